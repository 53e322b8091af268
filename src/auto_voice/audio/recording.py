"""An open recording: header checked, decoded in blocks, and what was learnt on the way."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import numpy as np
import soundfile

from auto_voice.audio.formats import (
    HEAD_BYTES,
    READABLE,
    Completeness,
    completeness,
    log_says_truncated,
    sniff,
)
from auto_voice.audio.opening import AudioSource, Window, open_source
from auto_voice.audio.quiet import quiet_stderr
from auto_voice.audio.resample import ResampleStream
from auto_voice.errors import AudioContentError, AudioFormatError
from auto_voice.types import BoolArray, FloatArray

SILENCE_PEAK = 1e-4  # -80 dBFS: three steps of 16 bits, what dither alone may reach
QUIET_PEAK = 0.01
FULL_SCALE = 0.99  # 8-bit full scale is 127/128
HIGHEST_PEAK = 1000.0  # 60 dB above full scale: no recording, and powers of it overflow
_BLOCK_FRAMES = 1 << 16
_SCAN_SECONDS = 600.0
_UNKNOWN_FRAMES = 1 << 60
_TAKE_WHAT_IS_THERE = (
    "use what is there with --allow-truncated (in Python with allow_truncated=True)"
)


@dataclass(frozen=True)
class AudioInfo:
    """What a file's header says.

    Attributes:
        name: of the file, for messages.
        format: container, e.g. ``WAV``, ``MP3``, ``OGG``.
        subtype: coding, e.g. ``PCM_16``, ``VORBIS``.
        sample_rate: Hz.
        channels: count.
        frames: samples per channel; None where the format does not say.
        notes: doubts about the file, one phrase each.
    """

    name: str
    format: str
    subtype: str
    sample_rate: int
    channels: int
    frames: int | None
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float | None:
        return None if self.frames is None else self.frames / self.sample_rate


class Recording:
    """An open file: checked header, decoder, and what was learnt while decoding."""

    def __init__(self, source: AudioSource, *, allow_truncated: bool) -> None:
        self._allow_truncated = allow_truncated
        self._stream, self.name, self._owned = open_source(source)
        try:
            self._start = self._stream.tell()
            self._completeness = self._check_header()
            self._sound = self._open_decoder()
            self._check_shape()
        except BaseException:
            self.close()
            raise
        self.sample_rate = int(self._sound.samplerate)
        self.channels = int(self._sound.channels)
        self.peak = 0.0
        self._sum = 0.0
        self._clipped = 0
        self._frames_read = 0
        self._remarks: list[str] = []

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        sound = getattr(self, "_sound", None)
        if sound is not None:
            sound.close()
        if self._owned:
            self._stream.close()

    @property
    def frames(self) -> int | None:
        frames = int(self._sound.frames)
        return frames if 0 <= frames < _UNKNOWN_FRAMES else None

    @property
    def frames_read(self) -> int:
        """Frames that were decoded so far."""
        return self._frames_read

    def info(self) -> AudioInfo:
        doubts = [self._completeness.note] if self._completeness.note else []
        if self._completeness.truncated or log_says_truncated(self._sound.extra_info):
            doubts.append("the file is truncated")
        return AudioInfo(
            self.name,
            str(self._sound.format),
            str(self._sound.subtype),
            self.sample_rate,
            self.channels,
            self.frames,
            tuple(doubts),
        )

    def blocks(
        self, block_frames: int, to_hz: int | None, max_seconds: float | None
    ) -> Iterator[FloatArray]:
        """Mono blocks at ``to_hz``; the parts of ``notes`` that need the whole grow on the way."""
        self._check_length(max_seconds)
        weights = self._channel_weights()
        resampler = ResampleStream(self.sample_rate, to_hz or self.sample_rate)
        for block in self._decode(block_frames):
            if max_seconds is not None and self._frames_read > max_seconds * self.sample_rate:
                raise self._too_long(max_seconds)
            self._observe(block)
            yield resampler.process(block @ weights)
        if self._frames_read == 0:
            raise AudioContentError(
                f"{self.name} holds no samples; choose a recording that has sound in it."
            )
        yield resampler.process(np.zeros(0, np.float32), last=True)
        if to_hz and to_hz != self.sample_rate:
            self._remarks.append(f"resampled from {self.sample_rate} to {to_hz} Hz")

    def notes(self) -> tuple[str, ...]:
        notes = [self._completeness.note] if self._completeness.note else []
        notes += self._remarks
        count = max(1, self._frames_read)
        if self._clipped / count > 1e-4:
            notes.append(f"the recording is clipped ({100 * self._clipped / count:.2g} % of it)")
        if abs(self._sum / count) > 0.01:
            notes.append(
                f"the recording has a DC offset of {100 * self._sum / count:.1f} % of full scale"
            )
        if self.peak > 1.5:
            notes.append(f"samples reach {self.peak:.3g}, above full scale (1.0)")
        if SILENCE_PEAK <= self.peak < QUIET_PEAK:
            notes.append(f"the recording is very quiet (peak {dbfs(self.peak)})")
        return tuple(notes)

    def _check_header(self) -> Completeness:
        size = self._stream.seek(0, os.SEEK_END) - self._start
        if size <= 0:
            raise AudioContentError(f"{self.name} is empty (0 bytes); choose a file with sound.")
        window = cast(BinaryIO, Window(self._stream, self._start, size))
        window.seek(0)
        seen = sniff(window.read(HEAD_BYTES))
        if not seen.readable:
            what = f"{self.name} is {seen.description}" if seen.description else self.name
            if seen.convertible:
                raise AudioFormatError(
                    f"{what}, which cannot be decoded here; convert it first, "
                    "for example with: ffmpeg -i INPUT output.wav"
                )
            joint = " and" if seen.description else " is"
            raise AudioFormatError(
                f"{what}{joint} not a recording that can be read; use {', '.join(READABLE)}."
            )
        self._noisy = seen.readable == "mp3"
        found = completeness(window, seen.readable, size)
        if found.missing is not None and found.missing >= 1.0:
            raise AudioFormatError(
                f"{self.name} is truncated before its first sample; get a complete copy."
            )
        if found.truncated and not self._allow_truncated:
            raise self._truncated(None if math.isnan(found.missing or 0) else found.missing)
        window.seek(0)
        self._window = window
        return found

    def _open_decoder(self) -> Any:
        try:
            with quiet_stderr(self._noisy):
                return soundfile.SoundFile(self._window)
        except (soundfile.LibsndfileError, RuntimeError, TypeError, ValueError) as error:
            reason = getattr(error, "error_string", "") or str(error)
            raise AudioFormatError(
                f"{self.name} is damaged or truncated and cannot be decoded "
                f"({reason.strip().rstrip('.')}); get a complete copy."
            ) from error

    def _check_shape(self) -> None:
        rate, channels = self._sound.samplerate, self._sound.channels
        if not 1000 <= rate <= 1_000_000 or not 1 <= channels <= 64:
            raise AudioFormatError(
                f"{self.name} claims {channels} channels at {rate} Hz, which is no recording; "
                "its header is damaged or it is not audio."
            )
        if log_says_truncated(self._sound.extra_info) and not self._allow_truncated:
            raise self._truncated(None)

    def _check_length(self, max_seconds: float | None) -> None:
        frames, rate = self.frames, self.sample_rate
        if max_seconds is not None and frames is not None and frames > max_seconds * rate:
            raise self._too_long(max_seconds)

    def _too_long(self, max_seconds: float) -> AudioContentError:
        frames = self.frames
        length = "" if frames is None else f"{frames / self.sample_rate:.0f} s long, "
        return AudioContentError(
            f"{self.name} is {length}longer than the limit of {max_seconds:g} s; "
            "cut it or raise max_seconds."
        )

    def _truncated(self, missing: float | None) -> AudioFormatError:
        part = "" if missing is None else f" ({100 * (1 - missing):.0f} % of it is readable)"
        return AudioFormatError(
            f"{self.name} is truncated: it is shorter than its header says{part}; get a complete "
            f"copy, or {_TAKE_WHAT_IS_THERE}."
        )

    def _decode(self, block_frames: int) -> Iterator[FloatArray]:
        """``(frames, channels)`` blocks up to the end, checked for NaN and for a missing end."""
        expected = self.frames
        failure: Exception | None = None
        # A read that fails loses its whole block, so a cut file is read in small ones.
        block_frames = 1024 if self._allow_truncated else block_frames
        while True:
            try:
                block = self._read(block_frames)
            except (soundfile.LibsndfileError, RuntimeError) as error:
                failure = error
                break
            if len(block) == 0:
                break
            if not np.isfinite(block).all():
                at = self._frames_read + int(np.argmin(np.isfinite(block).all(axis=1)))
                raise AudioContentError(
                    f"{self.name} holds values that are not numbers (NaN or infinite), the first "
                    f"at {at / self.sample_rate:.3f} s; export the recording again."
                )
            self._frames_read += len(block)
            yield block
        short = expected is not None and self._frames_read < expected
        if failure is None and not short and not self._completeness.truncated:
            return
        got = self._frames_read / self.sample_rate
        of = f" of {expected / self.sample_rate:.1f} s" if expected and short else ""
        if not self._allow_truncated or self._frames_read == 0:
            raise AudioFormatError(
                f"{self.name} is truncated or damaged: only the first {got:.1f} s{of} can be "
                f"read; get a complete copy, or {_TAKE_WHAT_IS_THERE}."
            ) from failure
        self._remarks.append(f"the file is truncated: only {got:.1f} s{of} were readable")

    def _read(self, frames: int) -> FloatArray:
        """``(frames, channels)``, fewer at the end."""
        with quiet_stderr(self._noisy):
            block: FloatArray = self._sound.read(frames, dtype="float32", always_2d=True)
        return block

    def _observe(self, block: FloatArray) -> None:
        magnitude = np.abs(block)
        self.peak = max(self.peak, float(magnitude.max()))
        if self.peak > HIGHEST_PEAK:
            raise AudioContentError(
                f"{self.name} holds samples of {self.peak:.3g}, where 1 is full scale; "
                "export it again."
            )
        self._sum += float(block.mean(axis=1, dtype=np.float64).sum())
        at_limit: BoolArray = np.max(magnitude, axis=1) >= FULL_SCALE
        # One sample at full scale is a normalised peak, three in a row are a cut-off wave.
        runs = at_limit[2:] & at_limit[1:-1] & at_limit[:-2]
        if runs.any():
            self._clipped += int(np.convolve(runs, np.ones(3, np.int64)).astype(bool).sum())

    def _channel_weights(self) -> FloatArray:
        """How the channels are summed: the mean of those that carry sound.

        A mean over silent channels would only lower the level, and channels in opposite phase
        would cancel; the first ten minutes decide.
        """
        weights = np.full(self.channels, 1 / self.channels, np.float32)
        if self.channels == 1:
            return weights
        power, mixed = np.zeros(self.channels), 0.0
        left = int(_SCAN_SECONDS * self.sample_rate)
        try:
            while left > 0:
                block = self._read(_BLOCK_FRAMES)
                if len(block) == 0:
                    break
                block = np.nan_to_num(block, nan=0.0, posinf=0.0, neginf=0.0)
                power += np.square(block, dtype=np.float64).sum(axis=0)
                mixed += float(np.square(block @ weights, dtype=np.float64).sum())
                left -= len(block)
        except (soundfile.LibsndfileError, RuntimeError):
            pass  # the second pass reports it
        self._rewind()
        heard = power > 1e-5 * power.max()
        kept = int(heard.sum())
        if kept and mixed < 1e-2 * power.sum() / self.channels**2:
            best = int(np.argmax(power))
            self._remarks.append(
                f"{self.channels} channels cancel each other out; only channel {best + 1} was used"
            )
            return np.asarray(np.arange(self.channels) == best, np.float32)
        if 0 < kept < self.channels:
            self._remarks.append(
                f"mixed {kept} of {self.channels} channels down to one, the others are silent"
            )
            return np.asarray(heard / kept, np.float32)
        self._remarks.append(f"mixed {self.channels} channels down to one")
        return weights

    def _rewind(self) -> None:
        """Start again with a fresh decoder: seeking in MP3 is not exact to the sample."""
        self._sound.close()
        self._window.seek(0)
        self._sound = self._open_decoder()


def dbfs(peak: float) -> str:
    return f"{20 * math.log10(peak):.0f} dBFS" if peak > 0 else "exactly zero"
