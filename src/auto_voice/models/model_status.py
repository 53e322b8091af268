"""Where each version of the catalog stands on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from auto_voice.models.registry.pins import read_pins

if TYPE_CHECKING:
    from auto_voice.models.model_registry import ModelRegistry


@dataclass(frozen=True)
class ModelStatus:
    """Where one version stands.

    Attributes:
        default: whether its bare name means this version now, pins considered.
        installed: all its files are in the store.
        loaded: it is in this registry's memory.
    """

    name: str
    version: str
    kind: str
    description: str
    licence: str
    bytes: int
    default: bool
    pinned: bool
    installed: bool
    loaded: bool


def status_of(registry: ModelRegistry) -> list[ModelStatus]:
    """One row per version, in the order of the catalog."""
    catalog = registry.catalog
    pins = read_pins(registry.model_dir)
    loaded = set(registry.loaded())
    return [
        ModelStatus(
            name=version.name,
            version=version.version,
            kind=version.kind,
            description=catalog.entry(version.name).description,
            licence=version.licence,
            bytes=version.bytes,
            default=registry.version(version.name) == version,
            pinned=pins.get(version.name, {}).get("version") == version.version,
            installed=registry.is_installed(version),
            loaded=version.key in loaded,
        )
        for version in catalog.versions()
    ]
