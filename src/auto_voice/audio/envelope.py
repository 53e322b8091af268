"""How the spectrum moves: in a few wide bands, and in cepstra.

Listeners follow speech from the envelopes of four bands alone (Shannon et al. 1995), and so wide a
band tells little of who speaks. Cepstra (Davis & Mermelstein 1980) hear more of both. So who learns
from them hears them warped at random, as if from a mouth of another size.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from auto_voice.audio.mel import CONTENT_MEL
from auto_voice.types import FloatArray

# Equal shares of ``CONTENT_MEL``: up to about 0.7, 1.9, 4 and 8 kHz.
BANDS = 4
ENVELOPE_SIZE = 2 * BANDS
# Log power that counts as silence at the networks' level; middle and spread of what lies above.
FLOOR, CENTRE, SCALE = -14.0, -10.0, 3.0
# Cosines over ``CONTENT_MEL``: the harmonics of a voice lie beyond, up to an F0 of 300 Hz.
CEPSTRA = 20
CEPSTRA_SIZE = 2 * CEPSTRA
# Of each of them in speech.
SPREADS = np.array(
    [20, 10.5, 5.5, 4.9, 3.9, 3, 2.8, 2.7, 2.3, 2.2, 2, 2, 1.8, 1.8, 1.7, 1.6, 1.5, 1.4, 1.4, 1.3],
    np.float32,
)


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
    heard = np.maximum(mel[:, : 2 * frames].astype(np.float32), FLOOR)
    scaled = _cosines(len(mel)) @ heard / SPREADS[:, None]
    return np.ascontiguousarray(scaled.T.reshape(frames, CEPSTRA_SIZE), np.float32)


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
