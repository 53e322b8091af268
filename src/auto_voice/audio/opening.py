"""Whatever holds a recording, as a stream that can be sought in."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from auto_voice.errors import AudioFormatError, AudioNotFoundError

AudioSource: TypeAlias = "str | os.PathLike[str] | bytes | BinaryIO"


class Window(io.RawIOBase):
    """The rest of a seekable stream, as if it began where the stream stood.

    Seeking before the start lands on it: damaged headers make decoders try, and an exception in
    their callback could only be printed.
    """

    def __init__(self, stream: BinaryIO, start: int, size: int) -> None:
        super().__init__()
        self._inner, self._start, self._size = stream, start, size

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
        data = self._inner.read(len(buffer))
        buffer[: len(data)] = data
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
            f"{str(path)!r} cannot be opened ({error}); check the path."
        ) from error
