"""The closed table of architectures, and published checkpoints converted to safetensors once."""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from auto_voice.errors import ConfigError, MissingDependencyError, StoreError
from auto_voice.models.registry.catalog import ModelVersion

if TYPE_CHECKING:
    from types import ModuleType

    import numpy as np
    from numpy.typing import NDArray

    from auto_voice.models.registry.store import ModelStore

# What a model can be in a conversion, in its training or in its evaluation.
KINDS = (
    "content", "converter", "vocoder", "speaker", "sample", "recogniser", "quality", "synthesiser",
)  # fmt: skip

# Files that carry nothing but numbers as they are; the other checkpoints of an architecture that
# converts go through its ``convert_checkpoint`` once.
_PLAIN = frozenset({".safetensors", ".onnx", ".json", ".txt", ".wav", ".flac"})


@dataclass(frozen=True)
class Architecture:
    """How a stage comes to be.

    Attributes:
        module: has ``build(files, version, device)``; for foreign checkpoints also
            ``convert_checkpoint(path)``; and where files say more of themselves than a catalog
            does, ``describe(paths, kind, params)``.
        kind: what it builds.
        extra: the installation extra that brings its dependencies; empty for none.
        devices: whether it runs wherever a session can; the others run on the CPU.
        converts: whether its published checkpoints are converted to safetensors.
    """

    module: str
    kind: str
    extra: str = ""
    devices: bool = False
    converts: bool = False

    def _import(self) -> ModuleType:
        try:
            return importlib.import_module(self.module)
        except ImportError as error:
            raise MissingDependencyError(_install_hint(error, self.extra)) from error

    def build(self, files: Mapping[str, Path], version: ModelVersion, device: str) -> Any:
        """The stage object; see the stage protocols in ``models.base``.

        Raises:
            MissingDependencyError: an extra is not installed.
            ModelLoadError: the files do not fit.
        """
        module = self._import()
        try:
            return module.build(files, version, device)
        except ImportError as error:
            if isinstance(error, MissingDependencyError):
                raise
            raise MissingDependencyError(_install_hint(error, self.extra)) from error

    def describe(
        self, paths: Sequence[Path], params: Mapping[str, Any]
    ) -> tuple[list[Path], dict[str, Any]]:
        """The files of a model that is being added, and its params.

        Args:
            paths: files or folders as the user named them.
            params: what the user said of them; it wins over what they say of themselves.

        Raises:
            ModelLoadError, UnsafeFileError: they are not of this architecture.
        """
        describe = getattr(self._import(), "describe", None)
        if describe is not None:
            found: tuple[list[Path], dict[str, Any]] = describe(paths, self.kind, params)
            return found
        for path in paths:
            if path.is_dir():
                raise ConfigError(f"{path} is a folder; name the files in it that are the weights")
        return list(paths), dict(params)

    def is_foreign(self, file: str) -> bool:
        """Whether ``file`` is a published checkpoint that is converted once."""
        return self.converts and Path(file).suffix not in _PLAIN

    def checkpoint_converter(self) -> Callable[[Path], dict[str, NDArray[np.generic]]]:
        """What turns a published checkpoint into named arrays.

        Raises:
            MissingDependencyError: an extra is not installed.
        """
        convert: Callable[[Path], dict[str, NDArray[np.generic]]]
        convert = self._import().convert_checkpoint
        return convert


def _install_hint(error: ImportError, extra: str) -> str:
    missing = error.name or str(error)
    package = f"auto-voice[{extra}]" if extra else str(missing)
    return f'{missing} is not installed; run: pip install "{package}"'


_TABLE: dict[str, Architecture] = {
    "hubert": Architecture(
        "auto_voice.models.hubert_model", "content", devices=True, converts=True
    ),
    "whisper_content": Architecture(
        "auto_voice.models.whisper_encoder", "content", devices=True, converts=True
    ),
    "mel_converter": Architecture("auto_voice.models.converter_model", "converter", devices=True),
    "hifigan": Architecture(
        "auto_voice.models.hifigan_model", "vocoder", devices=True, converts=True
    ),
    "griffin_lim": Architecture("auto_voice.models.griffin_lim_model", "vocoder"),
    "ge2e": Architecture(
        "auto_voice.models.speaker_encoder", "speaker", devices=True, converts=True
    ),
    "dvector": Architecture("auto_voice.models.dvector_model", "speaker"),
    "sample": Architecture("auto_voice.models.sample_model", "sample"),
    "recogniser": Architecture("auto_voice.models.recogniser", "recogniser", "eval"),
    "quality": Architecture("auto_voice.models.quality_model", "quality"),
    "onnx_content": Architecture("auto_voice.models.onnx_model", "content", devices=True),
    "onnx_speaker": Architecture("auto_voice.models.onnx_model", "speaker", devices=True),
    "onnx_vocoder": Architecture("auto_voice.models.onnx_model", "vocoder", devices=True),
    "kokoro": Architecture("auto_voice.training.speech_synthesis", "synthesiser"),
}
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(_TABLE)
# Entry points by which an installed package offers architectures: functions without arguments that
# call ``register_architecture``.
PLUGINS = "auto_voice.architectures"
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")


def register_architecture(name: str, architecture: Architecture) -> None:
    """Lets catalogs name an architecture of another package.

        register_architecture("my_vocoder", Architecture("my_package.vocoder", "vocoder"))

    Args:
        name: as catalogs write it: lower-case letters, digits, ``_``, ``.`` and ``-``.
        architecture: whose module is imported when the first such model loads.

    Raises:
        ConfigError: the name is no such name or is taken, or there is no such kind.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is no name of an architecture; use lower-case letters")
    if architecture.kind not in KINDS:
        raise ConfigError(f"{name} makes a {architecture.kind}; kinds are {', '.join(KINDS)}")
    if _TABLE.setdefault(name, architecture) != architecture:
        raise ConfigError(f"there is an architecture {name} already; choose another name")


@cache
def load_plugins() -> None:
    """Calls what installed packages offer under ``PLUGINS``, once per process.

    Raises:
        ConfigError: one of them cannot be called.
    """
    from importlib.metadata import entry_points

    for point in entry_points(group=PLUGINS):
        try:
            point.load()()
        except ConfigError:
            raise
        except Exception as error:  # Foreign code fails in every way there is.
            raise ConfigError(
                f"the package of {point.value} offers architectures, but fails "
                f"({type(error).__name__}: {error}); update or remove it"
            ) from error


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
