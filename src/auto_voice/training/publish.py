"""Trained networks as models of a catalog: weights, ``models.yaml``, card."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from auto_voice.models.content_model import CompactContentEncoder, ContentNet
from auto_voice.models.converter_model import ConverterNet
from auto_voice.models.registry.catalog import ModelVersion
from auto_voice.training.recipes import Recipe

LICENCE = "MIT"


@dataclass(frozen=True)
class Teacher:
    """Attributes:
    record: of the catalog's content encoder that runs the teacher.
    space: file of the content space that was fitted.
    """

    record: ModelVersion
    space: Path


def publish(
    recipe: Recipe,
    folder: Path,
    content: CompactContentEncoder,
    converter: ConverterNet,
    *,
    figures: Mapping[str, float],
    speakers: int,
    hours: float,
    teacher: Teacher | None = None,
) -> Path:
    """Writes the networks in half precision and the catalog that offers them.

    A content encoder that was kept as it is stays in its own catalog.

    Args:
        figures: held-out ones, for the card.
        speakers, hours: that were trained on.
        teacher: serves the new content space itself, where there is one.

    Returns:
        The ``models.yaml``; name it in ``AUTOVOICE_CONFIG`` or ``--config`` and the models are
        ``content_compact@<recipe>``, ``content_whisper@<recipe>`` and
        ``converter_compact@<recipe>``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    models: dict[str, Any] = {}
    entries: list[tuple[str, str, ContentNet | ConverterNet, dict[str, Any]]] = [
        ("converter_compact", "converter", converter, {"content_space": content.space})
    ]
    if recipe.content is not None or recipe.content_space.widens:
        params = {
            "dims": content.dims, "space": content.space,
            "envelope": content.envelope, "cepstra": content.cepstra,
        }  # fmt: skip
        entries.append(("content_compact", "content", content.net, params))
    for name, kind, net, params in entries:
        file = f"{name}-{recipe.name}.safetensors"
        _write(net, folder / file, recipe.name)
        version = {
            "architecture": {"content": "content_student", "converter": "mel_converter"}[kind],
            "licence": LICENCE,
            **_record(folder / file),
            "params": {**params, "net": net.arguments},
        }
        models[name] = {"kind": kind, "versions": {recipe.name: version}}
    if teacher is not None:
        models["content_whisper"] = {
            "kind": "content",
            "versions": {recipe.name: _served(teacher, recipe, folder, content)},
        }
    catalog = folder / "models.yaml"
    catalog.write_text(
        yaml.safe_dump({"schema": 1, "models": models}, sort_keys=False), encoding="utf-8"
    )
    (folder / "card.md").write_text(_card(recipe, figures, speakers, hours), encoding="utf-8")
    return catalog


def _served(
    teacher: Teacher, recipe: Recipe, folder: Path, content: CompactContentEncoder
) -> dict[str, Any]:
    """The teacher's record, with the new space in place of its own."""
    weights = teacher.record.files[0]
    space = folder / f"content_space-{recipe.name}.safetensors"
    space.write_bytes(teacher.space.read_bytes())
    return {
        "architecture": teacher.record.architecture,
        "licence": teacher.record.licence,
        "files": [
            {
                "file": weights.file,
                "sha256": weights.sha256,
                "bytes": weights.bytes,
                "sources": [list(uris) for uris in weights.sources],
            },
            _record(space),
        ],
        "params": {
            "sample_rate": content.sample_rate,
            "frame_rate": content.frame_rate,
            "dims": content.dims,
            "layers": recipe.content_space.layers,
            "space": content.space,
            "envelope": content.envelope,
            "cepstra": content.cepstra,
        },
    }


def _record(path: Path) -> dict[str, Any]:
    """What a catalog says of a file that lies there."""
    data = path.read_bytes()
    return {
        "file": path.name,
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        # It counts from the catalog beside it, so that the folder can be moved.
        "sources": [path.name],
    }


def _write(net: nn.Module, path: Path, version: str) -> None:
    halves = {key: value.detach().half().contiguous() for key, value in net.state_dict().items()}
    partial = path.with_suffix(".part")
    # One key only: safetensors writes several in random order, which would change the hash.
    save_file(halves, partial, metadata={"version": version})
    partial.replace(path)


def _card(recipe: Recipe, figures: Mapping[str, float], speakers: int, hours: float) -> str:
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in sorted(figures.items()))
    return f"""# {recipe.name}

{recipe.description}

Trained on {speakers} speakers, {hours:.2f} h of speech; torch {torch.__version__}.
Held-out figures are of speakers that were never trained on.

| figure | value |
|---|---|
{rows}
"""
