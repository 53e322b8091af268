"""Voices between voices."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from auto_voice.audio.frames import stretches
from auto_voice.errors import VoiceError
from auto_voice.types import FloatArray, Voice

# Frames of a blend: what a converter looks at most, shared among the voices by their weights.
BLEND_FRAMES = 1600
# Stretches of a reference that stand for it, where they are of so many frames at least.
STRETCHES, SHORTEST_STRETCH = 8, 20


def fine_tuned_alike(
    parts: Sequence[tuple[Voice, float]], fine_tuned: Callable[[Voice], Voice]
) -> list[tuple[Voice, float]]:
    """``parts`` for :func:`blend_voices`, all fine-tuned with one converter where that can be.

    What different converters learnt cannot be added, so where there are several, voices with a
    recording are fine-tuned again.

    Args:
        fine_tuned: gives a voice that one converter is fine-tuned to.
    """
    if len({voice.fine_tuned_converter for voice, _ in parts}) < 2:
        return list(parts)
    return [(v if v.speech is None else fine_tuned(v), weight) for v, weight in parts]


def blend_voices(parts: Sequence[tuple[Voice, float]], name: str = "") -> Voice:
    """The voice between ``parts``, pairs of a voice and its weight.

    Embeddings are averaged on the sphere, pitch statistics on the log scale, and what a converter
    learnt of the voices weight by weight; of the reference frames each voice gives a share that is
    proportional to its weight, so that whatever a converter averages over them is averaged
    likewise. A weight of 1 gives that voice unchanged.

    Raises:
        VoiceError: no positive weight, or voices of different encoders.
    """
    weights = [weight for _, weight in parts]
    if not parts or any(not w >= 0 for w in weights) or sum(weights) <= 0:
        raise VoiceError("a blend needs weights of 0 or more, at least one above 0, such as A=0.7.")
    parts = [(voice, weight / sum(weights)) for voice, weight in parts if weight > 0]
    voices = [voice for voice, _ in parts]
    if len(voices) == 1:
        return voices[0]
    for what in ("encoder", "content_space"):
        found = sorted({getattr(voice, what) for voice in voices} - {""})
        if len(found) > 1:
            raise VoiceError(
                f"voices of different encoders cannot be blended ({', '.join(found)}); add them "
                "again from their recordings."
            )
    embedding = np.sum([weight * voice.embedding for voice, weight in parts], axis=0)
    norm = float(np.linalg.norm(embedding))
    if norm < 1e-3:
        raise VoiceError("these voices cancel each other out; choose other weights.")
    converter = next((v.fine_tuned_converter for v in voices if v.fine_tuned_converter), "")
    return Voice(
        embedding=(embedding / norm).astype(np.float32),
        log_f0_mean=_mean([(voice.log_f0_mean, weight) for voice, weight in parts]),
        log_f0_std=_mean([(voice.log_f0_std, weight) for voice, weight in parts]),
        frames=_frames(parts),
        name=name or " + ".join(f"{100 * w:.0f} % {v.name or '?'}" for v, w in parts),
        speech_seconds=sum(voice.speech_seconds for voice in voices),
        encoder=voices[0].encoder,
        content_space=next((v.content_space for v in voices if v.content_space), ""),
        consent="; ".join(f"{v.name or '?'}: {v.consent}" for v in voices if v.consent),
        fine_tuning=_fine_tuning(parts, converter),
        fine_tuned_converter=converter,
        notes=(
            "A blend of " + ", ".join(f"{v.name or '?'} ({w:.2f})" for v, w in parts) + ".",
            *_left_out(voices, converter),
        ),
    )


def _mean(pairs: list[tuple[float | None, float]]) -> float | None:
    known = [(value, weight) for value, weight in pairs if value is not None]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if known else None


def _fine_tuning(
    parts: Sequence[tuple[Voice, float]], converter: str
) -> dict[str, NDArray[np.float16]]:
    """The weighted sum; voices that another converter was fine-tuned to add nothing."""
    known = [
        (v, weight) for v, weight in parts if converter and v.fine_tuned_converter == converter
    ]
    names = {name for voice, _ in known for name in voice.fine_tuning}
    return {
        name: np.sum(
            [np.float32(w) * voice.fine_tuning[name] for voice, w in known], axis=0
        ).astype(np.float16)
        for name in sorted(names)
    }


def _left_out(voices: Sequence[Voice], converter: str) -> list[str]:
    """Sentences on voices that another converter was fine-tuned to."""
    others = [v for v in voices if v.fine_tuning and v.fine_tuned_converter != converter]
    return [
        f"{v.name or '?'} was fine-tuned with {v.fine_tuned_converter} and not with {converter}, "
        "so the blend is less like it; add it again from its recordings."
        for v in others
    ]


def _frames(parts: Sequence[tuple[Voice, float]]) -> dict[str, FloatArray]:
    with_frames = [(voice, weight) for voice, weight in parts if voice.frames]
    if not with_frames:
        return {}
    names = set.intersection(*(set(voice.frames) for voice, _ in with_frames))
    total = sum(weight for _, weight in with_frames)
    out: dict[str, list[FloatArray]] = {name: [] for name in sorted(names)}
    # As many frames as the shortest voice can give its share of.
    most = min(
        BLEND_FRAMES,
        *(int(_length(voice) * total / weight) for voice, weight in with_frames),
    )
    for voice, weight in with_frames:
        length = _length(voice)
        wanted = max(1, round(most * weight / total))
        chosen = stretches(length, min(length, wanted), max(SHORTEST_STRETCH, wanted // STRETCHES))
        for name, rows in out.items():
            rows.append(voice.frames[name][chosen])
    return {name: np.ascontiguousarray(np.concatenate(rows)) for name, rows in out.items()}


def _length(voice: Voice) -> int:
    return min(len(rows) for rows in voice.frames.values())
