"""Uploads: judged by their bytes before a decoder runs, decoded within limits."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from auto_voice.audio.reading import SILENCE_PEAK, RecordingReader, dbfs
from auto_voice.errors import (
    AudioContentError,
    AudioError,
    AudioFormatError,
)
from auto_voice.server.jobs import CancellationToken
from auto_voice.types import FloatArray, Waveform

# Channels and Hz: more than any recorder writes.
MOST_CHANNELS = 8
HIGHEST_RATE_HZ = 384_000
# Hz. Above it, lengths are counted in samples: a limit in seconds would be none on memory.
USUAL_RATE_HZ = 96_000
# Hz at most of what is held whole in memory; the models use less than half of it.
KEPT_RATE_HZ = 48_000
# Of full scale, 60 dB above it: no recording reaches it, and squares of it overflow.
HIGHEST_PEAK = 1000.0
# What to do about a recording that is too long, where nothing longer is taken elsewhere.
CUT_IT = "cut it"
# Frames that are decoded at once.
_BLOCK_FRAMES = 1 << 16
# Characters of a file name that are shown.
_NAME_CHARACTERS = 80


def display_name(given: str | None, otherwise: str) -> str:
    """A client's file name as something to show: one line, no folders, never used as a path."""
    last = re.split(r"[/\\]", given or "")[-1]
    kept = "".join(c for c in last if c.isprintable()).strip(" .")
    return kept[:_NAME_CHARACTERS] or otherwise


@contextmanager
def _opened(path: Path, name: str, allow_truncated: bool) -> Iterator[RecordingReader]:
    with io.FileIO(path) as raw, _field_of_the_api():
        raw.name = name  # what messages call it
        with (
            io.BufferedReader(raw) as stream,
            RecordingReader(stream, allow_truncated=allow_truncated) as found,
        ):
            yield found


@contextmanager
def _field_of_the_api() -> Iterator[None]:
    """Name the form field where an error names the option of the command line."""
    try:
        yield
    except AudioError as error:
        text = re.sub(
            r"--allow-truncated \(in Python with allow_truncated=True\)",
            "the field allow_truncated=true",
            str(error),
        )
        error.args = (text, *error.args[1:])
        raise


def check_upload(
    path: Path,
    name: str,
    most_seconds: float,
    *,
    allow_truncated: bool = False,
    advice: str = CUT_IT,
) -> float | None:
    """Seconds by the header, which is all that is read; None where it does not tell.

    Args:
        advice: what to do about a recording that is too long.

    Raises:
        AudioError: not a recording, damaged, or beyond the limits.
    """
    with _opened(path, name, allow_truncated) as recording:
        _check_shape(recording, name, most_seconds, advice)
        frames = recording.frames
        return None if frames is None else frames / recording.sample_rate


def _check_shape(recording: RecordingReader, name: str, most_seconds: float, advice: str) -> None:
    if recording.channels > MOST_CHANNELS or recording.sample_rate > HIGHEST_RATE_HZ:
        raise AudioFormatError(
            f"{name} has {recording.channels} channels at {recording.sample_rate} Hz; at most "
            f"{MOST_CHANNELS} at {HIGHEST_RATE_HZ} Hz are taken."
        )
    frames = recording.frames
    if frames is not None and frames > _most_frames(recording, most_seconds):
        seconds = frames / recording.sample_rate
        raise AudioContentError(_too_long(name, seconds, most_seconds, advice))


def _most_frames(recording: RecordingReader, seconds: float) -> float:
    return seconds * min(recording.sample_rate, USUAL_RATE_HZ)


def _too_long(name: str, seconds: float | None, most_seconds: float, advice: str) -> str:
    length = "" if seconds is None else f"{seconds:.0f} s long, "
    if seconds is not None and seconds <= most_seconds:
        return (
            f"{name} has more samples than {most_seconds:g} s at {USUAL_RATE_HZ} Hz; resample it "
            f"to {KEPT_RATE_HZ} Hz."
        )
    return f"{name} is {length}longer than the {most_seconds:g} s that are taken here; {advice}."


def check_references(seconds: float, most_seconds: float) -> None:
    """Raises AudioContentError if all references of a request together are too long."""
    if seconds > most_seconds:
        raise AudioContentError(
            f"The references are longer than {most_seconds:g} s together; half a minute of speech "
            "is enough."
        )


class Decoding:
    """The blocks of an upload, decoded once within limits.

    Args:
        within_seconds: of work; more than that is an attack or a mistake.
        token: stops it.
        allow_truncated: take what is there of a recording that ends early, with a note.
        advice: what to do about a recording that is too long.
        progress: told the fraction decoded, where the length is known.
        to_hz: rate of the blocks; higher ones only are brought down to it.

    Iterating raises AudioError for what cannot be used or is beyond the limits, and Stopped
    through ``token``. ``sample_rate`` and ``notes`` hold when it is over.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        *,
        most_seconds: float,
        within_seconds: float,
        token: CancellationToken,
        progress: Callable[[float], None] | None = None,
        to_hz: int = HIGHEST_RATE_HZ,
        allow_truncated: bool = False,
        advice: str = CUT_IT,
    ) -> None:
        self._progress, self._to_hz = progress, to_hz
        self._path, self._name = path, name
        self._most_seconds, self._within_seconds = most_seconds, within_seconds
        self._token, self._allow_truncated, self._advice = token, allow_truncated, advice
        self.sample_rate = 0
        self.notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[FloatArray]:
        deadline = time.monotonic() + self._within_seconds
        with _opened(self._path, self._name, self._allow_truncated) as recording:
            _check_shape(recording, self._name, self._most_seconds, self._advice)
            most = _most_frames(recording, self._most_seconds)
            rate = min(recording.sample_rate, self._to_hz)
            for block in recording.blocks(_BLOCK_FRAMES, rate, None):
                self._token.check()
                if self._progress is not None and recording.frames:
                    self._progress(recording.frames_read / recording.frames)
                if recording.frames_read > most:
                    raise AudioContentError(
                        _too_long(self._name, None, self._most_seconds, self._advice)
                    )
                if time.monotonic() > deadline:
                    raise AudioContentError(
                        f"{self._name} took more than {self._within_seconds:g} s to decode; "
                        "convert it to WAV or FLAC, or cut it."
                    )
                yield block
            if recording.peak < SILENCE_PEAK:
                raise AudioContentError(
                    f"{self._name} holds only silence (peak {dbfs(recording.peak)}); check the "
                    "microphone or choose another recording."
                )
            if recording.peak > HIGHEST_PEAK:
                raise AudioContentError(
                    f"{self._name} holds samples of {recording.peak:.3g}, where 1 is full scale; "
                    "export it again."
                )
            self.sample_rate, self.notes = rate, recording.notes()


def gathered(decoding: Decoding) -> Waveform:
    """The whole upload as one channel."""
    samples = np.concatenate(list(decoding))
    return Waveform(samples, decoding.sample_rate, decoding.notes)
