"""A linear map from the mels that a converter draws of a voice to those of the voice itself.

What a converter misses of a voice it also misses when it draws the reference from the reference's
own content and pitch, and there the truth is known. So the map is estimated by least squares on
the reference, without training, as recognisers were once made to know a speaker (maximum
likelihood linear regression, Leggetter & Woodland 1995).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from auto_voice.types import FloatArray

# Share of the frames that are quieter and tell of the room.
QUIET_SHARE = 0.3
# Frames of speech from which on its own mean and spread count for more than the converter's.
PRIOR_FRAMES = 40


class Correction(NamedTuple):
    """Mels ``(frames, bands)`` become ``(mel - centre) @ weight + offset``.

    Attributes:
        centre: ``(bands,)`` mean of what is drawn of the reference.
        weight: ``(bands, bands)``.
        offset: ``(bands,)``.
    """

    centre: FloatArray
    weight: FloatArray
    offset: FloatArray

    def __call__(self, mel: FloatArray) -> FloatArray:
        """``(frames, bands)``, natural log."""
        return np.asarray((mel - self.centre) @ self.weight + self.offset, np.float32)


def loud(mel: FloatArray) -> NDArray[np.bool_]:
    """``(frames,)``: which of ``(frames, bands)`` tell of the voice."""
    loudness = mel.mean(1)
    found: NDArray[np.bool_] = loudness >= np.quantile(loudness, QUIET_SHARE)
    return found


def estimate(drawn: FloatArray, true: FloatArray, ridge: float) -> Correction:
    """From two mels ``(frames, bands)`` of one speech, natural log.

    Least squares draws towards the mean, so half of the spread (in dB) that it takes from a band
    is given back. The less speech there is, the less is changed.

    Args:
        drawn: what the converter makes of the speech.
        ridge: of the regression, in nats² times frames.
    """
    speech = loud(true)
    known, wanted = (mel[speech].astype(np.float64) for mel in (drawn, true))
    centre, mean = known.mean(0), wanted.mean(0)
    x, y = known - centre, wanted - mean
    prior = ridge * np.eye(x.shape[1])
    weight = np.eye(x.shape[1]) + np.linalg.solve(x.T @ x + prior, x.T @ (y - x))
    share = len(x) / (len(x) + PRIOR_FRAMES)
    weight *= ((y.std(0) + 1e-3) / ((x @ weight).std(0) + 1e-3)) ** (0.5 * share)
    offset = centre + share * (mean - centre)
    return Correction(*(values.astype(np.float32) for values in (centre, weight, offset)))
