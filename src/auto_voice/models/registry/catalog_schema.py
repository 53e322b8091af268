"""What a catalog file may say: YAML nodes in, checked records out, each error with its line.

Plain functions instead of a schema library: 0.2 s less to import, and a message that names the
file and line even for a value that one file overlays onto another.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from auto_voice import yaml_nodes
from auto_voice.errors import ConfigError
from auto_voice.filesystem import (
    atomic_write,
    file_lock,
    is_device_name,
    make_folder,
    storage_errors,
)
from auto_voice.models.registry.architectures import ARCHITECTURES, KINDS, load_plugins
from auto_voice.models.registry.catalog import (
    Catalog,
    ModelEntry,
    ModelFile,
    ModelVersion,
    Needs,
    Quantised,
    version_order,
)
from auto_voice.models.registry.sources import SCHEMES, local_path, parse_source
from auto_voice.yaml_nodes import Node

# Whole names; they become folders, and lower-case ones are the same on every file system.
NAME = r"[a-z0-9][a-z0-9_.-]*"
VERSION = r"[A-Za-z0-9][A-Za-z0-9_.+-]*"
FILE = r"[A-Za-z0-9][A-Za-z0-9_.+-]*"
SHA256 = r"[0-9a-f]{64}"
# Files that the store writes itself.
RESERVED = frozenset({"metadata.json"})
# Aliases that every model has: its highest and its default version.
ALIASES = ("latest", "stable")

# The keys of each level.
_ROOT = ("schema", "settings", "models")
_MODEL = ("kind", "description", "default", "aliases", "compact", "versions")
_FILE = ("file", "sha256", "bytes", "sources", "in_place")
_VERSION = ("architecture", "licence", "params", "needs", "quantised", "files", *_FILE)
_NEEDS = ("ram_mb", "vram_mb", "gpu")
_QUANTISED = ("of", "to", "speed", "calibration")
PRECISIONS = ("int8", "fp16", "bf16")

# In the model folder: what was imported or added there and no other catalog knows.
FOLDER_CATALOG = "catalog.yaml"

Fields = dict[str, Node]


def builtin_catalog() -> Path:
    """The catalog that comes with the package: inside the wheel, or in the checkout."""
    here = Path(__file__).resolve()
    installed = here.parents[2] / "config" / "models.yaml"
    return installed if installed.is_file() else here.parents[4] / "config" / "models.yaml"


def load_catalog(paths: Iterable[Path] | None = None) -> Catalog:
    """Read and check YAML files; each overlays those before it.

    Args:
        paths: by default the built-in catalog alone.

    Raises:
        CatalogError: the message starts with ``file:line:`` and names the key.
    """
    files = tuple(paths) if paths is not None else (builtin_catalog(),)
    return Catalog(MappingProxyType(read_catalog(files)), files)


def read_catalog(paths: Iterable[Path]) -> dict[str, ModelEntry]:
    """Entries by name; a later file adds models and versions and replaces single keys."""
    owners: dict[str, Node] = {}
    models: dict[str, Fields] = {}
    versions: dict[str, dict[str, tuple[Node, Fields]]] = {}
    for path in paths:
        root = yaml_nodes.read(path)
        if root is None or root.is_a("null"):
            continue
        top = root.mapping(_ROOT)
        if "schema" in top and top["schema"].integer() != 1:
            raise top["schema"].expected("1; this program is too old for another schema")
        section = top.get("models")
        if section is None or section.is_a("null"):
            continue
        for name, node in section.mapping().items():
            if not re.fullmatch(NAME, name):
                raise node.error("is no model name; use lower-case letters, digits, _ . and -")
            if is_device_name(name):
                raise node.error("is the name of a device on Windows; choose another")
            fields = node.mapping(_MODEL)
            owners[name] = node
            models.setdefault(name, {}).update(fields)
            _overlay_versions(versions.setdefault(name, {}), fields.get("versions"))
    return {name: _entry(name, owners[name], models[name], versions[name]) for name in models}


def fields_of(
    version: ModelVersion, sources: Mapping[str, Sequence[Sequence[str]]]
) -> dict[str, Any]:
    """A version as a catalog writes it: what ``read_catalog`` reads as the same record.

    Args:
        sources: of each file; each source is a list of addresses whose bytes are joined.
    """
    needs = {
        name: value for name, value in asdict(version.needs).items() if value not in (0, "optional")
    }
    files = [
        {
            "file": file.file,
            "sha256": file.sha256,
            "bytes": file.bytes,
            "sources": [uris[0] if len(uris) == 1 else list(uris) for uris in sources[file.file]],
            **({"in_place": True} if file.in_place else {}),
        }
        for file in version.files
    ]
    fields: dict[str, Any] = {
        "architecture": version.architecture,
        "licence": version.licence,
        "files": files,
    }
    if version.params:
        fields["params"] = dict(version.params)
    if needs:
        fields["needs"] = needs
    if version.quantised is not None:
        told = asdict(version.quantised).items()
        fields["quantised"] = {name: value for name, value in told if value not in (1.0, "")}
    return fields


def extend_folder_catalog(
    folder: Path, name: str, number: str, about: Mapping[str, Any], fields: Mapping[str, Any]
) -> None:
    """Makes the model folder's own catalog describe a version that no other one does.

    Args:
        about: kind, description, … of the model, where the folder does not know it yet.
        fields: of the version, as ``fields_of`` gives them.

    Raises:
        CatalogError: what would be written breaks the rules; nothing was written.
        StoreError: the folder cannot be written.
    """
    import yaml

    path = make_folder(folder, folder) / FOLDER_CATALOG
    with (
        file_lock(folder / ".catalog.lock", folder, "the folder's catalog"),
        storage_errors(folder, "describing a model"),
    ):
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        models = (yaml.safe_load(text) or {}).get("models", {}) if text else {}
        model = models.setdefault(name, {**about, "versions": {}})
        model["versions"][number] = dict(fields)
        with atomic_write(path) as temporary:
            written = yaml.safe_dump({"schema": 1, "models": models}, sort_keys=False)
            temporary.write_text(str(written), encoding="utf-8")
            read_catalog([temporary])  # What is not sound must not stop the next start.


def shrink_folder_catalog(folder: Path, name: str, number: str) -> None:
    """Makes the model folder's own catalog forget a version.

    Raises:
        StoreError: the folder cannot be written.
    """
    import yaml

    path = folder / FOLDER_CATALOG
    if not path.is_file():
        return
    with (
        file_lock(folder / ".catalog.lock", folder, "the folder's catalog"),
        storage_errors(folder, "forgetting a model"),
    ):
        models = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("models", {})
        model = models.get(name, {})
        model.get("versions", {}).pop(number, None)
        if not model.get("versions"):
            models.pop(name, None)
        with atomic_write(path) as temporary:
            written = yaml.safe_dump({"schema": 1, "models": models}, sort_keys=False)
            temporary.write_text(str(written), encoding="utf-8")


def version_problem(number: str) -> str | None:
    """What keeps ``number`` from being a version, said of it; None where nothing does."""
    if not re.fullmatch(VERSION, number):
        return "is no version; begin with a letter or digit and go on with those, . _ + and -"
    if is_device_name(number):
        return "is the name of a device on Windows; choose another"
    if number in ALIASES:
        return "is an alias; give the version a number"
    return None


def _overlay_versions(known: dict[str, tuple[Node, Fields]], section: Node | None) -> None:
    if section is None:
        return
    for number, node in section.mapping(quoted=True).items():
        if wrong := version_problem(number):
            raise node.error(wrong)
        fields = node.mapping(_VERSION)
        earlier = known.get(number, (node, {}))[1]
        if "files" in fields or any(key in fields for key in _FILE[:3]):
            # New bytes: nothing of the old description of the files may survive.
            old = ("files", "in_place", *_FILE[:3])
            earlier = {k: v for k, v in earlier.items() if k not in old}
        known[number] = (node, {**earlier, **fields})


def _entry(
    name: str, owner: Node, fields: Fields, versions: Mapping[str, tuple[Node, Fields]]
) -> ModelEntry:
    yaml_nodes.require(fields, owner, "kind", "versions")
    kind = fields["kind"].choice(KINDS)
    built = {
        number: _version(name, number, kind, node, version)
        for number, (node, version) in versions.items()
    }
    if not built:
        raise fields["versions"].error("holds no version; give at least one")
    published = [number for number, version in built.items() if version.quantised is None]
    newest = max(published or built, key=version_order)
    default = _known_version(fields.get("default"), built) or newest
    aliases = {"latest": newest, "stable": default}
    if "aliases" in fields:
        for alias, node in fields["aliases"].mapping().items():
            if alias in built:
                raise node.error("is the number of a version; choose another alias")
            aliases[alias] = _known_version(node, built) or newest
    return ModelEntry(
        name=name,
        kind=kind,
        description=fields["description"].text() if "description" in fields else "",
        default_version=default,
        versions=MappingProxyType(built),
        aliases=MappingProxyType(aliases),
        compact=fields["compact"].boolean() if "compact" in fields else False,
    )


def _known_version(node: Node | None, versions: Mapping[str, Any]) -> str | None:
    if node is None:
        return None
    value = node.text()
    if value not in versions:
        raise node.error(
            f'is "{value}", which is no version here; {yaml_nodes.closest(value, versions)}'
        )
    return value


def _version(name: str, number: str, kind: str, owner: Node, fields: Fields) -> ModelVersion:
    yaml_nodes.require(fields, owner, "architecture", "licence")
    if fields["architecture"].text() not in ARCHITECTURES:
        load_plugins()
    architecture = fields["architecture"].choice(ARCHITECTURES)
    if ARCHITECTURES[architecture].kind != kind:
        raise fields["architecture"].error(
            f"is {architecture}, which makes a {ARCHITECTURES[architecture].kind}, not a {kind}"
        )
    files = _files(owner, fields)
    return ModelVersion(
        name=name,
        version=number,
        kind=kind,
        architecture=architecture,
        files=files,
        licence=fields["licence"].text(),
        params=_params(fields.get("params")),
        needs=_needs(fields.get("needs")),
        quantised=_quantised(fields.get("quantised"), files),
    )


def _positive(node: Node) -> float:
    value = node.plain()
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e6:
        raise node.expected("a number above 0")
    return float(value)


def _quantised(node: Node | None, files: Sequence[ModelFile]) -> Quantised | None:
    if node is None:
        return None
    fields = node.mapping(_QUANTISED)
    yaml_nodes.require(fields, node, "of", "to")
    calibration = fields["calibration"].text() if "calibration" in fields else ""
    if calibration and calibration not in (file.file for file in files):
        raise fields["calibration"].error(f"names {calibration}, which is none of the files")
    return Quantised(
        of=fields["of"].text(),
        to=fields["to"].choice(PRECISIONS),
        speed=_positive(fields["speed"]) if "speed" in fields else 1.0,
        calibration=calibration,
    )


def _files(owner: Node, fields: Fields) -> tuple[ModelFile, ...]:
    if "files" not in fields:
        return (_file(owner, {key: fields[key] for key in _FILE if key in fields}),)
    both = next((fields[key] for key in _FILE if key in fields), None)
    if both is not None:
        raise both.error("stands beside files; give one or the other")
    nodes = fields["files"].items()
    files = tuple(_file(node, node.mapping(_FILE)) for node in nodes)
    seen: dict[str, Node] = {}
    for file, node in zip(files, nodes, strict=True):
        if file.file.lower() in seen:
            raise node.error(f"names {file.file} twice; {seen[file.file.lower()].place} has it")
        seen[file.file.lower()] = node
    return files


def _file(owner: Node, fields: Fields) -> ModelFile:
    yaml_nodes.require(fields, owner, "file", "sources")
    file = fields["file"].matching(FILE, "a bare file name of letters, digits, . _ + and -")
    if file.lower() in RESERVED or is_device_name(file):
        raise fields["file"].error(f"is {file}, a name the store keeps for itself; choose another")
    sources = fields["sources"].items()
    if not sources:
        raise fields["sources"].error("is empty; give at least one source")
    uris = tuple(_source(node) for node in sources)
    if "sha256" not in fields or "bytes" not in fields:
        missing = "sha256" if "sha256" not in fields else "bytes"
        raise owner.error(f"lacks {missing}{_measured(uris)}")
    in_place = "in_place" in fields and fields["in_place"].boolean()
    if in_place and (len(uris) != 1 or local_path(uris[0]) is None):
        raise fields["in_place"].error("needs one source that is a path of this machine")
    return ModelFile(
        file=file,
        sources=uris,
        in_place=in_place,
        sha256=fields["sha256"].matching(SHA256, "64 hexadecimal digits in lower case"),
        bytes=fields["bytes"].integer(at_least=1),
    )


def _source(node: Node) -> tuple[str, ...]:
    if not node.is_a("seq"):
        return (_uri(node),)
    parts = node.items()
    if not parts:
        raise node.error("is empty; give the addresses to join")
    return tuple(_uri(part) for part in parts)


def _uri(node: Node) -> str:
    value = node.text()
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", value)
    if scheme is None:
        # A plain path counts from the file that says it.
        try:
            return str((node.path.parent / Path(value).expanduser()).absolute())
        except RuntimeError as error:
            raise node.error(f'is "{value}", whose ~ names no user of this machine') from error
    name = scheme[1].lower()
    if name not in SCHEMES:
        known = yaml_nodes.closest(name, SCHEMES)
        raise node.error(f'starts with "{scheme[1]}://"; {known}, or a plain path')
    try:
        parse_source(value)
    except ConfigError as error:
        raise node.error(f'must look like {SCHEMES[name].shape}, not "{value}"') from error
    return value


def _measured(sources: Iterable[tuple[str, ...]]) -> str:
    """For a custom file on this machine: the lines to write, since only we can know them here."""
    for source in sources:
        path = Path(source[0].removeprefix("file://"))
        if len(source) == 1 and path.is_absolute() and path.is_file():
            with path.open("rb") as file:
                digest = hashlib.sha256()
                while block := file.read(1 << 20):
                    digest.update(block)
            size = path.stat().st_size
            return f"; of {path} they are: sha256: {digest.hexdigest()} and bytes: {size}"
    return ""


def _params(node: Node | None) -> Mapping[str, Any]:
    if node is None:
        return MappingProxyType({})
    return MappingProxyType({key: value.plain() for key, value in node.mapping().items()})


def _needs(node: Node | None) -> Needs:
    if node is None:
        return Needs()
    fields = node.mapping(_NEEDS)
    return Needs(
        ram_mb=fields["ram_mb"].integer() if "ram_mb" in fields else 0,
        vram_mb=fields["vram_mb"].integer() if "vram_mb" in fields else 0,
        gpu=fields["gpu"].choice(("required", "optional")) if "gpu" in fields else "optional",
    )
