"""Trained networks as models of a catalog: weights, ``models.yaml``, card."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from safetensors.numpy import save_file

from auto_voice.filesystem import atomic_write
from auto_voice.models.converter_model import ConverterShape
from auto_voice.models.hifigan_model import HiFiGANShape
from auto_voice.models.registry.catalog import ModelVersion
from auto_voice.models.runtime.graphs import SUFFIX
from auto_voice.models.runtime.weights import in_whole_numbers, whole_numbers_widened
from auto_voice.models.whisper_encoder import (
    ARCHITECTURE,
    LIVE,
    WhisperContentEncoder,
    WhisperShape,
    as_stored,
    with_positions,
)
from auto_voice.training.export_graphs import export, weights_of
from auto_voice.training.features import teacher_graph
from auto_voice.training.networks.encoders import ContentNet
from auto_voice.training.networks.generators import ConverterNet, HiFiGANNet
from auto_voice.training.recipes import Recipe

LICENCE = "MIT"


@dataclass(frozen=True)
class Teacher:
    """Attributes:
    record: of the catalog's content encoder that runs the teacher.
    space: file of the content space.
    version: that serves it, the one that the space is named after.
    layers: of the teacher.
    """

    record: ModelVersion
    space: Path
    version: str
    layers: int


def publish(
    recipe: Recipe,
    folder: Path,
    content: WhisperContentEncoder,
    converter: ConverterNet,
    *,
    content_net: ContentNet | None = None,
    figures: Mapping[str, float],
    speakers: int,
    hours: float,
    teacher: Teacher | None = None,
    drawing: Mapping[str, float] | None = None,
) -> Path:
    """Writes the networks in half precision, their graphs and the catalog that offers them.

    Args:
        content_net: the network of ``content`` where it is new; one that was kept as it is stays
            in its own catalog.
        figures: held-out ones, for the card.
        speakers, hours: that were trained on.
        drawing: how mels are drawn with the converter, see ``models.base.DRAWING``.
        teacher: serves the content space itself, where the package's own does not.

    Returns:
        The ``models.yaml``; name it in ``AUTOVOICE_CONFIG`` or ``--config`` and the models are
        ``content_compact@<recipe>``, ``converter_compact@<recipe>`` and, unless the package's own
        serves the space, ``content_whisper@<space>``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / f"converter_compact-{recipe.name}.safetensors"
    halves = {key: value.astype(np.float16) for key, value in weights_of(converter).items()}
    _write(halves, weights, recipe.name)
    graph = weights.with_suffix(SUFFIX)
    graph.write_bytes(export("mel_converter", ConverterShape(**converter.arguments)))
    version = {
        "architecture": "mel_converter",
        "licence": LICENCE,
        "files": [_record(weights), _record(graph)],
        "params": {
            "content_space": content.space,
            "net": converter.arguments,
            **(drawing or {}),
        },
    }
    models: dict[str, Any] = {
        "converter_compact": {"kind": "converter", "versions": {recipe.name: version}}
    }
    if content_net is not None:
        models["content_compact"] = {
            "kind": "content",
            "versions": {recipe.name: _learned(content_net, recipe, folder, content)},
        }
    if teacher is not None:
        models["content_whisper"] = {
            "kind": "content",
            "versions": {teacher.version: _served(teacher, folder, content)},
        }
    return _offer(folder, models, _card(recipe, figures, speakers, hours))


def publish_vocoder(
    recipe: Recipe,
    folder: Path,
    net: HiFiGANNet,
    shape: HiFiGANShape,
    made_of: ModelVersion,
    *,
    figures: Mapping[str, float],
    speakers: int,
    hours: float,
) -> Path:
    """Writes a vocoder in whole numbers, its graph and the catalog that offers it.

    Args:
        shape: sizes of ``net``.
        made_of: the vocoder that it was taught by.
        figures, speakers, hours: as for :func:`publish`.

    Returns:
        The ``models.yaml``, in which it is ``vocoder_compact@<recipe>``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / f"vocoder_compact-{recipe.name}.safetensors"
    _write(in_whole_numbers(weights_of(net)), weights, recipe.name)
    graph = weights.with_suffix(SUFFIX)
    graph.write_bytes(export("hifigan", shape))
    version = {
        "architecture": "hifigan",
        "licence": made_of.licence,
        "files": [_record(weights), _record(graph)],
        "params": {**made_of.params, "hidden_share": shape.hidden_share},
    }
    models = {"vocoder_compact": {"kind": "vocoder", "versions": {recipe.name: version}}}
    return _offer(folder, models, _card(recipe, figures, speakers, hours))


def _offer(folder: Path, models: Mapping[str, Any], card: str) -> Path:
    """Writes the catalog of ``models``, which it returns, and the card beside it."""
    catalog = folder / "models.yaml"
    catalog.write_text(
        yaml.safe_dump({"schema": 1, "models": dict(models)}, sort_keys=False), encoding="utf-8"
    )
    (folder / "card.md").write_text(card, encoding="utf-8")
    return catalog


def round_vocoder(net: HiFiGANNet) -> None:
    """Leaves ``net`` the numbers that its file will hold."""
    rounded = whole_numbers_widened(in_whole_numbers(weights_of(net)), Path("the network"))
    net.load_state_dict({name: torch.from_numpy(v.copy()) for name, v in rounded.items()})


def _served(teacher: Teacher, folder: Path, content: WhisperContentEncoder) -> dict[str, Any]:
    """The teacher's record, with the space in place of its own."""
    weights = teacher.record.files[0]
    space = folder / f"content_space-{teacher.version}.safetensors"
    space.write_bytes(teacher.space.read_bytes())
    graph = folder / f"content_whisper-{teacher.version}{SUFFIX}"
    graph.write_bytes(teacher_graph(WhisperShape(layers=teacher.layers)))
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
        "params": {"layers": teacher.layers, **_params(content)},
    }


def _learned(
    net: ContentNet, recipe: Recipe, folder: Path, content: WhisperContentEncoder
) -> dict[str, Any]:
    """A new content encoder: its matrices in whole numbers, and its subspace."""
    weights = folder / f"content_compact-{recipe.name}.safetensors"
    _write(as_stored(weights_of(net)), weights, recipe.name)
    space = folder / f"content_compact_space-{recipe.name}.safetensors"
    halves = {name: values.astype(np.float16) for name, values in vars(net.subspace()).items()}
    _write(halves, space, recipe.name)
    graph = weights.with_suffix(SUFFIX)
    graph.write_bytes(export(ARCHITECTURE, net.shape))
    live = folder / f"live_{graph.name}"
    live.write_bytes(export(LIVE, net.shape))
    sizes = {"layers": net.shape.layers, "hidden": net.shape.hidden, "live": live.name}
    return {
        "architecture": ARCHITECTURE,
        "licence": LICENCE,
        "files": [_record(path) for path in (weights, space, graph, live)],
        "params": {**sizes, **_params(content)},
    }


def round_as_published(net: ContentNet) -> None:
    """Leaves ``net`` the numbers that its files will hold."""
    rounded = with_positions(whole_numbers_widened(as_stored(weights_of(net)), Path("the network")))
    net.take_encoder(rounded, "the network")
    for values in (net.mean, net.scale, net.projection.data):
        values.copy_(values.half())


def _params(content: WhisperContentEncoder) -> dict[str, Any]:
    """What a catalog says of every content encoder."""
    return {
        "sample_rate": content.sample_rate,
        "frame_rate": content.frame_rate,
        "dims": content.dims,
        "space": content.space,
        "envelope": content.envelope,
        "cepstra": content.cepstra,
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


def _write(arrays: Mapping[str, NDArray[Any]], path: Path, version: str) -> None:
    with atomic_write(path) as temporary:
        # One key only: safetensors writes several in random order, which would change the hash.
        save_file(
            {name: np.ascontiguousarray(values) for name, values in arrays.items()}, temporary,
            metadata={"version": version},
        )  # fmt: skip


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
