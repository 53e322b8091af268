"""Pins: the lock file beside the models that says which version of a model is meant by its name."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from auto_voice.errors import IntegrityError, StoreError
from auto_voice.models.registry.catalog import Catalog, ModelVersion

LOCK_FILE = "models.lock.json"
_writing = threading.Lock()


def read_pins(model_dir: Path) -> Mapping[str, Mapping[str, Any]]:
    """``{name: {"version": …, "sha256": {file: …}}}``; empty without a lock file.

    Raises:
        StoreError: the lock file is damaged.
    """
    path = model_dir / LOCK_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error.strerror})") from error
    try:
        pins = json.loads(text)["pins"]
        if not all(isinstance(pin["version"], str) for pin in pins.values()):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(
            f"{path} is damaged; restore it or delete it and pin the versions again"
        ) from error
    return dict(pins)


def pinned(
    catalog: Catalog, pins: Mapping[str, Mapping[str, Any]], name: str
) -> ModelVersion | None:
    """The version that ``name`` is pinned to; None if it is not.

    Raises:
        UnknownModelError: the catalog no longer has the version.
        IntegrityError: the catalog now describes other bytes than when it was pinned.
    """
    if name not in pins:
        return None
    version = catalog.version(name, pins[name]["version"])
    locked = pins[name].get("sha256")
    if locked is not None and locked != _hashes(version):
        raise IntegrityError(
            f"{version.key} is pinned with other bytes than the catalog describes now; "
            f"run: autovoice models pin {version.key}"
        )
    return version


def write_pin(model_dir: Path, name: str, version: ModelVersion | None) -> None:
    """Pin ``name`` to ``version``, or with None forget its pin.

    Raises:
        StoreError: the folder cannot be written.
    """
    from auto_voice.filesystem import make_folder, storage_errors, write_json
    from auto_voice.models.registry.locks import file_lock

    make_folder(model_dir, model_dir)
    with _writing, file_lock(model_dir / ".pins.lock", model_dir, "the pins"):
        pins = {key: dict(pin) for key, pin in read_pins(model_dir).items()}
        if version is None:
            pins.pop(name, None)
        else:
            pins[name] = {"version": version.version, "sha256": _hashes(version)}
        with storage_errors(model_dir, "writing the pins"):
            write_json(model_dir / LOCK_FILE, {"schema": 1, "pins": pins})


def _hashes(version: ModelVersion) -> dict[str, str]:
    return {file.file: file.sha256 for file in version.files}
