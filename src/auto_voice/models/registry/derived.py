"""Published checkpoints to safetensors: once, beside the original; a load is then a memory map."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from auto_voice.errors import StoreError
from auto_voice.models.registry.architectures import ARCHITECTURES
from auto_voice.models.registry.catalog import ModelVersion

if TYPE_CHECKING:
    from auto_voice.models.registry.store import ModelStore

log = logging.getLogger(__name__)


def with_safetensors(
    version: ModelVersion, files: Mapping[str, Path], store: ModelStore
) -> Mapping[str, Path]:
    """``files`` with each foreign checkpoint replaced by its converted form, under the same key.

    In a store that cannot be written the original stays; its architecture then converts it in
    memory at each load.

    Raises:
        IntegrityError: the checkpoint's bytes changed since it was installed.
        UnsafeFileError: the checkpoint would run code.
        ModelLoadError: it is damaged or another model's.
    """
    ready = dict(files)
    for file, path in files.items():
        if not ARCHITECTURES[version.architecture].is_foreign(file):
            continue
        name = f"{file}.safetensors"
        ready[file] = store.derived(version, name) or _converted(version, file, path, name, store)
    return ready


def _converted(version: ModelVersion, file: str, path: Path, name: str, store: ModelStore) -> Path:
    convert = ARCHITECTURES[version.architecture].checkpoint_converter()

    def write(target: Path) -> None:
        from safetensors.numpy import save_file

        save_file(convert(path), target)

    try:
        made = store.add_derived(version, name, file, write)
    except StoreError as error:
        log.info("%s is converted in memory at each load: %s", file, error)
        store.checked(version, file)
        return path
    log.info("converted %s of %s to safetensors", file, version.key)
    return made
