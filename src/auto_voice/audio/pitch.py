"""Fundamental frequency: SwiftF0, and what is done with its track.

SwiftF0 (Nieradzik 2025) ships its ONNX network inside its own package, so no model of the registry
is involved.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
# Frames that the detector looks to either side.
DETECTOR_FRAMES = 16
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
    f0, confident = _detected(at_16k)
    return Pitch(f0, confident & ~_hum(f0, at_16k), FRAME_RATE)


def _detected(at_16k: FloatArray) -> tuple[FloatArray, BoolArray]:
    """``(frames,)`` F0 in Hz and whether the detector trusts it."""
    found = _detector().detect(at_16k, SPEECH_RATE, fmin=F_MIN_HZ, fmax=F_MAX_HZ)
    f0 = np.asarray(found.pitch_hz, dtype=np.float32)
    return f0, np.asarray(found.confidence) >= VOICED_CONFIDENCE


class PitchStream:
    """:func:`extract_pitch` of a stream, whose detector is not given the past anew."""

    def __init__(self) -> None:
        self._first = 0
        self._f0, self._confident = np.zeros(0, np.float32), np.zeros(0, np.bool_)

    def extract(self, at_16k: FloatArray, first: int, stop: int) -> Pitch:
        """The track from frame ``first`` on; of frames below that nothing will be asked again.

        Args:
            at_16k: the stream from that frame on, as far as it is known.
            stop: the frame that the next call will be given more sound of.
        """
        known = self._first + len(self._f0)
        low = max(first, known - DETECTOR_FRAMES)
        f0, confident = _detected(at_16k[(low - first) * _HOP_SAMPLES :])
        kept = slice(max(0, first - self._first), None)
        self._first = max(first, self._first)
        f0, confident = (
            np.concatenate([before[kept], now[known - low :]])
            for before, now in ((self._f0, f0), (self._confident, confident))
        )
        final = slice(max(0, stop - self._first))
        self._f0, self._confident = f0[final], confident[final]
        return Pitch(f0, confident & ~_hum(f0, at_16k), FRAME_RATE)


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

    # The package builds its session itself and takes these two options alone. One thread: the
    # network is so small that a second one costs more than it brings. What every session has
    # besides, telemetry off, stands in auto_voice/__init__.py.
    detector = SwiftF0(threads=1, spin=False)
    options = RunOptions()
    # Its arena would keep 90 MB of what half a minute needed, beside all networks that follow.
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    detector.session.run = partial(detector.session.run, run_options=options)
    return detector


# Frames of 16 ms without pitch that may lie inside one stretch of errors.
GAP_FRAMES = 2
# Length of the stretch around each frame whose median says in which octave the voice is.
LOCAL_SECONDS = 0.5
# Natural logarithm of the ratio.
OCTAVE = float(np.log(2.0))
# Octaves from a whole octave within which a frame counts as an error: against the whole recording,
# whose melody moves, and against the half second around it: two semitones.
WIDE_SLACK, LOCAL_SLACK = 0.45, 0.17
# Periods of the lower of two pitches that are compared.
PERIODS = 4
# Share of a period by which the best lag may lie beside it.
TOLERANCE = 0.06
# Hz that are compared: below lie hum and offset, above a sample is too long a step of the lag.
BAND_HZ = (70.0, 1500.0)
# Difference of the correlations at two periods from which on one counts as better.
CLEARLY = 0.1
# Power of a sample below which there is only silence.
SILENCE = 1e-12
# Frames whose median decides for the one in their middle.
VOTERS = 5


def corrected_by_sound(
    pitch: Pitch, read: Callable[[int, int], FloatArray], sample_rate: int
) -> Pitch:
    """The track with errors of the detector corrected and creak left as it was spoken.

    Each frame that :func:`corrected` would move is moved unless the sound itself repeats clearly
    better at the pitch that was found. Of 330 frames that lay too low in 160 recordings of many
    corpora 92 % did, and 1 % of 1 898 frames of plain voice tried at half their pitch. A sound that
    repeats at one period does so at two of them, so that frames an octave too high are nearly
    always moved.

    Args:
        read: gives samples ``[start, stop)`` of the sound, with no start below 0; less where it has
            no more.
        sample_rate: of these, Hz.
    """
    target = corrected(pitch)
    off = np.flatnonzero(pitch.voiced & (target.f0_hz != pitch.f0_hz))
    upwards = target.f0_hz[off] > pitch.f0_hz[off]
    f0 = pitch.f0_hz.copy()
    ends = (np.diff(off) > GAP_FRAMES) | (np.diff(upwards.astype(np.int8)) != 0)
    for stretch in np.split(off, np.flatnonzero(ends) + 1):
        votes = np.array([
            _preference(
                float(pitch.f0_hz[frame]), float(target.f0_hz[frame]),
                frame / pitch.frame_rate, read, sample_rate,
            )
            for frame in stretch
        ])  # fmt: skip
        reach = VOTERS // 2
        medians = [np.median(votes[max(0, i - reach) : i + reach + 1]) for i in range(len(votes))]
        wrong = stretch[np.array(medians, np.float64) <= CLEARLY]
        f0[wrong] = target.f0_hz[wrong]
    return Pitch(f0, pitch.voiced, pitch.frame_rate)


def corrected(pitch: Pitch) -> Pitch:
    """The track with frames that lie an octave from the voice brought to its octave.

    A frame is moved where it lies an octave, give or take two semitones, from the median of the
    half second around it, itself pulled towards the median of the whole, and where the track leapt
    to get there: the detector errs for a few frames, a voice creaks for some or for a whole word,
    but one that rises an octave glides.
    """
    known = np.flatnonzero(pitch.voiced)
    if len(known) == 0:
        return pitch
    found = np.log(pitch.f0_hz[known].astype(np.float64))
    log_f0 = _in_octave_of(found, np.full(len(found), _centre(found)), slack=WIDE_SLACK)
    reach = round(LOCAL_SECONDS / 2 * pitch.frame_rate)
    log_f0 = _in_octave_of(log_f0, _running_median(log_f0, known, reach), slack=LOCAL_SLACK)
    f0 = pitch.f0_hz.copy()
    f0[known] = np.exp(_only_leaps(found, log_f0, known))
    return Pitch(f0, pitch.voiced, pitch.frame_rate)


def without_octave_errors(pitch: Pitch) -> Pitch:
    """The track with frames that :func:`corrected` would move counted as unvoiced."""
    wrong = pitch.voiced & (corrected(pitch).f0_hz != pitch.f0_hz)
    return Pitch(pitch.f0_hz, pitch.voiced & ~wrong, pitch.frame_rate)


def _preference(
    found: float, other: float, seconds: float, read: Callable[[int, int], FloatArray], rate: int
) -> float:
    """How much better the sound at ``seconds`` repeats at ``found`` than at ``other``, both Hz."""
    size = 2 * round(PERIODS / 2 * rate / min(found, other))
    start = max(0, round(seconds * rate) - size // 2)
    sound = read(start, start + size)
    if len(sound) < size:
        sound = read(max(0, start - (size - len(sound))), start + size)
    band = _in_band(sound.astype(np.float64), rate)
    return _repetition(band, rate / found) - _repetition(band, rate / other)


def _in_band(sound: NDArray[np.float64], rate: int) -> NDArray[np.float64]:
    """``sound`` between ``BAND_HZ``."""
    if not len(sound):
        return sound
    frequencies = np.fft.rfftfreq(len(sound), 1 / rate)
    outside = (frequencies < BAND_HZ[0]) | (frequencies > BAND_HZ[1])
    return np.fft.irfft(np.where(outside, 0, np.fft.rfft(sound)), len(sound))


def _repetition(sound: NDArray[np.float64], period: float) -> float:
    """Correlation of ``sound`` with itself a period later, at the best lag near it; 0 if short."""
    lags = range(int(period * (1 - TOLERANCE)), int(period * (1 + TOLERANCE)) + 1)
    found = [0.0]
    for lag in lags:
        if not 0 < lag < len(sound) - lag:
            continue
        early, late = sound[:-lag], sound[lag:]
        powers = early @ early, late @ late
        if min(powers) > SILENCE * len(early):
            found.append(float(early @ late / np.sqrt(powers[0] * powers[1])))
    return max(found)


def _only_leaps(
    found: NDArray[np.float64], target: NDArray[np.float64], frames: NDArray[np.int64]
) -> NDArray[np.float64]:
    """``target`` where the track leapt, ``found`` where a voice just rose or fell far.

    An error or a creak begins or ends with a leap; a melody glides. A stretch between two pauses
    shows neither, and there only what lies too low is moved: creak halves a pitch, little doubles
    it.
    """
    out: NDArray[np.float64] = found.copy()
    moved = np.abs(target - found) > OCTAVE / 2
    together = np.diff(frames, prepend=frames[0] - GAP_FRAMES - 1) <= GAP_FRAMES
    edges = np.flatnonzero(
        np.diff(moved, prepend=False, append=False) | ~np.append(together, False)
    )
    for start, stop in pairwise(edges):
        if not moved[start]:
            continue
        leaps = [
            abs(found[a] - found[a - 1]) > OCTAVE / 2
            for a in (start, stop)
            if 0 < a < len(found) and together[a]
        ]
        if any(leaps) if leaps else target[start] > found[start]:
            out[start:stop] = target[start:stop]
    return out


def _centre(log_f0: NDArray[np.float64]) -> float:
    """The strongest place of the distribution: it stays when 2 of 5 frames are an octave off."""
    semitones = 12 * log_f0 / OCTAVE
    low = np.floor(semitones.min()) - 6
    counts = np.bincount(np.round((semitones - low) * 2).astype(np.int64), minlength=24)
    offsets = np.arange(-12, 13)
    smooth = np.convolve(counts, np.exp(-0.5 * (offsets / 4) ** 2), mode="same")
    return float((low + np.argmax(smooth) / 2) * OCTAVE / 12)


def _in_octave_of(
    log_f0: NDArray[np.float64], around: NDArray[np.float64], slack: float
) -> NDArray[np.float64]:
    """Values within ``slack`` octaves of a whole octave from ``around``, brought to its octave."""
    octaves = (log_f0 - around) / OCTAVE
    whole = np.round(octaves)
    wrong = (whole != 0) & (np.abs(octaves - whole) <= slack)
    return np.where(wrong, log_f0 - whole * OCTAVE, log_f0)


def _running_median(
    values: NDArray[np.float64], frames: NDArray[np.int64], reach: int
) -> NDArray[np.float64]:
    """Median over the voiced frames that lie within ``reach`` frames of each."""
    low = np.searchsorted(frames, frames - reach)
    high = np.searchsorted(frames, frames + reach, side="right")
    medians = (np.median(values[a:b]) for a, b in zip(low, high, strict=True))
    return np.fromiter(medians, np.float64, len(values))  # A list of hours takes 30 MB more.
