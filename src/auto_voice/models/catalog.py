"""The catalog: what config/models.yaml says, checked, as frozen records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModelFile:
    """One file of a version.

    Attributes:
        file: its name in the store, a bare file name.
        sources: alternatives in order of preference; each is one or more URIs whose bytes are
            joined in order (schemes: ``hf``, ``https``, ``pypi``, ``file``, ``package``).
        sha256: lower-case hex of the whole file.
        bytes: its size.
    """

    file: str
    sources: tuple[tuple[str, ...], ...]
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Needs:
    """What it takes to run a version."""

    ram_mb: int = 0
    vram_mb: int = 0
    gpu: str = "optional"


@dataclass(frozen=True)
class ModelVersion:
    """One version of a model; ``files[0]`` is the one that ``registry.path`` returns."""

    name: str
    version: str
    kind: str
    architecture: str
    files: tuple[ModelFile, ...]
    licence: str
    params: Mapping[str, Any] = field(default_factory=dict)
    needs: Needs = field(default_factory=Needs)

    @property
    def key(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class ModelEntry:
    """A model with its versions."""

    name: str
    kind: str
    description: str
    default_version: str
    versions: Mapping[str, ModelVersion]
    aliases: Mapping[str, str] = field(default_factory=dict)
