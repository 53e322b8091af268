"""Change of sample rate, whole or block by block (soxr, "very high" quality).

The length rule is the same for both ways: ``round(samples * to_hz / from_hz)``, halves up, so a
recording keeps its duration to within half a sample.
"""

from __future__ import annotations

from math import gcd
from typing import cast

import numpy as np
import soxr
from numpy.typing import ArrayLike

from auto_voice.types import FloatArray

# Quality of soxr: 28 bits of precision, more than the 24 of float32.
QUALITY = "VHQ"
# Samples at the lower of two rates that the filter is given before a part and after it: beyond the
# first it has died away; the second leaves an error of -90 dB, and costs 5 ms at 16 kHz.
REACH_BEFORE, REACH_AFTER = 256, 80


def resampled_length(samples: int, from_hz: int, to_hz: int) -> int:
    """Samples that ``samples`` at ``from_hz`` become at ``to_hz``."""
    return (2 * samples * to_hz + from_hz) // (2 * from_hz)


def resample(samples: ArrayLike, from_hz: int, to_hz: int) -> FloatArray:
    """``(samples,)`` or ``(samples, channels)`` at ``from_hz`` to the same at ``to_hz``, float32.

    Band-limited and without delay: what lies above half the lower rate is removed.

    Raises:
        ValueError: a rate is not positive.
    """
    x = np.asarray(samples, np.float32)
    _check_rates(from_hz, to_hz)
    if from_hz == to_hz or len(x) == 0:
        return x
    y = cast(FloatArray, soxr.resample(x, from_hz, to_hz, quality=QUALITY))
    return _fit(y, resampled_length(len(x), from_hz, to_hz))


def resampled_part(
    samples: FloatArray, first: int, from_hz: int, to_hz: int, start: int, stop: int
) -> FloatArray:
    """Samples ``[start, stop)`` of what :func:`resample` makes of a whole, from a part of it.

    A stream that is resampled so waits for ``REACH_AFTER`` alone, where soxr's own holds back up
    to 80 ms.

    Args:
        samples: the part, which reaches around what is wanted as :func:`part_needed` says, or to
            the ends of the whole.
        first: place of its first sample in the whole.
    """
    skipped = -first % (from_hz // gcd(from_hz, to_hz))
    low = (first + skipped) * to_hz // from_hz
    found = resample(samples[skipped:], from_hz, to_hz)[start - low : stop - low]
    return _fit(found, stop - start)


def part_needed(from_hz: int, to_hz: int, start: int, stop: int) -> tuple[int, int]:
    """What of a whole :func:`resampled_part` has to be given for ``[start, stop)``."""
    if from_hz == to_hz:
        return start, stop
    lower, step = min(from_hz, to_hz), from_hz // gcd(from_hz, to_hz)
    low = start * from_hz // to_hz - -(-REACH_BEFORE * from_hz // lower) - step
    high = -(-stop * from_hz // to_hz) + -(-REACH_AFTER * from_hz // lower)
    return max(0, low), high


class ResampleStream:
    """A resampler that keeps its filter state from block to block.

    The blocks that :meth:`process` returns, joined, equal :func:`resample` of the joined input;
    single blocks are shorter or longer than the ratio says, because the filter looks ahead.
    """

    def __init__(self, from_hz: int, to_hz: int, channels: int = 1) -> None:
        _check_rates(from_hz, to_hz)
        self.from_hz, self.to_hz = from_hz, to_hz
        self._taken = 0
        self._given = 0
        self._soxr = (
            None
            if from_hz == to_hz
            else soxr.ResampleStream(from_hz, to_hz, channels, dtype="float32", quality=QUALITY)
        )

    def process(self, block: FloatArray, *, last: bool = False) -> FloatArray:
        """The next ``(samples,)`` block, or ``(samples, channels)`` where there are several;
        ``last`` flushes what the filter still holds."""
        if self._soxr is None:
            return block
        self._taken += len(block)
        out = cast(FloatArray, self._soxr.resample_chunk(np.asarray(block, np.float32), last=last))
        if last:
            out = _fit(out, resampled_length(self._taken, self.from_hz, self.to_hz) - self._given)
        self._given += len(out)
        return out


def _check_rates(from_hz: int, to_hz: int) -> None:
    if from_hz <= 0 or to_hz <= 0:
        raise ValueError(f"a sample rate must be positive, not {from_hz} -> {to_hz} Hz")


def _fit(samples: FloatArray, length: int) -> FloatArray:
    """Cut or zero-pad the end: soxr rounds the last sample in its own way."""
    if len(samples) >= length:
        return samples[: max(length, 0)]
    padding = [(0, length - len(samples))] + [(0, 0)] * (samples.ndim - 1)
    return np.pad(samples, padding)
