"""Upkeep of the model folder: verify in full, remove, list partials, prune, and what was used."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from auto_voice import events
from auto_voice.errors import StoreError
from auto_voice.events import Event
from auto_voice.filesystem import (
    atomic_write,
    file_lock,
    is_sha256,
    read_json,
    sha256_file,
    storage_errors,
)
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
        events.emit(events.Verify(version.key, file.file, file.bytes, ok=not wrong))
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
                    # A piece of a file that is joined from several is named `<sha256>-<index>`.
                    sha256=path.stem.partition("-")[0],
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


# What was used

# In the model folder: a line of JSON for each load, download and fallback, the newest last.
USAGE = ".usage.jsonl"
# The record is cut to its newer half beyond so many bytes: about 1500 loads.
MOST_USAGE_BYTES = 256_000
# Seconds for which a model that stays loaded needs no further line.
_USE_AGAIN_S = 3600.0


@dataclass(frozen=True)
class ModelUsage:
    """What the record of a model folder tells of one version.

    Attributes:
        model: ``name@version``.
        first, last: seconds since the epoch; of its oldest and newest line.
        loads: how often it was loaded into memory.
        load_s, longest_load_s: seconds of the last load and of the longest; None without a load.
        device: of the last load.
        fetched_bytes: that its downloads brought.
        fetch_s: seconds that they took.
        source: of the last download.
        fallbacks: how often something else stood in for it.
    """

    model: str
    first: float
    last: float
    loads: int = 0
    load_s: float | None = None
    longest_load_s: float | None = None
    device: str = ""
    fetched_bytes: int = 0
    fetch_s: float = 0.0
    source: str = ""
    fallbacks: int = 0


class UsageRecord:
    """Keeps the record of a model folder from the events inside :func:`recorded`.

    A line is one write at the end of the file, so several processes may keep it together. A
    folder that is not there or cannot be written has no record.

    Args:
        folder: the model folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / USAGE
        self._lock = threading.Lock()
        self._noted: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        what, facts = event.what, dict[str, object]()
        if event.error:
            return
        if isinstance(what, events.Load):
            facts = {"device": what.device}
        elif isinstance(what, events.Download):
            facts = {"bytes": what.bytes, "source": what.source}
        elif not isinstance(what, (events.Reuse, events.Fallback)):
            return
        if what.model.endswith(")"):  # a mock
            return
        with self._lock:
            known = self._noted.get(what.model, 0.0)
            if isinstance(what, events.Reuse) and event.started - known < _USE_AGAIN_S:
                return
            self._noted[what.model] = event.started
        times = {"at": round(event.started, 3), "seconds": round(event.seconds, 4)}
        with suppress(OSError):
            self._append({**times, "event": event.name, "model": what.model, **facts})

    def _append(self, line: dict[str, object]) -> None:
        data = (json.dumps(line, ensure_ascii=False) + "\n").encode()
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
        descriptor = os.open(self._path, flags, 0o666)
        try:
            os.write(descriptor, data)
            size = os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)
        if size > MOST_USAGE_BYTES:
            self._shorten()

    def _shorten(self) -> None:
        # Whoever comes second finds it short; a line that is written meanwhile may be lost.
        with (
            suppress(StoreError),
            file_lock(self._folder / ".usage.lock", self._folder, "the record", 0.0),
        ):
            data = self._path.read_bytes()
            if len(data) > MOST_USAGE_BYTES:
                kept = data[-MOST_USAGE_BYTES // 2 :].partition(b"\n")[2]
                with atomic_write(self._path, durable=False) as temporary:
                    temporary.write_bytes(kept)


_record: ContextVar[UsageRecord | None] = ContextVar("auto_voice_usage", default=None)


@contextmanager
def recorded(record: UsageRecord) -> Iterator[None]:
    """What happens inside goes into ``record``."""
    token = _record.set(record)
    try:
        yield
    finally:
        _record.reset(token)


def _keep(event: Event) -> None:
    if (record := _record.get()) is not None:
        record(event)


events.subscribe(_keep)


def usage(store: ModelStore) -> list[ModelUsage]:
    """What was used, the latest first; lines that cannot be read are left out."""
    found: dict[str, ModelUsage] = {}
    try:
        text = (store.root / USAGE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    for raw in text.splitlines():
        with suppress(ValueError, KeyError, TypeError):
            line = json.loads(raw)
            model, at, seconds = str(line["model"]), float(line["at"]), float(line["seconds"])
            known = found.get(model) or ModelUsage(model, at, at)
            known = replace(known, first=min(known.first, at), last=max(known.last, at))
            found[model] = _with_line(known, line, seconds)
    return sorted(found.values(), key=lambda one: -one.last)


def _with_line(known: ModelUsage, line: dict[str, Any], seconds: float) -> ModelUsage:
    if line["event"] == "load":
        longest = max(seconds, known.longest_load_s or 0.0)
        return replace(
            known, loads=known.loads + 1, load_s=seconds, longest_load_s=longest,
            device=str(line["device"]),
        )  # fmt: skip
    if line["event"] == "download":
        return replace(
            known, fetched_bytes=known.fetched_bytes + int(line["bytes"]),
            fetch_s=known.fetch_s + seconds, source=str(line["source"]),
        )  # fmt: skip
    return replace(known, fallbacks=known.fallbacks + (line["event"] == "fallback"))
