"""Mel spectrograms and features of them: one definition of each for training and inference.

Content encoders see the envelopes of four bands beside their own features: listeners follow speech
from those alone (Shannon et al. 1995), and so wide a band tells little of the speaker. Cepstra
(Davis & Mermelstein 1980) tell more of both, so they are warped at random in training, as if the
vocal tract had another length.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from auto_voice.audio.frames import framed, interpolate_frames, spectra
from auto_voice.audio.pitch import F_MAX_HZ, F_MIN_HZ
from auto_voice.types import Content, FloatArray

# Equal shares of the bands of ``CONTENT_MEL``: up to about 0.7, 1.9, 4 and 8 kHz.
BANDS = 4
# Values a frame of 20 ms: each band in its first and in its second 10 ms.
ENVELOPE_SIZE = 2 * BANDS
# Log power that counts as silence at the networks' level; middle and spread of speech above it.
FLOOR, CENTRE, SCALE = -14.0, -10.0, 3.0
# Cosines over ``CONTENT_MEL``: the harmonics of a voice lie beyond, up to an F0 of 300 Hz.
CEPSTRA = 20
# Values a frame of 20 ms, as for the envelope.
CEPSTRA_SIZE = 2 * CEPSTRA
# Standard deviation of each cepstrum in speech.
SPREADS = np.array(
    [20, 10.5, 5.5, 4.9, 3.9, 3, 2.8, 2.7, 2.3, 2.2, 2, 2, 1.8, 1.8, 1.7, 1.6, 1.5, 1.4, 1.4, 1.3],
    np.float32,
)
# Resolution of the table of harmonic templates: a fifth of a semitone.
STEPS_PER_OCTAVE = 60
# Linear: the side lobes of a real window and the noise of real voices lie about here, -40 dB,
# between two harmonics.
HARMONIC_FLOOR = 1e-2


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

# What envelopes and cepstra are computed from; ``n`` samples give ``n // 160`` frames.
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


def band_envelope(mel: FloatArray) -> FloatArray:
    """``CONTENT_MEL`` ``(80, 2 * frames)`` at 100 Hz to ``(frames, ENVELOPE_SIZE)`` at 50 Hz.

    A frame holds the bands of its first 10 ms, then of its second.
    """
    frames = mel.shape[1] // 2
    power = np.exp(mel[:, : 2 * frames].astype(np.float32))
    level = np.log(power.reshape(BANDS, -1, 2 * frames).mean(1) + 1e-12)
    scaled = (np.maximum(level, FLOOR) - CENTRE) / SCALE
    return np.ascontiguousarray(scaled.T.reshape(frames, ENVELOPE_SIZE), np.float32)


def cepstra(mel: FloatArray) -> FloatArray:
    """``CONTENT_MEL`` ``(80, 2 * frames)`` at 100 Hz to ``(frames, CEPSTRA_SIZE)`` at 50 Hz.

    A frame holds those of its first 10 ms, then of its second, each over its spread.
    """
    frames = mel.shape[1] // 2
    audible = np.maximum(mel[:, : 2 * frames].astype(np.float32), FLOOR)
    scaled = _cosines(len(mel)) @ audible / SPREADS[:, None]
    return np.ascontiguousarray(scaled.T.reshape(frames, CEPSTRA_SIZE), np.float32)


def cepstral_change(change: FloatArray, frame_rate: float, content: Content) -> FloatArray:
    """By what a change of a log-power mel changes the ``cepstra`` in ``content``.

    Args:
        change: ``(bands, time)`` in nats, bands as those of ``CONTENT_MEL``.
        frame_rate: of it, frames a second.

    Returns:
        ``(frames of content, CEPSTRA_SIZE)``.
    """
    scaled = (_cosines(len(change)) @ change / SPREADS[:, None]).T
    # Whatever the rate, a frame holds two of ``CONTENT_MEL``, to either side of its centre.
    half = 0.5 / CONTENT_MEL.frame_rate
    rate, frames = content.frame_rate, len(content.features)
    both = [interpolate_frames(scaled, frame_rate, rate, frames, at) for at in (-half, half)]
    return np.concatenate(both, axis=1)


def cepstral_warp(factor: float) -> FloatArray:
    """``(CEPSTRA_SIZE, CEPSTRA_SIZE)``, by which cepstra are multiplied from the right.

    They become those of bands read at ``factor`` times their index, of a shorter vocal tract where
    it is below one: the same factor in Hz below 1 kHz, a growing one above, as bands lie on the mel
    scale.
    """
    bands = CONTENT_MEL.bands
    position = np.clip(np.arange(bands) * factor, 0, bands - 1)
    reading = np.maximum(0, 1 - np.abs(position[:, None] - np.arange(bands)))
    cosines = _cosines(bands) / SPREADS[:, None]
    back = (_cosines(bands) * SPREADS[:, None]).T
    once = (cosines @ reading @ back).T
    out: FloatArray = np.kron(np.eye(2), once).astype(np.float32)
    return out


def random_warp(rng: np.random.Generator, spread: float) -> FloatArray:
    """``cepstral_warp`` by a factor whose log has this spread."""
    return cepstral_warp(float(np.exp(rng.normal(0, spread))))


def envelope_size(envelope: bool, cepstra: bool) -> int:
    """Features that ``with_envelope`` adds."""
    return ENVELOPE_SIZE * envelope + CEPSTRA_SIZE * cepstra


def with_envelope(features: FloatArray, mel: FloatArray, with_cepstra: bool = False) -> FloatArray:
    """``(frames, dims)`` followed by the envelope, and by the cepstra where they are wanted.

    Args:
        mel: ``CONTENT_MEL`` of the same sound, ``(80, at least 2 * frames)``.
    """
    mel = mel[:, : 2 * len(features)]
    parts = [features, band_envelope(mel)]
    return np.concatenate([*parts, cepstra(mel)] if with_cepstra else parts, axis=1)


@lru_cache(maxsize=2)
def _cosines(bands: int) -> FloatArray:
    """``(CEPSTRA, bands)`` orthonormal: the first rows of a DCT-II."""
    out = np.cos(np.pi / bands * np.arange(CEPSTRA)[:, None] * (np.arange(bands) + 0.5))
    out *= np.sqrt(2 / bands)
    out[0] /= np.sqrt(2)
    return np.asarray(out, np.float32)


def harmonic_template(log_f0: FloatArray, voiced: FloatArray) -> FloatArray:
    """Log-mel of a harmonic series over that of white noise of the same power, per frame.

    Each harmonic is a line seen through the Hann window of ``HIFIGAN_MEL``; equal amplitudes.
    Networks add an envelope to it instead of drawing every harmonic by themselves.

    Args:
        log_f0: ``(frames,)`` ln(Hz).
        voiced: ``(frames,)`` in [0, 1]; the template is scaled by it.

    Returns:
        ``(frames, 80)`` float32, natural log.
    """
    table = _template_table()
    position = (np.asarray(log_f0, np.float64) / np.log(2.0) - np.log2(F_MIN_HZ)) * STEPS_PER_OCTAVE
    position = np.clip(position, 0, len(table) - 1)
    before = position.astype(np.int64)
    after = np.minimum(before + 1, len(table) - 1)
    share = (position - before)[:, None].astype(np.float32)
    mixed = table[before] * (1 - share) + table[after] * share
    return np.asarray(mixed * np.asarray(voiced, np.float32)[:, None], np.float32)


@lru_cache(maxsize=1)
def _template_table() -> FloatArray:
    """``(steps, 80)``: the template at every sixtieth of an octave."""
    spec = HIFIGAN_MEL
    bank = mel_filters(spec).astype(np.float64)
    bins = np.arange(spec.n_fft // 2 + 1)
    below = bins * spec.sample_rate < spec.f_max_hz * spec.n_fft
    steps = int(np.ceil(np.log2(F_MAX_HZ / F_MIN_HZ) * STEPS_PER_OCTAVE)) + 1
    rows = np.empty((steps, spec.bands), np.float32)
    for index in range(steps):
        f0 = F_MIN_HZ * 2 ** (index / STEPS_PER_OCTAVE)
        harmonics = np.arange(1, int(spec.f_max_hz / f0) + 2) * (f0 * spec.n_fft / spec.sample_rate)
        magnitude = np.sqrt(_hann_power(bins, harmonics))
        # A line carries the power that white noise spreads over f0: the comb's mean square is 1.
        magnitude /= np.sqrt(np.mean(np.square(magnitude[below])))
        level = (bank @ magnitude) / bank.sum(1)
        rows[index] = np.log(np.maximum(level, HARMONIC_FLOOR))
    rows.flags.writeable = False
    return rows


def _hann_power(bins: NDArray[Any], lines: NDArray[Any]) -> NDArray[Any]:
    """``(bins,)``: the power of lines of equal amplitude, seen through the Hann window.

    A line ``x`` bins away has the magnitude sin(pi x) / (pi x) / (1 - x^2), which is 1 at 0 and one
    half at 1 and -1. All whole bins see the same sine but for its sign, so one a line does.

    Args:
        bins: whole numbers.
        lines: places of the lines, in bins.
    """
    apart = bins[:, None] - lines
    divisor = np.pi * apart * (1 - np.square(apart))
    # Where the formula is 0 / 0, its limit stands.
    limit = np.abs(divisor) < 1e-6
    divisor[limit] = 1
    power = np.square(np.sin(np.pi * (lines % 1)) / divisor)
    power[limit] = np.where(np.abs(apart[limit]) < 0.5, 1.0, 0.25)
    return np.asarray(power.sum(axis=1))
