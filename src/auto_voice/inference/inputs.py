"""Recordings in whatever form a user hands them over: checked, one channel, read by position."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import UnsupportedOperation
from numbers import Number
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeAlias, Union, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from auto_voice.audio.io import MAX_SECONDS, probe
from auto_voice.audio.reading import (
    HIGHEST_PEAK,
    HIGHEST_RATE,
    LOWEST_RATE,
    MOST_CHANNELS,
    SILENCE_PEAK,
    RecordingReader,
    dbfs,
)
from auto_voice.audio.resample import ResampleStream, resample
from auto_voice.errors import (
    AudioContentError,
    AudioError,
    AudioFormatError,
    AudioOutputError,
    ConfigError,
    reason,
)
from auto_voice.types import FloatArray, Voice, Waveform

# A file by its path, its bytes or an open binary stream; a waveform; or an array or a tensor of
# samples, whose rate is given apart.
AudioInput: TypeAlias = Union[str, "PathLike[str]", bytes, BinaryIO, Waveform, ArrayLike]
# A voice, a voice file, one or several recordings, or a bare 256-d embedding.
Target: TypeAlias = Union[Voice, AudioInput, "Sequence[AudioInput | Voice]"]

# Shorter recordings hold no syllable.
SHORTEST_SECONDS = 0.1
# Where the mean of the channels holds less than this share of their power, they cancel out.
CANCELLED = 1e-2
# Frames that are decoded at once.
BLOCK_FRAMES = 1 << 16
# Of the float32 samples that a conversion keeps on disk.
BYTES_PER_SAMPLE = 4


class SampleSource(Protocol):
    """One channel of float32 samples at ``sample_rate`` Hz, read by position."""

    sample_rate: int

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> FloatArray:
        """Samples ``[start, stop)``, fewer at the end."""
        ...


class SampleStore(SampleSource, Protocol):
    """A sample source that grows."""

    def append(self, samples: FloatArray) -> None:
        """Add ``(samples,)`` at the end."""
        ...


class MemorySamples:
    """Samples in memory, ``(samples,)``."""

    def __init__(self, samples: FloatArray, sample_rate: int) -> None:
        self.sample_rate = sample_rate
        self._parts = [samples]
        self._length = len(samples)

    def __len__(self) -> int:
        return self._length

    @property
    def samples(self) -> FloatArray:
        """All of them, ``(samples,)``."""
        if len(self._parts) > 1:
            self._parts = [np.concatenate(self._parts)]
        return self._parts[0]

    def read(self, start: int, stop: int) -> FloatArray:
        return self.samples[start:stop]

    def append(self, samples: FloatArray) -> None:
        self._parts.append(samples)
        self._length += len(samples)


class FileSamples:
    """Samples in a file of raw little-endian float32.

    It is read with plain reads, not mapped: mapped pages would count as this process's memory.

    Raises:
        AudioOutputError: the disk fails or is full; what is there stays.
    """

    def __init__(self, path: Path, sample_rate: int) -> None:
        self.path, self.sample_rate = path, sample_rate
        with disk_errors(path):
            self._length = path.stat().st_size // BYTES_PER_SAMPLE if path.exists() else 0

    def __len__(self) -> int:
        return self._length

    def read(self, start: int, stop: int) -> FloatArray:
        start, stop = max(0, start), min(stop, self._length)
        with disk_errors(self.path), self.path.open("rb") as file:
            file.seek(start * BYTES_PER_SAMPLE)
            data = file.read(max(0, stop - start) * BYTES_PER_SAMPLE)
        return np.frombuffer(data, "<f4").astype(np.float32, copy=False)

    def append(self, samples: FloatArray) -> None:
        with disk_errors(self.path), self.path.open("ab") as file:
            file.write(np.ascontiguousarray(samples, "<f4").tobytes())
        self._length += len(samples)

    def truncate(self, length: int) -> None:
        """Drop what lies beyond ``length`` samples."""
        with disk_errors(self.path), self.path.open("ab") as file:
            file.truncate(length * BYTES_PER_SAMPLE)
        self._length = length


class Section:
    """Samples ``[start, stop)`` of another sample source."""

    def __init__(self, whole: SampleSource, start: int, stop: int) -> None:
        self.whole, self.start, self.stop = whole, start, stop
        self.sample_rate = whole.sample_rate

    def __len__(self) -> int:
        return self.stop - self.start

    def read(self, start: int, stop: int) -> FloatArray:
        return self.whole.read(self.start + max(0, start), min(self.start + stop, self.stop))


@dataclass(frozen=True)
class SourceFacts:
    """What is known of a source once it was read to its end.

    Attributes:
        samples: of one channel, at ``sample_rate`` Hz, as it was given.
        notes: on the recording, one phrase each.
    """

    samples: int
    sample_rate: int
    notes: tuple[str, ...] = ()


class Source:
    """A recording that is converted, read once from beginning to end.

    Args:
        audio: what the user handed over.
        sample_rate: Hz, of a bare array; files and waveforms carry their own.
        allow_truncated: take what is there of a truncated file, with a note.
        memory_seconds: decode a recording of at most this length at once, and a longer one in
            blocks while it is read.

    Raises:
        AudioError: a file that cannot be read; samples that are empty, too short, silent or not
            finite, as far as that is known at once.
        ConfigError: an array without a rate or of another shape.
    """

    def __init__(
        self,
        audio: AudioInput,
        sample_rate: float | None = None,
        *,
        allow_truncated: bool = False,
        memory_seconds: float = float("inf"),
    ) -> None:
        self._allow_truncated = allow_truncated
        self._waveform: Waveform | None = None
        self._file: str | PathLike[str] | bytes | None = None
        if isinstance(audio, (str, PathLike)):
            # Unlike Path.expanduser it leaves a ~ without a home to whoever reads the file.
            self._file = audio = os.path.expanduser(audio)  # noqa: PTH111
        elif (data := _encoded(audio)) is not None:
            self._file = audio = data
        self.seconds: float | None = None
        if self._file is not None and np.isfinite(memory_seconds):
            self.seconds = probe(self._file).seconds
        if self._file is None or memory_seconds >= (self.seconds or np.inf):
            self._waveform = as_waveform(
                audio, sample_rate, "the source", allow_truncated=allow_truncated
            )
            self.seconds = self._waveform.seconds
        self.facts: SourceFacts | None = None

    @property
    def in_memory(self) -> bool:
        """Whether the recording is decoded already."""
        return self._waveform is not None

    def identity(self, folder: Path) -> str:
        """A text that changes when the recording does; a file is known by path, size and time.

        Args:
            folder: from which the path is seen, since machines mount one folder in several places.

        Raises:
            AudioFormatError: the file cannot be looked at any more.
        """
        if isinstance(self._file, (str, PathLike)):
            with _reading(os.fspath(self._file)):
                stat = Path(self._file).stat()
            where = os.fspath(Path(self._file).resolve())
            with suppress(ValueError):  # another drive of Windows
                where = os.path.relpath(where, folder.resolve())
            return repr((where, stat.st_size, stat.st_mtime_ns))
        data = self._file if self._waveform is None else self._waveform.samples.tobytes()
        return hashlib.sha256(data or b"").hexdigest()

    def blocks(self, rate_hz: int) -> Iterator[FloatArray]:
        """``(samples,)`` blocks at ``rate_hz``; after the last of them ``facts`` is known.

        Raises:
            AudioError: the recording is damaged, too short or silent.
        """
        if self._waveform is not None:
            wave = self._waveform
            yield resample(wave.samples, wave.sample_rate, rate_hz)
            self.facts = SourceFacts(len(wave.samples), wave.sample_rate, wave.notes)
            return
        assert self._file is not None
        what = self._file if isinstance(self._file, (str, PathLike)) else "the source"
        with (
            _reading(os.fspath(what)),
            RecordingReader(self._file, allow_truncated=self._allow_truncated) as recording,
        ):
            resampler = ResampleStream(recording.sample_rate, rate_hz)
            for block in recording.blocks(BLOCK_FRAMES, None, None):
                yield resampler.process(block)
            yield resampler.process(np.zeros(0, np.float32), last=True)
            frames, rate = recording.frames_read, recording.sample_rate
            _check(f"the source {recording.name}", frames, rate, recording.peak)
            self.facts = SourceFacts(frames, rate, recording.notes())


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise AudioOutputError for what the system says of a file that a conversion keeps."""
    try:
        yield
    except OSError as error:
        raise AudioOutputError(
            f"{path} cannot be used ({reason(error)}); what is done is kept where there was room "
            "for it, and the same command goes on from there."
        ) from error


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Tells the system's errors of a source from those of the output, which may come together."""
    try:
        yield
    except OSError as error:
        if isinstance(error, AudioError):
            raise
        raise AudioFormatError(
            f"{name} cannot be read ({error.strerror or error}); check the disk that it is on."
        ) from error


def as_waveform(
    audio: AudioInput, sample_rate: float | None, what: str, *, allow_truncated: bool = False
) -> Waveform:
    """One channel of finite, audible samples.

    Args:
        sample_rate: Hz, of a bare array; files and waveforms carry their own.
        what: the recording's part in the sentence of an error, e.g. ``the source``.
        allow_truncated: take what is there of a truncated file, with a note.

    Raises:
        AudioError: a file that cannot be read; samples that are empty, too short, silent or not
            finite.
        ConfigError: an array without a rate, of another shape or type, or a rate that cannot be.
    """
    audio = getattr(audio, "audio", audio)  # The result of a conversion may be converted again.
    data = audio if isinstance(audio, (str, PathLike)) else _encoded(audio)
    if data is not None:
        with RecordingReader(data, allow_truncated=allow_truncated) as recording:
            samples = np.concatenate(list(recording.blocks(BLOCK_FRAMES, None, MAX_SECONDS)))
            _check(f"{what} {recording.name}", len(samples), recording.sample_rate, recording.peak)
            return Waveform(samples, recording.sample_rate, recording.notes())
    if isinstance(audio, Waveform):
        values, given, notes = audio.samples, audio.sample_rate, audio.notes
    else:
        values, given, notes = audio, sample_rate, ()  # type: ignore[assignment]
    numbers = _numbers(values, what)  # Before the rate: what is no recording lacks more than that.
    rate = _rate(given, what)
    samples, mixed = _one_channel(numbers, what)
    if not np.isfinite(samples).all():
        raise AudioContentError(
            f"{what} holds NaN or infinite samples; export it again from the program that made it."
        )
    _check(what, len(samples), rate, float(np.max(np.abs(samples), initial=0.0)))
    return Waveform(samples, rate, (*notes, *mixed))


def _encoded(audio: Any) -> bytes | None:
    """The bytes of an audio file that were handed over as such or as an open stream."""
    if isinstance(audio, (bytes, bytearray, memoryview)):
        return bytes(audio)
    if not hasattr(audio, "read"):
        return None
    try:
        data = audio.read()
    except (OSError, ValueError, UnsupportedOperation) as error:
        raise AudioFormatError(
            f"the open file cannot be read ({reason(error)}); open it with open(path, 'rb')."
        ) from error
    if not isinstance(data, bytes):
        raise AudioFormatError("the open file gives text; open it with open(path, 'rb').")
    return data


def _rate(value: Any, what: str) -> int:
    if value is None:
        raise ConfigError(
            f"{what} is an array, which carries no sample rate; pass sample_rate=48000 (its rate "
            "in Hz), a Waveform or a file."
        )
    try:
        rate = float(value)
    except (TypeError, ValueError):
        rate = float("nan")
    if isinstance(value, (bool, str)) or not LOWEST_RATE <= rate <= HIGHEST_RATE or rate % 1:
        raise ConfigError(
            f"the sample rate of {what} must be a whole number of Hz between {LOWEST_RATE} and "
            f"{HIGHEST_RATE}, not {value!r}."
        )
    return int(rate)


def _numbers(audio: Any, what: str) -> FloatArray:
    """Arrays, lists and tensors as float32; integers by the full scale of their type."""
    try:
        if hasattr(audio, "detach"):  # A torch tensor, on whichever device and of whichever type.
            audio = audio.detach().cpu()
            audio = (audio.float() if audio.is_floating_point() else audio).numpy()
        values: NDArray[Any] = np.asarray(audio)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{what} is not an array of samples ({error}).") from error
    if values.dtype.kind == "f":
        return values.astype(np.float32, copy=False)
    if values.dtype.kind not in "iu":
        raise ConfigError(
            f"{what} must be numbers, not {values.dtype}; pass floats in [-1, 1], integers, a "
            "Waveform or a file."
        )
    if values.dtype.itemsize > 4:
        raise ConfigError(
            f"{what} holds {values.dtype} samples, whose full scale is not known; give int16 or "
            "int32, or floats in [-1, 1]."
        )
    limits = np.iinfo(values.dtype)
    middle = (int(limits.max) + int(limits.min) + 1) / 2
    return ((values.astype(np.float64) - middle) / (limits.max - middle)).astype(np.float32)


def _one_channel(values: FloatArray, what: str) -> tuple[FloatArray, tuple[str, ...]]:
    """``(samples,)`` of an array in either layout of channels, and what was done to it."""
    if values.ndim > 1:
        values = values.reshape([size for size in values.shape if size != 1] or [1])
    if values.ndim == 1:
        return values, ()
    if values.ndim != 2 or min(values.shape) > MOST_CHANNELS or values.size == 0:
        raise ConfigError(
            f"{what} must be (samples,), (channels, samples) or (samples, channels), not "
            f"{values.shape}."
        )
    channels = values if values.shape[0] <= values.shape[1] else values.T
    power = np.square(channels, dtype=np.float64).sum(axis=1)
    heard = channels[power > 1e-5 * power.max()] if power.max() > 0 else channels
    mixed: FloatArray = heard.mean(axis=0, dtype=np.float64).astype(np.float32)
    if float(np.square(mixed, dtype=np.float64).sum()) < CANCELLED * float(power.max()):
        best = int(np.argmax(power))
        note = f"{len(channels)} channels cancel each other out; only channel {best + 1} was used"
        return np.ascontiguousarray(channels[best]), (note,)
    return mixed, (f"mixed {len(channels)} channels down to one",)


def _check(what: str, samples: int, rate: int, peak: float) -> None:
    """Refuse what cannot be converted: too little, nothing to be heard, or no audio at all."""
    if samples < SHORTEST_SECONDS * rate:
        raise AudioContentError(
            f"{what} holds {samples / rate:.3f} s of audio; at least {SHORTEST_SECONDS} s are "
            "needed."
        )
    if peak > HIGHEST_PEAK:
        raise AudioContentError(
            f"{what} holds samples of {peak:.3g}, where 1 is full scale; divide them by the full "
            "scale of their type, or export the recording again."
        )
    if peak < SILENCE_PEAK:
        raise AudioContentError(
            f"{what} holds only silence (peak {dbfs(peak)}); check the microphone or choose "
            "another recording."
        )


def listed(target: Target) -> list[Any]:
    """The recordings of ``target``, or what else it is."""
    return list(cast("Sequence[Any]", target)) if is_several(target) else [target]


def is_several(target: Target) -> bool:
    """Whether it is a list of recordings rather than one recording or a list of numbers."""
    return isinstance(target, (list, tuple)) and not any(
        isinstance(item, (list, tuple, Number)) for item in target
    )
