"""Whatever a user hands over, as a checked waveform."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TypeAlias, Union

import numpy as np
from numpy.typing import ArrayLike, NDArray

from auto_voice.audio.io import read_audio
from auto_voice.errors import AudioContentError, ConfigError
from auto_voice.types import FloatArray, Waveform

# A file, a waveform, or ``(samples,)`` numbers in [-1, 1] (or integers) at a rate given apart.
AudioInput: TypeAlias = Union[str, "PathLike[str]", Waveform, ArrayLike]

SHORTEST_SECONDS = 0.1
# -80 dBFS: below it nothing can be told apart from the noise of 16-bit rounding.
SILENT_PEAK = 1e-4


def as_waveform(
    audio: AudioInput, sample_rate: int, what: str, *, allow_truncated: bool = False
) -> Waveform:
    """One channel of finite, audible samples.

    Args:
        sample_rate: Hz, of a bare array; files and waveforms carry their own.
        what: the recording's part in the sentence of an error, e.g. ``the source``.
        allow_truncated: take what is there of a truncated file, with a note.

    Raises:
        AudioError: a file that cannot be read; samples that are empty, too short, silent or not
            finite.
        ConfigError: an array of another shape, a rate that is not positive.
    """
    if isinstance(audio, (str, PathLike)):
        waveform = read_audio(Path(audio), allow_truncated=allow_truncated)
        what = f"{what} {audio}"
    elif isinstance(audio, Waveform):
        waveform = audio
    else:
        waveform = Waveform(_samples(audio, what), sample_rate)
    _check(waveform, what)
    return waveform


def _samples(audio: ArrayLike, what: str) -> FloatArray:
    values: NDArray[np.generic] = np.asarray(audio)
    if values.ndim == 2 and 1 in values.shape:
        values = values.reshape(-1)
    if values.ndim != 1 or values.dtype.kind not in "fiu":
        raise ConfigError(
            f"{what} must be one channel of numbers (samples,), not {values.dtype} of shape "
            f"{values.shape}; average the channels first, or pass a file path."
        )
    if values.dtype.kind == "f":
        return values.astype(np.float32)
    limits = np.iinfo(values.dtype)  # type: ignore[type-var]
    middle = (int(limits.max) + int(limits.min) + 1) / 2
    return ((values.astype(np.float64) - middle) / (limits.max - middle)).astype(np.float32)


def _check(waveform: Waveform, what: str) -> None:
    samples, rate = waveform.samples, waveform.sample_rate
    if rate <= 0:
        raise ConfigError(f"the sample rate of {what} must be positive, not {rate} Hz.")
    if len(samples) < SHORTEST_SECONDS * rate:
        raise AudioContentError(
            f"{what} holds {len(samples) / rate:.3f} s of audio; at least {SHORTEST_SECONDS} s "
            "are needed."
        )
    if not np.isfinite(samples).all():
        raise AudioContentError(
            f"{what} holds NaN or infinite samples; export it again from the program that made it."
        )
    if np.max(np.abs(samples)) < SILENT_PEAK:
        raise AudioContentError(f"{what} is silent; check that the right channel was recorded.")
