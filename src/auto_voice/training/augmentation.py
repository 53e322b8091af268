"""Perturbations of log-mel spectrograms: other voices, rooms, microphones and phones.

All work on ``CONTENT_MEL`` frames, so that an epoch costs no signal processing. Amounts are in
dB and converted to the natural log of power.
"""

from __future__ import annotations

import numpy as np

from auto_voice.types import FloatArray

LOG_POWER_PER_DB = float(np.log(10.0) / 10.0)


def warp_formants(mel: FloatArray, factor: float) -> FloatArray:
    """``(bands, frames)`` with its bands read at ``factor`` times their index: formants move."""
    bands = len(mel)
    position = np.clip(np.arange(bands) * factor, 0, bands - 1)
    before = position.astype(np.int64)
    share = (position - before).astype(np.float32)[:, None]
    after = np.minimum(before + 1, bands - 1)
    return np.asarray(mel[before] * (1 - share) + mel[after] * share, np.float32)


def equalise(mel: FloatArray, rng: np.random.Generator, spread_db: float) -> FloatArray:
    """Adds a smooth random response: four cosines over the bands, and an overall gain."""
    bands = len(mel)
    order = np.arange(5)[:, None]
    basis = np.cos(np.pi * order * (np.arange(bands) + 0.5) / bands)
    amounts = rng.normal(0, spread_db, (5, 1)) / (1 + order)
    response = LOG_POWER_PER_DB * (basis * amounts).sum(0)[:, None]
    return np.asarray(mel + response, np.float32)


def add_noise(mel: FloatArray, rng: np.random.Generator, snr_db: float) -> FloatArray:
    """Adds stationary noise of a random tilt, ``snr_db`` under the loud frames."""
    bands = len(mel)
    loud = np.quantile(mel.mean(0), 0.9)
    tilt = rng.uniform(-20, 5) * np.linspace(-0.5, 0.5, bands)[:, None]
    level = loud + LOG_POWER_PER_DB * (tilt - snr_db)
    # The power of one noise frame is exponentially distributed; averaging over a band narrows it.
    flutter = rng.normal(0, 0.35, mel.shape)
    noisy = np.logaddexp(mel, level + flutter)
    return np.asarray(noisy, dtype=np.float32)


def limit_band(mel: FloatArray, top_band: int, floor: float) -> FloatArray:
    """Nothing above ``top_band``: what a telephone passes."""
    cut: FloatArray = mel.copy()
    cut[top_band:] = floor
    return cut


def perturb(mel: FloatArray, rng: np.random.Generator, strength: float = 1.0) -> FloatArray:
    """A random mixture of all of them; ``strength`` 0 leaves the input alone."""
    if strength <= 0:
        return mel
    out = warp_formants(mel, float(np.exp(rng.normal(0, 0.07 * strength))))
    out = equalise(out, rng, 5.0 * strength)
    if rng.random() < 0.15 * strength:
        out = limit_band(out, int(rng.integers(52, 66)), float(np.log(1e-8)))
    if rng.random() < 0.5 * strength:
        out = add_noise(out, rng, float(rng.uniform(8, 40)))
    return out
