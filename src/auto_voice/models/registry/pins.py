"""Pins: the lock file beside the models that says which version of a model is meant by its name."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from auto_voice.errors import IntegrityError, ModelError, StoreError, UnknownModelError
from auto_voice.models.registry.catalog import Catalog, ModelVersion

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
