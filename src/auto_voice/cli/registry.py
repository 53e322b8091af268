"""The registry that a command's options choose, and what names mean in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from auto_voice.errors import UnknownModelError

if TYPE_CHECKING:
    from auto_voice.models.model_registry import ModelRegistry
    from auto_voice.models.registry.catalog import ModelVersion

F = TypeVar("F", bound=Callable[..., Any])

# Options of every command that uses models.
REGISTRY_OPTIONS = (
    click.option("--config", type=click.Path(path_type=Path), help="YAML of settings and models."),
    click.option("--model-dir", type=click.Path(path_type=Path), help="Where models are kept."),
    click.option("--offline", is_flag=True, default=None, help="Open no network connection."),
)
# Of commands that run models.
device_option = click.option(
    "--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:N, directml, coreml or openvino."
)


def registry_options(command: F) -> F:
    """Options that choose the registry; the command takes them as ``**where``."""
    for option in reversed(REGISTRY_OPTIONS):
        command = option(command)
    return command


def open_registry(**where: Any) -> ModelRegistry:
    """The registry that the options choose."""
    import warnings

    from auto_voice.models.model_registry import ModelRegistry
    from auto_voice.models.registry.loading import FallbackWarning

    warnings.simplefilter("ignore", FallbackWarning)  # The log tells it in our own words.
    return ModelRegistry(**where)


def chosen(registry: ModelRegistry, names: Iterable[str]) -> list[ModelVersion]:
    """The versions that ``names`` mean, or else all that are installed."""
    wanted = list(names)
    if wanted:
        return [registry.version(name) for name in wanted]
    known = {version.key: version for version in registry.catalog.versions()}
    keys = [f"{name}@{version}" for name, version in registry.store.installed()]
    return [known[key] for key in keys if key in known]


def name_and_version(registry: ModelRegistry, name: str) -> tuple[str, str]:
    """What ``name`` means; a version that only the folder knows may be named in full."""
    try:
        version = registry.version(name)
    except UnknownModelError:
        bare, _, number = name.partition("@")
        if (bare, number) not in registry.store.installed():
            raise
        return bare, number
    return version.name, version.version
