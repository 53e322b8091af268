"""Which recordings can be read: their names, their first bytes, and what their headers promise.

Nothing here decodes. FFmpeg is only ever told to open a format that was recognised here, so that
playlists and other files that name further files or addresses never reach it.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

# Bytes in which every magic number and the text header of NIST files lie.
HEAD_BYTES = 4096
# Bytes of a header or of empty padding before the first frame of MP3 and AAC that are searched.
SEARCH_BYTES = 1 << 16
# Consecutive frames that make a stream without a magic number MP3 or AAC: random bytes hold two
# matching headers by chance once in thirty megabytes, three practically never.
FRAMES_TO_TRUST = 3


@dataclass(frozen=True)
class AudioFormat:
    """One container that can be read.

    Attributes:
        name: for users and messages.
        demuxer: FFmpeg's name of the reader of this container.
        suffixes: file name endings, lower case with dot.
        slack_samples: by how much the decoded sound may be shorter than the number of samples in
            the header; None where the header holds none that is exact.
    """

    name: str
    demuxer: str
    suffixes: tuple[str, ...]
    slack_samples: int | None = None


INPUT_FORMATS = {
    row.name: row
    for row in (
        AudioFormat("wav", "wav", (".wav", ".wave", ".bwf", ".rf64")),
        AudioFormat("flac", "flac", (".flac",), slack_samples=0),
        # Some encoders count the frame of their own header, some another: two frames of 1152.
        AudioFormat("mp3", "mp3", (".mp3", ".mp2", ".mpga"), slack_samples=2304),
        AudioFormat("mp4", "mov",
                    (".m4a", ".m4b", ".mp4", ".m4v", ".mov", ".3gp", ".3g2")),
        AudioFormat("aac", "aac", (".aac", ".adts")),
        AudioFormat("ogg", "ogg", (".ogg", ".oga", ".opus", ".spx")),
        AudioFormat("matroska", "matroska", (".webm", ".weba", ".mka", ".mkv")),
        AudioFormat("wma", "asf", (".wma", ".wmv", ".asf")),
        AudioFormat("amr", "amr", (".amr", ".awb")),
        AudioFormat("aiff", "aiff", (".aif", ".aiff", ".aifc")),
        AudioFormat("caf", "caf", (".caf",)),
        AudioFormat("au", "au", (".au", ".snd")),
        AudioFormat("w64", "w64", (".w64",)),
        AudioFormat("nist", "nistsphere", (".nist", ".sph"), slack_samples=0),
        AudioFormat("avi", "avi", (".avi",)),
        AudioFormat("mts", "mpegts", (".mts", ".m2ts")),
    )
}  # fmt: skip
# For messages.
READABLE = "wav, flac, mp3, m4a, mp4, mov, aac, ogg, opus, webm, wma, amr or aiff"
# The one list of endings by which a folder's files are taken as recordings.
AUDIO_SUFFIXES = frozenset(suffix for row in INPUT_FORMATS.values() for suffix in row.suffixes)

# Offset in the file, the bytes that stand there, and the format that they give away.
_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b"fLaC", "flac"),
    (0, b"OggS", "ogg"),
    (0, b".snd", "au"),
    (0, b"caff", "caf"),
    (0, b"riff\x2e\x91\xcf\x11", "w64"),
    (0, b"NIST_1A", "nist"),
    (0, b"\x1aE\xdf\xa3", "matroska"),
    (0, b"0&\xb2u\x8ef\xcf\x11", "wma"),
    (0, b"#!AMR", "amr"),
    (4, b"ftyp", "mp4"),
    # QuickTime from before the brand became a rule.
    (4, b"moov", "mp4"),
    (4, b"mdat", "mp4"),
    (4, b"wide", "mp4"),
)
_FOREIGN: tuple[tuple[bytes, str], ...] = (
    (b"#EXTM3U", "a playlist, which names other files"),
    (b"ffconcat", "a playlist, which names other files"),
    (b"MThd", "a MIDI file, which holds notes and no sound"),
    (b"FLV", "a Flash video"),
    (b"wvpk", "WavPack"),
    (b"MAC ", "Monkey's Audio"),
    (b"TTA1", "True Audio"),
    (b"MPCK", "Musepack"),
    (b"MP+", "Musepack"),
    (b"DSD ", "DSD"),
    (b"FRM8", "DSD"),
    (b".RMF", "RealAudio"),
    (b".ra\xfd", "RealAudio"),
    (b"Creative Voice File", "a Creative voice file"),
    (b"\x0b\x77", "a bare AC-3 stream"),
    (b"\x7f\xfe\x80\x01", "a bare DTS stream"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF8", "a GIF picture"),
    (b"%PDF", "a PDF document"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x7fELF", "a program"),
)

# Header objects of ASF that say the sound is encrypted: content encryption, extended, advanced.
_ASF_ENCRYPTION = tuple(
    bytes.fromhex(guid)
    for guid in (
        "fbb3112223bdd211b4b700a0c955fc6e",
        "14e68a292226174cb935dae07ee9289c",
        "3385054381 69e6499b74ad12cb86d58c",
    )
)


@dataclass(frozen=True)
class FolderListing:
    """The files of a folder in order of their names; hidden files and folders are left out.

    Attributes:
        recordings: whatever has an ending of ``AUDIO_SUFFIXES`` and is no folder: what cannot be
            read, such as a link that leads nowhere, is refused by its name where it is read.
        ignored: all others.
        skipped: folders that were not looked into: links, and those that may not be listed.
    """

    recordings: tuple[Path, ...]
    ignored: tuple[Path, ...]
    skipped: tuple[Path, ...]


def list_folder(folder: Path, *, deep: bool = True) -> FolderListing:
    """Every file of ``folder``, and of the folders in it where ``deep``."""
    found: list[Path] = []
    skipped: list[Path] = []

    def skip(error: OSError) -> None:
        skipped.append(Path(error.filename))

    for here, folders, files in os.walk(folder, onerror=skip):
        at = Path(here)
        found += (at / name for name in files if not name.startswith("."))
        folders[:] = [name for name in folders if deep and not name.startswith(".")]
        skipped += (at / name for name in folders if (at / name).is_symlink())
    found.sort()
    named = [path.suffix.lower() in AUDIO_SUFFIXES for path in found]
    return FolderListing(
        tuple(path for path, known in zip(found, named, strict=True) if known),
        tuple(path for path, known in zip(found, named, strict=True) if not known),
        tuple(sorted(skipped)),
    )


@dataclass(frozen=True)
class Sniffed:
    """The format that the first bytes of a file show.

    Attributes:
        format: a row of ``INPUT_FORMATS``; None if the file cannot be read.
        description: what it is instead, with an article; "" when nothing is known.
        start: byte at which the sound starts, behind tags and padding (MP3 and AAC only).
    """

    format: AudioFormat | None = None
    description: str = ""
    start: int = 0


def sniff(stream: BinaryIO) -> Sniffed:
    """The format of a seekable stream; the name of the file does not count."""
    start = _after_id3(stream)
    stream.seek(start)
    head = stream.read(HEAD_BYTES)
    kind = head[8:12]
    if head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64"):
        if kind in (b"WAVE", b"AVI "):
            return Sniffed(INPUT_FORMATS["wav" if kind == b"WAVE" else "avi"])
        return Sniffed(description="a RIFF file without sound")
    if head[:4] == b"FORM" and head[8:11] == b"AIF":
        return Sniffed(INPUT_FORMATS["aiff"])
    for offset, magic, name in _MAGIC:
        if head[offset : offset + len(magic)] == magic:
            if name == "wma" and any(guid in head for guid in _ASF_ENCRYPTION):
                return Sniffed(description="encrypted (copy protection)")
            return Sniffed(INPUT_FORMATS[name])
    for magic, description in _FOREIGN:
        if head.startswith(magic):
            return Sniffed(description=description)
    if _is_transport_stream(head):
        return Sniffed(INPUT_FORMATS["mts"])
    if _looks_like_text(head):
        return Sniffed(description="text")
    found = _sniff_frames(stream, start)
    # An ID3 tag stands before little else, so a damaged MP3 may be behind it.
    return found or Sniffed(INPUT_FORMATS["mp3"] if start else None, start=start)


def _after_id3(stream: BinaryIO) -> int:
    """The byte behind the ID3v2 tags at the start (id3.org, ID3v2.4, section 3.1)."""
    start = 0
    while True:
        stream.seek(start)
        tag = stream.read(10)
        if len(tag) < 10 or tag[:3] != b"ID3":
            return start
        length = 0
        for byte in tag[6:]:  # a "syncsafe" integer: seven bits a byte
            length = length << 7 | byte & 0x7F
        start += 10 + length


def _sniff_frames(stream: BinaryIO, start: int) -> Sniffed | None:
    """MP3 or AAC, if there are consecutive frames near ``start``."""
    stream.seek(start)
    data = stream.read(2 * SEARCH_BYTES)
    ended = len(data) < 2 * SEARCH_BYTES
    at = data.find(b"\xff")
    while 0 <= at < SEARCH_BYTES:
        for name, length_of in (("mp3", mpeg_frame_length), ("aac", _adts_frame_length)):
            if _frames_follow(data, at, length_of, ended):
                return Sniffed(INPUT_FORMATS[name], start=start + at)
        at = data.find(b"\xff", at + 1)
    return None


def _frames_follow(
    data: bytes, at: int, length_of: Callable[[bytes], int | None], ended: bool
) -> bool:
    for _ in range(FRAMES_TO_TRUST):
        length = length_of(data[at : at + 8])
        if length is None:
            return False
        if at + length >= len(data):
            # A last frame that ends with the file, or one that is cut and stands alone.
            return ended and (at + length == len(data) or at == 0)
        at += length
    return True


def _is_transport_stream(head: bytes) -> bool:
    """Packets of 188 bytes, or of 192 with a time code before each (AVCHD), begin with 0x47."""
    return any(
        len(head) > offset + 3 * size
        and all(head[offset + index * size] == 0x47 for index in range(4))
        for offset, size in ((0, 188), (4, 192))
    )


@dataclass(frozen=True)
class Completeness:
    """The length that a header promises, compared with the bytes that are there.

    Attributes:
        missing: share of the promised audio bytes that the file lacks; 0.0 if it is whole, NaN if
            something is missing but not how much.
        length_known: whether the header promises a length at all.
        note: a doubt worth passing on.
        end: byte at which the sound ends; None for the end of the file.
        one_page_samples: end of the only page of Ogg that holds sound, in samples; None where
            there are several.
        correction: an offset in the file and the bytes to read from there instead of its own,
            where its writer is known to err.
    """

    missing: float = 0.0
    length_known: bool = True
    note: str = ""
    end: int | None = None
    one_page_samples: int | None = None
    correction: tuple[int, bytes] | None = None

    @property
    def truncated(self) -> bool:
        return not self.missing <= 0


_NO_LENGTH = Completeness(0.0, False, "the header does not say how long the recording is")
# Programs that write to a pipe put this or more as "size not known".
_UNKNOWN_SIZE = 0x7F00_0000
# A size that is off by some bytes is an error of the program that wrote it, below 4 ms of sound.
_SLACK_BYTES = 64
# An Ogg page is shorter than this (RFC 3533, section 6: 65 307 bytes).
_OGG_PAGE_BYTES = 65_536 + 64
# Pages in which the headers of a stream lie, tags and a cover picture included.
_OGG_HEADER_PAGES = 200


def completeness(stream: BinaryIO, sniffed: Sniffed, size: int) -> Completeness:
    """Compare the length that the header promises with the bytes that are there, without decoding.

    ``size`` is that of ``stream``, which must be seekable and is left at an undefined place.
    """
    check = _CHECKS.get(sniffed.format.name if sniffed.format else "")
    if check is not None:
        return check(stream, size)
    if sniffed.format is INPUT_FORMATS["mp3"]:
        return _mp3_completeness(stream, sniffed.start, size)
    return Completeness(length_known=False)


def _against(declared_end: int, start: int, size: int) -> Completeness:
    """A block of audio bytes from ``start`` to ``declared_end`` in a file of ``size`` bytes."""
    lacking = declared_end - size
    if lacking <= _SLACK_BYTES:
        return Completeness()
    return Completeness(min(1.0, lacking / max(1, declared_end - start)))


def _chunks(
    stream: BinaryIO, size: int, start: int, header: str, align: int = 1, inclusive: bool = False
) -> Iterator[tuple[bytes, int, int]]:
    """Tag, start and declared length of the bodies of the chunks that follow each other.

    Args:
        header: of a chunk, for ``struct``: tag and length.
        align: bodies are padded to a multiple of it.
        inclusive: whether a length counts the header, too.
    """
    width = struct.calcsize(header)
    while start + width <= size:
        stream.seek(start)
        tag, length = struct.unpack(header, stream.read(width))
        body = length - width if inclusive else length
        yield tag, start + width, body
        if body < 0:
            return
        start += width + body + -body % align


def _wav_completeness(stream: BinaryIO, size: int) -> Completeness:
    stream.seek(0)
    magic = stream.read(4)
    long_length = None
    for tag, start, length in _chunks(stream, size, 12, ">4sI" if magic == b"RIFX" else "<4sI", 2):
        if tag == b"ds64":
            stream.seek(start + 8)
            long_length = struct.unpack("<Q", stream.read(8).ljust(8, b"\0"))[0]
        elif tag == b"data":
            if length == 0xFFFF_FFFF and long_length:
                length = long_length
            elif length >= _UNKNOWN_SIZE or length == 0:
                return _NO_LENGTH if size > start else Completeness()
            return _against(start + length, start, size)
    return Completeness(1.0)


def _aiff_completeness(stream: BinaryIO, size: int) -> Completeness:
    for tag, start, length in _chunks(stream, size, 12, ">4sI", 2):
        if tag == b"SSND":
            unknown = length >= _UNKNOWN_SIZE or length == 0
            return _NO_LENGTH if unknown else _against(start + length, start, size)
    return Completeness(1.0)


def _caf_completeness(stream: BinaryIO, size: int) -> Completeness:
    frames, correction = 0, None
    for tag, start, length in _chunks(stream, size, 8, ">4sq"):
        stream.seek(start)
        if tag == b"desc":
            frames = int.from_bytes(stream.read(24)[20:], "big")
        elif tag == b"pakt":
            # libsndfile calls a full last packet one that lacks all its samples, which FFmpeg
            # takes for damage (Core Audio Format specification, packet table).
            lacking = int.from_bytes(stream.read(24)[20:], "big")
            correction = (start + 20, bytes(4)) if 0 < frames <= lacking else None
        elif tag == b"data":
            found = _NO_LENGTH if length < 0 else _against(start + length, start, size)
            return replace(found, correction=correction)
    return Completeness(1.0)


def _w64_completeness(stream: BinaryIO, size: int) -> Completeness:
    for tag, start, length in _chunks(stream, size, 40, "<16sq", 8, inclusive=True):
        if tag[:4] == b"data":
            return _NO_LENGTH if length <= 0 else _against(start + length, start, size)
    return Completeness(1.0)


def _au_completeness(stream: BinaryIO, size: int) -> Completeness:
    stream.seek(4)
    header = stream.read(8)
    if len(header) < 8:
        return Completeness(1.0)
    start, length = struct.unpack(">II", header)
    return _NO_LENGTH if length >= _UNKNOWN_SIZE else _against(start + length, start, size)


def _avi_completeness(stream: BinaryIO, size: int) -> Completeness:
    stream.seek(4)
    (length,) = struct.unpack("<I", stream.read(4).ljust(4, b"\0"))
    return _NO_LENGTH if length in (0, 0xFFFF_FFFF) else _against(8 + length, 0, size)


def _flac_completeness(stream: BinaryIO, size: int) -> Completeness:
    """Whether STREAMINFO (RFC 9639, section 8.2) counts the samples; 0 is "not known"."""
    start = _after_id3(stream)
    stream.seek(start + 4 + 4 + 13)
    block = stream.read(5)
    count = int.from_bytes(block, "big") & 0xF_FFFF_FFFF
    return Completeness() if count else _NO_LENGTH


def _nist_completeness(stream: BinaryIO, size: int) -> Completeness:
    """Whether the text header (NIST SPHERE) counts the samples."""
    stream.seek(0)
    return Completeness(length_known=b"sample_count" in stream.read(HEAD_BYTES))


def _mp4_completeness(stream: BinaryIO, size: int) -> Completeness:
    """Whether the boxes that hold the sound or its index end inside the file (ISO 14496-12)."""
    start = 0
    while start + 8 <= size:
        stream.seek(start)
        length, tag = struct.unpack(">I4s", stream.read(8))
        if length == 1:
            length = int.from_bytes(stream.read(8), "big")
        if length < 8:  # 0: up to the end of the file.
            break
        if tag in (b"mdat", b"moov", b"moof") and start + length > size + _SLACK_BYTES:
            return _against(start + length, start, size)
        start += length
    return Completeness()


def _matroska_completeness(stream: BinaryIO, size: int) -> Completeness:
    """Whether the segment ends inside the file (RFC 8794; all ones: size not known)."""
    stream.seek(4)
    header = _ebml_size(stream)
    stream.seek(stream.tell() + (header or 0))
    if stream.read(4) != b"\x18\x53\x80\x67":
        return Completeness(length_known=False)
    length = _ebml_size(stream)
    start = stream.tell()
    return _NO_LENGTH if length is None else _against(start + length, start, size)


def _ebml_size(stream: BinaryIO) -> int | None:
    first = stream.read(1)
    if not first or not first[0]:
        return None
    width = 8 - first[0].bit_length()
    value = int.from_bytes(bytes([first[0] & (0x7F >> width)]) + stream.read(width), "big")
    return None if value == (1 << 7 * (width + 1)) - 1 else value


def _asf_completeness(stream: BinaryIO, size: int) -> Completeness:
    """Whether the data object, which follows the header object, ends inside the file."""
    for index, (_, start, length) in enumerate(_chunks(stream, size, 0, "<16sq", inclusive=True)):
        if index == 1:
            return _NO_LENGTH if length <= 0 else _against(start + length, start, size)
    return Completeness(math.nan)


def _mp3_completeness(stream: BinaryIO, start: int, size: int) -> Completeness:
    """Compare the byte count of a Xing/Info header, where an encoder wrote one, with the file."""
    if start >= size:
        return Completeness(1.0)
    stream.seek(start)
    frame = stream.read(1500)
    length = mpeg_frame_length(frame)
    if length is None:
        return Completeness(1.0 if start >= size else 0.0, False)
    for tag in (b"Xing", b"Info"):
        at = frame.find(tag, 4, 64)
        if at < 0 or at + 16 > len(frame):
            continue
        (flags,) = struct.unpack(">I", frame[at + 4 : at + 8])
        counted = bool(flags & 1)
        if not flags & 2:
            return Completeness(length_known=counted)
        where = at + 8 + (4 if counted else 0)
        (declared,) = struct.unpack(">I", frame[where : where + 4])
        # Some encoders leave their own first frame out of the count, none counts more than it.
        missing = declared - (size - start)
        share = missing / declared if declared and missing > length else 0.0
        # Far more bytes than declared: another file was joined to the one that was counted.
        return Completeness(share, length_known=counted and -missing <= declared >> 4)
    return Completeness(length_known=False)


def _ogg_completeness(stream: BinaryIO, size: int) -> Completeness:
    """Whether the last page is whole, and carries the end-of-stream flag (RFC 3533, section 6).

    Padding behind the last page is no sound and does not count.
    """
    end, tail, at = size, b"", -1
    while end > 0 and at < 0:
        start = max(0, end - _OGG_PAGE_BYTES)
        stream.seek(start)
        # A page that begins in the earlier part may end in the later one.
        tail = (stream.read(end - start) + tail)[: 2 * _OGG_PAGE_BYTES]
        at = _last_page(tail)
        end = start
    if at < 0:
        return Completeness(math.nan)
    if at + 27 > len(tail):
        return Completeness(math.nan)
    segments = tail[at + 26]
    lacing = tail[at + 27 : at + 27 + segments]
    stop = at + 27 + segments + sum(lacing)
    rest = tail[stop:]
    if len(lacing) < segments or stop > len(tail) or (rest and b"OggS".startswith(rest[:4])):
        return Completeness(math.nan)
    marked = bool(tail[at + 5] & 4)
    note = "" if marked else "the file has no end mark, so its end may be missing"
    only = _only_page(stream, end + stop) if marked else None
    return Completeness(note=note, end=end + stop, one_page_samples=only)


def _only_page(stream: BinaryIO, end: int) -> int | None:
    """The granule position of the only page that holds sound; None if there are several."""
    start = 0
    for _ in range(_OGG_HEADER_PAGES):
        stream.seek(start)
        header = stream.read(27)
        if len(header) < 27 or header[:4] != b"OggS":
            return None
        (granule,) = struct.unpack("<q", header[6:14])
        start += 27 + header[26] + sum(stream.read(header[26]))
        # Pages of headers stand at 0, those on which no packet ends at -1.
        if granule > 0:
            return granule if start >= end else None
    return None


def _last_page(tail: bytes) -> int:
    """The byte at which the last page begins; -1 without any."""
    at = tail.rfind(b"OggS")
    while at >= 0 and at + 5 <= len(tail) and tail[at + 4] != 0:
        at = tail.rfind(b"OggS", 0, at)
    return at


_CHECKS = {
    "wav": _wav_completeness,
    "aiff": _aiff_completeness,
    "caf": _caf_completeness,
    "w64": _w64_completeness,
    "au": _au_completeness,
    "avi": _avi_completeness,
    "flac": _flac_completeness,
    "nist": _nist_completeness,
    "ogg": _ogg_completeness,
    "mp4": _mp4_completeness,
    "matroska": _matroska_completeness,
    "wma": _asf_completeness,
}


# Hz of MPEG-1 by the index in a frame; MPEG-2 halves and MPEG-2.5 quarters them.
_RATES = (44_100, 48_000, 32_000)
# kbit/s by layer (1, 2, 3): MPEG-1, then MPEG-2 and 2.5.
_BITRATES_1 = {
    1: (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    2: (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    3: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
}
_BITRATES_2 = {
    1: (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    3: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


def mpeg_frame_length(data: bytes) -> int | None:
    """Bytes of the MPEG audio frame that starts here, None if none does (ISO 11172-3, 2.4.1.3)."""
    if len(data) < 4 or data[0] != 0xFF or data[1] & 0xE0 != 0xE0:
        return None
    version, layer = (data[1] >> 3) & 3, 4 - ((data[1] >> 1) & 3)
    bitrate_index, rate_index, padding = data[2] >> 4, (data[2] >> 2) & 3, (data[2] >> 1) & 1
    if version == 1 or layer == 4 or not 0 < bitrate_index < 15 or rate_index == 3:
        return None
    rate = _RATES[rate_index] >> {3: 0, 2: 1, 0: 2}[version]
    bits = 1000 * (_BITRATES_1 if version == 3 else _BITRATES_2)[layer][bitrate_index]
    if layer == 1:
        return (12 * bits // rate + padding) * 4
    return (72 if layer == 3 and version != 3 else 144) * bits // rate + padding


def _adts_frame_length(data: bytes) -> int | None:
    """Bytes of the AAC frame that starts here, None if none does (ISO 14496-3, 1.A.3.2)."""
    if len(data) < 7 or data[0] != 0xFF or data[1] & 0xF6 != 0xF0 or (data[2] >> 2) & 15 > 12:
        return None
    length = (data[3] & 3) << 11 | data[4] << 3 | data[5] >> 5
    return length if length >= 7 else None


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
