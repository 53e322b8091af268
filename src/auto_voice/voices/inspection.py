"""What is in a recording: figures, a drawing of its pitch, who speaks, and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from auto_voice.audio.io import AudioInfo, probe, read_audio
from auto_voice.audio.pitch import extract_pitch
from auto_voice.audio.quality import RecordingQuality, measure_quality
from auto_voice.types import Pitch, Voice, Waveform

if TYPE_CHECKING:
    from auto_voice.models.base import SpeakerEncoderStage

# Of a longer recording the first ten minutes are looked at.
LONGEST_SECONDS = 600.0
PLOT_ROWS, PLOT_COLUMNS = 8, 72


@dataclass(frozen=True, eq=False)
class Inspection:
    """Attributes:
    info: of the file.
    looked_at: seconds that the figures are of.
    quality: as a reference for a voice.
    f0_hz: low (5 %), median and high (95 %) pitch; None without any.
    speakers: estimate; None without enough speech or without a speaker encoder.
    likeness: stored voice to cosine of speaker embeddings, the likest first.
    notes: on the recording.
    """

    info: AudioInfo
    looked_at: float
    quality: RecordingQuality
    pitch: Pitch
    f0_hz: tuple[float, float, float] | None
    speakers: int | None
    likeness: Mapping[str, float]
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
            "likeness": {name: round(value, 3) for name, value in self.likeness.items()},
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
    from auto_voice.voices.speakers import count_speakers

    info = probe(path)
    waveform = _head(path, info)
    pitch = extract_pitch(waveform.samples, waveform.sample_rate)
    quality = measure_quality(waveform.samples, waveform.sample_rate)
    speakers, likeness = None, {}
    notes = waveform.notes
    if encoder is not None and quality.speech_seconds >= 1.0:
        foreign = [n for n, v in (voices or {}).items() if v.encoder not in ("", encoder.name)]
        if foreign:
            names = ", ".join(foreign)
            notes += (f"not compared with voices that another encoder made: {names}",)
        speakers = count_speakers(waveform, encoder)
        likeness = _likeness(waveform, encoder, voices or {})
    return Inspection(
        info, waveform.seconds, quality, pitch, _range(pitch), speakers, likeness, notes
    )


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


def _head(path: str | Path, info: AudioInfo) -> Waveform:
    """The recording, or its first ten minutes with a note."""
    if info.seconds is not None and info.seconds <= LONGEST_SECONDS:
        return read_audio(path, allow_silence=True, allow_truncated=True)
    from auto_voice.audio.io import iter_blocks

    blocks, count = [], 0
    for block in iter_blocks(path, allow_truncated=True):
        blocks.append(block)
        count += len(block)
        if count >= LONGEST_SECONDS * info.sample_rate:
            break
    samples = np.concatenate(blocks)[: round(LONGEST_SECONDS * info.sample_rate)]
    waveform = Waveform(samples, info.sample_rate)
    if len(samples) < count:
        waveform = waveform.with_note(
            f"only the first {LONGEST_SECONDS / 60:.0f} min are looked at"
        )
    return waveform


def _range(pitch: Pitch) -> tuple[float, float, float] | None:
    if not pitch.voiced.any():
        return None
    low, median, high = np.quantile(pitch.f0_hz[pitch.voiced], (0.05, 0.5, 0.95))
    return float(low), float(median), float(high)


def _likeness(
    waveform: Waveform, encoder: SpeakerEncoderStage, voices: Mapping[str, Voice]
) -> dict[str, float]:
    from auto_voice.audio.resample import resample
    from auto_voice.audio.vad import trim_silence

    comparable = {n: v for n, v in voices.items() if v.encoder in ("", encoder.name)}
    if not comparable:
        return {}
    samples = resample(waveform.samples, waveform.sample_rate, encoder.sample_rate)
    speech = trim_silence(samples, encoder.sample_rate, max_pause_seconds=0.3)
    embedding = encoder.embed_utterance(speech)
    found = {n: encoder.similarity(embedding, v.embedding) for n, v in comparable.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
