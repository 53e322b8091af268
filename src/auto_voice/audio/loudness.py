"""How loud a recording is: speech level, loudness after ITU-R BS.1770-4 and EBU R 128, true peak.

The rumble filter and the limiter that a result passes are here, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from auto_voice.audio.frames import filtered, pieces
from auto_voice.audio.resample import resample
from auto_voice.types import FloatArray

# Active speech level that the networks are trained at (RMS over speech frames).
SPEECH_DBFS = -26.0
# dB below the loudest frame within which a frame counts as speech.
ACTIVE_RANGE_DB = 30.0
# Shorter than a syllable, longer than a period of the lowest voice.
FRAME_SECONDS = 0.02
# Blocks and gates of BS.1770-4, section 5.1.
BLOCK_SECONDS = 0.4
BLOCK_STEP_SECONDS = 0.1
ABSOLUTE_GATE_LUFS = -70.0
RELATIVE_GATE_LU = -10.0
# EBU R 128, recommendation h.
CEILING_DBTP = -1.0
# Samples whose peak is looked at together, 2.9 ms at 22.05 kHz, and how many of these a limiter
# turns down on each side of a peak: 15 ms, so that a period of the lowest voice is not bent.
LIMITER_HOP_SAMPLES = 64
LIMITER_HOPS = 5
# Samples to either side that a limiter looks at, with room for the oversampling.
LIMITER_REACH_SAMPLES = (2 * LIMITER_HOPS + 2) * LIMITER_HOP_SAMPLES + 512
# Samples on either side of a piece that the peaks between its own samples depend on.
PEAK_MARGIN_SAMPLES = 256
# Samples of a piece: large enough that its surroundings cost little, small enough for the cache.
_LOUDNESS_FFT_SAMPLES = 1 << 18
# Sound before a block that its filters hear first: their slowest pole has died away by then.
SETTLE_SECONDS = 1.0
# Hz. No voice speaks below the first, and every voice is whole above the second: what lies lower is
# rumble, offset, or what a vocoder makes of a pause.
RUMBLE_HZ, WHOLE_HZ = 40.0, 60.0
# dB by which the rumble is turned down.
RUMBLE_DB = 50.0
# Shape of the Kaiser window that gives it.
_KAISER_BETA = 4.53
# Samples that are transformed at once.
_RUMBLE_FFT_SAMPLES = 1 << 16


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


class LoudnessMeter:
    """Integrated loudness (BS.1770-4) and true peak of blocks in order, in constant memory.

    Agrees with :func:`integrated_loudness` of the joined blocks.

    Args:
        peaks: whether the peaks are measured as well, which takes most of the time.
    """

    def __init__(self, sample_rate: int, peaks: bool = True) -> None:
        self.sample_rate = sample_rate
        self._peaks = peaks
        self.peak = 0.0
        self._true_peak = 0.0
        self._step = round(BLOCK_STEP_SECONDS * sample_rate)
        self._settle = round(SETTLE_SECONDS * sample_rate)
        self._before = np.zeros(self._settle, np.float32)
        self._held = np.zeros(0, np.float32)
        self._steps: list[NDArray[np.float64]] = []

    def add(self, block: FloatArray) -> None:
        """The next ``(samples,)``."""
        if self._peaks:
            self._look_for_peaks(block)
        joined = np.concatenate([self._held, block])
        whole = len(joined) // self._step * self._step
        if whole:
            self._measure(joined[:whole])
        self._held = joined[whole:]

    @property
    def true_peak_db(self) -> float:
        """dBTP; -inf for silence."""
        return 20 * math.log10(self._true_peak) if self._true_peak > 0 else -math.inf

    @property
    def loudness_lufs(self) -> float:
        """Loudness of the blocks so far; -inf if nothing passes the gates."""
        return _gated_loudness(self.block_powers())

    def block_powers(self) -> NDArray[np.float64]:
        """``(blocks,)`` weighted power of each 0.4 s, 0.1 s apart; of all if that is shorter."""
        steps = np.concatenate(self._steps) if self._steps else np.zeros(0)
        size = round(BLOCK_SECONDS / BLOCK_STEP_SECONDS)
        if len(steps) >= size:
            return np.convolve(steps, np.ones(size) / size, mode="valid")
        rest = np.concatenate([self._before, self._held])
        weighted = k_weighted(rest.astype(np.float64), self.sample_rate)[self._settle :]
        total = steps.sum() * self._step + float(np.square(weighted).sum())
        count = len(steps) * self._step + len(self._held)
        return np.array([total / count]) if count else np.zeros(0)

    def _look_for_peaks(self, block: FloatArray) -> None:
        self.peak = max(self.peak, float(np.max(np.abs(block), initial=0.0)))
        # A peak between two samples needs its neighbours on both sides, so one margin waits.
        around = np.concatenate([self._before[-PEAK_MARGIN_SAMPLES:], self._held, block])
        self._true_peak = max(self._true_peak, 10 ** (true_peak(around, self.sample_rate) / 20))

    def _measure(self, whole: FloatArray) -> None:
        joined = np.concatenate([self._before, whole])
        weighted = k_weighted(joined.astype(np.float64), self.sample_rate)[self._settle :]
        self._steps.append(np.square(weighted).reshape(-1, self._step).mean(axis=1))
        self._before = joined[-self._settle :]


def speech_loudness(source: LoudnessMeter, result: LoudnessMeter) -> tuple[float, float]:
    """LUFS of both over the same time: where ``source`` passes the gate of BS.1770-4.

    The absolute gate falls with a source that is quieter than that throughout. -inf for silence.
    """
    own, made = source.block_powers(), result.block_powers()
    count = min(len(own), len(made))
    own, made = own[:count], made[:count]
    loudest = float(own.max(initial=0.0))
    audible = own > min(_power(ABSOLUTE_GATE_LUFS), 1e-3 * loudest)
    if not audible.any():
        return -math.inf, -math.inf
    counted = audible & (own > own[audible].mean() * 10 ** (RELATIVE_GATE_LU / 10))
    return _lufs(own[counted]), _lufs(made[counted])


def _gated_loudness(blocks: NDArray[np.float64]) -> float:
    """LUFS of the ``(blocks,)`` powers that pass the gates; -inf if none does."""
    blocks = blocks[blocks > _power(ABSOLUTE_GATE_LUFS)]
    if len(blocks) == 0:
        return -math.inf
    return _lufs(blocks[blocks > blocks.mean() * 10 ** (RELATIVE_GATE_LU / 10)])


def _lufs(powers: NDArray[np.float64]) -> float:
    mean = float(powers.mean()) if len(powers) else 0.0
    return -0.691 + 10 * math.log10(mean) if mean > 0 else -math.inf


def integrated_loudness(samples: FloatArray, sample_rate: int) -> float:
    """Gated loudness of the programme in LUFS; -inf if nothing passes the gate.

    Args:
        samples: ``(samples,)`` or ``(samples, channels)`` with up to three channels, which all
            weigh the same. Less than 0.4 s is measured as one block.

    Raises:
        ValueError: more than three channels (their places would have to be known).
    """
    x = np.asarray(samples, np.float64)
    x = x[:, None] if x.ndim == 1 else x
    if x.shape[1] > 3:
        raise ValueError(f"loudness needs up to 3 channels, not {x.shape[1]}; mix them down first")
    if len(x) == 0:
        return -math.inf
    power = sum(_block_power(k_weighted(channel, sample_rate), sample_rate) for channel in x.T)
    return _gated_loudness(np.asarray(power))


def true_peak(samples: FloatArray, sample_rate: int) -> float:
    """The highest level between the samples too, dBTP (4 times oversampled); -inf for silence."""
    x = np.asarray(samples, np.float32)
    factor = _oversampling(sample_rate)
    peak = max(
        (float(np.max(np.abs(up), initial=0.0)) for up in _oversampled(x, sample_rate, factor)),
        default=0.0,
    )
    return 20 * math.log10(peak) if peak > 0 else -math.inf


def limited(
    samples: FloatArray, sample_rate: int, first_sample: int = 0, ceiling_dbtp: float = CEILING_DBTP
) -> FloatArray:
    """``(samples,)`` with each true peak above the ceiling turned down to it.

    The level falls before a peak and rises after it, 15 ms each; what is further from any peak
    stays as it is. A piece with ``LIMITER_REACH_SAMPLES`` of its surroundings comes out as it
    would in the whole.

    Args:
        first_sample: position of the piece in the whole.
    """
    hop = LIMITER_HOP_SAMPLES
    ahead = first_sample % hop
    padded = np.pad(samples, (ahead, -(len(samples) + ahead) % hop))
    factor = _oversampling(sample_rate)
    up = np.concatenate(list(_oversampled(padded, sample_rate, factor)))
    peaks = np.abs(up).reshape(-1, hop * factor).max(axis=1)
    needed = np.minimum(1, 10 ** (ceiling_dbtp / 20) / np.maximum(peaks, 1e-9))
    # Held for one hop longer than it is smoothed, no mean and no line between two of them exceeds
    # what a peak needs.
    held = np.pad(needed, LIMITER_HOPS + 1, mode="edge")
    held = np.lib.stride_tricks.sliding_window_view(held, 2 * LIMITER_HOPS + 3).min(axis=1)
    window = np.hanning(2 * LIMITER_HOPS + 3)[1:-1]
    smooth = np.convolve(np.pad(held, LIMITER_HOPS, mode="edge"), window / window.sum(), "valid")
    at = (np.arange(len(padded)) + 0.5) / hop - 0.5
    gain = np.interp(at, np.arange(len(smooth)), smooth)
    return (padded * gain).astype(np.float32)[ahead : ahead + len(samples)]


def k_weighted(channel: NDArray[np.float64], sample_rate: int) -> NDArray[np.float64]:
    """``(samples,)`` through the two filters of BS.1770 (head shelf, then high-pass).

    The recursive filters are applied as their frequency response, block by block with overlap
    and add. One second of padding holds their ringing: the slowest pole, at 38 Hz, has decayed
    by 2000 dB then. This is exact to rounding and needs no compiled recursion.
    """
    size = 1 << (_LOUDNESS_FFT_SAMPLES + sample_rate - 1).bit_length()
    response = _k_response(np.fft.rfftfreq(size), sample_rate)
    return filtered(channel, response, size, sample_rate)[: len(channel)]


def _k_response(cycles: NDArray[np.floating], sample_rate: int) -> NDArray[np.complex128]:
    """Response of both biquads at ``cycles`` per sample, for any rate.

    The standard tabulates coefficients at 48 kHz only; these are their analogue prototypes
    (centre, gain and quality as libebur128 and pyloudnorm derive them), bilinear-transformed.
    """
    z = np.exp(-2j * np.pi * cycles)
    k = math.tan(math.pi * 1681.974450955533 / sample_rate)
    q = 0.7071752369554196
    high = 10 ** (3.999843853973347 / 20)
    band = high**0.4996667741545416
    a0 = 1 + k / q + k * k
    shelf = _biquad(
        z,
        (
            (high + band * k / q + k * k) / a0,
            2 * (k * k - high) / a0,
            (high - band * k / q + k * k) / a0,
        ),
        (2 * (k * k - 1) / a0, (1 - k / q + k * k) / a0),
    )
    k = math.tan(math.pi * 38.13547087602444 / sample_rate)
    q = 0.5003270373238773
    a0 = 1 + k / q + k * k
    return shelf * _biquad(z, (1.0, -2.0, 1.0), (2 * (k * k - 1) / a0, (1 - k / q + k * k) / a0))


def _biquad(
    z: NDArray[np.complex128], b: tuple[float, float, float], a: tuple[float, float]
) -> NDArray[np.complex128]:
    return (b[0] + b[1] * z + b[2] * z * z) / (1 + a[0] * z + a[1] * z * z)


def _block_power(weighted: NDArray[np.float64], sample_rate: int) -> NDArray[np.float64]:
    """Mean square of each 0.4 s block, 0.1 s apart; of everything if it is shorter."""
    size = round(BLOCK_SECONDS * sample_rate)
    if len(weighted) < size:
        return np.array([np.mean(np.square(weighted))])
    total = np.concatenate(([0.0], np.cumsum(np.square(weighted))))
    count = 1 + int((len(weighted) - size) / (BLOCK_STEP_SECONDS * sample_rate) + 1e-9)
    starts = np.round(np.arange(count) * BLOCK_STEP_SECONDS * sample_rate).astype(np.int64)
    starts = np.minimum(starts, len(weighted) - size)
    return np.maximum((total[starts + size] - total[starts]) / size, 0.0)


def _power(lufs: float) -> float:
    return float(10 ** ((lufs + 0.691) / 10))


def _oversampling(sample_rate: int) -> int:
    return 4 if sample_rate < 96_000 else 2 if sample_rate < 192_000 else 1


def _oversampled(x: FloatArray, sample_rate: int, factor: int) -> Iterator[FloatArray]:
    """``x`` at ``factor`` times its rate, in pieces that are seen with their surroundings."""
    for piece in pieces(len(x), _LOUDNESS_FFT_SAMPLES, PEAK_MARGIN_SAMPLES):
        up = resample(x[piece.low : piece.high], sample_rate, factor * sample_rate)
        yield up[piece.inside(factor)]


def without_rumble(samples: FloatArray, sample_rate: int) -> FloatArray:
    """``(samples,)`` float32 without what lies below 40 Hz, in place to the sample.

    A symmetric filter: it delays nothing, and it looks 73 ms to either side, see
    :func:`rumble_reach`.
    """
    kernel = _rumble_kernel(sample_rate)
    reach = len(kernel) // 2
    x = np.asarray(samples, np.float32)
    most = min(len(x), max(_RUMBLE_FFT_SAMPLES, 8 * reach))
    size = 1 << (most + 2 * reach - 1).bit_length()
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
