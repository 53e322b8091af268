"""Files that survive: safe names, hashes, durable and atomic writes, locks between processes.

Nothing here knows a model. Every function works the same on Linux, macOS and Windows.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from auto_voice.errors import DiskSpaceError, StoreError, UnsafeFileError

if TYPE_CHECKING:
    import filelock

log = logging.getLogger(__name__)

# Read and written at a time, in bytes.
CHUNK_BYTES = 1 << 20
# What every file system takes as one name; 120 characters leave room for a temporary name's ending.
SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,119}")
# Names that Windows opens as devices, whatever ending follows.
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")
_HOST_AND_PORT = re.compile(r"(\[[^\]]*\]|[^:]*)(:\d*)?")
# Bytes of a target's name in that of its temporary file: most file systems take 255 in all.
_TEMPORARY_BYTES = 200
# Longest wait for another process, in seconds: it may be fetching a large model over a slow line.
LOCK_TIMEOUT_S = 3600.0
# Seconds of waiting after which the log says for whom.
_SAY_AFTER_S = 2.0


def is_device_name(name: str) -> bool:
    """Whether Windows would open a device by this name."""
    return _RESERVED.fullmatch(name) is not None


def check_name(name: str, what: str) -> str:
    """``name`` unchanged if it is a plain file name on every platform.

    Raises:
        UnsafeFileError: a separator, ``..``, a hidden or reserved name, a trailing dot.
    """
    if not SAFE_NAME.fullmatch(name) or name.endswith(".") or is_device_name(name):
        raise UnsafeFileError(
            f"{what} {name!r} is not a safe file name: use letters, digits and . _ + - "
            "(at most 120 characters, no leading or trailing dot, no Windows device name)."
        )
    return name


def shown_url(name: str) -> str:
    """An address as it may be shown: without user, password and signature. Paths are as they were.

    Passwords are often pasted unquoted, so one may hold ``@``, ``/``, ``?`` and ``#``.
    """
    scheme, found, rest = name.partition("://")
    if not found:
        return name
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    if "@" in authority:
        rest = "***@" + authority.rpartition("@")[2] + rest[len(authority) :]
    elif "@" in rest and not _HOST_AND_PORT.fullmatch(authority):  # A password was cut.
        rest = "***@" + rest.rpartition("@")[2]
    place, asked, query = rest.partition("?")
    # Elsewhere than on the web a question mark may be of a file's name, or of a pattern.
    if asked and ("=" in query or scheme.lower().endswith(("http", "https"))):
        rest = f"{place}?***"
    return f"{scheme}://{rest}"


def without_secrets(text: str) -> str:
    """A sentence, such as that of another library, whose addresses may be shown."""
    return _ADDRESS.sub(lambda found: shown_url(found[0]), text)


def is_sha256(text: str) -> bool:
    """Whether ``text`` is a lower-case sha256."""
    return _SHA256.fullmatch(text) is not None


def check_sha256(text: str) -> str:
    """``text`` unchanged if it is a lower-case sha256, since it becomes part of a file name.

    Raises:
        UnsafeFileError: it is not.
    """
    if not is_sha256(text):
        raise UnsafeFileError(
            f"sha256 {text!r} is not 64 lower-case hexadecimal digits: correct the catalog."
        )
    return text


def sha256_file(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """Hex sha256 of a file; ``on_bytes`` is told how many bytes each step read."""
    digest = hashlib.sha256()
    buffer = bytearray(CHUNK_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
            if on_bytes is not None:
                on_bytes(count)
    return digest.hexdigest()


def fsync_file(path: Path) -> None:
    """Forces a file's bytes to the disk."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(folder: Path) -> None:
    """Forces a folder's entries to the disk, where the platform can open a folder."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems refuse this; the rename itself stays atomic.
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_beside(target: Path) -> Path:
    """A name in the target's folder that nobody else uses; the dot keeps it out of listings."""
    # File systems count bytes, of which a character may take four.
    name = target.name.encode(errors="ignore")[:_TEMPORARY_BYTES].decode(errors="ignore")
    return target.with_name(f".{name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")


@contextlib.contextmanager
def atomic_write(target: Path, *, durable: bool = True) -> Iterator[Path]:
    """A new file beside ``target`` that replaces it when the block ends without an error.

    Readers see the old file or the new one, never a half, and the new one has the permissions
    that the umask of this process gives, whatever the writer did: safetensors and pip make files
    that only their owner can read, which would break a folder that several users share.

    Args:
        durable: force bytes and name to the disk before and after the change.

    Yields:
        The path to write to; it exists and is empty, and may be replaced by another file.
    """
    temporary = temporary_beside(target)
    try:
        with temporary.open("xb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        yield temporary
        temporary.chmod(mode)
        if durable:
            fsync_file(temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        fsync_folder(target.parent)


def move_into_place(source: Path, target: Path) -> None:
    """Renames over ``target``; a mapped reader of the old file keeps the old bytes.

    Where ``source`` lies on another file system it is copied beside the target first, so the
    target still changes in one step.
    """
    try:
        source.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        copy_into_place(source, target)
        source.unlink(missing_ok=True)
    fsync_folder(target.parent)


def copy_into_place(source: Path, target: Path) -> None:
    """Like ``move_into_place``, with ``source`` left where it is."""
    with atomic_write(target) as temporary:
        shutil.copyfile(source, temporary)


def link_into_place(source: Path, target: Path) -> None:
    """Makes ``target`` another name of the file ``source``, in one step.

    Raises:
        OSError: the file system has no hard links, or the system does not allow this one.
    """
    temporary = temporary_beside(target)
    try:
        os.link(source, temporary)
        temporary.replace(target)
    finally:
        # A rename over another name of the same file does nothing and leaves both.
        temporary.unlink(missing_ok=True)
    fsync_folder(target.parent)


def write_json(path: Path, value: Mapping[str, Any], *, durable: bool = True) -> None:
    """Writes JSON in one step."""
    with atomic_write(path, durable=durable) as temporary:
        text = json.dumps(value, indent=2, sort_keys=True)
        temporary.write_text(f"{text}\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, or None if it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def free_bytes(path: Path) -> int:
    """Room left on the file system that holds ``path`` or its nearest existing parent."""
    for folder in (path, *path.parents):
        if folder.is_dir():
            return shutil.disk_usage(folder).free
    return shutil.disk_usage(Path.cwd()).free


def megabytes(count: int) -> str:
    """``1234567`` as ``1.2 MB``."""
    return f"{count / 1e6:.1f} MB"


@contextlib.contextmanager
def storage_errors(root: Path, doing: str) -> Iterator[None]:
    """Turns what the operating system says about the model folder into our own errors.

    Raises:
        DiskSpaceError: the disk or the quota is full.
        StoreError: anything else that keeps the folder from being used.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            raise DiskSpaceError(
                f"The disk of {root} filled up while {doing}: what arrived is kept; free some "
                "space (autovoice models prune helps) or set AUTOVOICE_MODEL_DIR elsewhere, and "
                "run the same command again."
            ) from error
        reason = error.strerror or str(error)
        raise StoreError(
            f"The model folder {root} could not be used while {doing} ({reason}): check its "
            "permissions or set AUTOVOICE_MODEL_DIR to a folder you can write."
        ) from error


def make_folder(folder: Path, root: Path) -> Path:
    """Creates a folder of the store and its parents.

    Raises:
        StoreError: it cannot be created.
    """
    with storage_errors(root, "creating a folder"):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def holder_of(path: Path) -> str:
    """Who holds the lock at ``path``, in words."""
    record = read_json(_holder_path(path))
    if not record:
        return "another process"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(record.get("since", 0))))
    return f"process {record.get('pid')} on {record.get('host')} (since {since})"


@contextlib.contextmanager
def file_lock(
    path: Path, root: Path, what: str, timeout_s: float = LOCK_TIMEOUT_S
) -> Iterator[None]:
    """Holds the lock at ``path`` for the block; released by the system if the process dies.

    Args:
        path: of the lock file; its folder is created.
        root: the store, for error messages.
        what: is locked, in words.
        timeout_s: longest wait; 0 tries once.

    Raises:
        StoreError: somebody else held it for longer, or the folder is not writable.
    """
    # 0.1 s to import, and a cache hit never needs it.
    import filelock

    make_folder(path.parent, root)
    lock = filelock.FileLock(str(path), thread_local=False)
    with storage_errors(root, f"locking {what}"):
        _acquire(lock, path, what, timeout_s, filelock.Timeout)
    try:
        _note_holder(path)
        yield
    finally:
        _holder_path(path).unlink(missing_ok=True)
        lock.release()


def _acquire(
    lock: filelock.BaseFileLock,
    path: Path,
    what: str,
    timeout_s: float,
    timeout_error: type[Exception],
) -> None:
    deadline = time.monotonic() + timeout_s
    first = min(_SAY_AFTER_S, timeout_s)
    try:
        lock.acquire(timeout=first)
        return
    except timeout_error:
        if timeout_s > first:
            log.info("waiting for %s, which %s is working on", what, holder_of(path))
    try:
        lock.acquire(timeout=max(0.0, deadline - time.monotonic()))
    except timeout_error:
        raise StoreError(
            f"{what} is locked by {holder_of(path)}: wait until it is done, or end it if it hangs."
        ) from None


def _holder_path(path: Path) -> Path:
    # Beside the lock and not in it: a locked file cannot be read on Windows.
    return path.with_suffix(".holder")


def _note_holder(path: Path) -> None:
    import socket

    record = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
    # The note only serves a message; a full disk must not make the lock fail.
    with contextlib.suppress(OSError):
        _holder_path(path).write_text(json.dumps(record), encoding="utf-8")
