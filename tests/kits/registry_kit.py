"""Small catalogs and files for tests of the registry: real loading code, no network, no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import yaml


def write_tone(path: Path, hz: float = 220.0, seconds: float = 0.5, rate: int = 16000) -> Path:
    """A WAV file that a catalog entry of kind ``sample`` can hold."""
    path.parent.mkdir(parents=True, exist_ok=True)
    time_s = np.arange(int(seconds * rate)) / rate
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * hz * time_s), rate)
    return path


def file_entry(path: Path, sources: Sequence[Any] | None = None, **changes: Any) -> dict[str, Any]:
    """``file``, ``sha256``, ``bytes`` and ``sources`` of a file as it lies on disk."""
    data = path.read_bytes()
    entry = {
        "file": path.name,
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "sources": list(sources) if sources is not None else [str(path)],
    }
    return {**entry, **changes}


def version_entry(path: Path, architecture: str = "sample", **changes: Any) -> dict[str, Any]:
    """One version whose only file is ``path``."""
    return {"architecture": architecture, "licence": "MIT", **file_entry(path), **changes}


def model_entry(
    versions: Mapping[str, Any], kind: str = "sample", **changes: Any
) -> dict[str, Any]:
    return {"kind": kind, "description": "a test model", "versions": dict(versions), **changes}


def write_catalog(
    path: Path, models: Mapping[str, Any], settings: Mapping[str, Any] | None = None
) -> Path:
    """A user's YAML with ``models`` and perhaps ``settings``."""
    content: dict[str, Any] = {"models": dict(models)}
    if settings is not None:
        content["settings"] = dict(settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def tone_catalog(folder: Path, versions: Sequence[str] = ("1.0",), name: str = "tone") -> Path:
    """A YAML with one model ``tone``; version ``i`` holds a tone of ``220 * (i + 1)`` Hz."""
    entries = {
        version: version_entry(
            write_tone(folder / f"source-{version}" / "tone.wav", 220.0 * (i + 1))
        )
        for i, version in enumerate(versions)
    }
    return write_catalog(folder / "mine.yaml", {name: model_entry(entries)})
