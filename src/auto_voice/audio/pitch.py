"""Fundamental frequency: SwiftF0, and what is done with its track.

SwiftF0 (Nieradzik 2025) ships its ONNX network inside its own package, so no model of the registry
is involved.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any

import numpy as np

from auto_voice.audio.frames import sustained
from auto_voice.audio.resample import resample
from auto_voice.types import BoolArray, FloatArray, Pitch

SAMPLE_RATE = 16000
FRAME_RATE = 62.5
F_MIN_HZ, F_MAX_HZ = 50.0, 1100.0
VOICED_CONFIDENCE = 0.5
# What is done to the detector's track; a part of its name as a judge, so change it with that.
PITCH_RULES = "no-hum"
MAINS_HZ = (50.0, 60.0)
MAINS_WIDTH_HZ = 1.25
# Mains hum stands still: hardly a voice stays so near one of these for 128 ms.
MAINS_FRAMES = 8
# Log-F0 of speech without any voiced frame.
NEUTRAL_LOG_F0 = float(np.log(150.0))

_lock = threading.Lock()


def extract_pitch(samples: FloatArray, sample_rate: int) -> Pitch:
    """F0 of ``(samples,)`` at any rate, 62.5 frames a second; ``i`` is at ``i * 16`` ms.

    Mains hum is no voice: where the detector follows it, in the pauses, the frame is unvoiced. So
    is a voice that stands still on 50 or 60 Hz, below the range of most.
    """
    at_16k = resample(samples, sample_rate, SAMPLE_RATE)
    if len(at_16k) == 0:
        return Pitch(np.zeros(0, np.float32), np.zeros(0, np.bool_), FRAME_RATE)
    found = _detector().detect(at_16k, SAMPLE_RATE, fmin=F_MIN_HZ, fmax=F_MAX_HZ)
    voiced = np.asarray(found.confidence) >= VOICED_CONFIDENCE
    f0 = np.asarray(found.pitch_hz, dtype=np.float32)
    return Pitch(f0, voiced & ~_hum(f0), FRAME_RATE)


def _hum(f0: FloatArray) -> BoolArray:
    """``(frames,)``: where ``MAINS_FRAMES`` in a row, or more, lie on a mains line.

    Whether the detector trusts them does not count: noise shakes its trust in hum now and then.
    """
    out = np.zeros(len(f0), np.bool_)
    for line in MAINS_HZ:
        out |= sustained(np.abs(f0 - line) <= MAINS_WIDTH_HZ, MAINS_FRAMES)
    return out


def align_pitch(pitch: Pitch, frame_rate: float, frames: int) -> tuple[FloatArray, BoolArray]:
    """The track at ``frames`` frames centred at ``(i + 0.5) / frame_rate`` seconds.

    Returns:
        ``log_f0`` ``(frames,)`` float32, ln(Hz), interpolated over unvoiced stretches and held at
        the ends; ``voiced`` ``(frames,)`` bool, of the nearest pitch frame.
    """
    if not pitch.voiced.any():
        return np.full(frames, NEUTRAL_LOG_F0, np.float32), np.zeros(frames, np.bool_)
    position = (np.arange(frames) + 0.5) / frame_rate * pitch.frame_rate
    known = np.flatnonzero(pitch.voiced)
    log_f0 = np.interp(position, known, np.log(pitch.f0_hz[known])).astype(np.float32)
    nearest = np.minimum(np.round(position).astype(np.int64), len(pitch.voiced) - 1)
    return log_f0, pitch.voiced[nearest]


def transpose(pitch: Pitch, semitones: float) -> Pitch:
    """The same melody, ``semitones`` higher."""
    factor = np.float32(2.0 ** (semitones / 12.0))
    return Pitch(pitch.f0_hz * factor, pitch.voiced, pitch.frame_rate)


def log_f0_statistics(pitch: Pitch) -> tuple[float, float] | None:
    """Mean and standard deviation of ln(F0 in Hz) over voiced frames, None without any.

    Frames more than 0.6 octaves from the median are left out: in speech they are mostly octave
    errors of the tracker and creak.
    """
    if not pitch.voiced.any():
        return None
    log_f0 = np.log(pitch.f0_hz[pitch.voiced])
    near = np.abs(log_f0 - np.median(log_f0)) < 0.6 * np.log(2.0)
    kept = log_f0[near]
    return float(kept.mean()), float(kept.std())


def _detector() -> Any:
    with _lock:
        return _build_detector()


@lru_cache(maxsize=1)
def _build_detector() -> Any:
    from swift_f0 import SwiftF0

    return SwiftF0(threads=1, spin=False)
