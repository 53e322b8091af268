"""The folders of jobs: uploads in, results out, nothing left behind.

No name here comes from a client: folders are called by job ids, which the server draws, and files
by their role and number.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from auto_voice.errors import ConfigError, UnknownJobError

_ID = re.compile(r"[A-Za-z0-9_-]{22}")
# A disk with less room than this is called full.
SPARE_BYTES = 200_000_000


def new_id() -> str:
    """128 random bits as 22 characters."""
    return secrets.token_urlsafe(16)


class JobFiles:
    """Files by job.

    Args:
        root: folder that holds one folder per job; made if missing.

    Raises:
        ConfigError: it cannot be made or written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            probe = root / f".probe-{secrets.token_hex(4)}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                f"the data folder {root} cannot be used: {error}; name another with --data-dir."
            ) from error

    def folder(self, job_id: str) -> Path:
        """The folder of a job.

        Raises:
            UnknownJobError: what was given is no id.
        """
        if not _ID.fullmatch(job_id):
            raise UnknownJobError("There is no such job; it may have expired.")
        return self.root / job_id

    def make(self, job_id: str) -> Path:
        """A new folder for a job, readable by this user only."""
        folder = self.folder(job_id)
        folder.mkdir(mode=0o700)
        return folder

    def keep(self, folder: Path, name: str, upload: BinaryIO) -> Path:
        """Copy ``upload`` to ``name`` in ``folder`` and make it survive a power cut."""
        path = folder / name
        with path.open("xb") as file:
            shutil.copyfileobj(upload, file, 1 << 20)
            file.flush()
            os.fsync(file.fileno())
        return path

    def drop_inputs(self, job_id: str, index: int | None = None) -> None:
        """Delete the uploads of a job, or those of one item, and a folder that is empty then."""
        folder = self.folder(job_id)
        for pattern in ("in-*", "ref-*") if index is None else (f"in-{index}", f"in-{index}.*"):
            for path in folder.glob(pattern):
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()  # which the system refuses while anything is in it

    def remove(self, job_id: str) -> None:
        """Delete everything of a job."""
        shutil.rmtree(self.folder(job_id), ignore_errors=True)

    def sweep(self, known: Iterable[str]) -> int:
        """Delete the folders of jobs that nobody knows; how many there were.

        Only what is called like a job: a folder of somebody's own may have been given as ours.
        """
        known = set(known)
        strange = [
            path
            for path in self.root.iterdir()
            if _ID.fullmatch(path.name)
            and path.name not in known
            and path.is_dir()
            and not path.is_symlink()
        ]
        for path in strange:
            shutil.rmtree(path, ignore_errors=True)
        return len(strange)

    def has_room(self, wanted: int = 0) -> bool:
        """Whether ``wanted`` bytes and some to spare fit on the disk."""
        return shutil.disk_usage(self.root).free > wanted + SPARE_BYTES
