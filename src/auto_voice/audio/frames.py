"""Frame sequences at one rate, read at another."""

from __future__ import annotations

import numpy as np

from auto_voice.types import FloatArray


def interpolate_frames(
    values: FloatArray, from_rate: float, to_rate: float, frames: int
) -> FloatArray:
    """``(n, dims)`` at ``from_rate`` to ``(frames, dims)`` at ``to_rate``, linearly.

    Frame ``i`` of either side is centred at ``(i + 0.5) / rate`` seconds; ends are held.
    """
    if len(values) == 0:
        return np.zeros((frames, values.shape[1]), np.float32)
    position = (np.arange(frames) + 0.5) / to_rate * from_rate - 0.5
    position = np.clip(position, 0, len(values) - 1)
    before = position.astype(np.int64)
    after = np.minimum(before + 1, len(values) - 1)
    share = (position - before).astype(np.float32)[:, None]
    mixed: FloatArray = values[before] * (1 - share) + values[after] * share
    return mixed.astype(np.float32)
