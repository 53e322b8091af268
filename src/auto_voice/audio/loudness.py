"""Loudness as ITU-R BS.1770-4 and EBU R 128 define it, and true peak."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from auto_voice.audio.frames import filtered, pieces
from auto_voice.audio.resample import resample
from auto_voice.types import FloatArray

BLOCK_SECONDS = 0.4
BLOCK_STEP_SECONDS = 0.1
ABSOLUTE_GATE_LUFS = -70.0
RELATIVE_GATE_LU = -10.0
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
_FFT_SAMPLES = 1 << 18


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
    blocks = np.asarray(power)
    blocks = blocks[blocks > _power(ABSOLUTE_GATE_LUFS)]
    if len(blocks) == 0:
        return -math.inf
    blocks = blocks[blocks > blocks.mean() * 10 ** (RELATIVE_GATE_LU / 10)]
    return -0.691 + 10 * math.log10(blocks.mean())


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
    size = 1 << (_FFT_SAMPLES + sample_rate - 1).bit_length()
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
    for piece in pieces(len(x), _FFT_SAMPLES, PEAK_MARGIN_SAMPLES):
        up = resample(x[piece.low : piece.high], sample_rate, factor * sample_rate)
        yield up[piece.inside(factor)]
