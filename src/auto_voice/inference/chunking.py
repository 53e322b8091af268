"""Cutting a long recording into pieces that join again without a seam.

A piece is rendered with context on both sides and only its core is kept, so a network whose
receptive field is shorter than the context gives what it would have given on the whole. Cores meet
in the quietest spot near the longest allowed length, where a difference is heard least. Context
starts on a grid on which every stage has a frame boundary, so no stage sees its frames shifted.

Content features are cut on their own: a network that attends to its whole input gives other
features for a piece than for the whole. So a recording longer than one window is always encoded in
windows whose places depend on the recording alone, with a second of overlap on each side that is
thrown away. However the later stages cut the recording, they get the same features.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import gcd, lcm
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from auto_voice.errors import ModelLoadError
from auto_voice.inference.inputs import SampleSource
from auto_voice.models.base import ContentEncoder, PieceEncoder
from auto_voice.models.runtime.sessions import trim_heap
from auto_voice.types import Content, FloatArray

# At least this much is rendered on each side of a core and thrown away.
CONTEXT_SECONDS = 1.5
# Cuts are looked for among hops of a hundredth of a second: no pause between words is shorter.
LEVEL_HOP_SECONDS = 0.01
HOP = Fraction(1, 100)
# The level at a cut is the mean over 0.11 s, so that the closure of a plosive is no pause.
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
    energies: NDArray[np.floating],
    seconds: float,
    *,
    frames: int,
    frame_rate: Fraction,
    grid_frames: int,
    longest_seconds: float,
) -> list[Chunk]:
    """The pieces of a recording, whose cores cover ``[0, frames)`` once and in order.

    Args:
        energies: of its hops, as :func:`hop_energies` gives them.
        seconds: of the whole.
        frames: mel frames of the whole.
        grid_frames: context starts at multiples of it.
        longest_seconds: of a core; a shorter recording is one piece.
    """
    cuts = [round(Fraction(at) * HOP * frame_rate) for at in
            quiet_hops(energies, seconds, longest_seconds)]  # fmt: skip
    edges = [0, *(cut for cut in cuts if 0 < cut < frames), frames]
    return with_context(
        edges, frames, grid_frames=grid_frames, context=int(np.ceil(CONTEXT_SECONDS * frame_rate))
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


def quiet_hops(energies: NDArray[np.floating], seconds: float, longest_seconds: float) -> list[int]:
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
    gc.collect()
    trim_heap()


log = logging.getLogger(__name__)

T = TypeVar("T")

# 24 s at 50 Hz: Whisper hears 28 s at most, whose attention takes half as much memory again.
WINDOW_FRAMES = 1200
# One second at 50 Hz that is thrown away on each side of a window: the features near its ends lack
# context.
MARGIN_FRAMES = 50
# The shortest window, in frames: half of it is margins.
LEAST_FRAMES = 4 * MARGIN_FRAMES
# So many windows are kept whatever their size, because a piece lies across two of them.
KEPT_WINDOWS = 2
# Bytes of windows that were encoded for the mean and will be read: a quarter of an hour of 176
# values a frame, less than four minutes of 768. The windows beyond it are encoded twice.
KEPT_BYTES = 32 << 20


class ContentWindows:
    """Content features of ``gain * source`` in the memory of two windows and ``KEPT_BYTES``.

    Args:
        encoder: computes the features.
        source: the recording, at the encoder's rate.
        gain: brings it to the level that the networks were trained at.
    """

    def __init__(self, encoder: ContentEncoder, source: SampleSource, gain: float) -> None:
        self.encoder, self.source, self.gain = encoder, source, gain
        self.window_frames = WINDOW_FRAMES
        self._per_frame = Fraction(encoder.sample_rate) / Fraction(encoder.frame_rate)
        self._encoded: dict[int, FloatArray] = {}
        self._reading = 0
        self._mean: FloatArray | None = None

    def mean(self) -> FloatArray | None:
        """``(dims,)`` over the whole; None where no stage needs it.

        Raises:
            ModelLoadError: the memory does not suffice for the shortest window either.
        """
        if self._mean is None:
            self._mean = self._within_memory(self._find_mean)
        return self._mean

    def read(self, start: int, stop: int | None, mean: FloatArray | None = None) -> Content:
        """Frames ``[start, stop)``, to the end if ``stop`` is None.

        Args:
            mean: of the whole, where it is known.

        Raises:
            ModelLoadError: as :meth:`mean`.
        """
        self._mean = self._mean if mean is None else mean
        return self._within_memory(lambda: self._read(start, stop))

    def forget(self) -> None:
        """Drop the windows that are kept; those that are read again are encoded again."""
        self._encoded.clear()

    def _read(self, start: int, stop: int | None) -> Content:
        encoder = self.encoder
        parts: list[FloatArray] = []
        for index in range(self._count):
            low, high = self._core(index)
            if (stop is not None and low >= stop) or (high is not None and high <= start):
                continue
            if not parts:
                self._reading = index
            here = max(0, start - low)
            there = None if stop is None else max(0, stop - low)
            parts.append(self._features(index)[here:there])
        features = np.concatenate(parts) if parts else np.zeros((0, encoder.dims), np.float32)
        mean = self.mean()
        if mean is None or not isinstance(encoder, PieceEncoder):
            return Content(features, encoder.frame_rate, encoder.space)
        return encoder.centred(features, mean)

    def _find_mean(self) -> FloatArray | None:
        if self._count == 1 or not isinstance(self.encoder, PieceEncoder):
            return None
        total: NDArray[np.float64] | None = None
        count = 0
        for index in range(self._count):
            features = self._features(index)
            part = features.sum(axis=0, dtype=np.float64)
            total = part if total is None else total + part
            count += len(features)
            release_memory()
        return None if total is None else (total / max(1, count)).astype(np.float32)

    @property
    def _frames(self) -> int:
        return int(len(self.source) / self._per_frame)

    @property
    def _step(self) -> int:
        return self.window_frames - 2 * MARGIN_FRAMES

    @property
    def _count(self) -> int:
        """Windows; a last one that would hold nothing but margins is left to the one before."""
        if self._frames <= self.window_frames:
            return 1
        return -(-(self._frames - 2 * MARGIN_FRAMES) // self._step)

    def _core(self, index: int) -> tuple[int, int | None]:
        """The frames that a window gives; the last one's reach to the end."""
        low = index * self._step + MARGIN_FRAMES if index else 0
        last = index == self._count - 1
        return low, None if last else (index + 1) * self._step + MARGIN_FRAMES

    def _features(self, index: int) -> FloatArray:
        """``(frames, dims)`` of a window's core; with the mean left in where there are several."""
        if index in self._encoded:
            return self._encoded[index]
        start = index * self._step
        low, high = self._core(index)
        stop = None if high is None else start + self.window_frames
        end = len(self.source) if stop is None else int(stop * self._per_frame)
        samples = self.source.read(int(start * self._per_frame), end)
        samples = (samples * np.float32(self.gain)).astype(np.float32)
        if self._count > 1:
            trim_heap()  # Attention over a whole window comes on top of what others left free.
        if self._count > 1 and isinstance(self.encoder, PieceEncoder):
            features = self.encoder.encode_piece(samples)
        else:
            features = self.encoder.encode(samples).features
        kept = features[low - start : None if high is None else high - start]
        features = np.array(kept)  # A copy, or the margins would stay, too.
        self._keep(index, features)
        return features

    def _keep(self, index: int, features: FloatArray) -> None:
        kept = self._encoded
        kept[index] = features
        while len(kept) > KEPT_WINDOWS and sum(f.nbytes for f in kept.values()) > KEPT_BYTES:
            # What has been read goes first, then what will be read last.
            first = min(kept)
            del kept[first if first < self._reading else max(kept)]

    def _within_memory(self, action: Callable[[], T]) -> T:
        """``action``, with shorter windows where the memory does not suffice for these."""
        while True:
            try:
                return action()
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                self._shorten(error)

    def _shorten(self, error: BaseException) -> None:
        window = min(self.window_frames, self._frames)
        if window // 2 < LEAST_FRAMES:
            raise ModelLoadError(
                "The memory does not suffice to encode even a few seconds at a time; close other "
                "programs or choose --device cpu."
            ) from error
        self.window_frames = window // 2
        self.forget()
        self._reading = 0
        seconds = self.window_frames / self.encoder.frame_rate
        log.warning("the memory is full: the content is encoded in windows of %.1f s", seconds)
        release_memory()
