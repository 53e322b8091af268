"""Steady background noise turned down, in numpy alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from auto_voice.audio.frames import framed, spectra
from auto_voice.types import FloatArray

# Long enough to part the harmonics of a low voice, short enough for consonants.
FRAME_SECONDS = 0.032
# Frames that cover each sample.
OVERLAP = 4
# Quantile of the power over time: speech leaves at least so many of the frames to the noise.
NOISE_QUANTILE = 0.15
# Share of the estimate that comes from the frame before (Ephraim and Malah use 0.98).
SMOOTHING = 0.97


def denoise(samples: FloatArray, sample_rate: int, *, reduction_db: float = 15.0) -> FloatArray:
    """The recording with steady noise (hiss, hum, fans) lower by up to ``reduction_db``.

    A Wiener gain per frequency with the decision-directed estimate of Ephraim and Malah (1984),
    which keeps residual noise from tinkling. The noise spectrum is one for the whole recording,
    taken from its quietest frames, so what comes and goes (music, voices, knocks) stays, and a
    clean recording, whose quietest frames are far below its speech, hardly changes.

    Args:
        samples: ``(samples,)`` at any rate.
        reduction_db: the most that any frequency is turned down; 0 changes nothing.

    Returns:
        ``(samples,)`` float32 of the same length, without delay.

    Raises:
        ValueError: ``reduction_db`` is negative.
    """
    if not reduction_db >= 0:
        raise ValueError(f"reduction_db must be 0 or more, not {reduction_db}")
    x = np.asarray(samples, np.float32)
    size = 1 << max(6, round(np.log2(FRAME_SECONDS * sample_rate)))
    if len(x) < 4 * size or reduction_db == 0:
        return np.array(x, np.float32)
    hop = size // OVERLAP
    padded = np.pad(x, (size, size + -len(x) % hop))
    window = np.sqrt(np.hanning(size + 1)[:-1])
    frames = framed(padded, size, hop)
    noise = _noise_spectrum(frames, window)
    floor = 10 ** (-reduction_db / 20)
    out = np.zeros(len(padded), np.float64)
    prior = np.ones(len(noise))
    for block, spectrum in spectra(frames, window):
        gains, prior = _wiener_gains(np.square(np.abs(spectrum)) / noise, floor, prior)
        shaped = np.fft.irfft(spectrum * gains, size) * window
        for index, frame in enumerate(shaped, block.start):
            out[index * hop : index * hop + size] += frame
    # Hann windows a quarter apart add up to OVERLAP / 2.
    out *= 2 / OVERLAP
    return out[size : size + len(x)].astype(np.float32)


def _noise_spectrum(
    frames: NDArray[np.float32], window: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Mean noise power per frequency, from a low quantile over (up to 20 000) frames.

    The power of a noise bin is exponentially distributed; its p-quantile lies at
    ``-ln(1 - p)`` of its mean, and that factor turns one into the other.
    """
    chosen = frames[:: max(1, len(frames) // 20_000)]
    power = np.square(np.abs(np.fft.rfft(chosen * window))).astype(np.float32)
    # Speech fills a part of the frames and pushes the quantile up, padding with zeros down.
    audible = power.sum(axis=1) > 1e-12
    power = power[audible] if audible.any() else power
    low = np.quantile(power, NOISE_QUANTILE, axis=0)
    return np.asarray(low / -np.log1p(-NOISE_QUANTILE), np.float64) + 1e-14


def _wiener_gains(
    posterior: NDArray[np.float64], floor: float, prior: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gains of one block and the clean-to-noise ratio that the next one continues from.

    Args:
        posterior: ``(frames, bins)`` observed power over noise power.
        prior: ``(bins,)`` estimate of clean power over noise power in the frame before.
    """
    gains = np.empty_like(posterior)
    for index, observed in enumerate(posterior):
        ratio = SMOOTHING * prior + (1 - SMOOTHING) * np.maximum(observed - 1, 0)
        gain = np.maximum(ratio / (1 + ratio), floor)
        gains[index] = gain
        prior = np.square(gain) * observed
    return gains, prior
