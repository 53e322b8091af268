"""How loud speech is from moment to moment in a few wide bands: when a consonant bursts or hisses.

Listeners follow speech from the envelopes of four bands alone (Shannon et al. 1995), and so wide a
band tells little of who speaks.
"""

from __future__ import annotations

import numpy as np

from auto_voice.types import FloatArray

BANDS = 4
"""Equal shares of ``CONTENT_MEL``: up to about 0.7, 1.9, 4 and 8 kHz."""
ENVELOPE_SIZE = 2 * BANDS
FLOOR, CENTRE, SCALE = -14.0, -10.0, 3.0
"""Log power that counts as silence at the networks' level; middle and spread of what lies above."""


def band_envelope(mel: FloatArray) -> FloatArray:
    """``CONTENT_MEL`` ``(80, 2 * frames)`` at 100 Hz to ``(frames, ENVELOPE_SIZE)`` at 50 Hz.

    A frame holds the bands of its first 10 ms, then of its second.
    """
    frames = mel.shape[1] // 2
    power = np.exp(mel[:, : 2 * frames].astype(np.float32))
    level = np.log(power.reshape(BANDS, -1, 2 * frames).mean(1) + 1e-12)
    scaled = (np.maximum(level, FLOOR) - CENTRE) / SCALE
    return np.ascontiguousarray(scaled.T.reshape(frames, ENVELOPE_SIZE), np.float32)


def with_envelope(features: FloatArray, mel: FloatArray) -> FloatArray:
    """``(frames, dims)`` followed by the envelope: ``(frames, dims + ENVELOPE_SIZE)``.

    Args:
        mel: ``CONTENT_MEL`` of the same sound, ``(80, at least 2 * frames)``.
    """
    return np.concatenate([features, band_envelope(mel[:, : 2 * len(features)])], axis=1)
