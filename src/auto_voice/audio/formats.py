"""What a file is, judged by its first and last bytes before any decoder runs."""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass
from typing import BinaryIO

HEAD_BYTES = 4096
_OGG_TAIL_BYTES = 65_536 + 64  # an Ogg page is shorter than this
_UNKNOWN_SIZE = 0x7FFF_0000  # programs that write to a pipe put this or more as "size not known"

READABLE = ("wav", "flac", "mp3", "ogg (vorbis, opus)", "aiff", "au", "caf", "w64", "nist")

_FOREIGN: tuple[tuple[int, bytes, str], ...] = (
    (4, b"ftyp", "an MP4/M4A file"),
    (0, b"\x1aE\xdf\xa3", "a Matroska/WebM file"),
    (0, b"0&\xb2u", "a WMA/WMV file"),
    (0, b"#!AMR", "an AMR file"),
    (0, b"FLV", "a Flash video"),
    (0, b"MThd", "a MIDI file, which holds notes and no sound"),
    (0, b"\x89PNG", "a PNG picture"),
    (0, b"\xff\xd8\xff", "a JPEG picture"),
    (0, b"GIF8", "a GIF picture"),
    (0, b"%PDF", "a PDF document"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"\x7fELF", "a program"),
)
_CONVERTIBLE = ("MP4", "Matroska", "WMA", "AMR", "Flash", "AVI", "AAC")


@dataclass(frozen=True)
class Sniffed:
    """Attributes:
    readable: name of a format that can be decoded, or "" if it cannot.
    description: what it is instead, with an article; "" when nothing is known.
    """

    readable: str = ""
    description: str = ""

    @property
    def convertible(self) -> bool:
        """A media file whose sound another program can extract."""
        return any(word in self.description for word in _CONVERTIBLE)


def sniff(head: bytes) -> Sniffed:
    """The format that starts with ``head`` (4096 bytes are plenty)."""
    if head[:4] in (b"RIFF", b"RIFX", b"RF64"):
        if head[8:12] == b"WAVE":
            return Sniffed("rf64" if head[:4] == b"RF64" else "wav")
        return Sniffed(description="an AVI video" if head[8:11] == b"AVI" else "a RIFF file")
    if head[:4] == b"FORM" and head[8:11] == b"AIF":
        return Sniffed("aiff")
    for magic, name in (
        (b"fLaC", "flac"),
        (b"OggS", "ogg"),
        (b".snd", "au"),
        (b"dns.", "au"),
        (b"caff", "caf"),
        (b"riff\x2e\x91\xcf\x11", "w64"),
        (b"NIST_1A", "nist"),
        (b"ID3", "mp3"),
    ):
        if head.startswith(magic):
            return Sniffed(name)
    for offset, magic, description in _FOREIGN:
        if head[offset : offset + len(magic)] == magic:
            return Sniffed(description=description)
    if _mpeg_frame_length(head) is not None:
        return Sniffed("mp3")
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0:
        return Sniffed(description="a raw AAC stream")
    return Sniffed(description="text" if _looks_like_text(head) else "")


@dataclass(frozen=True)
class Completeness:
    """Attributes:
    missing: share of the promised audio bytes that the file lacks; 0.0 if it is whole, NaN if
        something is missing but not how much, None if the header does not tell.
    note: a doubt worth passing on.
    """

    missing: float | None = None
    note: str = ""

    @property
    def truncated(self) -> bool:
        return self.missing is not None and not self.missing <= 0


def completeness(stream: BinaryIO, kind: str, size: int) -> Completeness:
    """What the header promises against what is there, without decoding.

    ``kind`` is from :func:`sniff`, ``size`` the bytes of ``stream``, which must be seekable and
    is left at an undefined place. Formats not looked at here are left to the decoder.
    """
    if kind == "wav":
        return _wav_completeness(stream, size)
    if kind == "mp3":
        return _mp3_completeness(stream, size)
    if kind == "ogg":
        return _ogg_completeness(stream, size)
    return Completeness()


def log_says_truncated(decoder_log: str) -> bool:
    """Whether libsndfile's parse log tells that the sound chunk is shorter than declared."""
    if re.search(r"not equal to frame count|does not match value from 'ds64'", decoder_log):
        return True
    sizes = re.search(
        r"^(?:data|\s*Data Size|SSND|riff)\s*: (\d+) \(should be (\d+)\)", decoder_log, re.MULTILINE
    )
    if sizes is None:
        return False
    declared, actual = int(sizes[1]), int(sizes[2])
    return actual < declared < _UNKNOWN_SIZE


def _wav_completeness(stream: BinaryIO, size: int) -> Completeness:
    stream.seek(0)
    order = ">" if stream.read(12)[:4] == b"RIFX" else "<"
    position = 12
    while position + 8 <= size:
        stream.seek(position)
        tag, declared = struct.unpack(order + "4sI", stream.read(8))
        if tag == b"data":
            available = size - position - 8
            if declared >= _UNKNOWN_SIZE or declared == 0:
                return Completeness(note="the header does not say how long the recording is")
            return Completeness(max(0.0, 1 - available / declared))
        position += 8 + declared + (declared & 1)
    return Completeness(1.0)


def _mp3_completeness(stream: BinaryIO, size: int) -> Completeness:
    """Compare the byte count of a Xing/Info header, where an encoder wrote one, with the file."""
    stream.seek(0)
    head = stream.read(10)
    start = 0
    if head[:3] == b"ID3" and len(head) == 10:
        for byte in head[6:]:  # a "syncsafe" integer: seven bits a byte
            start = start << 7 | byte & 0x7F
        start += 10
    stream.seek(start)
    frame = stream.read(1500)
    length = _mpeg_frame_length(frame)
    if length is None:
        return Completeness(1.0 if start >= size else None)
    for tag in (b"Xing", b"Info"):
        at = frame.find(tag, 4, 64)
        if at < 0 or at + 16 > len(frame):
            continue
        (flags,) = struct.unpack(">I", frame[at + 4 : at + 8])
        if not flags & 2:
            return Completeness()
        where = at + 8 + (4 if flags & 1 else 0)
        (declared,) = struct.unpack(">I", frame[where : where + 4])
        # Some encoders leave their own first frame out of the count, none counts more than it.
        missing = declared - (size - start)
        return Completeness(missing / declared if declared and missing > length else 0.0)
    return Completeness()


def _ogg_completeness(stream: BinaryIO, size: int) -> Completeness:
    """Whether the last page is whole, and carries the end-of-stream flag (RFC 3533, section 6)."""
    stream.seek(max(0, size - _OGG_TAIL_BYTES))
    tail = stream.read()
    at = tail.rfind(b"OggS")
    while at >= 0 and (at + 27 > len(tail) or tail[at + 4] != 0):
        at = tail.rfind(b"OggS", 0, at)
    if at < 0:
        return Completeness(math.nan)
    segments = tail[at + 26]
    lacing = tail[at + 27 : at + 27 + segments]
    end = at + 27 + segments + sum(lacing)
    if len(lacing) < segments or end != len(tail):
        return Completeness(math.nan)
    if not tail[at + 5] & 4:
        return Completeness(0.0, "the file has no end mark, so its end may be missing")
    return Completeness(0.0)


_BITRATES_V1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_BITRATES_V2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)


def _mpeg_frame_length(data: bytes) -> int | None:
    """Bytes of the layer-III frame that starts here, None if none does (ISO 11172-3, 2.4.1.3)."""
    if len(data) < 4 or data[0] != 0xFF or data[1] & 0xE0 != 0xE0:
        return None
    version, layer = (data[1] >> 3) & 3, (data[1] >> 1) & 3
    bitrate_index, rate_index, padding = data[2] >> 4, (data[2] >> 2) & 3, (data[2] >> 1) & 1
    if version == 1 or layer != 1 or not 0 < bitrate_index < 15 or rate_index == 3:
        return None
    rate = (44_100, 48_000, 32_000)[rate_index] >> {3: 0, 2: 1, 0: 2}[version]
    kbps = (_BITRATES_V1 if version == 3 else _BITRATES_V2)[bitrate_index]
    return (144_000 if version == 3 else 72_000) * kbps // rate + padding


def _looks_like_text(head: bytes) -> bool:
    """UTF-8 (up to a character cut at the end) without control characters."""
    if not head or b"\0" in head:
        return False
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:
            return False
        text = head[: error.start].decode("utf-8")
    return all(character.isprintable() or character in "\r\n\t\f\x1b" for character in text)
