"""Breath noise of a source carried over to the result.

How noisy a voiced sound is shows in how little one period is like the next. That share of noise is
measured in the source and in the result, and what the result lacks is made by scattering the phases
of its upper spectrum: the envelope stays, the harmonics lose energy to the noise between them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from auto_voice.audio.pitch import align_pitch
from auto_voice.types import FloatArray, Pitch

# Below it breath is drowned by the voice.
LOWEST_HZ = 1500.0
SIZE = 1024
SMOOTH_HZ = 400.0
PERIODS = 3


def aperiodicity(samples: FloatArray, sample_rate: int, pitch: Pitch, frame_rate: float,
                 frames: int) -> FloatArray:  # fmt: skip
    """``(frames,)`` share of noise, 0 to 1, in the sound above 1.5 kHz; 0 where unvoiced.

    One less the highest normalised correlation at a lag near the period.
    """
    log_f0, voiced = align_pitch(pitch, frame_rate, frames)
    high = _high_passed(np.asarray(samples, np.float32), sample_rate)
    out = np.zeros(frames, np.float32)
    for frame in np.flatnonzero(voiced):
        period = sample_rate / float(np.exp(log_f0[frame]))
        lags = np.arange(int(0.94 * period), int(np.ceil(1.06 * period)) + 1)
        length = int(PERIODS * period)
        start = int((frame + 0.5) / frame_rate * sample_rate - (length + lags[-1]) / 2)
        if start < 0 or start + length + lags[-1] > len(high):
            continue
        here = high[start : start + length]
        later = np.lib.stride_tricks.sliding_window_view(
            high[start + lags[0] : start + lags[-1] + length], length
        )
        power = float(here @ here) * np.einsum("ij,ij->i", later, later)
        likeness = float(np.max(later @ here / np.sqrt(power + 1e-20)))
        out[frame] = 1 - np.clip(likeness, 0, 1)
    return out


def scatter(samples: FloatArray, share: FloatArray, sample_rate: int, hop_samples: int,
            first_frame: int) -> FloatArray:  # fmt: skip
    """``samples`` with ``share`` ``(frames,)`` of their energy above 1.5 kHz turned into noise.

    Args:
        first_frame: position of the piece in the whole, which seeds the noise, so that a piece
            gets the same noise as the whole would give it.
    """
    if not np.any(share > 0):
        return samples
    half = SIZE // 2
    padded = np.pad(samples, half)
    window = np.sqrt(np.hanning(SIZE + 1)[:-1]).astype(np.float32)
    low = int(LOWEST_HZ * SIZE / sample_rate)
    out = np.zeros(len(padded) + SIZE, np.float32)
    for frame in range(len(share) + 1):
        at = frame * hop_samples
        piece = padded[at : at + SIZE]
        if len(piece) < SIZE:
            piece = np.pad(piece, (0, SIZE - len(piece)))
        spectrum = np.fft.rfft(piece * window)
        amount = float(share[min(frame, len(share) - 1)])
        if amount > 0:
            rng = np.random.default_rng(first_frame + frame)
            phase = rng.uniform(0, 2 * np.pi, len(spectrum) - low)
            noise = envelope(spectrum, sample_rate)[low:] * np.exp(1j * phase)
            # Frames of noise add up in power, not in amplitude: with four of them overlapping, a
            # Hann window in all leaves a quarter of it.
            spectrum[low:] = np.sqrt(1 - amount) * spectrum[low:] + 2 * np.sqrt(amount) * noise
        out[at : at + SIZE] += np.fft.irfft(spectrum, SIZE) * window
    scale = np.float32(2 * hop_samples / SIZE)
    scaled: FloatArray = (out[half : half + len(samples)] * scale).astype(np.float32)
    return scaled


def envelope(spectrum: NDArray[np.complexfloating], sample_rate: int) -> NDArray[np.float64]:
    """``(bins,)`` magnitudes smoothed in power over 400 Hz, so that harmonics leave no trace."""
    width = max(1, round(SMOOTH_HZ * SIZE / sample_rate)) // 2 * 2 + 1
    power = np.pad(np.square(np.abs(spectrum)), width // 2, mode="edge")
    total = np.concatenate(([0.0], np.cumsum(power)))
    mean = np.maximum(total[width:] - total[:-width], 0) / width
    return np.asarray(np.sqrt(mean))


def _high_passed(samples: FloatArray, sample_rate: int) -> FloatArray:
    """What lies above 1.5 kHz, by a symmetric filter of 8 ms: no delay, no ringing beyond it."""
    reach = round(0.004 * sample_rate)
    n = np.arange(-reach, reach + 1)
    cutoff = 2 * LOWEST_HZ / sample_rate
    low = cutoff * np.sinc(cutoff * n) * np.hanning(len(n) + 2)[1:-1]
    low /= low.sum()
    kernel = -low
    kernel[reach] += 1
    return np.convolve(samples, kernel.astype(np.float32), mode="same").astype(np.float32)
