"""Signals cut into frames and pieces: in what steps long ones are worked through, and the stretches
of frames in which something holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from auto_voice.types import BoolArray, FloatArray

Sample = TypeVar("Sample", np.float32, np.float64)

# Bounds the memory of a short-time Fourier transform: about 35 MB for 1024 points.
FRAMES_AT_ONCE = 4096
# Mel frames of speech that stay together where a part of a recording stands for all, 2.3 s.
STRETCH_FRAMES = 200


@dataclass(frozen=True)
class Piece:
    """A part of a sequence, and the surroundings that have to be seen to work it out.

    Attributes:
        start, stop: the part; the parts of a sequence follow each other without a gap.
        low, high: the part with its surroundings, as far as the sequence reaches.
    """

    start: int
    stop: int
    low: int
    high: int

    def inside(self, scale: int = 1) -> slice:
        """The part within what was worked out of ``[low, high)``, ``scale`` values each."""
        return slice((self.start - self.low) * scale, (self.stop - self.low) * scale)


def pieces(total: int, size: int, margin: int = 0) -> Iterator[Piece]:
    """``total`` values in parts of ``size`` (the last is shorter), each with ``margin`` around it.

    What looks no further than ``margin`` comes out of the parts as it would of the whole.
    """
    for start in range(0, total, size):
        stop = min(start + size, total)
        yield Piece(start, stop, max(0, start - margin), min(total, stop + margin))


def stretches(total: int, wanted: int, size: int = STRETCH_FRAMES) -> NDArray[np.int64]:
    """``(wanted,)`` places among ``total``, in stretches of ``size`` that are spread evenly.

    Args:
        wanted: at most ``total``.
    """
    count = max(1, -(-wanted // size))
    edges = np.arange(count + 1) * wanted // count
    # What is left out lies around them in equal shares.
    skipped = (np.arange(count) * 2 + 1) * (total - wanted) // (2 * count)
    return np.arange(wanted) + np.repeat(skipped, np.diff(edges))


def framed(samples: FloatArray, size: int, hop: int) -> FloatArray:
    """``(frames, size)``: a view of ``(samples,)`` every ``hop`` samples, whole frames only."""
    if len(samples) < size:
        return np.zeros((0, size), samples.dtype)
    return np.lib.stride_tricks.sliding_window_view(samples, size)[::hop]


def spectra(
    frames: FloatArray, window: NDArray[np.floating]
) -> Iterator[tuple[slice, NDArray[np.complexfloating]]]:
    """Fourier transforms of ``(frames, size)`` times ``window``, some thousand frames at a time.

    Yields:
        which frames, and their ``(frames, size // 2 + 1)`` spectra.
    """
    for piece in pieces(len(frames), FRAMES_AT_ONCE):
        at = slice(piece.start, piece.stop)
        yield at, np.fft.rfft(frames[at] * window)


def filtered(
    samples: NDArray[Sample], response: NDArray[np.complexfloating], size: int, tail: int
) -> NDArray[Sample]:
    """``(samples + tail,)`` convolved with a filter, block by block with overlap and add.

    Args:
        response: ``(size // 2 + 1,)`` of the filter.
        size: of a Fourier transform.
        tail: samples after which the filter has died away, less than ``size``.
    """
    out = np.zeros(len(samples) + tail, samples.dtype)
    for piece in pieces(len(samples), size - tail):
        block = np.fft.irfft(np.fft.rfft(samples[piece.start : piece.stop], size) * response, size)
        stop = piece.stop + tail
        out[piece.start : stop] += block[: stop - piece.start]
    return out


def interpolate_frames(
    values: FloatArray, from_rate: float, to_rate: float, frames: int, later: float = 0.0
) -> FloatArray:
    """``(n, dims)`` at ``from_rate`` to ``(frames, dims)`` at ``to_rate``, linearly.

    Frame ``i`` of either side is centred at ``(i + 0.5) / rate`` seconds; ends are held.

    Args:
        later: seconds from the beginning of ``values`` to that of the result.
    """
    if len(values) == 0:
        return np.zeros((frames, values.shape[1]), np.float32)
    position = ((np.arange(frames) + 0.5) / to_rate + later) * from_rate - 0.5
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
