"""Cutting a long recording into pieces that join again without a seam.

A piece is rendered with context on both sides and only its core is kept, so a network whose
receptive field is shorter than the context gives what it would have given on the whole. Cores meet
in the quietest spot near the longest allowed length, where a difference is heard least. Context
starts on a grid on which every stage has a frame boundary, so no stage sees its frames shifted.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import gcd, lcm

import numpy as np
from numpy.typing import NDArray

from auto_voice.types import FloatArray

# At least this much is rendered on each side of a core and thrown away.
CONTEXT_SECONDS = 1.5
LEVEL_HOP_SECONDS = 0.01
HOP = Fraction(1, 100)
LEVEL_WINDOW_HOPS = 11


@dataclass(frozen=True)
class Chunk:
    """A piece, in mel frames: ``[start, stop)`` is kept of ``[context_start, context_stop)``."""

    start: int
    stop: int
    context_start: int
    context_stop: int


def common_period(*rates_hz: Fraction) -> Fraction:
    """The shortest time, in seconds, that is a whole number of frames at each of the rates.

    Mel frames at 22 050 / 256 Hz, content at 50, pitch at 62.5 and samples at 16 000 Hz meet every
    5.12 s.
    """
    periods = [1 / rate for rate in rates_hz]
    # In lowest terms, the least common multiple of a/b and c/d is lcm(a, c) / gcd(b, d).
    numerator = lcm(*(period.numerator for period in periods))
    denominator = 0
    for period in periods:
        denominator = gcd(denominator, period.denominator)
    return Fraction(numerator, denominator)


def plan_chunks(
    samples: FloatArray,
    sample_rate: int,
    *,
    frames: int,
    frame_rate: Fraction,
    grid_frames: int,
    longest_seconds: float,
    context_seconds: float = CONTEXT_SECONDS,
) -> list[Chunk]:
    """The pieces of ``(samples,)``, whose cores cover ``[0, frames)`` once and in order.

    Args:
        frames: mel frames of the whole.
        grid_frames: context starts at multiples of it.
        longest_seconds: of a core; a shorter recording is one piece.
    """
    levels = hop_energies(samples, sample_rate)
    return plan_from_energies(
        levels,
        len(samples) / sample_rate,
        frames=frames,
        frame_rate=frame_rate,
        grid_frames=grid_frames,
        longest_seconds=longest_seconds,
        context_seconds=context_seconds,
    )


def plan_from_energies(
    energies: NDArray[np.float64],
    seconds: float,
    *,
    frames: int,
    frame_rate: Fraction,
    grid_frames: int,
    longest_seconds: float,
    context_seconds: float = CONTEXT_SECONDS,
) -> list[Chunk]:
    """:func:`plan_chunks` of a recording of which only ``hop_energies`` are at hand."""
    cuts = [round(Fraction(at) * HOP * frame_rate) for at in
            quiet_hops(energies, seconds, longest_seconds)]  # fmt: skip
    edges = [0, *(cut for cut in cuts if 0 < cut < frames), frames]
    return with_context(
        edges, frames, grid_frames=grid_frames, context=int(np.ceil(context_seconds * frame_rate))
    )


def with_context(edges: list[int], frames: int, *, grid_frames: int, context: int) -> list[Chunk]:
    """Chunks between neighbouring ``edges``, each with at least ``context`` frames around it."""
    return [
        Chunk(
            start,
            stop,
            max(0, (start - context) // grid_frames * grid_frames),
            min(frames, stop + context),
        )
        for start, stop in pairwise(edges)
    ]


def halved(edges: list[int]) -> list[int]:
    """``edges`` with one more in the middle of every piece that is as long as the longest half."""
    longest = max(stop - start for start, stop in pairwise(edges))
    out = [edges[0]]
    for start, stop in pairwise(edges):
        if stop - start > longest // 2:
            out.append((start + stop) // 2)
        out.append(stop)
    return out


def hop_energies(samples: FloatArray, sample_rate: int) -> NDArray[np.float64]:
    """``(hops,)`` sums of squares over the whole hundredths of a second of ``(samples,)``."""
    hop = hop_size(sample_rate)
    framed = samples[: len(samples) // hop * hop].reshape(-1, hop)
    return np.asarray(np.einsum("ij,ij->i", framed, framed, dtype=np.float64))


def hop_size(sample_rate: int) -> int:
    """Samples in a hundredth of a second."""
    return max(1, round(LEVEL_HOP_SECONDS * sample_rate))


def quiet_hops(energies: NDArray[np.float64], seconds: float, longest_seconds: float) -> list[int]:
    """Positions, in hops, that cut a recording into pieces of at most ``longest_seconds``.

    Each lies at the quietest tenth of a second in the last third of what is allowed.
    """
    longest = int(longest_seconds * 100)
    hops = len(energies)
    if seconds <= longest_seconds or hops <= longest:
        return []
    level = np.convolve(energies, np.ones(LEVEL_WINDOW_HOPS) / LEVEL_WINDOW_HOPS, mode="same")
    cuts: list[int] = []
    done = 0
    while hops - done > longest:
        low = done + longest * 2 // 3
        done = low + int(np.argmin(level[low : done + longest]))
        cuts.append(done)
    return cuts


class Joiner:
    """Rendered pieces in, finished samples out, with memory for one piece.

    Neighbours fade linearly over one frame before and one after the cut; equal audio on both sides
    comes out unchanged.

    Args:
        hop_samples: of a frame.
        samples: of the whole.
        done: samples that came out already, when an interrupted job goes on.
        pending: what was faded in after them, ``(samples,)``.
    """

    def __init__(
        self, hop_samples: int, samples: int, done: int = 0, pending: FloatArray | None = None
    ) -> None:
        self.hop, self.samples, self.done = hop_samples, samples, done
        self.pending = np.zeros(0, np.float32) if pending is None else pending

    def push(self, chunk: Chunk, audio: FloatArray) -> FloatArray:
        """The samples that are finished once ``chunk``, the next one, is there.

        Args:
            audio: of the chunk's whole context, ``hop_samples`` a frame.
        """
        hop = self.hop
        first, last = chunk.start == 0, chunk.stop * hop >= self.samples
        low = 0 if first else (chunk.start - 1) * hop
        high = self.samples if last else min(self.samples, (chunk.stop + 1) * hop)
        offset = low - chunk.context_start * hop
        core = np.array(audio[offset : offset + high - low], dtype=np.float32)
        fade = (np.arange(2 * hop, dtype=np.float32) + 0.5) / (2 * hop)
        if not first:
            core[: len(fade)] *= fade[: len(core)]
        if not last:
            # A cut less than a frame before the end leaves the fade unfinished; so does the piece
            # after it, and the two still add up to one.
            core[(chunk.stop - 1) * hop - low :] *= fade[::-1][: high - (chunk.stop - 1) * hop]
        joined = np.zeros(max(high - self.done, len(self.pending)), np.float32)
        joined[: len(self.pending)] = self.pending
        joined[low - self.done : high - self.done] += core
        ready = len(joined) if last else (chunk.stop - 1) * hop - self.done
        self.done, self.pending = self.done + ready, joined[ready:]
        return joined[:ready]


def join(pieces: Iterable[tuple[Chunk, FloatArray]], hop_samples: int, samples: int) -> FloatArray:
    """Cross-fade rendered pieces, in order, into ``(samples,)`` float32; see :class:`Joiner`."""
    joiner = Joiner(hop_samples, samples)
    ready = [joiner.push(chunk, audio) for chunk, audio in pieces]
    return np.concatenate(ready) if ready else np.zeros(0, np.float32)


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is what numpy or ONNX Runtime raise where some memory is full."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and any(s in str(error).lower() for s in ("out of memory", "can't allocate memory"))
    )


def release_memory() -> None:
    """Give back what the C library keeps for later.

    Pieces differ in length, so what one leaves free is not what the next one wants, and over hours
    the holes would add up.
    """
    import ctypes

    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
