"""Fundamental frequency: SwiftF0, and what is done with its track.

SwiftF0 (Nieradzik 2025) ships its ONNX network inside its own package, so no model of the registry
is involved.
"""

from __future__ import annotations

import threading
from functools import lru_cache, partial
from typing import Any

import numpy as np

from auto_voice.audio.frames import runs, sustained
from auto_voice.audio.resample import resample
from auto_voice.types import SPEECH_RATE, BoolArray, FloatArray, Pitch

# Frames a second of SwiftF0, which hops 256 samples at 16 kHz.
FRAME_RATE = 62.5
# From a low bass to a soprano's high C; the network reaches from 46.875 to 2093.75 Hz.
F_MIN_HZ, F_MAX_HZ = 50.0, 1100.0
# Confidence of the network, 0 to 1, from which on a frame counts as voiced.
VOICED_CONFIDENCE = 0.5
# The rules by which the detector's track is changed; a part of its name as a judge, so that
# figures under other rules are not compared.
PITCH_RULES = "no-lasting-hum"
# Mains hum of the two grids of the world, and how far the detector strays from a line.
MAINS_HZ = (50.0, 60.0)
MAINS_WIDTH_HZ = 1.25
# Mains hum stands still: hardly a voice stays so near one of these for 128 ms.
MAINS_FRAMES = 8
# Samples at 16 kHz between frames, and frames over which the strength of a line is taken: 272 ms,
# so that a voice 60 Hz away does not count.
_HOP_SAMPLES = 256
LINE_FRAMES = 17
# Frames beside a note that are looked at for the line, and those next to it that still hold it.
BESIDE_FRAMES, NEAR_FRAMES = 30, 8
# Hum is as strong beside a pause as in it, -6 dB at least; a note that is sung has ended there.
LASTING = 0.5
# A tone that fills a recording is a voice if it repeats itself in this band, where mains hum has
# died away.
RICH_HZ = (400.0, 2500.0)
RICH_CORRELATION = 0.5
# Log-F0 of speech without any voiced frame.
NEUTRAL_LOG_F0 = float(np.log(150.0))

_lock = threading.Lock()


def extract_pitch(samples: FloatArray, sample_rate: int) -> Pitch:
    """F0 of ``(samples,)`` at any rate, 62.5 frames a second; ``i`` is at ``i * 16`` ms.

    Mains hum is no voice: where the detector follows it, in the pauses, the frame is unvoiced. A
    note that is held on 50 or 60 Hz is one, as it begins and ends where hum goes on.
    """
    at_16k = resample(samples, sample_rate, SPEECH_RATE)
    if len(at_16k) == 0:
        return Pitch(np.zeros(0, np.float32), np.zeros(0, np.bool_), FRAME_RATE)
    found = _detector().detect(at_16k, SPEECH_RATE, fmin=F_MIN_HZ, fmax=F_MAX_HZ)
    voiced = np.asarray(found.confidence) >= VOICED_CONFIDENCE
    f0 = np.asarray(found.pitch_hz, dtype=np.float32)
    return Pitch(f0, voiced & ~_hum(f0, at_16k), FRAME_RATE)


def _hum(f0: FloatArray, at_16k: FloatArray) -> BoolArray:
    """``(frames,)``: where ``MAINS_FRAMES`` in a row, or more, lie on a mains line that lasts.

    Whether the detector trusts them does not count: noise shakes its trust in hum now and then.
    """
    out = np.zeros(len(f0), np.bool_)
    for line in MAINS_HZ:
        steady = runs(sustained(np.abs(f0 - line) <= MAINS_WIDTH_HZ, MAINS_FRAMES))
        if len(steady) == 0:
            continue
        strength = _line_strength(at_16k, line, len(f0))
        for start, stop in steady:
            before = strength[max(0, start - BESIDE_FRAMES) : max(0, start - NEAR_FRAMES)]
            after = strength[stop + NEAR_FRAMES : stop + BESIDE_FRAMES]
            beside = [float(np.median(side)) for side in (before, after) if len(side)]
            if beside:
                lasts = min(beside) > LASTING * float(np.median(strength[start:stop]))
            else:
                f0_hz = float(np.median(f0[start:stop]))
                part = at_16k[start * _HOP_SAMPLES : stop * _HOP_SAMPLES]
                lasts = not _rich(part, f0_hz)
            out[start:stop] = lasts
    return out


def _line_strength(at_16k: FloatArray, line_hz: float, frames: int) -> FloatArray:
    """``(frames,)`` amplitude at one frequency."""
    held = at_16k[: frames * _HOP_SAMPLES]
    held = np.pad(held, (0, frames * _HOP_SAMPLES - len(held)))
    turned = held * np.exp(-2j * np.pi * line_hz / SPEECH_RATE * np.arange(len(held)))
    window = np.hanning(LINE_FRAMES + 2)[1:-1]
    sums, weight = turned.reshape(frames, -1).mean(axis=1), np.ones(frames)
    reach = LINE_FRAMES // 2
    smooth, weight = (np.convolve(x, window)[reach : reach + frames] for x in (sums, weight))
    return np.asarray(2 * np.abs(smooth) / weight.real, np.float32)


def _rich(at_16k: FloatArray, f0_hz: float) -> bool:
    """Whether one period is like the next above the harmonics that hum has."""
    spectrum = np.fft.rfft(at_16k)
    hz = np.fft.rfftfreq(len(at_16k), 1 / SPEECH_RATE)
    spectrum[(hz < RICH_HZ[0]) | (hz > RICH_HZ[1])] = 0
    band = np.fft.irfft(spectrum, len(at_16k))
    power = float(np.square(band).sum())
    lag = round(SPEECH_RATE / f0_hz)
    best = max(float(band[n:] @ band[:-n]) for n in range(lag - 2, lag + 3))
    return power > 0 and best > RICH_CORRELATION * power


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
    from onnxruntime import RunOptions
    from swift_f0 import SwiftF0

    detector = SwiftF0(threads=1, spin=False)
    options = RunOptions()
    # Its arena would keep 90 MB of what half a minute needed, beside all networks that follow.
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    detector.session.run = partial(detector.session.run, run_options=options)
    return detector
