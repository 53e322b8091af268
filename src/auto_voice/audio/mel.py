"""Mel spectrograms: the one definition of each that training and inference share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from auto_voice.audio.frames import framed, spectra
from auto_voice.types import FloatArray


@dataclass(frozen=True)
class MelSpec:
    """How a mel spectrogram is computed.

    Attributes:
        sample_rate: Hz.
        n_fft: samples in a Fourier transform.
        win_samples: length of the periodic Hann window, centred in the transform.
        hop_samples: samples between frames.
        bands: number of mel bands (Slaney scale, area-normalised triangles).
        f_min_hz, f_max_hz: range of the bands.
        power: exponent of the magnitude: 1 or 2.
        log_floor: values are clamped to it before the natural log; None returns them linear.
        pad_samples: added on each side before framing.
        pad_mode: numpy's name for it.
        magnitude_epsilon: added under the square root of the magnitude.
    """

    sample_rate: int
    n_fft: int
    win_samples: int
    hop_samples: int
    bands: int
    f_min_hz: float
    f_max_hz: float
    power: int = 1
    log_floor: float | None = 1e-5
    pad_samples: int = 0
    pad_mode: str = "reflect"
    magnitude_epsilon: float = 0.0

    @property
    def frame_rate(self) -> float:
        return self.sample_rate / self.hop_samples

    def frames(self, samples: int) -> int:
        """Frames that ``log_mel`` returns for so many samples."""
        padded = max(samples, 1) + 2 * self.pad_samples
        return 1 + max(0, padded - self.n_fft) // self.hop_samples


# The input of HiFi-GAN universal V1 (Kong et al. 2020); ``n`` samples give ``n // 256`` frames.
HIFIGAN_MEL = MelSpec(
    sample_rate=22050,
    n_fft=1024,
    win_samples=1024,
    hop_samples=256,
    bands=80,
    f_min_hz=0.0,
    f_max_hz=8000.0,
    pad_samples=384,
    magnitude_epsilon=1e-9,
)

# The input of the GE2E speaker encoder: linear power, 25 ms windows every 10 ms.
GE2E_MEL = MelSpec(
    sample_rate=16000,
    n_fft=400,
    win_samples=400,
    hop_samples=160,
    bands=40,
    f_min_hz=0.0,
    f_max_hz=8000.0,
    power=2,
    log_floor=None,
    pad_samples=200,
    pad_mode="constant",
)

# The input of the compact content encoder; ``n`` samples give ``n // 160`` frames.
CONTENT_MEL = MelSpec(
    sample_rate=16000,
    n_fft=400,
    win_samples=400,
    hop_samples=160,
    bands=80,
    f_min_hz=0.0,
    f_max_hz=8000.0,
    power=2,
    log_floor=1e-8,
    pad_samples=120,
)


def log_mel(samples: FloatArray, spec: MelSpec) -> FloatArray:
    """``(samples,)`` at ``spec.sample_rate`` to ``(bands, frames)`` float32.

    ``frames`` is ``spec.frames(len(samples))``. Input shorter than the padding is extended by
    zeros, so that one frame always comes out.
    """
    x = np.asarray(samples, dtype=np.float32)
    if spec.pad_mode == "reflect" and len(x) <= spec.pad_samples:
        x = np.pad(x, (0, spec.pad_samples + 1 - len(x)))
    if spec.pad_samples:
        x = np.pad(x, spec.pad_samples, mode=spec.pad_mode)  # type: ignore[call-overload]
    if len(x) < spec.n_fft:
        x = np.pad(x, (0, spec.n_fft - len(x)))
    frames = framed(x, spec.n_fft, spec.hop_samples)
    bank = mel_filters(spec)
    mel = np.empty((spec.bands, len(frames)), dtype=np.float32)
    for block, spectrum in spectra(frames, _window(spec)):
        energy = spectrum.real**2 + spectrum.imag**2 + spec.magnitude_epsilon
        magnitude = energy if spec.power == 2 else np.sqrt(energy)
        mel[:, block] = bank @ magnitude.T.astype(np.float32)
    if spec.log_floor is not None:
        mel = np.log(np.maximum(mel, spec.log_floor))
    return mel


@lru_cache(maxsize=8)
def mel_filters(spec: MelSpec) -> FloatArray:
    """``(bands, n_fft // 2 + 1)`` float32 triangles of unit area in Hz, after Slaney (1998)."""
    bins = np.linspace(0, spec.sample_rate / 2, spec.n_fft // 2 + 1)
    low, high = _hz_to_mel(np.array([spec.f_min_hz, spec.f_max_hz]))
    edges = _mel_to_hz(np.linspace(low, high, spec.bands + 2))
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    triangles = np.maximum(0, np.minimum(rising, falling))
    bank = (triangles * (2 / (edges[2:] - edges[:-2]))[:, None]).astype(np.float32)
    bank.flags.writeable = False
    return bank


# Slaney's scale: linear up to 1 kHz (15 mels), then 27 mels for each factor of 6.4.
_LINEAR_HZ_PER_MEL = 200 / 3
_LOG_STEP = np.log(6.4) / 27


def _hz_to_mel(hz: NDArray[np.float64]) -> NDArray[np.float64]:
    above = 15 + np.log(np.maximum(hz, 1000.0) / 1000.0) / _LOG_STEP
    return np.where(hz < 1000.0, hz / _LINEAR_HZ_PER_MEL, above)


def _mel_to_hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    above = 1000.0 * np.exp(_LOG_STEP * (np.maximum(mel, 15.0) - 15.0))
    return np.where(mel < 15.0, mel * _LINEAR_HZ_PER_MEL, above)


@lru_cache(maxsize=8)
def _window(spec: MelSpec) -> FloatArray:
    phase = 2 * np.pi * np.arange(spec.win_samples) / spec.win_samples
    hann = (0.5 - 0.5 * np.cos(phase)).astype(np.float32)
    before = (spec.n_fft - spec.win_samples) // 2
    window = np.pad(hann, (before, spec.n_fft - spec.win_samples - before))
    window.flags.writeable = False
    return window
