"""The model folder: a version is present or absent, never half.

<root>/<name>/<version>/<file>           as the catalog names it: a hard link of its blob
<root>/<name>/<version>/metadata.json    written last; what makes the version exist
<root>/.blobs/<sha256>                   each file once, however many versions hold it
<root>/.locks/<name>@<version>.lock      one writer at a time, across processes
<root>/.partial/<sha256>.part            on its way in, resumable
<root>/.downloads/<sha256>.whl           wheels of the current run
<root>/.aside/…                          damaged files, kept for a look until pruned
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from auto_voice import events
from auto_voice.errors import IntegrityError, StoreError, UnsafeFileError
from auto_voice.filesystem import (
    LOCK_TIMEOUT_S,
    SAFE_NAME,
    atomic_write,
    check_name,
    check_sha256,
    copy_into_place,
    file_lock,
    is_sha256,
    link_into_place,
    make_folder,
    move_into_place,
    read_json,
    sha256_file,
    storage_errors,
    write_json,
)
from auto_voice.models.registry.catalog import ModelFile, ModelVersion
from auto_voice.models.registry.partials import Partial
from auto_voice.models.registry.sources import local_path

log = logging.getLogger(__name__)

# Folder of files by their hash.
BLOBS = ".blobs"
# The completion record of a version, and the layout of what stands in it.
METADATA = "metadata.json"
FORMAT = 1


@dataclass(frozen=True)
class Fetched:
    """A complete, hashed file that waits to be installed.

    Attributes:
        path: on disk, already forced there.
        source: the URI or URIs that served it.
    """

    path: Path
    source: str


class ModelStore:
    """Models on disk. Building one touches nothing; folders appear with the first install.

    Args:
        root: the model folder.
        lock_timeout_s: longest wait for another process that works on the same version.
    """

    def __init__(self, root: Path | str, lock_timeout_s: float = LOCK_TIMEOUT_S) -> None:
        self.root = Path(root)
        self.lock_timeout_s = lock_timeout_s
        # Files whose stat differs from the metadata but whose bytes were hashed in this process:
        # a copied cache on a read-only disk is hashed once and not at every load.
        self._hashed: dict[Path, tuple[str, tuple[int, int, int]]] = {}

    def folder(self, name: str, version: str) -> Path:
        """Where a version lies, or would lie.

        Raises:
            UnsafeFileError: a name that is more than a folder name.
        """
        return self.root / check_name(name, "model name") / check_name(version, "version")

    def lock(
        self, name: str, version: str, timeout_s: float | None = None
    ) -> AbstractContextManager[None]:
        """Holds the version for the block, against threads and processes.

        Raises:
            StoreError: it stayed locked (the message names the holder), or the folder is not
                writable.
        """
        self.folder(name, version)
        path = self.root / ".locks" / f"{name}@{version}.lock"
        wait = self.lock_timeout_s if timeout_s is None else timeout_s
        return file_lock(path, self.root, f"{name}@{version}", wait)

    def partial(self, sha256: str) -> Partial:
        """The partial of the file with this hash; its folder is created."""
        folder = make_folder(self.root / ".partial", self.root)
        return Partial(folder / f"{check_sha256(sha256)}.part")

    def partial_lock(self, sha256: str) -> AbstractContextManager[None]:
        """Holds a partial: two versions may share a file."""
        path = self.root / ".partial" / f"{check_sha256(sha256)}.lock"
        return file_lock(path, self.root, f"the partial of {sha256[:12]}", self.lock_timeout_s)

    def metadata(self, name: str, version: str) -> dict[str, Any] | None:
        """The completion record; None if the version is absent or the record damaged."""
        record = read_json(self.folder(name, version) / METADATA)
        if record is None or record.get("format") != FORMAT:
            return None
        files, derived = record.get("files"), record.get("derived", {})
        return record if _are_entries(files) and _are_entries(derived) else None

    def installed(self) -> list[tuple[str, str]]:
        """Name and version of everything with a completion record, sorted."""
        found = []
        for path in self.root.glob(f"*/*/{METADATA}"):
            name, version = path.parts[-3:-1]
            with suppress(Exception):
                if self.metadata(name, version) is not None:
                    found.append((name, version))
        return sorted(found)

    def lookup(self, version: ModelVersion) -> dict[str, Path] | None:
        """File name to path if the version is present and intact, else None.

        No request, no write and no lock. Size, mtime and inode must be those of the install;
        a file that was copied or touched since is hashed again instead of being trusted.
        """
        record = self.metadata(version.name, version.version)
        if record is None:
            return None
        paths = {}
        for file in version.files:
            path = self.path(version, file.file)
            entry = record["files"].get(file.file)
            if not isinstance(entry, dict) or entry.get("sha256") != file.sha256:
                return None
            if not self._intact(path, file, entry):
                return None
            paths[file.file] = path
        return paths

    def adopt(self, version: ModelVersion) -> list[ModelFile]:
        """Files still to be fetched; call under the lock.

        A file that is there with the right bytes is kept whatever the metadata says (a crash
        between rename and record costs no transfer); a wrong one is set aside. One whose blob is
        here is linked from there: several versions may share a file.

        Raises:
            StoreError: a file cannot be read or made.
        """
        folder = self.folder(version.name, version.version)
        if (folder / METADATA).exists() and self.metadata(version.name, version.version) is None:
            self.set_aside(folder / METADATA, "its metadata is damaged")
        self.check_in_place(version)
        missing = []
        for file in version.files:
            path = self.path(version, file.file)
            if file.in_place:
                continue
            if not path.exists():
                missing.append(file)
            elif not self._holds(path, file):
                self.set_aside(path, "its bytes do not match the catalog")
                missing.append(file)
        return [file for file in missing if not self._take(version, file)]

    def check_in_place(self, version: ModelVersion) -> None:
        """Hashes what stays with its owner, which is neither fetched nor set aside.

        Raises:
            IntegrityError: a file is gone or has other bytes.
        """
        for file in version.files:
            path = self.path(version, file.file)
            if not file.in_place or (path.is_file() and self._holds(path, file)):
                continue
            what = "has other bytes than" if path.exists() else "is no longer there as"
            raise IntegrityError(
                f"{path} {what} when {version.key} was added; put it back, or add the model again "
                "under another version."
            )

    def blob(self, sha256: str) -> Path | None:
        """Where these bytes lie, if a version holds them; they are not hashed.

        What 0.1 installed has no blobs yet, so the records of all versions are asked before None.
        """
        blob = self._blob(sha256)
        if blob.exists():
            return blob
        for path, _ in self._named(sha256):
            self._share(path, sha256)
        return blob if blob.exists() else None

    def path_of(self, sha256: str) -> Path | None:
        """A file with these bytes to hand out, hashed if it changed since it was installed.

        Nothing is written, and what was made here from other files does not count. None if no
        version that is here names the hash, or its file is damaged.
        """
        for path, entry in self._named(sha256):
            known = ModelFile(path.name, (), sha256, int(entry.get("bytes", -1)))
            if self._intact(path, known, entry):
                return path
        return None

    def _named(self, sha256: str) -> Iterator[tuple[Path, Mapping[str, Any]]]:
        """Files of installed versions that should hold these bytes, each with its record."""
        for name, number in self.installed():
            for file, entry in (self.metadata(name, number) or {"files": {}})["files"].items():
                if entry.get("sha256") == sha256:
                    yield self.folder(name, number) / file, entry

    def drop_blobs(self, hashes: Iterable[str]) -> int:
        """Removes those of these blobs that no version's file is another name of; the bytes freed.

        Without a lock: whoever links a blob at this moment has a name of their own for its bytes,
        or does not find it and fetches them.
        """
        freed = 0
        for blob in map(self._blob, hashes):
            with suppress(OSError):  # It is not there, or another user's.
                if (stat := blob.stat()).st_nlink == 1:
                    blob.unlink()
                    freed += stat.st_size
        return freed

    def _blob(self, sha256: str) -> Path:
        return self.root / BLOBS / check_sha256(sha256)

    def _share(self, path: Path, sha256: str) -> None:
        """Makes the blob of these bytes another name of ``path``.

        Where the system has no hard links there is none, rather than every file twice.
        """
        blob = self._blob(sha256)
        with suppress(OSError):
            blob.parent.mkdir(parents=True, exist_ok=True)
            link_into_place(path, blob)

    def _take(self, version: ModelVersion, file: ModelFile) -> bool:
        """Whether the blob of ``file`` is whole and now has its name in the version, too."""
        blob = self.blob(file.sha256)
        if blob is None:
            return False
        path = self.path(version, file.file)
        with storage_errors(self.root, f"taking {file.file} from {blob.parent}"):
            if sha256_file(blob) != file.sha256:
                with suppress(OSError):
                    blob.touch()  # The versions that hold the file see that it changed.
                blob.unlink()
                return False
            make_folder(path.parent, self.root)
            _link_or_copy(blob, path)
        log.info("%s of %s shares the bytes of %s", file.file, version.key, blob)
        return True

    def install(self, version: ModelVersion, fetched: Mapping[str, Fetched]) -> dict[str, Path]:
        """Moves files in and writes the completion record last; call under the lock.

        Files that are not in ``fetched`` must lie in place already, as ``adopt`` found them.
        """
        folder = make_folder(self.folder(version.name, version.version), self.root)
        old = self.metadata(version.name, version.version) or {"files": {}}
        entries: dict[str, Any] = {}
        paths: dict[str, Path] = {}
        placed: dict[Path, Path] = {}
        with storage_errors(self.root, f"installing {version.key}"):
            for file in version.files:
                path = self.path(version, file.file)
                new = fetched.get(file.file)
                if new is not None:
                    # Two names for the same bytes are transferred once.
                    first = placed.setdefault(new.path, path)
                    if first == path:
                        move_into_place(new.path, path)
                    else:
                        _link_or_copy(first, path)
                    self._hashed.pop(path, None)
                shared = new is not None or not self._blob(file.sha256).exists()
                if shared and not file.in_place:
                    self._share(path, file.sha256)
                source = new.source if new else _source_of(old, file)
                entries[file.file] = _entry(path, file.sha256, source)
                paths[file.file] = path
            record = {
                "format": FORMAT,
                "name": version.name,
                "version": version.version,
                "kind": version.kind,
                "architecture": version.architecture,
                "licence": version.licence,
                "completed": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "files": entries,
                "derived": self._valid_derived(version, old),
            }
            write_json(folder / METADATA, record)
        self.drop_blobs(hashes_of(old))
        return paths

    def derived(self, version: ModelVersion, file: str) -> Path | None:
        """A file made from an installed one (``add_derived``), if it is intact and current."""
        record = self.metadata(version.name, version.version)
        entry = record.get("derived", {}).get(file) if record else None
        if not isinstance(entry, dict) or not self._derived_current(version, entry):
            return None
        path = self.path(version, file)
        expected = ModelFile(file, (), str(entry.get("sha256")), int(entry.get("bytes", -1)))
        return path if self._intact(path, expected, entry) else None

    def add_derived(
        self, version: ModelVersion, file: str, of: str, write: Callable[[Path], None]
    ) -> Path:
        """Makes a file beside the original, e.g. its safetensors form, once for all processes.

        Args:
            file: name of the new file.
            of: name of the file of ``version`` that it is made from.
            write: writes it to the path it is given, a temporary beside the target.

        Raises:
            IntegrityError: the original's bytes changed since it was installed.
            StoreError: the version is not installed, or the folder is not writable.
        """
        path = self.path(version, file)
        with self.lock(version.name, version.version):
            existing = self.derived(version, file)
            if existing is not None:
                return existing
            record = self.metadata(version.name, version.version)
            if record is None or of not in record["files"]:
                raise StoreError(f"{version.key} is not installed: run `autovoice models pull`.")
            made_from = self.checked(version, of)
            with storage_errors(self.root, f"converting {of}"):
                with atomic_write(path) as temporary:
                    write(temporary)
                    sha256 = sha256_file(temporary)
                entry = _entry(path, sha256, f"made from {of}")
                entry["of"], entry["made_from_sha256"] = of, made_from
                record.setdefault("derived", {})[file] = entry
                write_json(path.with_name(METADATA), record)
            return path

    def checked(self, version: ModelVersion, file: str) -> str:
        """The sha256 of an installed file, hashed now: size and time do not betray every damage.

        Raises:
            IntegrityError: it is not the catalog's.
            StoreError: it cannot be read.
        """
        path = self.path(version, file)
        with storage_errors(self.root, f"reading {file}"):
            found = sha256_file(path)
        if found not in {known.sha256 for known in version.files if known.file == file}:
            raise IntegrityError(
                f"{path} does not match its sha256: run `autovoice models repair {version.key}`."
            )
        return found

    def drop_damaged_derived(self, version: ModelVersion) -> list[str]:
        """Forgets derived files whose bytes changed or whose origin is not known to the byte, so
        that the next load makes them anew.

        Call under the lock. Returns their names.
        """
        record = self.metadata(version.name, version.version)
        if record is None or not isinstance(record.get("derived"), dict):
            return []
        folder = self.folder(version.name, version.version)
        dropped = []
        for file, entry in list(record["derived"].items()):
            path = self.path(version, file)
            if not self._derived_current(version, entry):
                path.unlink(missing_ok=True)
            elif _readable(path) and sha256_file(path) == entry.get("sha256"):
                continue
            elif path.exists():
                self.set_aside(path, "its bytes changed since it was made")
            del record["derived"][file]
            dropped.append(file)
        if dropped:
            write_json(folder / METADATA, record)
        return dropped

    def set_aside(self, path: Path, reason: str) -> Path:
        """Moves a damaged file out of the way; where it went.

        Its time is renewed: other versions that hold the same file see that it changed.
        """
        folder = make_folder(self.root / ".aside", self.root)
        stamp = time.strftime("%Y%m%dT%H%M%S")
        name = "-".join((*path.relative_to(self.root).parts[:-1], stamp, uuid.uuid4().hex[:6]))
        target = folder / f"{name}-{path.name}"
        with storage_errors(self.root, f"setting {path.name} aside"):
            move_into_place(path, target)
        with suppress(OSError):  # Another user's: they share nothing that this one could repair.
            target.touch()
        log.warning("%s was set aside: %s; it is now %s", path, reason, target)
        return target

    def path(self, version: ModelVersion, file: str) -> Path:
        """Where a file of a version lies, or would lie: in its folder, or where its owner keeps it.

        Raises:
            UnsafeFileError: a name that is more than a file name.
        """
        if check_name(file, "file").lower() == METADATA:
            raise UnsafeFileError(f"{version.key} may not name a file {METADATA}: rename it.")
        for known in version.files:
            if known.file == file and known.in_place:
                found = local_path(known.sources[0])
                assert found is not None  # The catalog takes no other.
                return found
        return self.folder(version.name, version.version) / file

    def _holds(self, path: Path, file: ModelFile) -> bool:
        with storage_errors(self.root, f"reading {file.file}"):
            return path.stat().st_size == file.bytes and sha256_file(path) == file.sha256

    def _intact(self, path: Path, file: ModelFile, entry: Mapping[str, Any]) -> bool:
        try:
            stat = path.stat()
        except OSError:
            return False
        if not _readable(path):
            log.warning("%s cannot be read by this user", path)
            return False
        if stat.st_size != file.bytes:
            log.warning("%s has %d bytes and not %d", path, stat.st_size, file.bytes)
            return False
        now = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
        if now == (entry.get("bytes"), entry.get("mtime_ns"), entry.get("inode")):
            return True
        if self._hashed.get(path) == (file.sha256, now):
            return True
        log.info("%s changed on disk since it was installed: hashing it again", path)
        right = sha256_file(path) == file.sha256
        key = "@".join(path.parts[-3:-1])
        events.emit(events.Verify(key, file.file, file.bytes, ok=right))
        if not right:
            log.warning("%s does not match its sha256", path)
            return False
        self._hashed[path] = (file.sha256, now)
        return True

    def _derived_current(self, version: ModelVersion, entry: Mapping[str, Any]) -> bool:
        hashes = {file.file: file.sha256 for file in version.files}
        of = entry.get("of")
        # Older records hold the hash that the original should have had ("of_sha256"); what was
        # made from damaged bytes could not be told from the rest.
        return isinstance(of, str) and hashes.get(of) == entry.get("made_from_sha256")

    def _valid_derived(self, version: ModelVersion, old: Mapping[str, Any]) -> dict[str, Any]:
        derived = old.get("derived")
        if not isinstance(derived, dict):
            return {}
        return {
            file: entry
            for file, entry in derived.items()
            if isinstance(entry, dict) and self._derived_current(version, entry)
        }


def _readable(path: Path) -> bool:
    effective = os.access in os.supports_effective_ids
    return os.access(path, os.R_OK, effective_ids=effective)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        link_into_place(source, target)
    except OSError:
        # File systems without hard links; and Linux lets nobody link another user's file that they
        # cannot write.
        copy_into_place(source, target)


def _entry(path: Path, sha256: str, source: str) -> dict[str, Any]:
    stat = path.stat()
    return {
        "sha256": sha256,
        "bytes": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "inode": stat.st_ino,
        "source": source,
    }


def _are_entries(value: Any) -> bool:
    """Whether it is file name to record; names end up in paths, and the file is not trusted."""
    return isinstance(value, dict) and all(
        SAFE_NAME.fullmatch(name) and isinstance(entry, dict) for name, entry in value.items()
    )


def hashes_of(record: Mapping[str, Any]) -> set[str]:
    """The hashes of the files in a completion record."""
    found = (str(entry.get("sha256")) for entry in record["files"].values())
    return {text for text in found if is_sha256(text)}


def _source_of(record: Mapping[str, Any], file: ModelFile) -> str:
    entry = record["files"].get(file.file)
    known = entry.get("source") if isinstance(entry, dict) else None
    return str(known) if known else "found in place"


def check_bundled(path: Path, file: ModelFile) -> None:
    """Hashes a file of the installed package.

    Raises:
        IntegrityError: it does not match the catalog.
    """
    if path.stat().st_size != file.bytes or sha256_file(path) != file.sha256:
        raise IntegrityError(
            f"{path} does not match its sha256: the installed auto_voice package is damaged, "
            "install it again."
        )
