"""Upkeep of the model folder: verify in full, remove, list partials, prune."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from auto_voice.errors import StoreError
from auto_voice.filesystem import file_lock, is_sha256, read_json, sha256_file, storage_errors
from auto_voice.models.registry.catalog import ModelVersion
from auto_voice.models.registry.fetchers import WheelCache
from auto_voice.models.registry.partials import Partial
from auto_voice.models.registry.sources import bundled_files
from auto_voice.models.registry.store import BLOBS, METADATA, ModelStore, hashes_of

log = logging.getLogger(__name__)

# Seconds without a byte after which an interrupted transfer counts as forgotten: a week.
PRUNE_AFTER_S = 7 * 86400.0


@dataclass(frozen=True)
class VerifyReport:
    """What a full hash of a version found.

    Attributes:
        key: ``name@version``.
        present: whether the version is installed, or lies inside the package.
        problems: one sentence each; empty if all is well.
    """

    key: str
    present: bool
    problems: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return self.present and not self.problems


@dataclass(frozen=True)
class PartialInfo:
    """A transfer that was interrupted and can be resumed.

    Attributes:
        sha256: of the whole file.
        bytes: that are here.
        total: bytes of the whole file; -1 if unknown.
        url: that served them; empty if unknown.
        age_s: seconds since the last byte.
    """

    sha256: str
    bytes: int
    total: int
    url: str
    age_s: float


@dataclass(frozen=True)
class PruneReport:
    """What was removed, and the room it gave back."""

    removed: tuple[Path, ...]
    freed_bytes: int


def verify(store: ModelStore, version: ModelVersion) -> VerifyReport:
    """Hashes every file of a version, whatever its metadata says."""
    inside = bundled_files(version)
    if inside is not None:
        return VerifyReport(version.key, True, tuple(_file_problems(version, inside)))
    record = store.metadata(version.name, version.version)
    folder = store.folder(version.name, version.version)
    if record is None:
        damaged = (f"{METADATA} is damaged: {_fix(version)}",)
        return VerifyReport(version.key, False, damaged if (folder / METADATA).exists() else ())
    paths = {file.file: store.path(version, file.file) for file in version.files}
    problems = list(_file_problems(version, paths))
    unrecorded = [name for name in paths if name not in record["files"]]
    problems += [f"{METADATA} lacks {name}: {_fix(version)}" for name in unrecorded]
    for name, entry in record.get("derived", {}).items():
        wrong = _hash_problem(folder / name, str(entry.get("sha256")))
        # An older record does not say which bytes it was made from; nothing loads such a file.
        if wrong and "made_from_sha256" in entry:
            problems.append(f"{name}, made from {entry.get('of')}, {wrong}: {_fix(version)}")
    return VerifyReport(version.key, True, tuple(problems))


def _fix(version: ModelVersion) -> str:
    return f"run `autovoice models repair {version.key}`."


def _file_problems(version: ModelVersion, paths: dict[str, Path]) -> Iterator[str]:
    for file in version.files:
        path = paths[file.file]
        if path.exists() and path.stat().st_size != file.bytes:
            wrong: str | None = f"has {path.stat().st_size} bytes and not {file.bytes}"
        else:
            wrong = _hash_problem(path, file.sha256)
        if wrong:
            yield f"{file.file} {wrong}: {_fix(version)}"


def _hash_problem(path: Path, sha256: str) -> str | None:
    """What is wrong with a file, said of it; None if its bytes are right."""
    try:
        return None if sha256_file(path) == sha256 else "does not match its sha256"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read by this user ({error.strerror})"


def remove(store: ModelStore, name: str, version: str) -> int:
    """Removes a version and everything made from it; the bytes given back.

    Raises:
        StoreError: it is not installed, in use (Windows), or locked.
    """
    folder = store.folder(name, version)
    if not folder.is_dir():
        raise StoreError(f"{name}@{version} is not in {store.root}: there is nothing to remove.")
    with store.lock(name, version), storage_errors(store.root, f"removing {name}@{version}"):
        record = store.metadata(name, version) or {"files": {}}
        freed = _size(folder)
        # The record first: a removal that is interrupted leaves the version absent, not half.
        (folder / METADATA).unlink(missing_ok=True)
        shutil.rmtree(folder)
        with suppress(OSError):
            folder.parent.rmdir()
    return freed + store.drop_blobs(hashes_of(record))


def partials(store: ModelStore) -> list[PartialInfo]:
    """Interrupted transfers, largest first."""
    found = []
    for path in _arriving(store, "*.part"):
        with suppress(OSError):
            stat = path.stat()
            if not stat.st_size:
                continue
            record = Partial(path).read_record()
            found.append(
                PartialInfo(
                    sha256=path.stem,
                    bytes=stat.st_size,
                    total=record.size if record else -1,
                    url=record.url if record else "",
                    age_s=max(0.0, time.time() - stat.st_mtime),
                )
            )
    return sorted(found, key=lambda info: -info.bytes)


def prune(store: ModelStore, older_than_s: float = PRUNE_AFTER_S) -> PruneReport:
    """Removes what nobody needs: old partials that no process works on, set-aside files,
    left-over temporary files and wheels, blobs that no version names. Installed versions are never
    touched.
    """
    horizon = time.time() - older_than_s
    removed: list[Path] = []
    freed = 0
    for path in _prunable(store):
        with suppress(OSError, StoreError):
            if path.stat().st_mtime > horizon:
                continue
            size = _size(path)
            if path.suffix == ".part":
                _remove_partial(store, path)
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
            removed.append(path)
            freed += size
    wheels = store.root / ".downloads"
    sizes = {path: _size(path) for path in wheels.glob("*") if path.suffix in (".whl", "")}
    swept = WheelCache(wheels, store.root).sweep(older_than_s)
    freed += sum(sizes.get(path, 0) for path in swept)
    # After the files that were set aside, which are names of blobs, too.
    blobs = [path.name for path in (store.root / BLOBS).glob("*") if is_sha256(path.name)]
    freed += store.drop_blobs(blobs)
    log.info("pruned %d files from %s", len(removed) + len(swept), store.root)
    return PruneReport((*removed, *swept), freed)


def _prunable(store: ModelStore) -> Iterator[Path]:
    root = store.root
    yield from _arriving(store, "*.part")
    yield from sorted((root / ".partial").glob("import-*"))
    yield from sorted((root / ".aside").glob("*"))
    yield from sorted(
        [*root.glob("*/*/.*.tmp"), *root.glob(f"{BLOBS}/.*.tmp"), *_arriving(store, ".*.tmp")]
    )
    for record in _arriving(store, "*.json"):
        if read_json(record) is None or not record.with_suffix(".part").exists():
            yield record


def _arriving(store: ModelStore, pattern: str) -> list[Path]:
    """Files on their way in: models in one folder, wheels in another."""
    folders = (store.root / ".partial", store.root / ".downloads")
    return sorted(path for folder in folders for path in folder.glob(pattern))


def _remove_partial(store: ModelStore, path: Path) -> None:
    # A piece `<sha256>-<index>` belongs to the lock of its file.
    lock = path.with_name(f"{path.stem.partition('-')[0]}.lock")
    with file_lock(lock, store.root, path.name, 0.0):
        Partial(path).discard()


def _size(path: Path) -> int:
    """Bytes that are free once ``path`` is gone: a file with further names stays."""
    found = [path] if path.is_file() else [item for item in path.rglob("*") if item.is_file()]
    return sum(stat.st_size for item in found if (stat := item.stat()).st_nlink == 1)
