"""Speech level: networks see every recording at one level, results get the source's back."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from auto_voice.audio.frames import filtered
from auto_voice.types import FloatArray

# Active speech level that the networks are trained at (RMS over speech frames).
SPEECH_DBFS = -26.0
ACTIVE_RANGE_DB = 30.0
FRAME_SECONDS = 0.02
# Hz. No voice speaks below the first, and every voice is whole above the second: what lies lower is
# rumble, offset, or what a vocoder makes of a pause.
RUMBLE_HZ, WHOLE_HZ = 40.0, 60.0
# dB by which the rumble is turned down, and the shape of the Kaiser window that gives it.
RUMBLE_DB = 50.0
_KAISER_BETA = 4.53
# Samples that are transformed at once.
_FFT_SAMPLES = 1 << 16


def speech_level(samples: FloatArray, sample_rate: int) -> float:
    """RMS in dBFS over the frames within 30 dB of the loudest; -inf for silence.

    The loudest frame is taken at the 99th percentile, so that a click does not count.
    """
    size = max(1, int(sample_rate * FRAME_SECONDS))
    whole = len(samples) // size * size
    framed = samples[:whole].reshape(-1, size) if whole else samples[None, :]
    power = np.mean(np.square(framed, dtype=np.float64), axis=1) if framed.size else np.zeros(1)
    return active_level(power)


def active_level(power: NDArray[np.float64]) -> float:
    """:func:`speech_level` of a recording whose ``(frames,)`` mean squares are given."""
    loudest = np.percentile(power, 99)
    active = power[power >= loudest * 10 ** (-ACTIVE_RANGE_DB / 10)]
    mean = float(active.mean()) if len(active) else 0.0
    return 10 * float(np.log10(mean)) if mean > 0 else -np.inf


def gain_to_speech_level(samples: FloatArray, sample_rate: int) -> float:
    """Factor that brings a recording to ``SPEECH_DBFS``; 1 for silence."""
    level = speech_level(samples, sample_rate)
    return float(10 ** ((SPEECH_DBFS - level) / 20)) if np.isfinite(level) else 1.0


def without_rumble(samples: FloatArray, sample_rate: int) -> FloatArray:
    """``(samples,)`` float32 without what lies below 40 Hz, in place to the sample.

    A symmetric filter: it delays nothing, and it looks 73 ms to either side, see
    :func:`rumble_reach`.
    """
    kernel = _rumble_kernel(sample_rate)
    reach = len(kernel) // 2
    x = np.asarray(samples, np.float32)
    size = 1 << (max(_FFT_SAMPLES, 8 * reach) + 2 * reach - 1).bit_length()
    out = filtered(x, np.fft.rfft(kernel, size), size, 2 * reach)
    return out[reach : reach + len(x)]


def rumble_reach(sample_rate: int) -> int:
    """Samples to either side that :func:`without_rumble` looks at."""
    # Kaiser's formula for the length that a transition of this width needs.
    width = 2 * np.pi * (WHOLE_HZ - RUMBLE_HZ) / sample_rate
    return int(np.ceil((RUMBLE_DB - 7.95) / (2.285 * width) / 2))


@lru_cache(maxsize=4)
def _rumble_kernel(sample_rate: int) -> NDArray[np.float64]:
    """``(2 * reach + 1,)``: one sample less a windowed low-pass, whose sum is one."""
    reach = rumble_reach(sample_rate)
    n = np.arange(-reach, reach + 1)
    cutoff = (RUMBLE_HZ + WHOLE_HZ) / sample_rate
    low = cutoff * np.sinc(cutoff * n) * np.kaiser(len(n), _KAISER_BETA)
    kernel = -low / low.sum()
    kernel[reach] += 1
    return np.asarray(kernel)
