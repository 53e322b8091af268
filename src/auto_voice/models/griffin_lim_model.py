"""Griffin-Lim vocoder: audio whose mel spectrogram is the given one, without any weights.

The honest stand-in for HiFi-GAN where its weights are out of reach: intelligible, with the
metallic sound of guessed phases. Numpy alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from auto_voice.audio.frames import framed
from auto_voice.audio.mel import HIFIGAN_MEL, mel_filters
from auto_voice.errors import AudioContentError
from auto_voice.models.registry.catalog import ModelVersion
from auto_voice.types import FloatArray

ComplexArray = NDArray[np.complex64]

# As librosa has by default; it stands in for a vocoder, and time counts.
ITERATIONS = 32
# Of the fast variant (Perraudin, Balazs and Søndergaard 2013).
MOMENTUM = 0.99
INVERSION_STEPS = 16
_TINY = np.float32(1e-9)


class GriffinLimModel:
    """A vocoder that guesses phases until neighbouring frames agree; deterministic.

    Args:
        name: ``name@version`` of the catalog entry.
        iterations: each costs two Fourier transforms of the signal.
    """

    sample_rate = HIFIGAN_MEL.sample_rate
    hop_samples = HIFIGAN_MEL.hop_samples
    bands = HIFIGAN_MEL.bands

    def __init__(self, *, name: str = "griffin_lim", iterations: int = ITERATIONS) -> None:
        self.name = name
        self.iterations = iterations

    def synthesize(self, mel: ArrayLike) -> FloatArray:
        """``(bands, frames)`` or ``(batch, bands, frames)`` to ``(batch, frames * 256)``.

        Args:
            mel: numpy or a CPU tensor, as ``audio.mel.HIFIGAN_MEL`` defines it.

        Returns:
            float32 in [-1, 1] at 22 050 Hz.

        Raises:
            AudioContentError: empty, not finite, or another number of bands.
        """
        batch = np.asarray(mel, dtype=np.float32)
        batch = batch[None] if batch.ndim == 2 else batch
        if batch.ndim != 3 or batch.shape[1] != self.bands or batch.size == 0:
            raise AudioContentError(
                f"mel must have shape ({self.bands}, frames) or (batch, {self.bands}, frames), "
                f"not {np.shape(mel)}."
            )
        if not np.isfinite(batch).all():
            raise AudioContentError("mel holds NaN or infinity; repair the input first.")
        return np.stack([self._one(row) for row in batch])

    def _one(self, mel: FloatArray) -> FloatArray:
        magnitude = linear_magnitude(mel)
        phases = np.random.default_rng(0).uniform(-np.pi, np.pi, magnitude.shape)
        guess = (magnitude * np.exp(1j * phases)).astype(np.complex64)
        previous = np.zeros_like(guess)
        for _ in range(self.iterations):
            consistent = _stft(_istft(guess))
            ahead = consistent + MOMENTUM * (consistent - previous)
            guess = magnitude * (ahead / np.maximum(np.abs(ahead), _TINY))
            previous = consistent
        pad = HIFIGAN_MEL.pad_samples
        return np.clip(_istft(guess)[pad:-pad], -1.0, 1.0)


def linear_magnitude(mel: FloatArray) -> FloatArray:
    """``(bands, frames)`` log-mel to ``(frames, 513)`` magnitudes whose mel it is, none negative.

    Non-negative least squares by multiplicative updates (Lee and Seung 2001) from the smooth
    spectrum that spreads each band over its bins.
    """
    bank = mel_filters(HIFIGAN_MEL)
    target = np.exp(mel).T
    magnitude = target @ (bank / np.maximum(bank.sum(axis=1, keepdims=True), _TINY))
    wanted = target @ bank
    for _ in range(INVERSION_STEPS):
        magnitude *= wanted / np.maximum((magnitude @ bank.T) @ bank, _TINY)
    return np.asarray(magnitude, dtype=np.float32)


def build(files: Mapping[str, Path], version: ModelVersion, device: str) -> GriffinLimModel:
    """The vocoder; it needs no file and runs on the CPU. ``params`` may hold ``iterations``."""
    return GriffinLimModel(
        name=version.key, iterations=int(version.params.get("iterations", ITERATIONS))
    )


def _stft(samples: FloatArray) -> ComplexArray:
    frames = framed(samples, HIFIGAN_MEL.n_fft, HIFIGAN_MEL.hop_samples)
    spectrum = np.fft.rfft(frames * _window())
    return spectrum.astype(np.complex64, copy=False)


def _istft(spectrum: ComplexArray) -> FloatArray:
    """Least-squares signal of a spectrogram: overlap-add over the sum of squared windows."""
    frames = np.fft.irfft(spectrum, HIFIGAN_MEL.n_fft).astype(np.float32, copy=False) * _window()
    envelope = np.broadcast_to(_window() ** 2, frames.shape)
    total: FloatArray = _overlap_add(envelope)
    return np.divide(_overlap_add(frames), np.maximum(total, 1e-3), dtype=np.float32)


def _overlap_add(frames: FloatArray) -> FloatArray:
    # The hop divides the frame, so a frame is whole hops and each lands in one row.
    count, size = frames.shape
    hop = HIFIGAN_MEL.hop_samples
    parts = size // hop
    out = np.zeros((count + parts - 1, hop), dtype=np.float32)
    for part in range(parts):
        out[part : part + count] += frames[:, part * hop : (part + 1) * hop]
    return out.reshape(-1)


@lru_cache(maxsize=1)
def _window() -> FloatArray:
    phase = 2 * np.pi * np.arange(HIFIGAN_MEL.n_fft) / HIFIGAN_MEL.n_fft
    window = (0.5 - 0.5 * np.cos(phase)).astype(np.float32)
    window.flags.writeable = False
    return window
