"""What is in a recording: figures, its pitch, how many people speak, and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from auto_voice.audio.io import AudioInfo, probe, read_audio
from auto_voice.audio.pitch import extract_pitch
from auto_voice.audio.quality import (
    MUSIC_SHARE,
    RecordingQuality,
    measure_quality,
    tonal_background,
)
from auto_voice.audio.reading import RecordingReader
from auto_voice.audio.resample import resample
from auto_voice.audio.vad import speech_segments, trim_silence
from auto_voice.types import FloatArray, Pitch, Voice, Waveform

if TYPE_CHECKING:
    from auto_voice.models.base import SpeakerEncoderStage

# Seconds of a longer recording that are looked at.
LONGEST_SECONDS = 600.0
# Frames that are decoded at once.
BLOCK_FRAMES = 1 << 16
# Lines and columns of text in a plot of the pitch.
PLOT_ROWS, PLOT_COLUMNS = 8, 72
# Cosine of GE2E embeddings of whole recordings: about 0.85 within a person, 0.55 between two.
OTHER_SPEAKER = 0.65
# Seconds: GE2E was trained on windows of this length; they overlap by half.
WINDOW_SECONDS = 1.6
STEP_SECONDS = 0.8
# Of a long recording: their clustering takes time that grows with their square.
MOST_WINDOWS = 150
# Mean GE2E cosine between clusters above which they are one person. On ten readers of LibriSpeech
# test-other, windows of one agree by 0.73 to 0.79 and those of two by 0.36 to 0.58; with anything
# from 0.58 to 0.62 all ten, all 45 pairs and ten triples were counted right.
SAME_SPEAKER = 0.6
# A cluster with a smaller share of the windows is an outlier and no person.
LEAST_SHARE = 0.12
# Fewer windows cannot be clustered.
LEAST_WINDOWS = 3


@dataclass(frozen=True, eq=False)
class Inspection:
    """Attributes:
    info: of the file.
    looked_at: seconds that the figures are of.
    quality: as a reference for a voice.
    f0_hz: low (5 %), median and high (95 %) pitch; None without any.
    speakers: estimate; None without enough speech or without a speaker encoder.
    similarity: stored voice to speaker similarity (cosine of the embeddings), the highest first.
    notes: on the recording.
    """

    info: AudioInfo
    looked_at: float
    quality: RecordingQuality
    pitch: Pitch
    f0_hz: tuple[float, float, float] | None
    speakers: int | None
    similarity: Mapping[str, float]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        low, median, high = self.f0_hz or (None, None, None)
        return {
            "file": self.info.name,
            "format": self.info.format,
            "subtype": self.info.subtype,
            "sample_rate": self.info.sample_rate,
            "channels": self.info.channels,
            "seconds": self.info.seconds,
            "looked_at_seconds": round(self.looked_at, 3),
            **{k: _rounded(v) for k, v in self.quality.as_dict().items() if k != "seconds"},
            "f0_hz": {"low": _rounded(low), "median": _rounded(median), "high": _rounded(high)},
            "speakers": self.speakers,
            "similarity": {name: round(value, 3) for name, value in self.similarity.items()},
            "advice": list(self.quality.advice()),
            "notes": list(self.notes),
        }


def inspect_file(
    path: str | Path,
    encoder: SpeakerEncoderStage | None = None,
    voices: Mapping[str, Voice] | None = None,
) -> Inspection:
    """What is in the recording ``path``.

    Args:
        encoder: without it, speakers are not counted and voices not compared.
        voices: by name.

    Raises:
        AudioError: it cannot be read.
    """
    info = probe(path)
    waveform, whole = _head(path, info)
    if whole:
        # What was decoded is what a conversion gives; headers may be some milliseconds off.
        info = replace(info, frames=len(waveform.samples))
    pitch = extract_pitch(waveform.samples, waveform.sample_rate)
    quality = measure_quality(waveform.samples, waveform.sample_rate)
    speakers, similarity = None, {}
    notes = (*waveform.notes, *_music(waveform))
    if encoder is not None and quality.speech_seconds >= 1.0:
        foreign = [n for n, v in (voices or {}).items() if v.encoder not in ("", encoder.name)]
        if foreign:
            names = ", ".join(foreign)
            notes += (f"not compared with voices that another encoder made: {names}",)
        speakers = count_speakers(waveform, encoder)
        similarity = _similarity(waveform, encoder, voices or {})
    return Inspection(
        info, waveform.seconds, quality, pitch, _range(pitch), speakers, similarity, notes
    )


@dataclass(frozen=True)
class ReferenceCheck:
    """What is to be said of recordings that a voice is made of.

    Attributes:
        notes: what is wrong with a recording and what to do, one sentence each.
        figures: sums of lengths, and of everything else the worst recording's.
    """

    notes: tuple[str, ...]
    figures: Mapping[str, float | None]


def check_references(
    references: Sequence[tuple[str, Waveform]], encoder: SpeakerEncoderStage
) -> ReferenceCheck:
    """Judge recordings of one person, pairs of a label and a recording.

    Noise, a telephone band, reverberation, clipping and more than one speaker are named, and so is
    a recording that sounds like another person than the others.
    """
    notes: list[str] = []
    qualities, counts = [], []
    for label, waveform in references:
        quality = measure_quality(waveform.samples, waveform.sample_rate)
        qualities.append(quality)
        # A note of the voice says already that speech is short, summed over the recordings.
        notes += [f"{label}: {text}." for text in quality.advice() if "s of speech" not in text]
        notes += [f"{label}: {text}." for text in _music(waveform)]
        speakers = count_speakers(waveform, encoder)
        if speakers is not None:
            counts.append(speakers)
        if speakers is not None and speakers > 1:
            notes.append(
                f"{label}: {speakers} people seem to speak; give a recording of the wanted "
                "person alone, or cut the others out."
            )
    notes += _other_speakers(references, encoder)
    snrs = [q.snr_db for q in qualities if q.snr_db is not None]
    decays = [q.decay_seconds for q in qualities if q.decay_seconds is not None]
    figures = {
        "seconds": sum(q.seconds for q in qualities),
        "speech_seconds": sum(q.speech_seconds for q in qualities),
        "snr_db": min(snrs) if snrs else None,
        "clipping_ratio": max(q.clipping_ratio for q in qualities),
        "bandwidth_hz": min(q.bandwidth_hz for q in qualities),
        "decay_seconds": max(decays) if decays else None,
        "speakers": float(max(counts)) if counts else None,
    }
    return ReferenceCheck(tuple(notes), figures)


def _music(waveform: Waveform) -> list[str]:
    """A sentence where something tonal sounds behind the speech."""
    spans = speech_segments(waveform.samples, waveform.sample_rate, padding_seconds=0.0)
    share = tonal_background(waveform.samples, waveform.sample_rate, spans)
    if share is None or share <= MUSIC_SHARE:
        return []
    return ["music or other voices sound behind the speech: give a recording of the voice alone"]


def _other_speakers(
    references: Sequence[tuple[str, Waveform]], encoder: SpeakerEncoderStage
) -> list[str]:
    """Sentences on recordings that sound like another person than the rest of them."""
    if len(references) < 2:
        return []
    embeddings = [_embedding(waveform, encoder) for _, waveform in references]
    notes = []
    for index, (label, _) in enumerate(references):
        others = [e for i, e in enumerate(embeddings) if i != index]
        # The most similar one counts: one other speaker among three must not make the rest suspect.
        similarity = max(encoder.similarity(embeddings[index], other) for other in others)
        if similarity < OTHER_SPEAKER:
            notes.append(
                f"{label}: sounds like another person than the other recordings (speaker "
                f"similarity {similarity:.2f}); leave it out if it is."
            )
    return notes


def _embedding(waveform: Waveform, encoder: SpeakerEncoderStage) -> FloatArray:
    """Of the speech in ``waveform``, without its pauses."""
    samples = resample(waveform.samples, waveform.sample_rate, encoder.sample_rate)
    speech = trim_silence(samples, encoder.sample_rate, max_pause_seconds=0.3)
    return encoder.embed_utterance(speech if len(speech) else samples)


def plot_pitch(pitch: Pitch, rows: int = PLOT_ROWS, columns: int = PLOT_COLUMNS) -> list[str]:
    """The melody as lines of text, time to the right, log frequency upwards."""
    spread = _range(pitch)
    if spread is None:
        return []
    low, _, high = spread
    bottom, top = math.log(low / 1.1), math.log(high * 1.1)
    grid = [[" "] * columns for _ in range(rows)]
    edges = np.linspace(0, len(pitch.voiced), columns + 1).astype(int)
    for column in range(columns):
        part = slice(edges[column], max(edges[column + 1], edges[column] + 1))
        voiced = pitch.voiced[part]
        if not voiced.any():
            continue
        height = (math.log(float(np.median(pitch.f0_hz[part][voiced]))) - bottom) / (top - bottom)
        grid[rows - 1 - min(rows - 1, max(0, int(height * rows)))][column] = "•"
    lines = []
    for index, row in enumerate(grid):
        centre_hz = math.exp(top - (index + 0.5) / rows * (top - bottom))
        lines.append(f"{centre_hz:5.0f} Hz │{''.join(row).rstrip()}")
    seconds = len(pitch.voiced) / pitch.frame_rate
    end = f"{seconds:.1f} s"
    lines.append("         └" + "─" * columns)
    lines.append("          0" + end.rjust(columns - 1))
    return lines


def _head(path: str | Path, info: AudioInfo) -> tuple[Waveform, bool]:
    """The recording, or its first ten minutes with a note; and whether that is all of it."""
    if info.seconds is not None and info.seconds <= LONGEST_SECONDS:
        return read_audio(path, allow_silence=True, allow_truncated=True), True
    blocks, count = [], 0
    with RecordingReader(path, allow_truncated=True) as recording:
        for block in recording.blocks(BLOCK_FRAMES, None, None):
            blocks.append(block)
            count += len(block)
            if count > LONGEST_SECONDS * info.sample_rate:
                break
        notes = recording.notes()
    samples = np.concatenate(blocks)[: round(LONGEST_SECONDS * info.sample_rate)]
    waveform = Waveform(samples, info.sample_rate, notes)
    whole = len(samples) == count
    if not whole:
        waveform = waveform.with_note(
            f"only the first {LONGEST_SECONDS / 60:.0f} min are looked at"
        )
    return waveform, whole


def _range(pitch: Pitch) -> tuple[float, float, float] | None:
    if not pitch.voiced.any():
        return None
    low, median, high = np.quantile(pitch.f0_hz[pitch.voiced], (0.05, 0.5, 0.95))
    return float(low), float(median), float(high)


def _similarity(
    waveform: Waveform, encoder: SpeakerEncoderStage, voices: Mapping[str, Voice]
) -> dict[str, float]:
    comparable = {n: v for n, v in voices.items() if v.encoder in ("", encoder.name)}
    if not comparable:
        return {}
    embedding = _embedding(waveform, encoder)
    found = {n: encoder.similarity(embedding, v.embedding) for n, v in comparable.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def count_speakers(waveform: Waveform, encoder: SpeakerEncoderStage) -> int | None:
    """People who speak for at least an eighth of the speech; None with under 3 s of it.

    Windows of speech are embedded and joined, the most similar clusters first, until none are alike
    enough (average linkage). Similar voices may count as one, a voice that is disguised as two.
    """
    windows = speech_windows(waveform, encoder.sample_rate)
    if len(windows) < LEAST_WINDOWS:
        return None
    embeddings = np.stack([encoder.embed_utterance(window) for window in windows])
    labels = clusters(embeddings, SAME_SPEAKER)
    _, sizes = np.unique(labels, return_counts=True)
    return max(1, int(np.sum(sizes >= max(2, LEAST_SHARE * len(labels)))))


def speech_windows(waveform: Waveform, sample_rate: int) -> list[FloatArray]:
    """Overlapping windows of speech at ``sample_rate``, evenly thinned to at most 150.

    A pause ends a window, so that it holds one turn where people take turns.
    """
    samples = resample(waveform.samples, waveform.sample_rate, sample_rate)
    size, step = round(WINDOW_SECONDS * sample_rate), round(STEP_SECONDS * sample_rate)
    spans = speech_segments(samples, sample_rate)
    starts = [
        at for low, high in spans for at in range(low, max(low, high - size) + 1, step)
        if high - low >= size / 2
    ]  # fmt: skip
    ends = {at: high for low, high in spans for at in range(low, max(low, high - size) + 1, step)}
    kept = starts[:: max(1, -(-len(starts) // MOST_WINDOWS))]
    return [samples[at : min(at + size, ends[at])] for at in kept]


def clusters(embeddings: FloatArray, least_similarity: float) -> NDArray[np.int64]:
    """``(n,)`` cluster of each of the unit vectors ``(n, dims)``, by average linkage."""
    count = len(embeddings)
    similarity = (embeddings @ embeddings.T).astype(np.float64)
    np.fill_diagonal(similarity, -np.inf)
    sizes = np.ones(count)
    labels = np.arange(count)
    while True:
        best = int(np.argmax(similarity))
        a, b = divmod(best, count)
        if similarity[a, b] < least_similarity:
            return labels
        # Average linkage: the mean over pairs is the weighted mean of the two clusters' means.
        merged = (sizes[a] * similarity[a] + sizes[b] * similarity[b]) / (sizes[a] + sizes[b])
        similarity[a], similarity[:, a] = merged, merged
        similarity[a, a] = -np.inf
        similarity[b], similarity[:, b] = -np.inf, -np.inf
        sizes[a] += sizes[b]
        labels[labels == b] = a


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
