"""Frame sequences: read at another rate, and the stretches in which something holds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from auto_voice.types import BoolArray, FloatArray


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


def runs(flags: BoolArray) -> NDArray[np.int64]:
    """``(runs, 2)``: where each stretch of true ``(frames,)`` starts and where it has ended."""
    return np.flatnonzero(np.diff(flags, prepend=False, append=False)).reshape(-1, 2)


def sustained(flags: BoolArray, length: int) -> BoolArray:
    """``(frames,)``: flags that belong to a run of at least ``length``."""
    kept = np.zeros_like(flags)
    for start, stop in runs(flags):
        kept[start:stop] = stop - start >= length
    return kept
