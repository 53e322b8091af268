"""Decoders in C that write to stderr by themselves, kept quiet where that is safe."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STDERR = 2
# Begins the names of threads that never write and start no process.
SILENT = "silent"


@contextmanager
def quiet_stderr(wanted: bool = True) -> Iterator[None]:
    """Nothing that is written to file descriptor 2 inside is seen.

    The MP3 decoder complains there of what our own sentence says better. The descriptor belongs to
    the whole process, so this does nothing while other threads run, whose lines would be lost.
    """
    here = threading.current_thread()
    alone = all(t is here or t.name.startswith(SILENT) for t in threading.enumerate())
    if not (wanted and alone):
        yield
        return
    try:
        kept = os.dup(STDERR)
    except OSError:  # There is no stderr.
        yield
        return
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, STDERR)
        os.close(nowhere)
        yield
    finally:
        os.dup2(kept, STDERR)
        os.close(kept)
