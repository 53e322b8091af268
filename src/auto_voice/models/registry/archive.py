"""Moving versions to machines without a network: a plain tar of the store's own layout.

    <name>/<version>/<file>

An archive is not trusted: nothing is installed before every member's name and place is known
and every file's sha256 equals that of this machine's own catalog.
"""

from __future__ import annotations

import hashlib
import logging
import lzma
import shutil
import tarfile
import uuid
import zlib
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import IO

from auto_voice.errors import DiskSpaceError, IntegrityError, StoreError, UnsafeFileError
from auto_voice.filesystem import (
    CHUNK_BYTES,
    atomic_write,
    check_name,
    free_bytes,
    fsync_file,
    make_folder,
    megabytes,
    sha256_file,
    storage_errors,
)
from auto_voice.models.registry.catalog import ModelFile, ModelVersion
from auto_voice.models.registry.store import METADATA, Fetched, ModelStore

log = logging.getLogger(__name__)

# Name and version to the catalog's record; raises ``UnknownModelError``.
FindVersion = Callable[[str, str], ModelVersion]


def export_versions(store: ModelStore, versions: Iterable[ModelVersion], to: Path) -> Path:
    """Writes installed versions to a tar, in one step; ``to``.

    Raises:
        StoreError: a version is not installed, or ``to`` cannot be written.
        IntegrityError: a file does not match its sha256 (it is hashed on its way out).
    """
    wanted = list(versions)
    sources: list[tuple[str, Path, ModelFile]] = []
    for version in wanted:
        paths = store.lookup(version)
        if paths is None:
            raise StoreError(
                f"{version.key} is not installed: run `autovoice models pull {version.key}` first."
            )
        for file in version.files:
            member = f"{version.name}/{version.version}/{file.file}"
            sources.append((member, paths[file.file], file))
    try:
        with (
            atomic_write(to) as temporary,
            tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as archive,
        ):
            for member, path, file in sources:
                _add(archive, member, path, file)
    except OSError as error:
        raise StoreError(
            f"The archive {to} could not be written ({error.strerror or error}): choose another "
            "place with enough room."
        ) from error
    return to


def import_archive(store: ModelStore, path: Path, find: FindVersion) -> list[ModelVersion]:
    """Installs the versions of an archive that ``export_versions`` wrote.

    Raises:
        UnsafeFileError: a member that is not a plain file at ``name/version/file``.
        UnknownModelError: a model or version that the catalog lacks.
        IntegrityError: bytes that do not match the catalog.
        StoreError: not an archive, incomplete, or the folder is not writable.
    """
    try:
        with tarfile.open(path, "r:*") as archive:
            plan = _plan(archive, find)
            return _install(store, path, archive, plan)
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise StoreError(f"{path} is not a complete archive of models ({error}).") from error
    except FileNotFoundError as error:
        raise StoreError(f"{path} does not exist: give the archive to import.") from error
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error.strerror or error}).") from error


_Plan = list[tuple[ModelVersion, list[tuple[ModelFile, tarfile.TarInfo]]]]


class _HashingReader:
    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()

    def read(self, count: int = -1) -> bytes:
        chunk = self._stream.read(count)
        self._digest.update(chunk)
        return chunk

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def _add(archive: tarfile.TarFile, member: str, path: Path, file: ModelFile) -> None:
    info = tarfile.TarInfo(member)
    info.size = file.bytes
    info.mode = 0o644
    with path.open("rb") as stream:
        reader = _HashingReader(stream)
        archive.addfile(info, reader)
    if reader.hexdigest() != file.sha256:
        raise IntegrityError(
            f"{path} does not match its sha256 and was not exported: run `autovoice models repair`."
        )


def _plan(archive: tarfile.TarFile, find: FindVersion) -> _Plan:
    """Which member is which file, from the headers alone."""
    found: dict[tuple[str, str], dict[str, tarfile.TarInfo]] = {}
    for info in archive:
        parts = PurePosixPath(info.name).parts
        if not info.isfile() or len(parts) != 3 or "/".join(parts) != info.name:
            raise UnsafeFileError(
                f"The archive holds {info.name!r}, which is not a plain file at "
                "name/version/file: nothing was imported."
            )
        name, version, file = parts
        for part, what in ((name, "model name"), (version, "version"), (file, "file")):
            check_name(part, f"the archive's {what}")
        if file == METADATA:
            continue
        members = found.setdefault((name, version), {})
        if file in members:
            raise UnsafeFileError(f"The archive holds {info.name!r} twice: nothing was imported.")
        members[file] = info
    if not found:
        raise StoreError("The archive holds no models: make one with `autovoice models export`.")
    return [_match(find(name, version), members) for (name, version), members in found.items()]


def _match(
    version: ModelVersion, members: dict[str, tarfile.TarInfo]
) -> tuple[ModelVersion, list[tuple[ModelFile, tarfile.TarInfo]]]:
    known = {file.file: file for file in version.files}
    if unknown := sorted(set(members) - set(known)):
        raise UnsafeFileError(
            f"The archive holds {', '.join(unknown)} for {version.key}, which the catalog does "
            "not name: nothing was imported."
        )
    if missing := sorted(set(known) - set(members)):
        raise StoreError(
            f"The archive lacks {', '.join(missing)} of {version.key}: export it again."
        )
    for name, info in members.items():
        if info.size != known[name].bytes:
            raise IntegrityError(
                f"{info.name} in the archive has {info.size} bytes and not {known[name].bytes}: "
                "nothing was imported."
            )
    return version, [(known[name], info) for name, info in members.items()]


def _install(
    store: ModelStore, path: Path, archive: tarfile.TarFile, plan: _Plan
) -> list[ModelVersion]:
    needed = sum(file.bytes for _, files in plan for file, _ in files)
    if free_bytes(store.root) < needed:
        raise DiskSpaceError(
            f"The import needs {megabytes(needed)} on the disk of {store.root}: free some space "
            "or set AUTOVOICE_MODEL_DIR elsewhere."
        )
    staging = make_folder(store.root / ".partial" / f"import-{uuid.uuid4().hex[:8]}", store.root)
    try:
        staged: list[tuple[ModelVersion, dict[str, Fetched]]] = []
        for number, (version, files) in enumerate(plan):
            fetched = {}
            for file, info in files:
                target = staging / f"{number}-{file.file}"
                with storage_errors(store.root, f"importing {info.name}"):
                    _extract(archive, info, target)
                if sha256_file(target) != file.sha256:
                    raise IntegrityError(
                        f"{info.name} in the archive does not match the catalog's sha256: "
                        "nothing was imported."
                    )
                fetched[file.file] = Fetched(target, f"import {path.name}")
            staged.append((version, fetched))
        with ExitStack() as locks:
            for version, _ in sorted(staged, key=lambda item: item[0].key):
                locks.enter_context(store.lock(version.name, version.version))
            for version, fetched in staged:
                store.install(version, fetched)
                log.info("%s imported from %s", version.key, path)
        return [version for version, _ in staged]
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _extract(archive: tarfile.TarFile, info: tarfile.TarInfo, target: Path) -> None:
    stream = archive.extractfile(info)
    if stream is None:
        raise UnsafeFileError(f"{info.name} in the archive is not a plain file.")
    with stream, target.open("wb") as out:
        shutil.copyfileobj(stream, out, CHUNK_BYTES)
    fsync_file(target)
