"""What a conversion gives back, and where it is written: audio, a file, and an honest account."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin
from numpy.typing import DTypeLike, NDArray

from auto_voice.audio.encoding import Encoding, choose_encoding, ensure_writable
from auto_voice.audio.io import AudioWriter
from auto_voice.errors import AudioOutputError, MockAudioError
from auto_voice.inference.controls import Controls
from auto_voice.types import FloatArray, Voice, Waveform

# Stages whose time grows with the source; reading, loading and cloning are not among them.
REALTIME_STAGES = ("pitch", "content", "convert", "vocode", "breath", "level")


# Hz of an output file: below no speech is left, above no player follows.
LOWEST_OUTPUT_RATE, HIGHEST_OUTPUT_RATE = 1000, 384_000


@dataclass(frozen=True)
class OutputSpec:
    """Where a result is written, and as what.

    Attributes:
        path: of the file.
        format: ``wav``, ``flac``, ``ogg``, ``opus``, ``mp3`` or ``aiff``; None for what the suffix
            of ``path`` says.
        subtype: sample coding, such as ``pcm_24`` or bits: ``16``, ``24``, ``32f``; None for the
            format's own.
        rate: Hz of the file; None keeps the result's where the format can carry it.
        overwrite: whether an existing file may be replaced.
        allow_mock: whether what mock models make, which is noise, may be written.
    """

    path: str | PathLike[str]
    format: str | None = None
    subtype: str | None = None
    rate: int | None = None
    overwrite: bool = True
    allow_mock: bool = False

    def check(self, inputs: Iterable[object] = ()) -> Output:
        """The output, checked once and before any work; nothing is created.

        Args:
            inputs: recordings that are read, none of which may be the output.

        Raises:
            AudioOutputError: the path cannot be written to, or the format or the rate cannot be.
        """
        spec = self if self.rate is None else replace(self, rate=output_rate(self.rate))
        path = ensure_writable(self.path, inputs, overwrite=self.overwrite)
        return Output(path, choose_encoding(path, self.format, self.subtype), spec)


def output_rate(value: Any) -> int:
    """``value`` as the rate of a file, in Hz.

    Raises:
        AudioOutputError: it cannot be one.
    """
    try:
        rate = float(value)
    except (TypeError, ValueError, OverflowError):
        rate = float("nan")
    possible = LOWEST_OUTPUT_RATE <= rate <= HIGHEST_OUTPUT_RATE and rate % 1 == 0
    if isinstance(value, (bool, str)) or not possible:
        raise AudioOutputError(
            f"the rate of the output must be a whole number of Hz between {LOWEST_OUTPUT_RATE} and "
            f"{HIGHEST_OUTPUT_RATE}, not {value!r}."
        )
    return int(rate)


@dataclass(frozen=True)
class Output:
    """A checked output; made by :meth:`OutputSpec.check`."""

    path: Path
    encoding: Encoding
    spec: OutputSpec

    def refuse_mock(self, mock: bool) -> None:
        """Raises MockAudioError where mock models make the audio and nobody asked for that."""
        if mock and not self.spec.allow_mock:
            raise MockAudioError(
                f"{self.path} was not written because mock models make noise and not speech; use "
                "real models, or ask for mock audio (--mock, allow_mock=True)."
            )

    def write(self, blocks: Iterable[FloatArray], sample_rate: int) -> tuple[str, ...]:
        """Write ``(samples,)`` blocks at ``sample_rate``, all or nothing; notes on what changed.

        The file has the rate :meth:`file_rate`.

        Raises:
            AudioOutputError: the disk is full, or the file cannot be made.
            AudioContentError: a sample is not finite.
        """
        writer = AudioWriter(
            self.path, sample_rate, encoding=self.encoding, output_rate=self.spec.rate
        )
        with writer:
            for block in blocks:
                writer.write(block)
        return writer.notes

    def file_rate(self, sample_rate: int) -> int:
        """Hz of the file for a result at ``sample_rate``: the nearest that the format carries."""
        return self.encoding.nearest_rate(self.spec.rate or sample_rate)


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Account:
    """How a conversion was made.

    Attributes:
        models: stage (``content``, ``speaker``, ``converter``, ``vocoder``) to the exact
            ``name@version`` that ran, with the reason where it stands in for another.
        voice: the target that was conditioned on.
        semitones: how far the pitch was moved in all.
        notes: everything that was altered, replaced or doubtful, one sentence each.
        timings: seconds by step.
        mock: true if any stage was a mock, so that this is no speech.
        chunks: pieces that the source was cut into.
        controls: what was asked for beyond the defaults.
    """

    models: Mapping[str, str]
    voice: Voice
    semitones: float = 0.0
    notes: tuple[str, ...] = ()
    timings: Mapping[str, float] | None = None
    mock: bool = False
    chunks: int = 1
    controls: Controls = field(default_factory=Controls)

    @property
    def length(self) -> int:
        """Samples of the result."""
        raise NotImplementedError

    @property
    def sample_rate(self) -> int:
        raise NotImplementedError

    @property
    def seconds(self) -> float:
        return self.length / self.sample_rate

    @property
    def seconds_per_second(self) -> float:
        """Time spent on the source per second of it, without loading models and cloning."""
        spent = sum((self.timings or {}).get(stage, 0.0) for stage in REALTIME_STAGES)
        return spent / self.seconds

    def __repr__(self) -> str:
        mock = ", mock" if self.mock else ""
        notes = f"{len(self.notes)} note{'' if len(self.notes) == 1 else 's'}"
        return (
            f"{type(self).__name__}({self.seconds:.2f} s at {self.sample_rate} Hz, "
            f"voice {self.voice.name!r}, {notes}{mock})"
        )

    def summary(self) -> dict[str, Any]:
        """The account without the samples, ready for JSON."""
        return {
            "seconds": round(self.seconds, 4),
            "samples": self.length,
            "sample_rate": self.sample_rate,
            "voice": self.voice.name,
            "models": dict(self.models),
            "semitones": round(self.semitones, 3),
            "controls": self.controls.account(),
            "mock": self.mock,
            "chunks": self.chunks,
            "notes": list(self.notes),
            "timings": {step: round(spent, 4) for step, spent in (self.timings or {}).items()},
            "seconds_per_second": round(self.seconds_per_second, 4),
        }


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class FileResult(Account):
    """The account of a conversion that went from file to file.

    Attributes:
        output: what was written.
        file_rate: Hz of the file.
        length: samples before the change to the file's rate, at ``sample_rate``.
        resumed: whether it went on from where an earlier run had stopped.
    """

    output: Path
    file_rate: int
    length: int = 0
    sample_rate: int = 0
    resumed: bool = False


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class ConversionResult(Account, NDArrayOperatorsMixin):
    """A converted recording that behaves like the array of its samples.

    ``len``, indexing, slicing, iteration, arithmetic and numpy's functions give what they give for
    ``result.samples``; ``numpy.asarray(result)`` and ``torch.as_tensor(result)`` take it as it is.
    ``result *= 0.5`` changes the samples of the result, and the name then holds that plain array.

    Attributes:
        audio: at the vocoder's rate, exactly as long as the source
            (``round(source_samples * sample_rate / source_rate)`` samples) unless it was trimmed.
    """

    audio: Waveform

    @property
    def samples(self) -> FloatArray:
        """``(samples,)`` float32."""
        return self.audio.samples

    @property
    def length(self) -> int:
        return len(self.audio.samples)

    @property
    def sample_rate(self) -> int:
        return self.audio.sample_rate

    @property
    def shape(self) -> tuple[int, ...]:
        return self.samples.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.samples.dtype

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self.samples.__array_interface__

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: Any) -> Any:
        return self.samples[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.samples)

    # Two results are equal where they are the same one, so that they can be kept in sets.
    __eq__ = object.__eq__
    __ne__ = object.__ne__
    __hash__ = object.__hash__

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        if "out" in options:
            options["out"] = _plain(options["out"])
        return getattr(ufunc, method)(*_plain(inputs), **options)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        samples = self.audio.samples
        if dtype is not None and np.dtype(dtype) != samples.dtype:
            return samples.astype(dtype)
        return samples.copy() if copy else samples

    def save(
        self,
        path: str | PathLike[str],
        *,
        format: str | None = None,
        subtype: str | None = None,
        sample_rate: int | None = None,
        overwrite: bool = True,
        allow_mock: bool = False,
    ) -> Path:
        """Write the audio; see :class:`OutputSpec`.

        Raises:
            MockAudioError: mock models made the audio and ``allow_mock`` is false.
            AudioOutputError: ``path`` cannot be written, or exists and ``overwrite`` is false.
        """
        spec = OutputSpec(path, format, subtype, sample_rate, overwrite, allow_mock)
        output = spec.check()
        output.refuse_mock(self.mock)
        output.write([self.samples], self.sample_rate)
        return output.path


def _plain(values: Iterable[Any]) -> tuple[Any, ...]:
    """``values``, with the samples of each result in its place."""
    return tuple(x.samples if isinstance(x, ConversionResult) else x for x in values)
