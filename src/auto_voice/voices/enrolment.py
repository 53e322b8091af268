"""From recordings to a voice worth keeping: judged, with advice on what to record instead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from auto_voice.audio.quality import RecordingQuality, measure_quality
from auto_voice.types import Voice, Waveform
from auto_voice.voices.speakers import count_speakers

if TYPE_CHECKING:
    from auto_voice.inference.voice_conversion_pipeline import VoiceConversionPipeline


def enrol(
    pipeline: VoiceConversionPipeline,
    references: Sequence[tuple[str, Waveform]],
    name: str,
    *,
    consent: str = "",
    keep_recording: bool = True,
    progress: Callable[[float], None] | None = None,
) -> Voice:
    """The voice of ``references``, pairs of a label and a recording, with figures and warnings.

    Args:
        consent: what the owner of the voice agreed to, in words of your own.
        keep_recording: store the speech in the voice, so that it can be encoded again when models
            change. Without it the voice is smaller, and new models need the recordings again.
        progress: called with the fraction of the fine-tuning that is done.

    Raises:
        AudioContentError: a recording holds less than a second of speech.
    """
    # What is to be said of a recording is said under its own label.
    bare = [replace(waveform, notes=()) for _, waveform in references]
    voice = pipeline.clone(bare, name=name, progress=progress)
    notes = [f"{label}: {text}." for label, waveform in references for text in waveform.notes]
    notes += voice.notes
    qualities = []
    counts = []
    for label, waveform in references:
        quality = measure_quality(waveform.samples, waveform.sample_rate)
        qualities.append(quality)
        # A voice note says already that speech is short, summed over the recordings.
        notes += [f"{label}: {text}." for text in quality.advice() if "s of speech" not in text]
        speakers = count_speakers(waveform, pipeline.speaker_encoder)
        counts.append(speakers)
        if speakers is not None and speakers > 1:
            notes.append(
                f"{label}: {speakers} people seem to speak; give a recording of the wanted "
                "person alone, or cut the others out."
            )
    notes += _strangers(pipeline, references)
    known = [count for count in counts if count is not None]
    return replace(
        voice,
        notes=tuple(dict.fromkeys(notes)),
        quality=_figures(qualities) | {"speakers": float(max(known)) if known else None},
        consent=consent,
        speech=voice.speech if keep_recording else None,
    )


def _figures(qualities: Sequence[RecordingQuality]) -> dict[str, float | None]:
    """Sums of lengths, and of everything else the worst recording."""
    snrs = [q.snr_db for q in qualities if q.snr_db is not None]
    decays = [q.decay_seconds for q in qualities if q.decay_seconds is not None]
    return {
        "seconds": sum(q.seconds for q in qualities),
        "speech_seconds": sum(q.speech_seconds for q in qualities),
        "snr_db": min(snrs) if snrs else None,
        "clipping_ratio": max(q.clipping_ratio for q in qualities),
        "bandwidth_hz": min(q.bandwidth_hz for q in qualities),
        "decay_seconds": max(decays) if decays else None,
    }


def _strangers(
    pipeline: VoiceConversionPipeline, references: Sequence[tuple[str, Waveform]]
) -> list[str]:
    """Recordings that sound like another person than the rest of them."""
    if len(references) < 2:
        return []
    encoder = pipeline.speaker_encoder
    embeddings = [pipeline.clone(waveform, adapt=False).embedding for _, waveform in references]
    notes = []
    for index, (label, _) in enumerate(references):
        others = [e for i, e in enumerate(embeddings) if i != index]
        # The likest counts: one stranger among three must not make the others look strange.
        likeness = max(encoder.similarity(embeddings[index], other) for other in others)
        if likeness < STRANGER:
            notes.append(
                f"{label}: sounds like another person than the other recordings (likeness "
                f"{likeness:.2f}); leave it out if it is."
            )
    return notes


# GE2E cosine between whole recordings: about 0.85 within a person, 0.55 between two.
STRANGER = 0.65
