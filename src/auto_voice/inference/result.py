"""What a conversion gives back: audio, and an honest account of how it was made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from auto_voice.errors import MockAudioError
from auto_voice.types import FloatArray, Voice, Waveform

REALTIME_STAGES = ("pitch", "content", "convert", "vocode")
"""Stages that run over the source each time; reading, loading and cloning are not among them."""


@dataclass(frozen=True, eq=False)
class ConversionResult:
    """A converted recording; ``numpy.asarray(result)`` gives its samples.

    Attributes:
        audio: at the vocoder's rate, exactly as long as the source
            (``round(source_samples * sample_rate / source_rate)`` samples).
        models: stage (``content``, ``speaker``, ``converter``, ``vocoder``) to the exact
            ``name@version`` that ran, with the reason where it stands in for another.
        voice: the target that was conditioned on.
        semitones: how far the pitch was moved in all.
        notes: everything that was altered, replaced or doubtful, one sentence each.
        timings: seconds by step.
        mock: true if any stage was a mock, so that this is no speech.
        chunks: pieces that the source was cut into.
    """

    audio: Waveform
    models: Mapping[str, str]
    voice: Voice
    semitones: float = 0.0
    notes: tuple[str, ...] = ()
    timings: Mapping[str, float] | None = None
    mock: bool = False
    chunks: int = 1

    @property
    def samples(self) -> FloatArray:
        return self.audio.samples

    @property
    def sample_rate(self) -> int:
        return self.audio.sample_rate

    @property
    def seconds(self) -> float:
        return self.audio.seconds

    @property
    def seconds_per_second(self) -> float:
        """Time spent on the source per second of it, without loading models and cloning."""
        spent = sum((self.timings or {}).get(stage, 0.0) for stage in REALTIME_STAGES)
        return spent / self.seconds

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        samples = self.audio.samples
        if dtype is not None and np.dtype(dtype) != samples.dtype:
            return samples.astype(dtype)
        return samples.copy() if copy else samples

    def save(
        self,
        path: str | Path,
        *,
        format: str | None = None,
        subtype: str | None = None,
        overwrite: bool = True,
        allow_mock: bool = False,
    ) -> Path:
        """Write the audio; the suffix of ``path`` chooses the format unless ``format`` does.

        Raises:
            MockAudioError: mock models made the audio and ``allow_mock`` is false.
            AudioOutputError: ``path`` cannot be written, or exists and ``overwrite`` is false.
        """
        if self.mock and not allow_mock:
            raise MockAudioError(
                f"{path} was not written because mock models made this audio, which is noise and "
                "not speech; use real models, or ask for mock audio (--mock, allow_mock=True)."
            )
        from auto_voice.audio.io import write_audio

        return write_audio(path, self.audio, format=format, subtype=subtype, overwrite=overwrite)

    def summary(self) -> dict[str, Any]:
        """The account without the samples, ready for JSON."""
        return {
            "seconds": round(self.seconds, 4),
            "samples": len(self.audio.samples),
            "sample_rate": self.sample_rate,
            "voice": self.voice.name,
            "models": dict(self.models),
            "semitones": round(self.semitones, 3),
            "mock": self.mock,
            "chunks": self.chunks,
            "notes": list(self.notes),
            "timings": {step: round(spent, 4) for step, spent in (self.timings or {}).items()},
            "seconds_per_second": round(self.seconds_per_second, 4),
        }
