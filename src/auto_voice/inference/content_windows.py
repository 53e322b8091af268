"""Content features of a recording of any length, read by position.

A network that attends to its whole input gives other features for a piece than for the whole. So a
recording longer than one window is always encoded in windows whose places depend on the recording
alone, with a second of overlap on each side that is thrown away. However the later stages cut the
recording, they get the same features.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from fractions import Fraction
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from auto_voice.errors import ModelLoadError
from auto_voice.inference.chunking import out_of_memory, release_memory
from auto_voice.inference.inputs import SampleSource
from auto_voice.models.base import ContentEncoder, PieceEncoder
from auto_voice.types import Content, FloatArray

log = logging.getLogger(__name__)

T = TypeVar("T")

# 28 s at 50 Hz: the longest input of Whisper, and enough for every other encoder.
WINDOW_FRAMES = 1400
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
