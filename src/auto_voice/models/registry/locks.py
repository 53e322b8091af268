"""Locks between processes, with a bounded wait that names the holder."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from auto_voice.errors import StoreError
from auto_voice.filesystem import make_folder, read_json, storage_errors

if TYPE_CHECKING:
    import filelock

log = logging.getLogger(__name__)

DEFAULT_TIMEOUT_S = 3600.0
_SAY_AFTER_S = 2.0


def holder_of(path: Path) -> str:
    """Who holds the lock at ``path``, in words."""
    record = read_json(_holder_path(path))
    if not record:
        return "another process"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(record.get("since", 0))))
    return f"process {record.get('pid')} on {record.get('host')} (since {since})"


@contextlib.contextmanager
def file_lock(
    path: Path, root: Path, what: str, timeout_s: float = DEFAULT_TIMEOUT_S
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
    record = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
    # The note only serves a message; a full disk must not make the lock fail.
    with contextlib.suppress(OSError):
        _holder_path(path).write_text(json.dumps(record), encoding="utf-8")
