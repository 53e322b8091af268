"""Speech level: networks see every recording at one level, results get the source's back."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from auto_voice.types import FloatArray

# Active speech level that the networks are trained at (RMS over speech frames).
SPEECH_DBFS = -26.0
ACTIVE_RANGE_DB = 30.0
FRAME_SECONDS = 0.02


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
