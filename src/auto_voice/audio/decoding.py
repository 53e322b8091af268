"""The sound of a file, decoded by FFmpeg's libraries (PyAV) without its command or its network."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from typing import Any, BinaryIO, NoReturn

import av
import numpy as np
from av.codec.context import Flags2
from av.stream import Discard

from auto_voice.audio.formats import AudioFormat
from auto_voice.errors import AudioFormatError
from auto_voice.types import FloatArray

# Codings in which speech is stored. FFmpeg knows a thousand more, most of them of games and of
# pictures; one that is not named here is never started, not even to find out what a file holds.
CODECS = frozenset({
    "aac", "aac_latm", "ac3", "eac3", "alac", "flac", "opus", "libopus", "speex", "vorbis",
    "mp1", "mp1float", "mp2", "mp2float", "mp3", "mp3float",
    "wmalossless", "wmapro", "wmav1", "wmav2", "wmavoice",
    "amrnb", "amrwb", "libopencore_amrnb", "libopencore_amrwb",
    "adpcm_ima_qt", "adpcm_ima_wav", "adpcm_ms", "adpcm_yamaha",
    "g722", "g726", "g726le", "gsm", "gsm_ms",
    "pcm_alaw", "pcm_mulaw", "pcm_s8", "pcm_u8", "pcm_s16be", "pcm_s16le", "pcm_s24be",
    "pcm_s24le", "pcm_s32be", "pcm_s32le", "pcm_f32be", "pcm_f32le",
    "pcm_f64be", "pcm_f64le",
})  # fmt: skip
# Tags need not be UTF-8. PyAV 19 reads any; before, it refused the file unless told otherwise.
_ANY_TAGS: dict[str, Any] = (
    {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}
)
# Sample entries of MP4 that say the sound is encrypted (ISO 23001-7; Apple; Audible).
_ENCRYPTED_TAGS = frozenset({"enca", "drms", "aavd"})


class Decoder:
    """One pass through the best sound track of a stream.

    Args:
        stream: seekable, at the start of the file; stays open.
        format: how to read it; nothing else is tried.
        name: of the file, for messages.
        vorbis_frames: samples per channel of Vorbis, where FFmpeg would count them wrongly.

    Attributes:
        sample_rate: Hz of the first frame that was decoded.
        channels: count in that frame.
        codec: the coding in words of ``--subtype`` where they have one, e.g. ``pcm_16``, ``aac``.
        declared_frames: samples per channel by the header; None where it does not say.
        tracks: how many sound tracks there are.
        packets, damaged: how many were read, and how many of them could not be decoded.
        failure: what ended the pass before the end of the file; None if nothing did.
        changes: whether rate or channels change on the way.

    Raises:
        AudioFormatError: it holds no sound, or none that can be decoded.
    """

    def __init__(
        self,
        stream: BinaryIO,
        format: AudioFormat,
        name: str,
        vorbis_frames: int | None = None,
    ) -> None:
        self._name = name
        self._format, self._vorbis_frames = format, vorbis_frames
        self.packets = self.damaged = 0
        self.failure: Exception | None = None
        self.changes = False
        try:
            self._container = _open(stream, format)
        except (av.FFmpegError, PermissionError) as error:
            raise AudioFormatError(
                f"{name} is damaged or truncated and cannot be decoded as {format.name} "
                f"({_reason(error)}); get a complete copy."
            ) from error
        try:
            self._stream = self._choose_track()
            self._frames = self._decoded()
            self._first: Any = next(self._frames, None)
            if self._vorbis_frames is not None and self._stream.codec_context.name == "vorbis":
                # The first packet of Vorbis only prepares the second one, and FFmpeg makes a frame
                # of it that it would leave out by itself.
                self._first = next(self._frames, None)
        except BaseException:
            self.close()
            raise
        context = self._stream.codec_context
        self.codec = _in_words(context.name)
        self.sample_rate = int(self._first.sample_rate if self._first else context.sample_rate)
        self.channels = int(self._first.layout.nb_channels if self._first else context.channels)
        self.declared_frames = self._declared_frames()

    def close(self) -> None:
        self._container.close()

    def blocks(self, frames: int) -> Iterator[FloatArray]:
        """``(at least frames, channels)`` float32 in order; the last is shorter."""
        held: list[FloatArray] = []
        count = 0
        for samples in self._exact():
            held.append(samples)
            count += len(samples)
            if count >= frames:
                yield np.concatenate(held)
                held, count = [], 0
        if count:
            yield np.concatenate(held)

    def _exact(self) -> Iterator[FloatArray]:
        """All blocks, up to the exact number of samples where that is known."""
        left = self._frames_in_all
        for samples in self._uniform():
            yield samples[:left]
            left = None if left is None else max(0, left - len(samples))

    def _count_exactly(self, track: Any) -> int | None:
        """Samples per channel, where FFmpeg must be kept from leaving out some at the ends.

        FFmpeg takes the padding that a CAF file declares off the last packet of ALAC, which has
        none, and misjudges Vorbis that fits into one page of Ogg.
        """
        codec = track.codec_context.name
        if codec == "vorbis":
            return self._vorbis_frames
        if codec != "alac" or self._format.demuxer != "caf" or not track.duration:
            return None
        frames: int = round(
            float(track.duration * track.time_base) * track.codec_context.sample_rate
        )
        return frames

    def _choose_track(self) -> Any:
        tracks = self._container.streams.audio
        self.tracks = len(tracks)
        best = self._container.streams.best("audio")
        if best is None:
            raise AudioFormatError(
                f"{self._name} holds no sound that can be read; choose a file with a sound track."
            )
        if _is_encrypted(best):
            raise self._encrypted()
        codec = "an unknown coding" if best.codec_context is None else best.codec_context.name
        if codec not in CODECS:
            raise AudioFormatError(
                f"{self._name} holds sound coded as {codec}, which cannot be read; convert it "
                "first, for example with: ffmpeg -i INPUT output.wav"
            )
        best.codec_context.thread_count = 1
        self._frames_in_all = self._count_exactly(best)
        if self._frames_in_all is not None:
            best.codec_context.flags2 |= Flags2.skip_manual
        try:
            best.codec_context.open()
        except av.FFmpegError as error:
            # Not left to the first packet: what is asked of a context that did not open ends the
            # process (PyAV 19).
            raise AudioFormatError(
                f"{self._name} is damaged and cannot be decoded as {codec} ({_reason(error)}); "
                "get a complete copy."
            ) from error
        for other in self._container.streams:
            if other.index != best.index:
                other.discard = Discard.all
        return best

    def _encrypted(self) -> AudioFormatError:
        return AudioFormatError(
            f"{self._name} is encrypted (copy protection); use a recording without it."
        )

    def _declared_frames(self) -> int | None:
        duration, seconds = self._stream.duration, self._stream.time_base
        if duration is None:
            duration, seconds = self._container.duration, 1 / av.time_base
        return None if duration is None else round(float(duration * seconds) * self.sample_rate)

    def _decoded(self) -> Iterator[Any]:
        for packet in self._demuxed():
            self.packets += 1
            if packet.has_sidedata("encryption_info"):
                raise self._encrypted()
            try:
                frames = packet.decode()
            except av.EOFError:
                return
            except av.FFmpegError:
                frames = self._whole_samples(packet)
                if not frames:
                    self.damaged += 1
                    continue
            yield from frames

    def _whole_samples(self, packet: Any) -> list[Any]:
        """Frames of a PCM packet without the part of a sample that it ends with, if it has one.

        PyAV 17 refuses such a packet as a whole, later ones leave the part out by themselves.
        """
        context = self._stream.codec_context
        bits = re.fullmatch(r"pcm_[fsu](8|16|24|32|64)(le|be)?", context.name)
        if bits is None:
            return []
        size = packet.size - packet.size % (int(bits[1]) // 8 * context.channels)
        if size in (0, packet.size):
            return []
        try:
            return list(context.decode(av.Packet(bytes(packet)[:size])))
        except av.FFmpegError:
            return []

    def _demuxed(self) -> Iterator[Any]:
        while True:
            try:
                yield from self._container.demux(self._stream)
            except IndexError:
                # A packet of a track that the header did not announce (transport streams).
                continue
            except av.FFmpegError as error:
                self.failure = error
            return

    def _uniform(self) -> Iterator[FloatArray]:
        """Blocks at the rate and with the channels of the first frame, whatever comes later."""
        converter: Any = None
        shape: tuple[str, str, int] | None = None
        try:
            for frame in chain([self._first] if self._first else [], self._frames):
                now = (frame.format.name, frame.layout.name, frame.sample_rate)
                if now != shape:
                    yield from self._converted(converter, None)
                    self.changes = shape is not None
                    converter, shape = self._converter(frame), now
                if converter is None:
                    yield _as_float(frame)
                else:
                    yield from self._converted(converter, frame)
            yield from self._converted(converter, None)
        except av.FFmpegError as error:
            self.failure = error

    def _converter(self, frame: Any) -> Any:
        """A converter of such frames to the shape of the first; None where none is needed.

        From eight separate channels on PyAV cannot tell how many there are and reads past their
        end, so FFmpeg lays those side by side. It does so by a filter with threads of its own,
        hence not for all.
        """
        separate = frame.format.is_planar and frame.layout.nb_channels >= 8
        if (
            not separate
            and frame.layout == self._first.layout
            and frame.sample_rate == self.sample_rate
        ):
            return None
        return av.AudioResampler("flt", self._first.layout, self.sample_rate)

    def _converted(self, converter: Any, frame: Any) -> Iterator[FloatArray]:
        """The blocks that ``converter`` gives for ``frame``; None ends its input."""
        for made in () if converter is None else converter.resample(frame):
            if made is not None:
                yield made.to_ndarray().reshape(-1, self.channels)


def _open(stream: BinaryIO, format: AudioFormat) -> Any:
    """The container of ``stream``, from which no other file or address can be opened."""
    return av.open(
        stream,
        format=format.demuxer,
        io_open=_refuse,
        **_ANY_TAGS,
        options={
            "protocol_whitelist": "none",
            "format_whitelist": format.demuxer,
            "codec_whitelist": ",".join(sorted(CODECS)),
            "enable_drefs": "0",
            "threads": "1",
        },
    )


def _refuse(url: str, flags: int, options: Any) -> NoReturn:
    raise PermissionError(f"a recording may not open {url!r}")


def _is_encrypted(track: Any) -> bool:
    try:
        tag = "" if track.codec_context is None else str(track.codec_context.codec_tag)
    except UnicodeDecodeError:
        tag = ""
    return tag in _ENCRYPTED_TAGS or "enc_key_id" in track.metadata


def _as_float(frame: Any) -> FloatArray:
    """``(frames, channels)`` float32 with full scale at 1."""
    values = frame.to_ndarray()
    values = values.T if frame.format.is_planar else values.reshape(-1, frame.layout.nb_channels)
    if values.dtype.kind == "f":
        with np.errstate(over="ignore"):  # Infinity is refused where blocks are checked.
            return np.asarray(values, np.float32)
    if values.dtype.kind == "u":
        return np.asarray((values.astype(np.float32) - 128) / 128, np.float32)
    return np.asarray(values * 2.0 ** (1 - 8 * values.dtype.itemsize), np.float32)


def _in_words(codec: str) -> str:
    pcm = re.fullmatch(r"pcm_s(\d+)[lb]e", codec)
    if pcm:
        return f"pcm_{pcm[1]}"
    named = {"pcm_f32le": "float", "pcm_f32be": "float", "pcm_f64le": "double",
             "pcm_f64be": "double"}  # fmt: skip
    return named.get(codec, codec.removesuffix("float").removeprefix("lib"))


def _reason(error: av.FFmpegError | PermissionError) -> str:
    return str(error.strerror or error).strip().rstrip(".")
