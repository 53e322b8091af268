"""Uploads: judged by their bytes before a decoder runs, decoded within limits."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from auto_voice.audio.recording import SILENCE_PEAK, Recording, dbfs
from auto_voice.errors import AudioContentError, AudioFormatError
from auto_voice.server.control import Control
from auto_voice.types import Waveform

MOST_CHANNELS = 8
HIGHEST_RATE_HZ = 384_000
_BLOCK_FRAMES = 1 << 16
_NAME_CHARACTERS = 80


def display_name(given: str | None, otherwise: str) -> str:
    """A client's file name as something to show: one line, no folders, never used as a path."""
    last = re.split(r"[/\\]", given or "")[-1]
    kept = "".join(c for c in last if c.isprintable()).strip(" .")
    return kept[:_NAME_CHARACTERS] or otherwise


@contextmanager
def _opened(path: Path, name: str) -> Iterator[Recording]:
    with io.FileIO(path) as raw:
        raw.name = name  # what messages call it
        with io.BufferedReader(raw) as stream, Recording(stream, allow_truncated=False) as found:
            yield found


def check_upload(path: Path, name: str, most_seconds: float) -> float | None:
    """Seconds by the header, which is all that is read; None where it does not tell.

    Raises:
        AudioError: not a recording, damaged, or beyond the limits.
    """
    with _opened(path, name) as recording:
        _check_shape(recording, name, most_seconds)
        frames = recording.frames
        return None if frames is None else frames / recording.sample_rate


def _check_shape(recording: Recording, name: str, most_seconds: float) -> None:
    if recording.channels > MOST_CHANNELS or recording.sample_rate > HIGHEST_RATE_HZ:
        raise AudioFormatError(
            f"{name} has {recording.channels} channels at {recording.sample_rate} Hz; at most "
            f"{MOST_CHANNELS} at {HIGHEST_RATE_HZ} Hz are taken."
        )
    frames = recording.frames
    if frames is not None and frames > most_seconds * recording.sample_rate:
        raise AudioContentError(_too_long(name, frames / recording.sample_rate, most_seconds))


def _too_long(name: str, seconds: float | None, most_seconds: float) -> str:
    length = "" if seconds is None else f"{seconds:.0f} s long, "
    return f"{name} is {length}longer than the {most_seconds:g} s that are taken here; cut it."


def decode(
    path: Path, name: str, *, most_seconds: float, within_seconds: float, control: Control
) -> Waveform:
    """The whole upload as one channel.

    Args:
        within_seconds: of work; more than that is an attack or a mistake.

    Raises:
        AudioError: it cannot be used, or is beyond the limits.
        Stopped: through ``control``.
    """
    deadline = time.monotonic() + within_seconds
    blocks = []
    with _opened(path, name) as recording:
        _check_shape(recording, name, most_seconds)
        decoded = 0
        for block in recording.blocks(_BLOCK_FRAMES, None, None):
            control.check()
            decoded += len(block)
            if decoded > most_seconds * recording.sample_rate:
                raise AudioContentError(_too_long(name, None, most_seconds))
            if time.monotonic() > deadline:
                raise AudioContentError(
                    f"{name} took more than {within_seconds:g} s to decode; convert it to WAV or "
                    "FLAC, or cut it."
                )
            blocks.append(block)
        if recording.peak < SILENCE_PEAK:
            raise AudioContentError(
                f"{name} holds only silence (peak {dbfs(recording.peak)}); check the microphone or "
                "choose another recording."
            )
        return Waveform(np.concatenate(blocks), recording.sample_rate, recording.notes())
