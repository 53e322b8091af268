"""A recording that is read by position: in memory, or on disk where hours would not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np

from auto_voice.types import FloatArray

BYTES_PER_SAMPLE = 4


class Tape(Protocol):
    """One channel of float32 samples at ``sample_rate`` Hz."""

    sample_rate: int

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> FloatArray:
        """Samples ``[start, stop)``, fewer at the end."""
        ...


class MemoryTape:
    """A tape over an array ``(samples,)``."""

    def __init__(self, samples: FloatArray, sample_rate: int) -> None:
        self.samples, self.sample_rate = samples, sample_rate

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, start: int, stop: int) -> FloatArray:
        return self.samples[start:stop]


class FileTape:
    """A tape over a file of raw little-endian float32 that can grow.

    It is read with plain reads, not mapped: mapped pages would count as this process's memory.
    """

    def __init__(self, path: Path, sample_rate: int) -> None:
        self.path, self.sample_rate = path, sample_rate
        self._length = path.stat().st_size // BYTES_PER_SAMPLE if path.exists() else 0

    def __len__(self) -> int:
        return self._length

    def read(self, start: int, stop: int) -> FloatArray:
        start, stop = max(0, start), min(stop, self._length)
        with self.path.open("rb") as file:
            file.seek(start * BYTES_PER_SAMPLE)
            data = file.read(max(0, stop - start) * BYTES_PER_SAMPLE)
        return np.frombuffer(data, "<f4").astype(np.float32, copy=False)

    def append(self, samples: FloatArray) -> None:
        """Add ``(samples,)`` at the end."""
        with self.path.open("ab") as file:
            file.write(np.ascontiguousarray(samples, "<f4").tobytes())
        self._length += len(samples)

    def truncate(self, length: int) -> None:
        """Forget what lies beyond ``length`` samples."""
        with self.path.open("ab") as file:
            file.truncate(length * BYTES_PER_SAMPLE)
        self._length = length


class Section:
    """Samples ``[start, stop)`` of another tape."""

    def __init__(self, tape: Tape, start: int, stop: int) -> None:
        self.tape, self.start, self.stop = tape, start, stop
        self.sample_rate = tape.sample_rate

    def __len__(self) -> int:
        return self.stop - self.start

    def read(self, start: int, stop: int) -> FloatArray:
        return self.tape.read(self.start + max(0, start), min(self.start + stop, self.stop))
