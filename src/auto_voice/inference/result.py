"""What a conversion gives back: audio, and an honest account of how it was made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from auto_voice.errors import MockAudioError
from auto_voice.inference.controls import Controls
from auto_voice.types import FloatArray, Voice, Waveform

# Stages that run over the source each time; reading, loading and cloning are not among them.
REALTIME_STAGES = ("pitch", "content", "convert", "vocode", "breath", "level")


@dataclass(frozen=True, eq=False, kw_only=True)
class Account:
    """How a conversion was made.

    Attributes:
        models: stage (``content``, ``speaker``, ``converter``, ``vocoder``) to the exact
            ``name@version`` that ran, with the reason where it stands in for another.
        voice: the target that was conditioned on.
        semitones: how far the pitch was moved in all.
        notes: everything that was altered, replaced or doubtful, one sentence each.
        timings: seconds by step.
        mock: true if any stage was a mock, so that this is no speech.
        chunks: pieces that the source was cut into.
        controls: what was asked for beyond the defaults.
    """

    models: Mapping[str, str]
    voice: Voice
    semitones: float = 0.0
    notes: tuple[str, ...] = ()
    timings: Mapping[str, float] | None = None
    mock: bool = False
    chunks: int = 1
    controls: Controls = field(default_factory=Controls)

    @property
    def length(self) -> int:
        """Samples of the result."""
        raise NotImplementedError

    @property
    def sample_rate(self) -> int:
        raise NotImplementedError

    @property
    def seconds(self) -> float:
        return self.length / self.sample_rate

    @property
    def seconds_per_second(self) -> float:
        """Time spent on the source per second of it, without loading models and cloning."""
        spent = sum((self.timings or {}).get(stage, 0.0) for stage in REALTIME_STAGES)
        return spent / self.seconds

    def summary(self) -> dict[str, Any]:
        """The account without the samples, ready for JSON."""
        return {
            "seconds": round(self.seconds, 4),
            "samples": self.length,
            "sample_rate": self.sample_rate,
            "voice": self.voice.name,
            "models": dict(self.models),
            "semitones": round(self.semitones, 3),
            "controls": self.controls.account(),
            "mock": self.mock,
            "chunks": self.chunks,
            "notes": list(self.notes),
            "timings": {step: round(spent, 4) for step, spent in (self.timings or {}).items()},
            "seconds_per_second": round(self.seconds_per_second, 4),
        }


@dataclass(frozen=True, eq=False, kw_only=True)
class FileResult(Account):
    """The account of a conversion that went from file to file.

    Attributes:
        output: what was written.
        length: samples before the output file's own rate, at ``sample_rate``.
        resumed: whether it went on from where an earlier run had stopped.
    """

    output: Path
    length: int = 0
    sample_rate: int = 0
    resumed: bool = False


@dataclass(frozen=True, eq=False, kw_only=True)
class ConversionResult(Account):
    """A converted recording; ``numpy.asarray(result)`` gives its samples.

    Attributes:
        audio: at the vocoder's rate, exactly as long as the source
            (``round(source_samples * sample_rate / source_rate)`` samples) unless it was trimmed.
    """

    audio: Waveform

    @property
    def samples(self) -> FloatArray:
        return self.audio.samples

    @property
    def length(self) -> int:
        return len(self.audio.samples)

    @property
    def sample_rate(self) -> int:
        return self.audio.sample_rate

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
        sample_rate: int | None = None,
        overwrite: bool = True,
        allow_mock: bool = False,
    ) -> Path:
        """Write the audio; the suffix of ``path`` chooses the format unless ``format`` does.

        Args:
            sample_rate: Hz of the file; None keeps the result's where the format can carry it.

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

        return write_audio(
            path,
            self.audio,
            format=format,
            subtype=subtype,
            sample_rate=sample_rate,
            overwrite=overwrite,
        )
