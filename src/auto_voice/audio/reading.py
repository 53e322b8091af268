"""An open recording: its header checked, decoded in blocks, and what was learnt on the way."""

from __future__ import annotations

import io
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

import numpy as np

from auto_voice.audio.decoding import Decoder
from auto_voice.audio.formats import READABLE, AudioFormat, Completeness, completeness, sniff
from auto_voice.audio.resample import ResampleStream
from auto_voice.errors import AudioContentError, AudioFormatError, AudioNotFoundError, reason
from auto_voice.types import BoolArray, FloatArray

AudioSource: TypeAlias = "str | os.PathLike[str] | bytes | BinaryIO"

# -80 dBFS: three steps of 16 bits, what dither alone may reach.
SILENCE_PEAK = 1e-4
# -40 dBFS: speech recorded so low drowns in the noise of most sound cards.
QUIET_PEAK = 0.01
# 8-bit full scale is 127/128.
FULL_SCALE = 0.99
# 60 dB above full scale: no recording, and powers of it overflow.
HIGHEST_PEAK = 1000.0
# Hz and channels of recordings; what lies outside is a damaged header.
LOWEST_RATE, HIGHEST_RATE, MOST_CHANNELS = 1000, 1_000_000, 64
# Share of packets that may fail to decode before a recording counts as damaged. Joined MP3 files
# have tags between them that are no sound.
DAMAGED_SHARE = 0.02
# Decoded at once where channels are judged: 1.5 s at 44.1 kHz.
_BLOCK_FRAMES = 1 << 16
# The first ten minutes decide how channels are mixed.
_SCAN_SECONDS = 600.0
_TAKE_WHAT_IS_THERE = (
    "use what is there with --allow-truncated (in Python with allow_truncated=True)"
)


@dataclass(frozen=True)
class AudioInfo:
    """The facts in the header of a file.

    Attributes:
        name: of the file, for messages.
        format: container, e.g. ``wav``, ``mp3``, ``mp4``.
        subtype: coding, e.g. ``pcm_16``, ``vorbis``, ``aac``.
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


class RecordingReader:
    """An open recording whose header was checked; decodes it in blocks of one channel.

    Args:
        source: see :func:`open_source`.
        allow_truncated: take what is there of a truncated or damaged file, with a note.

    Attributes:
        name: of the file, for messages.
        sample_rate: Hz.
        channels: count.
        peak: the largest magnitude so far.
        frames_read: samples per channel decoded so far.

    Raises:
        AudioError: what the header alone tells: no such file, no recording, truncated, damaged.
    """

    def __init__(self, source: AudioSource, *, allow_truncated: bool) -> None:
        self._allow_truncated = allow_truncated
        self._stream, self.name, self._owned = open_source(source)
        self._decoder: Decoder | None = None
        try:
            self._start = self._stream.tell()
            self._format, self._completeness = self._check_header()
            decoder = self._open_decoder()
            self._check_shape(decoder)
        except BaseException:
            self.close()
            raise
        self.sample_rate, self.channels = decoder.sample_rate, decoder.channels
        self.peak = 0.0
        self.frames_read = 0
        self._sum = 0.0
        self._clipped = 0
        self._remarks: list[str] = []
        if decoder.tracks > 1:
            self._remarks.append(f"only one of {decoder.tracks} sound tracks was used")

    def __enter__(self) -> RecordingReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._decoder is not None:
            self._decoder.close()
            self._decoder = None
        if self._owned:
            self._stream.close()

    @property
    def frames(self) -> int | None:
        """Samples per channel by the header; None where it does not say."""
        if self._decoder is None or not self._completeness.length_known:
            return None
        return self._decoder.declared_frames

    def info(self) -> AudioInfo:
        """The facts in the header."""
        assert self._decoder is not None
        doubts = [self._completeness.note] if self._completeness.note else []
        if self._completeness.truncated:
            doubts.append("the file is truncated")
        return AudioInfo(
            self.name,
            self._format.name,
            self._decoder.codec,
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
            if max_seconds is not None and self.frames_read > max_seconds * self.sample_rate:
                raise self._too_long(max_seconds)
            self._observe(block)
            yield resampler.process(block @ weights)
        if self.frames_read == 0:
            raise AudioContentError(
                f"{self.name} holds no samples; choose a recording that has sound in it."
            )
        yield resampler.process(np.zeros(0, np.float32), last=True)
        if to_hz and to_hz != self.sample_rate:
            self._remarks.append(f"resampled from {self.sample_rate} to {to_hz} Hz")

    def notes(self) -> tuple[str, ...]:
        notes = [self._completeness.note] if self._completeness.note else []
        notes += self._remarks
        count = max(1, self.frames_read)
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

    def _check_header(self) -> tuple[AudioFormat, Completeness]:
        size = self._stream.seek(0, os.SEEK_END) - self._start
        if size <= 0:
            raise AudioContentError(f"{self.name} is empty (0 bytes); choose a file with sound.")
        self._window = cast(BinaryIO, Window(self._stream, self._start, size))
        seen = sniff(self._window)
        if seen.format is None:
            what = f"{self.name} is {seen.description} and" if seen.description else self.name
            joint = "" if seen.description else " is"
            raise AudioFormatError(
                f"{what}{joint} not a recording that can be read; use {READABLE}."
            )
        found = completeness(self._window, seen, size)
        if found.missing >= 1.0:
            raise AudioFormatError(
                f"{self.name} is truncated before its first sample; get a complete copy."
            )
        if found.truncated and not self._allow_truncated:
            raise self._truncated(None if math.isnan(found.missing) else found.missing)
        end = size if found.end is None else found.end
        self._window = cast(BinaryIO, Window(self._stream, self._start, end, found.correction))
        return seen.format, found

    def _open_decoder(self) -> Decoder:
        """Start at the first sample, with a fresh decoder: seeking is not exact to the sample."""
        if self._decoder is not None:
            self._decoder.close()
            self._decoder = None
        self._window.seek(0)
        self._decoder = Decoder(
            self._window, self._format, self.name, self._completeness.one_page_samples
        )
        return self._decoder

    def _check_shape(self, decoder: Decoder) -> None:
        rate, channels = decoder.sample_rate, decoder.channels
        if not LOWEST_RATE <= rate <= HIGHEST_RATE or not 1 <= channels <= MOST_CHANNELS:
            raise AudioFormatError(
                f"{self.name} claims {channels} channels at {rate} Hz, which is no recording; "
                "its header is damaged or it is not audio."
            )

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
        decoder = self._decoder
        assert decoder is not None
        for block in decoder.blocks(block_frames):
            if not np.isfinite(block).all():
                at = self.frames_read + int(np.argmin(np.isfinite(block).all(axis=1)))
                raise AudioContentError(
                    f"{self.name} holds values that are not numbers (NaN or infinite), the first "
                    f"at {at / self.sample_rate:.3f} s; export the recording again."
                )
            self.frames_read += len(block)
            yield block
        self._check_end(decoder)
        if decoder.changes:
            self._remarks.append(
                "rate or channels change inside the recording; all of it was brought to the first"
            )

    def _check_end(self, decoder: Decoder) -> None:
        """Refuse or note what the header promised and decoding did not give.

        Raises:
            AudioFormatError: something is missing and ``allow_truncated`` was not given.
        """
        slack = self._format.slack_samples
        promised = None if slack is None else self.frames
        short = promised is not None and self.frames_read < promised - (slack or 0)
        bad = decoder.failure is not None or decoder.damaged > DAMAGED_SHARE * decoder.packets
        got = self.frames_read / self.sample_rate
        of = f" of {promised / self.sample_rate:.1f} s" if promised and short else ""
        if (short or bad) and not (self._allow_truncated and self.frames_read):
            raise AudioFormatError(
                f"{self.name} is truncated or damaged: only {got:.1f} s{of} can be "
                f"read; get a complete copy, or {_TAKE_WHAT_IS_THERE}."
            ) from decoder.failure
        if short or bad or self._completeness.truncated:
            self._remarks.append(f"the file is truncated: only {got:.1f} s{of} were readable")
        elif decoder.damaged:
            self._remarks.append(
                f"{decoder.damaged} of {decoder.packets} packets of the file are no sound that can "
                "be decoded and were left out"
            )

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
        assert self._decoder is not None
        power, mixed = np.zeros(self.channels), 0.0
        left = int(_SCAN_SECONDS * self.sample_rate)
        for block in self._decoder.blocks(_BLOCK_FRAMES):
            block = np.nan_to_num(block, nan=0.0, posinf=0.0, neginf=0.0)
            power += np.square(block, dtype=np.float64).sum(axis=0)
            mixed += float(np.square(block @ weights, dtype=np.float64).sum())
            left -= len(block)
            if left <= 0:
                break
        self._open_decoder()
        audible = power > 1e-5 * power.max()
        kept = int(audible.sum())
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
            return np.asarray(audible / kept, np.float32)
        self._remarks.append(f"mixed {self.channels} channels down to one")
        return weights


def dbfs(peak: float) -> str:
    return f"{20 * math.log10(peak):.0f} dBFS" if peak > 0 else "exactly zero"


class Window(io.RawIOBase):
    """The rest of a seekable stream, as if it began where the stream stood.

    Seeking before the start lands on it: damaged headers make decoders try, and an exception in
    their callback could only be printed.

    Args:
        correction: an offset and the bytes that stand there instead of the stream's own.
    """

    def __init__(
        self, stream: BinaryIO, start: int, size: int, correction: tuple[int, bytes] | None = None
    ) -> None:
        super().__init__()
        self._inner, self._start, self._size = stream, start, size
        self._correction = correction or (0, b"")

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self._size}[whence]
        return self._inner.seek(max(0, base + offset) + self._start) - self._start

    def tell(self) -> int:
        return self._inner.tell() - self._start

    def readinto(self, buffer: Any) -> int:
        at = self.tell()
        data = self._inner.read(min(len(buffer), max(0, self._size - at)))
        buffer[: len(data)] = data
        offset, correct = self._correction
        low, high = max(at, offset), min(at + len(data), offset + len(correct))
        if low < high:
            buffer[low - at : high - at] = correct[low - offset : high - offset]
        return len(data)


def open_source(source: AudioSource) -> tuple[BinaryIO, str, bool]:
    """A seekable binary stream, its name for messages, and whether it is ours to close."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(source), "the given audio", True
    if not isinstance(source, (str, os.PathLike)):
        if not hasattr(source, "read"):
            raise TypeError(f"expected a path, bytes or a binary stream, not {type(source)}")
        name = getattr(source, "name", None)
        label = Path(name).name if isinstance(name, str) and name else "the given audio"
        if not (hasattr(source, "seekable") and source.seekable()):
            return io.BytesIO(source.read()), label, True
        return source, label, False
    path = Path(source)
    with _clear_os_errors(path):
        path = path.expanduser()
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise AudioFormatError(f"{path} is a folder; name one recording in it.")
        if not stat.S_ISREG(mode):
            raise AudioFormatError(
                f"{path} is not a regular file; save the recording to a file first."
            )
        return path.open("rb"), str(path), True


@contextmanager
def _clear_os_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise AudioNotFoundError(f"{path} does not exist; check the path.") from error
    except PermissionError as error:
        raise AudioFormatError(
            f"{path} may not be read by this user; change its permissions."
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise AudioNotFoundError(
            f"{str(path)!r} cannot be opened ({reason(error)}); check the path."
        ) from error
