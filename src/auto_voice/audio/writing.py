"""Samples into files: whole or block by block, atomically, never clipped without a word."""

from __future__ import annotations

import errno
import io
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import soundfile
from numpy.typing import ArrayLike

from auto_voice.audio.encoding import HOLDS_ANY_PEAK, Encoding, choose_encoding, ensure_writable
from auto_voice.audio.resample import ResampleStream, resample
from auto_voice.errors import AudioContentError, AudioOutputError, reason
from auto_voice.filesystem import move_into_place, temporary_beside
from auto_voice.types import FloatArray, Waveform

log = logging.getLogger(__name__)

# Full scale is 1: peaks above it are scaled down to here, so that rounding cannot clip.
CEILING = 0.999
# Full scale is 1: from here on the limiter bends.
LIMITER_KNEE = 0.95
# libsndfile's Vorbis encoder overflows its stack on much larger writes.
_BLOCK_FRAMES = 1 << 16


def fit_to_output(
    waveform: Waveform,
    encoding: Encoding,
    sample_rate: int | None = None,
) -> Waveform:
    """The waveform as ``encoding`` can hold it: rate changed, peaks scaled, both noted.

    Args:
        sample_rate: Hz that the user asked for; None keeps the waveform's if possible.

    Raises:
        AudioContentError: empty, or not finite.
    """
    samples = np.asarray(waveform.samples, np.float32)
    if samples.ndim != 1 or len(samples) == 0:
        raise AudioContentError(
            f"There is no audio to write (shape {samples.shape}); the result must be one channel "
            "with at least one sample."
        )
    _refuse_non_finite(samples)
    wanted = encoding.nearest_rate(sample_rate or waveform.sample_rate)
    if wanted != waveform.sample_rate:
        samples = resample(samples, waveform.sample_rate, wanted)
        note = f"resampled from {waveform.sample_rate} to {wanted} Hz for the output file"
        waveform = replace(waveform, sample_rate=wanted).with_note(note)
    peak = float(np.max(np.abs(samples), initial=0.0))
    if peak > 1.0 and encoding.subtype not in HOLDS_ANY_PEAK:
        samples = samples * np.float32(CEILING / peak)
        decibels = 20 * np.log10(peak / CEILING)
        waveform = waveform.with_note(
            f"turned down by {decibels:.1f} dB so that the output does not clip"
        )
    return replace(waveform, samples=samples)


def write_audio(
    path: str | os.PathLike[str],
    waveform: Waveform,
    *,
    format: str | None = None,
    subtype: str | None = None,
    sample_rate: int | None = None,
    overwrite: bool = True,
    create_parents: bool = False,
) -> Path:
    """Write the whole waveform, or nothing: a reader never sees half a file.

    Peaks above full scale turn the recording down as a whole; that and a changed rate are logged
    as warnings (:func:`fit_to_output` does the same with notes, for results that report them).

    Args:
        format, subtype: see :func:`choose_encoding`.
        sample_rate: Hz of the file; None keeps the waveform's where the format can carry it.

    Returns:
        The path written.

    Raises:
        AudioOutputError: see :func:`ensure_writable` and :func:`choose_encoding`; disk full.
        AudioContentError: empty or not finite.
    """
    target = ensure_writable(path, overwrite=overwrite, create_parents=create_parents)
    encoding = choose_encoding(target, format, subtype)
    fitted = fit_to_output(waveform, encoding, sample_rate)
    for note in fitted.notes[len(waveform.notes) :]:
        log.warning("%s: %s", target.name, note)
    with AudioWriter(target, fitted.sample_rate, format=format, subtype=subtype) as writer:
        writer.write(fitted.samples)
    return target


class AudioWriter:
    """A file that grows block by block and appears under its name only when complete.

    Use as a context manager; an exception inside it removes what was written.
    Blocks with peaks above full scale are limited softly (their loudest samples are bent below
    1.0), because the level of what comes later is not known yet; :attr:`notes` tells.

    Args:
        path: see :func:`ensure_writable`.
        sample_rate: Hz of the blocks; resampled on the way where the format needs it or
            ``output_rate`` asks for it.
        encoding: as chosen where ``path`` was checked; neither is done again then.
        channels: of the blocks and of the file.

    Raises:
        AudioOutputError: the path or the encoding is not possible.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        sample_rate: int,
        *,
        format: str | None = None,
        subtype: str | None = None,
        output_rate: int | None = None,
        overwrite: bool = True,
        encoding: Encoding | None = None,
        channels: int = 1,
    ) -> None:
        checked = encoding is not None
        self.path = Path(path) if checked else ensure_writable(path, overwrite=overwrite)
        self.encoding = encoding or choose_encoding(self.path, format, subtype)
        self.sample_rate = self.encoding.nearest_rate(output_rate or sample_rate)
        self.samples_written = 0
        self.channels = channels
        self._resampler = ResampleStream(sample_rate, self.sample_rate, channels)
        self._limited = 0
        self._temporary = temporary_beside(self.path)
        self._file: IO[bytes] | None = None
        self._sound: Any = None

    def __enter__(self) -> AudioWriter:
        try:
            self._file = cast("IO[bytes]", _QuietFile(self._temporary, "xb+"))
            self._sound = soundfile.SoundFile(
                self._file,
                "w",
                samplerate=self.sample_rate,
                channels=self.channels,
                format=self.encoding.container,
                subtype=self.encoding.subtype,
            )
        except (OSError, soundfile.LibsndfileError, ValueError) as error:
            self._discard()
            raise AudioOutputError(
                f"{self.path} cannot be written as {self.encoding.name} at "
                f"{self.sample_rate} Hz: {reason(error)}."
            ) from error
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._finish()
        else:
            self._discard()

    @property
    def notes(self) -> tuple[str, ...]:
        if not self._limited:
            return ()
        return (f"{self._limited} samples above full scale were limited in the output",)

    def write(self, samples: FloatArray) -> None:
        """Append ``(samples,)`` float, or ``(samples, channels)`` where there are several.

        Raises:
            AudioContentError: a sample is not finite.
            AudioOutputError: the disk is full or the file cannot grow.
        """
        block = self._shaped(samples)
        _refuse_non_finite(block)
        self._append(self._resampler.process(block))

    def _shaped(self, samples: ArrayLike) -> FloatArray:
        shape = (-1,) if self.channels == 1 else (-1, self.channels)
        return np.asarray(samples, np.float32).reshape(shape)

    def _append(self, block: FloatArray) -> None:
        if self._sound is None:
            raise AudioOutputError("The writer is closed; open it with 'with AudioWriter(…)'.")
        if self.encoding.subtype not in HOLDS_ANY_PEAK:
            above = int(np.count_nonzero(np.abs(block) > 1.0))
            if above:
                self._limited += above
                block = soft_limit(block)
        try:
            for at in range(0, len(block), _BLOCK_FRAMES):
                self._sound.write(block[at : at + _BLOCK_FRAMES])
        except (OSError, soundfile.LibsndfileError, AssertionError) as error:
            reason = getattr(self._file, "failure", None) or error
            raise AudioOutputError(
                f"{self.path} cannot be written ({reason}); is the disk full?"
            ) from error
        self.samples_written += len(block)

    def _finish(self) -> None:
        try:
            self._append(self._resampler.process(self._shaped(np.zeros(0)), last=True))
            self._close_file()
            move_into_place(self._temporary, self.path)
        except (OSError, soundfile.LibsndfileError) as error:
            self._discard()
            raise AudioOutputError(
                f"{self.path} cannot be written ({reason(error)}); is the disk full?"
            ) from error
        except BaseException:
            self._discard()
            raise
        for note in self.notes:
            log.warning("%s: %s", self.path.name, note)

    def _close_file(self) -> None:
        assert self._file is not None
        self._sound.close()
        self._sound = None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def _discard(self) -> None:
        for handle in (self._sound, self._file):
            if handle is not None:
                try:
                    handle.close()
                except (OSError, soundfile.LibsndfileError):
                    log.debug("closing %s failed", self._temporary, exc_info=True)
        self._sound = self._file = None
        self._temporary.unlink(missing_ok=True)


class _QuietFile(io.FileIO):
    """A file whose failed writes are short ones.

    The encoder calls from C, where an exception could only be printed; a short write it reports.
    """

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            count = super().write(data) or 0
        except OSError as error:
            self.failure = error
            return 0
        if count < len(data):
            self.failure = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return count

    def flush(self) -> None:
        super().flush()
        if self.failure is not None:
            raise self.failure


def soft_limit(samples: FloatArray, knee: float = LIMITER_KNEE) -> FloatArray:
    """Bend what lies above ``knee`` so that nothing exceeds 1.0; below it nothing changes.

    ``knee + (1 - knee) * tanh((|x| - knee) / (1 - knee))``: value and slope are continuous at
    the knee, so it distorts far less than a clip.
    """
    magnitude = np.abs(samples)
    room = 1.0 - knee
    bent = knee + room * np.tanh((magnitude - knee) / room)
    return np.where(magnitude > knee, np.sign(samples) * bent, samples).astype(np.float32)


def _refuse_non_finite(samples: FloatArray) -> None:
    if not np.isfinite(samples).all():
        raise AudioContentError(
            "The audio to write holds values that are not numbers (NaN or infinite); "
            "nothing was written."
        )
