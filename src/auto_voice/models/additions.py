"""Models of one's own: their files measured and tried, then described in the model folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from auto_voice.errors import (
    AutoVoiceError,
    ConfigError,
    MissingDependencyError,
    ModelLoadError,
    OfflineError,
)
from auto_voice.filesystem import sha256_file
from auto_voice.models.registry import architectures
from auto_voice.models.registry.catalog import ModelFile, ModelVersion, Needs, split_key
from auto_voice.models.registry.catalog_schema import extend_folder_catalog, fields_of
from auto_voice.models.registry.sources import file_name, local_path, needs_network

if TYPE_CHECKING:
    from auto_voice.models.model_loader import ModelLoader
    from auto_voice.models.registry.catalog import Catalog

log = logging.getLogger(__name__)

ONNX = ".onnx"


@dataclass(frozen=True)
class Addition:
    """What a user says of a model that is to be added.

    Attributes:
        name: ``name`` or ``name@version``; version 1.0 if not given.
        sources: paths and addresses of its files, or one folder where the architecture reads such.
        licence: under which the files may be used.
        kind: ``vocoder``, …; needed for an ONNX model, whose architecture follows from it.
        architecture: what the files are weights of.
        description: one line for the list.
        params: read by the architecture.
        in_place: use the files where they lie, without a copy.
    """

    name: str
    sources: tuple[str, ...]
    licence: str
    kind: str = ""
    architecture: str = ""
    description: str = ""
    params: Mapping[str, Any] | None = None
    in_place: bool = False


@dataclass(frozen=True)
class _Given:
    """A file on this machine, what a catalog calls it, and where it came from."""

    path: Path
    file: str
    source: str


def add_model(wanted: Addition, catalog: Catalog, loader: ModelLoader) -> ModelVersion:
    """The new version, fetched, hashed, tried once, and described in the folder's own catalog.

    Raises:
        ConfigError: the name is taken, or what is said of the model contradicts itself.
        ModelLoadError, UnsafeFileError: the files are not of that architecture, or do not compute
            what its kind promises.
        ModelError: they cannot be fetched.
    """
    name, number = split_key(wanted.name)
    number = number or "1.0"
    known = catalog.models.get(name)
    if known is not None and number in known.versions:
        raise ConfigError(f"there is a {name}@{number} already; give another version")
    chosen, architecture = _architecture(wanted)
    if known is not None and known.kind != architecture.kind:
        raise ConfigError(
            f"{name} is a {known.kind}, and {chosen} makes a {architecture.kind}; choose another "
            "name"
        )
    given = [_had(source, wanted.in_place, loader) for source in wanted.sources]
    paths, params = architecture.describe([g.path for g in given], dict(wanted.params or {}))
    origin = {g.path: g for g in given}
    found = [origin.get(path) or _Given(path, file_name(str(path)), str(path)) for path in paths]
    files = [_measured(g, wanted.in_place) for g in found]
    megabytes = -(-sum(file.bytes for file in files) // 10**6)
    version = ModelVersion(
        name=name,
        version=number,
        kind=architecture.kind,
        architecture=chosen,
        files=tuple(files),
        licence=wanted.licence,
        params=params,
        needs=Needs(megabytes, megabytes if architecture.devices else 0),
    )
    _try(version, {g.file: g.path for g in found}, architecture)
    about = {"kind": architecture.kind}
    if wanted.description or known is None:
        about["description"] = wanted.description or f"added from {found[0].file}"
    fields = fields_of(version, {file.file: file.sources for file in files})
    extend_folder_catalog(loader.store.root, name, number, about, fields)
    return version


def _architecture(wanted: Addition) -> tuple[str, architectures.Architecture]:
    name = wanted.architecture
    if not name and all(file_name(source).endswith(ONNX) for source in wanted.sources):
        kinds = [known[5:] for known in architectures.ARCHITECTURES if known.startswith("onnx_")]
        if wanted.kind not in kinds:
            raise ConfigError(
                f"an ONNX file does not say what it does: add --kind with one of {', '.join(kinds)}"
            )
        name = f"onnx_{wanted.kind}"
    if name not in architectures.ARCHITECTURES:
        architectures.load_plugins()
    if name not in architectures.ARCHITECTURES:
        listed = ", ".join(architectures.ARCHITECTURES)
        told = f"there is no architecture {name}" if name else "say what the files are weights of"
        raise ConfigError(f"{told}; known: {listed}")
    found = architectures.ARCHITECTURES[name]
    if wanted.kind not in ("", found.kind):
        raise ConfigError(f"{name} makes a {found.kind}, not a {wanted.kind}")
    return name, found


def _had(source: str, in_place: bool, loader: ModelLoader) -> _Given:
    path = local_path([source])
    if path is not None:
        path = path.absolute()
        if not path.exists():
            raise ConfigError(f"{source} cannot be read (it is not there); give the weights")
        return _Given(path, file_name(str(path)), str(path))
    if in_place:
        raise ConfigError(f"{source} is not on this machine; leave --in-place out to fetch it")
    if loader.offline and needs_network(source):
        raise OfflineError(f"{source} is not on this machine, and the network is switched off")
    return _Given(loader.downloader.fetch_unknown(source), file_name(source), source)


def _measured(given: _Given, in_place: bool) -> ModelFile:
    try:
        sha256, size = sha256_file(given.path), given.path.stat().st_size
    except OSError as error:
        raise ConfigError(
            f"{given.path} cannot be read ({error.strerror}); give the weights"
        ) from error
    return ModelFile(given.file, ((given.source,),), sha256, size, in_place)


def _try(
    version: ModelVersion, files: Mapping[str, Path], architecture: architectures.Architecture
) -> None:
    """Load the model from where its files lie, and run it once on a second of sound."""
    from auto_voice.models.registry.loading import run_once

    try:
        run_once(architecture.build(files, version, "cpu"), version)
    except MissingDependencyError as error:
        log.warning("%s was not tried: %s", version.key, error)
    except AutoVoiceError:
        raise
    except Exception as error:  # Whatever a network library raises.
        raise ModelLoadError(
            f"{version.key} cannot be run ({type(error).__name__}: {error}); check its params"
        ) from error
