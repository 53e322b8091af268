"""Moving versions to machines without a network: a plain tar of the store's own layout.

    <name>/<version>/<file>
    catalog.yaml              what the catalog says of them, for machines that do not know them
    pins.json                 which of them their bare names mean

An archive is not trusted: nothing is installed before every member's name and place is known. What
this machine's catalog knows is held to that catalog. Only of what it does not know the archive's
own description is read, by the same rules as a user's YAML, and every file must have the sha256
that it names.
"""

from __future__ import annotations

import io
import json
import logging
import lzma
import shutil
import tarfile
import uuid
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from auto_voice.errors import (
    AutoVoiceError,
    DiskSpaceError,
    IntegrityError,
    ModelError,
    StoreError,
    UnknownModelError,
    UnsafeFileError,
)
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
from auto_voice.models.registry.catalog import ModelEntry, ModelFile, ModelVersion, PinRecords
from auto_voice.models.registry.catalog_schema import (
    extend_folder_catalog,
    fields_of,
    read_catalog,
)
from auto_voice.models.registry.sources import bundled_files, needs_network
from auto_voice.models.registry.store import METADATA, Fetched, ModelStore

log = logging.getLogger(__name__)

CATALOG, PINS = "catalog.yaml", "pins.json"
# Longest description in an archive, in bytes: the built-in catalog has 20 000.
_ABOUT_BYTES = 1 << 20

# Name and version to the catalog's record; raises ``UnknownModelError``.
FindVersion = Callable[[str, str], ModelVersion]


@dataclass(frozen=True)
class ArchiveReport:
    """What went in or came out.

    Attributes:
        versions: that did.
        problems: one error for each that did not.
        pins: version by name, as the archive has them.
        new: the versions that only the archive describes.
    """

    versions: tuple[ModelVersion, ...]
    problems: tuple[AutoVoiceError, ...] = ()
    pins: Mapping[str, str] | None = None
    new: tuple[ModelVersion, ...] = ()


def export_versions(
    store: ModelStore,
    versions: Iterable[ModelVersion],
    to: Path,
    *,
    entries: Mapping[str, ModelEntry] | None = None,
    pins: PinRecords | None = None,
) -> ArchiveReport:
    """Writes versions that are here, in the store or in the package, to a tar, in one step.

    What is absent or damaged is left out and reported.

    Args:
        entries: of the catalog, by name, for what it says of a model as a whole.
        pins: those of the exported versions go along.

    Raises:
        StoreError: ``to`` cannot be written, or nothing could be exported.
        IntegrityError: nothing could be exported, since every file is damaged.
    """
    done: list[ModelVersion] = []
    problems: list[AutoVoiceError] = []
    found: list[tuple[str, Path]] = []
    for version in versions:
        try:
            found += _files_of(store, version)
            done.append(version)
        except AutoVoiceError as error:
            problems.append(error)
    if not done:
        raise _all_failed(problems)
    kept = {
        version.name: dict(pin)
        for version in done
        if (pin := (pins or {}).get(version.name)) and pin["version"] == version.version
    }
    try:
        with (
            atomic_write(to) as temporary,
            tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as archive,
        ):
            _add_text(archive, CATALOG, _described(done, entries or {}))
            if kept:
                _add_text(archive, PINS, json.dumps(kept, indent=2, sort_keys=True))
            for member, path in found:
                info = tarfile.TarInfo(member)
                info.size, info.mode = path.stat().st_size, 0o644
                with path.open("rb") as stream:
                    archive.addfile(info, stream)
    except OSError as error:
        raise StoreError(
            f"The archive {to} could not be written ({error.strerror or error}): choose another "
            "place with enough room."
        ) from error
    return ArchiveReport(tuple(done), tuple(problems))


def import_archive(store: ModelStore, path: Path, find: FindVersion) -> ArchiveReport:
    """Installs the versions of an archive that ``export_versions`` wrote.

    What is damaged, incomplete or unknown is left out and reported. Versions that only the archive
    describes are added to the catalog of the model folder.

    Raises:
        UnsafeFileError: a member that is not a plain file at ``name/version/file``; nothing was
            imported.
        UnknownModelError: neither catalog knows any of the models.
        IntegrityError: none has the bytes that its catalog names.
        StoreError: not an archive, incomplete, or the folder is not writable.
    """
    try:
        with tarfile.open(path, "r:*") as archive:
            return _import(store, path, archive, find)
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise StoreError(f"{path} is not a complete archive of models ({error}).") from error
    except FileNotFoundError as error:
        raise StoreError(f"{path} does not exist: give the archive to import.") from error
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error.strerror or error}).") from error


def _files_of(store: ModelStore, version: ModelVersion) -> list[tuple[str, Path]]:
    paths = store.lookup(version) or bundled_files(version)
    if paths is None:
        raise StoreError(
            f"{version.key} is not installed: run `autovoice models pull {version.key}` first."
        )
    for file in version.files:
        with storage_errors(store.root, f"exporting {file.file}"):
            right = sha256_file(paths[file.file]) == file.sha256
        if not right:
            raise IntegrityError(
                f"{paths[file.file]} does not match its sha256 and was not exported: run "
                f"`autovoice models repair {version.key}`."
            )
    return [
        (f"{version.name}/{version.version}/{file.file}", paths[file.file])
        for file in version.files
    ]


def _all_failed(problems: list[AutoVoiceError]) -> AutoVoiceError:
    if len(problems) == 1:
        return problems[0]
    return ModelError(" ".join(map(str, problems)) or "There is nothing to export.")


def _described(versions: Iterable[ModelVersion], entries: Mapping[str, ModelEntry]) -> str:
    import yaml

    models: dict[str, dict[str, Any]] = {}
    for version in versions:
        entry = entries.get(version.name)
        model = models.setdefault(
            version.name,
            {
                "kind": version.kind,
                "description": (entry.description if entry else "") or version.name,
                "versions": {},
            },
        )
        model["versions"][version.version] = fields_of(version, _portable_sources(version))
        if entry is not None and entry.default_version == version.version:
            model["default"] = version.version
    return str(yaml.safe_dump({"schema": 1, "models": models}, sort_keys=False))


def _portable_sources(version: ModelVersion) -> dict[str, list[list[str]]]:
    """Sources that mean something elsewhere; where there is none, the place in the store: a plain
    path counts from the file that names it, which will lie in the model folder."""
    found = {}
    for file in version.files:
        far = [list(uris) for uris in file.sources if all(map(needs_network, uris))]
        place = f"{version.name}/{version.version}/{file.file}"
        found[file.file] = far or [[place]]
    return found


def _add_text(archive: tarfile.TarFile, name: str, text: str) -> None:
    data = text.encode("utf-8")
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    archive.addfile(info, io.BytesIO(data))


_Members = dict[str, tarfile.TarInfo]


def _import(
    store: ModelStore, path: Path, archive: tarfile.TarFile, find: FindVersion
) -> ArchiveReport:
    texts, found = _members(archive)
    needed = sum(info.size for files in found.values() for info in files.values())
    if free_bytes(store.root) < needed:
        raise DiskSpaceError(
            f"The import needs {megabytes(needed)} on the disk of {store.root}: free some space "
            "or set AUTOVOICE_MODEL_DIR elsewhere."
        )
    theirs = cache(lambda: _their_catalog(archive, texts.get(CATALOG)))
    problems: list[AutoVoiceError] = []
    plan: list[tuple[ModelVersion, _Members, bool]] = []
    for (name, number), members in found.items():
        try:
            version, is_new = _known(find, theirs, name, number)
            _match(version, members)
            plan.append((version, members, is_new))
        except UnsafeFileError:
            raise
        except AutoVoiceError as error:
            problems.append(error)
    done: list[ModelVersion] = []
    new: list[ModelVersion] = []
    for version, members, is_new in plan:
        try:
            about = _about(find, theirs()[version.name]) if is_new else {}
            _install(store, path, archive, version, members)
            if is_new:
                fields = fields_of(version, _portable_sources(version))
                extend_folder_catalog(store.root, version.name, version.version, about, fields)
                new.append(version)
            done.append(version)
        except DiskSpaceError:
            raise
        except AutoVoiceError as error:
            problems.append(error)
    if not done:
        raise _all_failed(problems)
    pins = _their_pins(archive, texts.get(PINS), done)
    return ArchiveReport(tuple(done), tuple(problems), pins, tuple(new))


def _members(archive: tarfile.TarFile) -> tuple[_Members, dict[tuple[str, str], _Members]]:
    """What describes the archive, and which member is which file, from the headers alone."""
    about: _Members = {}
    found: dict[tuple[str, str], _Members] = {}
    for info in archive:
        parts = PurePosixPath(info.name).parts
        if info.isfile() and info.name in (CATALOG, PINS) and info.size <= _ABOUT_BYTES:
            about[info.name] = info
            continue
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
    return about, found


def _their_catalog(
    archive: tarfile.TarFile, info: tarfile.TarInfo | None
) -> Mapping[str, ModelEntry]:
    """What the archive says of its models; empty where it does not.

    Raises:
        CatalogError: it breaks the rules.
    """
    if info is None:
        return {}
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / CATALOG
        path.write_bytes(_text(archive, info))
        return read_catalog([path])


def _their_pins(
    archive: tarfile.TarFile, info: tarfile.TarInfo | None, done: list[ModelVersion]
) -> dict[str, str]:
    """The archive's pins of what was imported with the bytes that were pinned."""
    if info is None:
        return {}
    try:
        pins = json.loads(_text(archive, info))
        wanted = {name: (pin["version"], pin["sha256"]) for name, pin in pins.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        log.warning("the pins in the archive cannot be read and are left out")
        return {}
    return {
        version.name: version.version
        for version in done
        if wanted.get(version.name)
        == (version.version, {file.file: file.sha256 for file in version.files})
    }


def _text(archive: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    stream = archive.extractfile(info)
    return stream.read() if stream is not None else b""


def _known(
    find: FindVersion, theirs: Callable[[], Mapping[str, ModelEntry]], name: str, number: str
) -> tuple[ModelVersion, bool]:
    """The record of a version, and whether only the archive has it."""
    try:
        return find(name, number), False
    except UnknownModelError:
        entry = theirs().get(name)
        if entry is None or number not in entry.versions:
            raise
        return entry.versions[number], True


def _match(version: ModelVersion, members: _Members) -> None:
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
                f"{version.key} was not imported."
            )


def _about(find: FindVersion, entry: ModelEntry) -> dict[str, Any]:
    """What to write of a model as a whole: its kind alone where our catalog knows the name."""
    try:
        known = find(entry.name, "latest")
    except UnknownModelError:
        return {"kind": entry.kind, "description": entry.description or entry.name}
    if known.kind != entry.kind:
        raise IntegrityError(
            f"The archive's {entry.name} is a {entry.kind}, and here the name means a "
            f"{known.kind}: it was not imported."
        )
    return {"kind": entry.kind}


def _install(
    store: ModelStore,
    path: Path,
    archive: tarfile.TarFile,
    version: ModelVersion,
    members: _Members,
) -> None:
    staging = make_folder(store.root / ".partial" / f"import-{uuid.uuid4().hex[:8]}", store.root)
    files: dict[str, ModelFile] = {file.file: file for file in version.files}
    try:
        fetched = {}
        for name, info in members.items():
            target = staging / name
            with storage_errors(store.root, f"importing {info.name}"):
                _extract(archive, info, target)
            if sha256_file(target) != files[name].sha256:
                raise IntegrityError(
                    f"{info.name} in the archive does not match the catalog's sha256: "
                    f"{version.key} was not imported."
                )
            fetched[name] = Fetched(target, f"import {path.name}")
        with store.lock(version.name, version.version):
            missing = {file.file for file in store.adopt(version)}
            store.install(version, {name: it for name, it in fetched.items() if name in missing})
            log.info("%s imported from %s", version.key, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _extract(archive: tarfile.TarFile, info: tarfile.TarInfo, target: Path) -> None:
    stream = archive.extractfile(info)
    if stream is None:
        raise UnsafeFileError(f"{info.name} in the archive is not a plain file.")
    with stream, target.open("wb") as out:
        shutil.copyfileobj(stream, out, CHUNK_BYTES)
    fsync_file(target)
