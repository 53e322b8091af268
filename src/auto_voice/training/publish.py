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

from auto_voice.filesystem import atomic_write
from auto_voice.models.content_model import CompactContentEncoder, ContentShape
from auto_voice.models.converter_model import ConverterShape
from auto_voice.models.registry.catalog import ModelVersion
from auto_voice.models.runtime.graphs import SUFFIX
from auto_voice.models.whisper_encoder import WhisperShape
from auto_voice.training.export_graphs import export
from auto_voice.training.features import teacher_graph
from auto_voice.training.networks.converter import ConverterNet
from auto_voice.training.networks.encoders import ContentNet
from auto_voice.training.recipes import Recipe

LICENCE = "MIT"
# Architecture and sizes of each kind of network.
_SHAPES: Mapping[str, tuple[str, Any]] = {
    "content": ("content_student", ContentShape),
    "converter": ("mel_converter", ConverterShape),
}


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
    content_net: ContentNet | None = None,
    figures: Mapping[str, float],
    speakers: int,
    hours: float,
    teacher: Teacher | None = None,
) -> Path:
    """Writes the networks in half precision, their graphs and the catalog that offers them.

    Args:
        content_net: the network of ``content`` where it is new; one that was kept as it is stays
            in its own catalog.
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
    if content_net is not None:
        params = {
            "dims": content.dims, "space": content.space,
            "envelope": content.envelope, "cepstra": content.cepstra,
        }  # fmt: skip
        entries.append(("content_compact", "content", content_net, params))
    for name, kind, net, params in entries:
        weights = folder / f"{name}-{recipe.name}.safetensors"
        _write(net, weights, recipe.name)
        architecture, shape = _SHAPES[kind]
        graph = weights.with_suffix(SUFFIX)
        graph.write_bytes(export(architecture, shape(**net.arguments)))
        version = {
            "architecture": architecture,
            "licence": LICENCE,
            "files": [_record(weights), _record(graph)],
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
    graph = folder / f"content_whisper-{recipe.name}{SUFFIX}"
    graph.write_bytes(teacher_graph(WhisperShape(layers=recipe.content_space.layers)))
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
            _record(graph),
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
    with atomic_write(path) as temporary:
        # One key only: safetensors writes several in random order, which would change the hash.
        save_file(halves, temporary, metadata={"version": version})


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
