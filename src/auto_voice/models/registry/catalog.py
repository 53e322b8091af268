"""The catalog: what config/models.yaml says, checked, as frozen records; and the pins, a lock file
beside the models that says which of its versions is meant by a bare name.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from auto_voice.errors import IntegrityError, ModelError, StoreError, UnknownModelError

# Parameters that whoever uses a model relies on.
PROMISES = (
    "sample_rate", "hop_samples", "frame_rate", "bands", "dims", "space", "content_space",
)  # fmt: skip


@dataclass(frozen=True)
class ModelFile:
    """One file of a version.

    Attributes:
        file: its name in the store, a bare file name.
        sources: alternatives in order of preference; each is one or more URIs whose bytes are
            joined in order (schemes: ``hf``, ``https``, ``pypi``, ``file``, ``package``).
        sha256: lower-case hex of the whole file.
        bytes: its size.
        in_place: used where its one source, a path of this machine, says that it lies, and not
            copied into the model folder.
    """

    file: str
    sources: tuple[tuple[str, ...], ...]
    sha256: str
    bytes: int
    in_place: bool = False


@dataclass(frozen=True)
class Needs:
    """What it takes to run a version."""

    ram_mb: int = 0
    vram_mb: int = 0
    gpu: str = "optional"


@dataclass(frozen=True)
class Quantised:
    """How a version was made of another one of the same model.

    Attributes:
        of: number of that version.
        to: ``int8``, ``fp16`` or ``bf16``.
        speed: how many times as fast as that one it runs on a CPU.
        calibration: the file with the ranges by which its weights are quantised on each machine;
            empty where the quantised weights are its files.
    """

    of: str
    to: str
    speed: float = 1.0
    calibration: str = ""


@dataclass(frozen=True)
class ModelVersion:
    """One version of a model; ``files[0]`` is the one that ``registry.path`` returns.

    Attributes:
        quantised: None for a version as it was published.
    """

    name: str
    version: str
    kind: str
    architecture: str
    files: tuple[ModelFile, ...]
    licence: str
    params: Mapping[str, Any] = field(default_factory=dict)
    needs: Needs = field(default_factory=Needs)
    quantised: Quantised | None = None

    @property
    def key(self) -> str:
        return f"{self.name}@{self.version}"

    def keeps_promises_of(self, other: ModelVersion) -> bool:
        """Whether its results have the shape, rate and meaning of those of ``other``."""
        return self.kind == other.kind and all(
            self.params.get(name) == other.params[name] for name in PROMISES if name in other.params
        )

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


@dataclass(frozen=True)
class ModelEntry:
    """A model with its versions.

    Attributes:
        aliases: other names of versions; ``latest`` and ``stable`` are always there and mean no
            quantised version.
        compact: whether it stands in for models of its kind that cannot be had.
    """

    name: str
    kind: str
    description: str
    default_version: str
    versions: Mapping[str, ModelVersion]
    aliases: Mapping[str, str] = field(default_factory=dict)
    compact: bool = False

    def quantised_of(self, version: ModelVersion) -> list[ModelVersion]:
        """The versions that were made of ``version``."""
        others = self.versions.values()
        return [v for v in others if v.quantised is not None and v.quantised.of == version.version]

    def in_space(self, space: str) -> ModelVersion | None:
        """The last version whose content lies in ``space``; None if none does."""
        versions = [v for v in reversed(tuple(self.versions.values())) if v.quantised is None]
        return next((v for v in versions if v.params.get("space") == space), None)


@dataclass(frozen=True)
class Catalog:
    """Every model that the registry knows.

    Attributes:
        models: by name, in the order of the files.
        files: the YAML files it came from; later ones overlay earlier ones.
    """

    models: Mapping[str, ModelEntry]
    files: tuple[Path, ...] = ()

    def entry(self, name: str) -> ModelEntry:
        """The model called ``name``.

        Raises:
            UnknownModelError: there is none; the message lists those that exist.
        """
        try:
            return self.models[name]
        except KeyError:
            from auto_voice.yaml_nodes import closest

            raise UnknownModelError(
                f"there is no model {name}; {closest(name, self.models)}"
            ) from None

    def version(self, name: str, version: str | None = None) -> ModelVersion:
        """A version by number or alias; by default the model's default version.

        Args:
            name: ``name`` or ``name@version``.

        Raises:
            UnknownModelError: no such model or version.
        """
        name, version = split_key(name, version)
        entry = self.entry(name)
        wanted = entry.default_version if version is None else version
        wanted = entry.aliases.get(wanted, wanted)
        try:
            return entry.versions[wanted]
        except KeyError:
            from auto_voice.yaml_nodes import closest

            raise UnknownModelError(
                f"{name} has no version {wanted}; "
                f"{closest(wanted, [*entry.versions, *entry.aliases])}"
            ) from None

    def versions(self) -> Iterable[ModelVersion]:
        """Every version of every model."""
        return (version for entry in self.models.values() for version in entry.versions.values())

    def compact(self, kind: str) -> ModelEntry | None:
        """The model that stands in for others of its kind; None if there is none."""
        entries = self.models.values()
        return next((entry for entry in entries if entry.kind == kind and entry.compact), None)

    def stand_ins(self, wanted: ModelVersion, *, others: bool) -> Iterator[ModelVersion]:
        """What could do the work of ``wanted``, best first: its other versions, newest first,
        then with ``others`` those of the compact model of its kind.

        Only what keeps its promises is named: the same rates, sizes and content space.
        """
        compact = self.compact(wanted.kind) if others else None
        for entry in (self.entry(wanted.name), compact):
            if entry is None:
                continue
            newest_first = sorted(entry.versions, key=version_order, reverse=True)
            for number in dict.fromkeys((entry.default_version, *newest_first)):
                version = entry.versions[number]
                if version.key != wanted.key and version.keeps_promises_of(wanted):
                    yield version


def split_key(name: str, version: str | None = None) -> tuple[str, str | None]:
    """``name@version`` to its parts.

    Raises:
        UnknownModelError: two different versions were asked for, or no text.
    """
    if not isinstance(name, str):
        raise UnknownModelError(f'a model is named by text such as "hifigan_universal", not {name}')
    name, at, suffix = name.partition("@")
    if not at:
        return name, version
    if version is not None and version != suffix:
        raise UnknownModelError(
            f"{name}@{suffix} and version {version} contradict each other; give one of them"
        )
    return name, suffix


def version_order(version: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts 1.10 after 1.9."""
    parts = re.findall(r"\d+|[a-z]+", version.lower())
    return tuple((1, int(part), "") if part.isdigit() else (0, 0, part) for part in parts)


# In the model folder; named like other lock files, since it belongs into version control as well.
LOCK_FILE = "models.lock.json"
_writing = threading.Lock()

# ``{name: {"version": …, "sha256": {file: …}}}``
PinRecords = Mapping[str, Mapping[str, Any]]


class Pins:
    """The pins of a model folder, read when first asked for and again when the file changes.

    Args:
        folder: the model folder; making this touches nothing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / LOCK_FILE
        self._lock = threading.Lock()
        self._read: tuple[tuple[int, int, int], PinRecords] | None = None

    def records(self) -> PinRecords:
        """What is pinned; empty without a lock file.

        Raises:
            StoreError: the lock file is damaged or cannot be read.
        """
        with self._lock:
            try:
                stat = self.path.stat()
                state = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
                if self._read is None or self._read[0] != state:
                    self._read = state, _parsed(self.path, self.path.read_text(encoding="utf-8"))
                return self._read[1]
            except (FileNotFoundError, NotADirectoryError):
                return {}
            except OSError as error:
                raise StoreError(f"{self.path} cannot be read ({error.strerror})") from error
            except UnicodeDecodeError as error:
                raise _damaged(self.path) from error

    def version(self, catalog: Catalog, name: str) -> ModelVersion | None:
        """The version that ``name`` is pinned to; None if it is not.

        Raises:
            UnknownModelError: the catalog no longer has the version.
            IntegrityError: the catalog now describes other bytes than when it was pinned.
        """
        pin = self.records().get(name)
        if pin is None:
            return None
        number = pin["version"]
        try:
            version = catalog.version(name, number)
        except UnknownModelError as error:
            raise UnknownModelError(self._stale(name, number, f"but {error}")) from error
        locked = pin.get("sha256")
        if locked is not None and locked != _hashes(version):
            changed = "whose bytes in the catalog are others now than when it was pinned"
            raise IntegrityError(self._stale(name, number, changed))
        return version

    def problem(self, catalog: Catalog, name: str) -> str:
        """What is wrong with the pin of ``name``; empty if nothing is."""
        try:
            self.version(catalog, name)
        except ModelError as error:
            return str(error)
        return ""

    def write(self, name: str, version: ModelVersion | None) -> None:
        """Pin ``name`` to ``version``, or with None forget its pin.

        Raises:
            StoreError: the folder cannot be written.
        """
        from auto_voice.filesystem import file_lock, make_folder, storage_errors, write_json

        make_folder(self.folder, self.folder)
        with _writing, file_lock(self.folder / ".pins.lock", self.folder, "the pins"):
            pins = {key: dict(pin) for key, pin in self.records().items()}
            if version is None:
                pins.pop(name, None)
            else:
                pins[name] = {"version": version.version, "sha256": _hashes(version)}
            with storage_errors(self.folder, "writing the pins"):
                write_json(self.path, {"schema": 1, "pins": pins})

    def _stale(self, name: str, number: str, reason: str) -> str:
        return (
            f"{self.path} pins {name} to version {number}, {reason}; run `autovoice models pin "
            f"{name}` to pin the default version, or `autovoice models pin --remove {name}`."
        )


def _parsed(path: Path, text: str) -> PinRecords:
    try:
        pins = json.loads(text)["pins"]
        if not all(isinstance(pin["version"], str) for pin in pins.values()):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path) from error
    return dict(pins)


def _damaged(path: Path) -> StoreError:
    return StoreError(f"{path} is damaged; restore it or delete it and pin the versions again")


def _hashes(version: ModelVersion) -> dict[str, str]:
    return {file.file: file.sha256 for file in version.files}
