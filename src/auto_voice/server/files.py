"""Files by job: in a folder of this machine or of several, or in an object store.

No name here comes from a client: folders are called by job ids, which the server draws, and files
by their role and number.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from auto_voice.errors import (
    BusyError,
    ConfigError,
    DiskSpaceError,
    MissingDependencyError,
    ServerError,
    UnknownJobError,
    install_hint,
    reason,
)
from auto_voice.filesystem import shown_url
from auto_voice.server.jobs import Claim, JobRecord, Json
from auto_voice.server.settings import ServerSettings
from auto_voice.types import Voice
from auto_voice.voices.library import VoiceLibrary, is_name
from auto_voice.voices.voice_file import SUFFIX

# The frozen voice of a job, beside its uploads.
VOICE_FILE = "voice.safetensors"
# What is only needed while a job is not finished: uploads, references, voices that it learnt.
_INPUTS = ("in-*", "ref-*", "made-*", VOICE_FILE)
# Names the place, so that processes that share jobs notice when they do not share their files.
PLACE_FILE = ".autovoice-place"
# Seconds after which a folder that no job has is not being filled any more.
STRANGE_SECONDS = 6 * 3600.0
# Seconds between two looks whether an object store is back.
LOOK_AGAIN_SECONDS = 2.0
_ID = re.compile(r"[A-Za-z0-9_-]{22}")
# Bytes: a disk with less room than this is called full.
SPARE_BYTES = 200_000_000
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


class NoRoomError(BusyError):
    """The disk is full for now."""

    kind = "BusyError"  # what clients know

    def __init__(self) -> None:
        super().__init__("The server's disk is full; try again later.", 60, 507)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether a full disk or quota is behind ``error``, whatever it was raised as."""
    while error is not None:
        if isinstance(error, (NoRoomError, DiskSpaceError)):
            return True
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        error = error.__cause__ or error.__context__
    return False


def new_id() -> str:
    """128 random bits as 22 characters."""
    return secrets.token_urlsafe(16)


class StorageError(ServerError):
    """The files cannot be read or written just now."""

    http_status = 503
    retry_after = 5


def result_name(claim: Claim, ending: str) -> str:
    """The file of an item's result.

    Each claim has its own where several processes work: one that wakes up after another has taken
    its work up writes no file of the other's.
    """
    mark = f"-{claim.ticket}" if claim.ticket else ""
    return f"out-{claim.item.index}{mark}.{ending}"


class JobFiles:
    """Files by job in one folder.

    Args:
        root: folder that holds one folder per job; made if missing.
        option: names the folder where it cannot be used.

    Raises:
        ConfigError: it cannot be made or written.
    """

    def __init__(self, root: Path, option: str = "--data-dir") -> None:
        self.root = root
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            probe = root / f".probe-{secrets.token_hex(4)}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                f"the data folder {root} cannot be used ({reason(error)}); name another with "
                f"{option}."
            ) from error

    def folder(self, job_id: str) -> Path:
        """The folder of a job on this machine.

        Raises:
            UnknownJobError: what was given is no id.
        """
        if not _ID.fullmatch(job_id):
            raise UnknownJobError
        return self.root / job_id

    def place(self) -> str:
        """An id of where the files are, the same for all processes that see them."""
        path = self.root / PLACE_FILE
        with _storage():
            with contextlib.suppress(FileExistsError), path.open("x", encoding="ascii") as file:
                file.write(secrets.token_hex(8))
                file.flush()
                os.fsync(file.fileno())
            return path.read_text(encoding="ascii")

    # Accepting

    def make(self, job_id: str) -> Path:
        """A new folder for a job, readable by this user only.

        Raises:
            ServerError: the data folder cannot be written just now.
        """
        folder = self.folder(job_id)
        with _storage():
            folder.mkdir(mode=0o700)
        return folder

    def keep(self, folder: Path, name: str, upload: BinaryIO, *, durable: bool = True) -> Path:
        """Copy ``upload`` to ``name`` in ``folder``.

        Args:
            durable: make it survive a power cut.

        Raises:
            ServerError: the data folder cannot be written just now.
        """
        path = folder / name
        with _storage(), path.open("xb") as file:
            shutil.copyfileobj(upload, file, 1 << 20)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        return path

    def publish(self, job_id: str) -> None:
        """Let other machines see what was kept for a job."""

    # Working

    def bring(self, claim: Claim) -> None:
        """Have on this machine what an item needs."""

    def save(self, claim: Claim, name: str) -> None:
        """Let what was made of an item outlive this machine."""

    def deliver(self, claim: Claim, result: Json) -> None:
        """Let other machines see the file of a result."""

    def put_back(self, claim: Claim) -> None:
        """Let other machines go on where the work on an item was stopped."""

    def leave(self, claim: Claim) -> None:
        """The work on an item is over here, whatever became of it."""

    @property
    def carrying_seconds(self) -> float:
        """Seconds that it takes another machine to go on where one stopped."""
        return 0.0

    # Reading

    @contextmanager
    def result(self, job_id: str, name: str) -> Iterator[Path]:
        """The file of a result while the block runs.

        Raises:
            FileNotFoundError: it was deleted.
        """
        path = self.folder(job_id) / name
        if not path.is_file():
            raise FileNotFoundError(name)
        yield path

    def names(self, job_id: str) -> set[str]:
        """The files that a job has."""
        folder = self.folder(job_id)
        return {path.name for path in folder.iterdir()} if folder.is_dir() else set()

    # Deleting

    def drop_inputs(self, job_id: str, index: int | None = None) -> None:
        """Delete the uploads of a job, or those of one item, and a folder that is empty then."""
        folder = self.folder(job_id)
        for pattern in _INPUTS if index is None else (f"in-{index}", f"in-{index}.*"):
            for path in folder.glob(pattern):
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()  # which the system refuses while anything is in it

    def drop_results(self, job_id: str, index: int) -> None:
        """Delete what was made of an item that has no result."""
        for path in self.folder(job_id).glob(f"out-{index}[.-]*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def drop_claim(self, claim: Claim) -> None:
        """Delete what was made under a claim that is another's by now."""
        for path in self.folder(claim.job.id).glob(result_name(claim, "*")):
            path.unlink(missing_ok=True)

    def remove(self, job_id: str) -> None:
        """Delete everything of a job.

        Raises:
            StorageError: that cannot be done just now.
        """
        shutil.rmtree(self.folder(job_id), ignore_errors=True)

    def sweep(self, known: Iterable[str], older_seconds: float = 0.0) -> int:
        """Delete the folders of jobs that nobody knows; how many there were.

        Only what is called like a job: a folder of somebody's own may have been given as ours.

        Args:
            older_seconds: leave those that were changed since.
        """
        known, now = set(known), time.time()
        strange = [
            path
            for path in self.root.iterdir()
            if _ID.fullmatch(path.name)
            and path.name not in known
            and path.is_dir()
            and not path.is_symlink()
            and (not older_seconds or now - path.stat().st_mtime > older_seconds)
        ]
        for path in strange:
            shutil.rmtree(path, ignore_errors=True)
        return len(strange)

    # Room

    def has_room(self, wanted: int = 0) -> bool:
        """Whether ``wanted`` bytes and some to spare fit on the disk."""
        return shutil.disk_usage(self.root).free > wanted + SPARE_BYTES

    def check_room(self, wanted: int = 0) -> None:
        """Raises NoRoomError unless :meth:`has_room`."""
        with _storage():
            if not self.has_room(wanted):
                raise NoRoomError

    def problem(self) -> str:
        """The reason why no work can be done in the folder now; "" if it can."""
        try:
            if not os.access(self.root, os.R_OK | os.W_OK | os.X_OK):
                reason = "missing" if not self.root.is_dir() else "not writable"
                return f"the data folder is {reason}"
            if not self.has_room():
                megabytes = SPARE_BYTES / 1e6
                return f"the disk of the data folder is full: {megabytes:.0f} MB must be free"
        except OSError as error:
            return f"the data folder cannot be used ({error.strerror})"
        return ""


class ObjectStore:
    """Files under one URL of fsspec, by name.

    Args:
        url: such as ``s3://bucket/prefix``; options of the file system come from its own
            variables and files.

    Raises:
        ConfigError: there is no such file system, or it takes no such URL.
        MissingDependencyError: its package is not installed.
    """

    def __init__(self, url: str) -> None:
        try:
            import fsspec
        except ImportError as error:
            raise MissingDependencyError(
                f"{error.name} is not installed; run: {install_hint('postgres')}"
            ) from error
        shown = shown_url(url)
        try:
            # What another machine wrote a moment ago must be seen.
            self._fs, self._root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except ImportError as error:
            raise MissingDependencyError(
                f"--files {shown} needs another package: {error}"
            ) from error
        except Exception as error:
            raise ConfigError(
                f"--files {shown} is neither a folder nor a URL that fsspec knows "
                f"({type(error).__name__})."
            ) from None
        self._shown = shown
        self._problem = ""
        self._look_at = 0.0

    @contextmanager
    def _reached(self, *, may_miss: bool = True) -> Iterator[None]:
        """Turn whatever the file system raises into our own errors.

        Raises:
            FileNotFoundError: there is no such file, and there need not be.
            StorageError: anything else.
        """
        try:
            yield
        except Exception as error:
            if may_miss and isinstance(error, FileNotFoundError):
                raise
            said = (str(error).splitlines() or [type(error).__name__])[0][:200]
            self._problem = f"the files at {self._shown} cannot be used ({said})"
            self._look_at = time.monotonic() + LOOK_AGAIN_SECONDS
            text = "The server's files cannot be used just now; try again later."
            raise StorageError(text) from error
        self._problem = ""

    def problem(self) -> str:
        """The reason why the last use failed; "" if it did not."""
        if self._problem and time.monotonic() > self._look_at:
            with contextlib.suppress(StorageError):
                self.mark(PLACE_FILE)
        return self._problem

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def put(self, path: Path, name: str) -> None:
        """Write a file.

        In an object store readers see the old one or the new one, as those promise. Other file
        systems of fsspec, such as sftp, may show them a part of the new one.
        """
        with self._reached(may_miss=False):
            self._fs.makedirs(self._at(name).rpartition("/")[0], exist_ok=True)
            self._fs.put_file(str(path), self._at(name))

    def get(self, name: str, path: Path) -> None:
        """Read a file into ``path``, whole or not at all."""
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            with self._reached():
                self._fs.get_file(self._at(name), str(temporary))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def names(self, folder: str) -> dict[str, str]:
        """Every file under ``folder`` by its path in it, and a mark that changes with the file."""
        base = self._at(folder).rstrip("/") + "/"
        with self._reached():
            self._fs.invalidate_cache()
            try:
                found = self._fs.find(base, detail=True)
            except FileNotFoundError:
                return {}
        return {
            _after(path, base): _mark(about)
            for path, about in found.items()
            if about.get("type") == "file" and _after(path, base)
        }

    def mark(self, name: str) -> str | None:
        """What changes with the file; None if there is none."""
        try:
            with self._reached():
                self._fs.invalidate_cache()
                return _mark(self._fs.info(self._at(name)))
        except FileNotFoundError:
            return None

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""
        with contextlib.suppress(FileNotFoundError), self._reached():
            self._fs.rm_file(self._at(name))


def is_folder(place: str) -> bool:
    """Whether ``--files`` names a folder and no object store."""
    return place.startswith("file://") or "://" not in place


def folder_of(place: str) -> Path:
    """The folder that ``--files`` names."""
    return Path(place.removeprefix("file://")).expanduser()


def make_files(settings: ServerSettings) -> JobFiles:
    """Where the settings say that uploads and results are.

    Raises:
        ConfigError: it cannot be used.
    """
    if not settings.files:
        return JobFiles(settings.data_dir / "jobs")
    if is_folder(settings.files):
        return JobFiles(folder_of(settings.files) / "jobs", "--files")
    return ObjectFiles(ObjectStore(settings.files), own_folder(settings.data_dir) / "jobs")


def make_voices(settings: ServerSettings, voice_dir: Path | None) -> VoiceLibrary:
    """Where the settings say that voices are.

    Args:
        voice_dir: a folder that the user named for them.

    Raises:
        ConfigError: it is named beside files that others share, who would not see it.
    """
    if voice_dir is not None and settings.files:
        raise ConfigError(
            "--voice-dir cannot be given with --files, where servers and workers share their "
            "voices; leave one of them out."
        )
    if voice_dir is not None or not settings.files:
        return VoiceLibrary(voice_dir)
    if is_folder(settings.files):
        return VoiceLibrary(folder_of(settings.files) / "voices")
    return ObjectVoices(ObjectStore(settings.files), own_folder(settings.data_dir) / "voices")


def own_folder(data_dir: Path) -> Path:
    """A new folder of this process in the data folder; those of dead processes are deleted.

    Raises:
        ConfigError: it cannot be made.
    """
    scratch = data_dir / "scratch"
    try:
        scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in scratch.glob("*.lock"):
            with contextlib.suppress(Timeout, OSError), FileLock(path, timeout=0):
                shutil.rmtree(path.with_suffix(""), ignore_errors=True)
                path.unlink(missing_ok=True)
        folder = scratch / secrets.token_hex(8)
        lock = FileLock(folder.with_suffix(".lock"), thread_local=False)
        lock.acquire(timeout=0)
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise ConfigError(
            f"the data folder {data_dir} cannot be used ({reason(error)}); name another with "
            "--data-dir."
        ) from error
    _LOCKS.append(lock)
    return folder


# Held as long as the process lives.
_LOCKS: list[FileLock] = []


def _after(path: str, base: str) -> str:
    return path.partition(base.strip("/") + "/")[2]


def _mark(about: dict[str, Any]) -> str:
    told = ("ETag", "etag", "md5Hash", "size", "LastModified", "mtime", "updated", "created")
    return repr([about.get(name) for name in told])


class ObjectFiles(JobFiles):
    """Files by job in an object store; what is worked on lies in a folder of this machine.

    Args:
        objects: where they are kept.
        scratch: folder of this process alone.
    """

    def __init__(self, objects: ObjectStore, scratch: Path) -> None:
        super().__init__(scratch)
        self._objects = objects
        self._brought: set[tuple[str, int, str]] = set()
        self._lock = threading.Lock()
        self._carrying = 0.0

    def place(self) -> str:
        path = self.root / PLACE_FILE
        try:
            try:
                self._objects.get(PLACE_FILE, path)
            except FileNotFoundError:
                path.write_text(secrets.token_hex(8), encoding="ascii")
                self._objects.put(path, PLACE_FILE)
        except StorageError as error:
            raise ConfigError(f"{self._objects.problem()}; correct --files.") from error
        return path.read_text(encoding="ascii")

    def publish(self, job_id: str) -> None:
        folder = self.folder(job_id)
        for path in folder.iterdir():
            self._objects.put(path, f"jobs/{job_id}/{path.name}")
        shutil.rmtree(folder, ignore_errors=True)

    def bring(self, claim: Claim) -> None:
        job, started = claim.job, time.monotonic()
        folder = self.folder(job.id)
        with self._lock:
            self._brought.add(claim.key)
            folder.mkdir(mode=0o700, exist_ok=True)
        for name in self._objects.names(f"jobs/{job.id}"):
            if _is_needed(name, job, claim.item.index) and not (folder / name).exists():
                with contextlib.suppress(FileNotFoundError):  # deleted this moment
                    self._objects.get(f"jobs/{job.id}/{name}", folder / name)
                    # On every machine the same, by which a checkpoint knows its source.
                    os.utime(folder / name, (job.created, job.created))
        self._carrying = time.monotonic() - started

    def save(self, claim: Claim, name: str) -> None:
        self._objects.put(self.folder(claim.job.id) / name, f"jobs/{claim.job.id}/{name}")

    def deliver(self, claim: Claim, result: Json) -> None:
        if "file" in result:
            self.save(claim, result["file"])

    def put_back(self, claim: Claim) -> None:
        folder, index = self.folder(claim.job.id), claim.item.index
        started = time.monotonic()
        for path in [*folder.glob(f"in-{index}.*"), *folder.glob(f"out-{index}.*.partial/*")]:
            if path.name != "lock" and not path.name.startswith("."):
                self.save(claim, str(path.relative_to(folder).as_posix()))
        self._carrying += time.monotonic() - started

    def leave(self, claim: Claim) -> None:
        job_id, index = claim.job.id, claim.item.index
        with self._lock:
            self._brought.discard(claim.key)
            if any(key[0] == job_id for key in self._brought):  # other items of it are worked on
                JobFiles.drop_inputs(self, job_id, index)
                JobFiles.drop_results(self, job_id, index)
            else:
                shutil.rmtree(self.folder(job_id), ignore_errors=True)

    @property
    def carrying_seconds(self) -> float:
        return self._carrying

    @contextmanager
    def result(self, job_id: str, name: str) -> Iterator[Path]:
        path = self.root / f".result-{secrets.token_hex(8)}-{name}"
        self.folder(job_id)
        self._objects.get(f"jobs/{job_id}/{name}", path)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def names(self, job_id: str) -> set[str]:
        self.folder(job_id)
        return set(self._objects.names(f"jobs/{job_id}"))

    def drop_inputs(self, job_id: str, index: int | None = None) -> None:
        patterns = _INPUTS if index is None else (f"in-{index}", f"in-{index}.*")
        self._drop(job_id, patterns)

    def drop_results(self, job_id: str, index: int) -> None:
        self._drop(job_id, (f"out-{index}[.-]*",))

    def drop_claim(self, claim: Claim) -> None:
        self._drop(claim.job.id, (result_name(claim, "*"),))

    def _drop(self, job_id: str, patterns: Iterable[str]) -> None:
        with contextlib.suppress(StorageError):  # it goes with the job
            for name in self.names(job_id):
                if any(fnmatchcase(name, pattern) for pattern in patterns):
                    self._objects.remove(f"jobs/{job_id}/{name}")

    def remove(self, job_id: str) -> None:
        super().remove(job_id)
        for name in self.names(job_id):
            self._objects.remove(f"jobs/{job_id}/{name}")

    def sweep(self, known: Iterable[str], older_seconds: float = 0.0) -> int:
        """Nothing: stores have rules of their own for what is old, which cost no listing."""
        return 0

    def problem(self) -> str:
        return super().problem() or self._objects.problem()


def _is_needed(name: str, job: JobRecord, index: int) -> bool:
    """Whether a file is of those that we keep for an item; others may write to the store, too."""
    folder, within, last = name.rpartition("/")
    if within:
        is_plain = "/" not in folder and "\\" not in name and last not in ("", ".", "..")
        return is_plain and fnmatchcase(folder, f"out-{index}.*.partial")
    if "\\" in name:
        return False
    own = (f"in-{index}", f"in-{index}.*", "ref-*", "made-*", VOICE_FILE)
    patterns = (*own, "in-*") if len(job.items) == 1 else own
    return any(fnmatchcase(name, pattern) for pattern in patterns)


class ObjectVoices(VoiceLibrary):
    """Voices in an object store, of which this machine keeps copies.

    Args:
        objects: where they are kept.
        folder: of the copies, of this process alone.
    """

    def __init__(self, objects: ObjectStore, folder: Path) -> None:
        super().__init__(folder)
        self._objects = objects
        self._marks: dict[str, str] = {}

    def names(self) -> list[str]:
        found = (n[: -len(SUFFIX)] for n in self._objects.names("voices") if n.endswith(SUFFIX))
        return sorted(name for name in found if is_name(name))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and is_name(name) and self._mark(name) is not None

    def _mark(self, name: str) -> str | None:
        return self._objects.mark(f"voices/{name}{SUFFIX}")

    def require(self, name: str) -> Path:
        path, mark = self.path(name), self._mark(name)
        if mark is None:
            raise self._unknown(name)
        if self._marks.get(name) != mark or not path.is_file():
            try:
                self._objects.get(f"voices/{name}{SUFFIX}", path)
            except FileNotFoundError:
                raise self._unknown(name) from None
            self._marks[name] = mark
        return path

    def add(self, name: str, voice: Voice | Path, *, overwrite: bool = False) -> Path:
        if not overwrite and name in self:
            self._refuse(name)
        self._marks.pop(name, None)  # the copy is not to be trusted, whatever comes of it
        try:
            path = super().add(name, voice, overwrite=True)
            self._objects.put(path, f"voices/{name}{SUFFIX}")
        finally:
            self._marks.pop(name, None)
        return path

    def remove(self, name: str) -> None:
        super().remove(name)
        self._objects.remove(f"voices/{name}{SUFFIX}")


@contextmanager
def _storage() -> Iterator[None]:
    """Raise our own errors for those of the file system."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise NoRoomError from error
        raise ServerError(
            f"The server's data folder cannot be written ({error.strerror}); whoever runs the "
            "server must mend that.",
            503,
        ) from error
