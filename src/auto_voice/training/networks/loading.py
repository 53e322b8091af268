"""Networks of torch with weights of the catalog, and small ones grown to do the same at first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from auto_voice.models import speaker_encoder
from auto_voice.models.converter_model import PITCH_SIZE
from auto_voice.models.model_registry import ModelRegistry
from auto_voice.models.registry.catalog import ModelVersion
from auto_voice.models.runtime.graphs import check_fit, weight_file
from auto_voice.models.runtime.weights import Array, read_weights
from auto_voice.models.whisper_encoder import WhisperShape, encoder_arrays, read_arrays
from auto_voice.training.networks.encoders import ContentNet, SpeakerNet, WhisperNet
from auto_voice.training.networks.generators import ConverterNet

NetT = TypeVar("NetT", bound=nn.Module)


def with_weights(make: Callable[[], NetT], arrays: Mapping[str, Array], source: str) -> NetT:
    """A network in evaluation mode with copies of ``arrays`` as its parameters, in float32.

    Args:
        make: builds it; called under the meta device, so nothing is drawn at random.
        source: what to call the place that the arrays come from.

    Raises:
        ModelLoadError: they are another network's.
    """
    with torch.device("meta"):
        net = make()
    check_fit({key: tuple(v.shape) for key, v in net.state_dict().items()}, arrays, source)
    copies = {key: torch.from_numpy(np.array(v, np.float32)) for key, v in arrays.items()}
    net.load_state_dict(copies, assign=True)
    return net.eval()


def content_net(registry: ModelRegistry, name: str) -> ContentNet:
    """A compact content encoder's network."""
    version, path = _fetched(registry, name)
    sizes = version.params.get("net", {})
    return with_weights(lambda: ContentNet(**sizes), read_weights(path), str(path))


def converter_net(registry: ModelRegistry, name: str) -> ConverterNet:
    """A compact converter's network."""
    version, path = _fetched(registry, name)
    sizes = version.params.get("net", {})
    return with_weights(lambda: ConverterNet(**sizes), read_weights(path), str(path))


def speaker_net(registry: ModelRegistry) -> SpeakerNet:
    """The speaker encoder's network."""
    _, path = _fetched(registry, "speaker_encoder")
    arrays = read_weights(
        path, convert=speaker_encoder.convert_checkpoint, select=speaker_encoder.select
    )
    return with_weights(SpeakerNet, arrays, str(path))


def whisper_net(path: Path, layers: int = 4, device: str = "cpu") -> WhisperNet:
    """The first layers of the encoder in a CTranslate2 file, with frozen weights."""
    arrays = read_arrays(path)
    shape = WhisperShape.of(arrays, layers)
    known = encoder_arrays(arrays, layers)
    net = with_weights(lambda: WhisperNet(shape), known, str(path))
    return net.requires_grad_(False).to(device)


def _fetched(registry: ModelRegistry, name: str) -> tuple[ModelVersion, Path]:
    version = registry.version(name)
    files = registry.pull(version.name, version.version)
    return version, weight_file(files, version.key)


# Arguments of ``ConverterNet`` that a trained one can be given more of, and what to call them.
GROWS = {"blocks": "{} blocks", "expansion": "an expansion of {}"}
# What the lookup makes of a new feature at first: with nothing it would never learn to look.
INITIAL_ATTENTION = 0.3


def widen_content(net: ContentNet, dims: int) -> ContentNet:
    """``net`` with ``dims`` features, of which the new ones are zero."""
    wide = ContentNet(**{**net.arguments, "dims": dims})
    weights = _on_cpu(net)
    for name in ("head.weight", "head.bias"):
        weights[name] = _longer(weights[name], dims)
    wide.load_state_dict(weights)
    return wide.eval()


def widen_converter(net: ConverterNet, dims: int, cepstra: bool = False) -> ConverterNet:
    """``net`` for content of ``dims`` features, deaf to the new ones but in its lookup.

    The new features follow all that ``net`` knows.

    Args:
        cepstra: whether the content ends with them.
    """
    wide = ConverterNet(**{**net.arguments, "dims": dims, "cepstra": cepstra})
    weights = _on_cpu(net)
    stem = weights["stem.weight"]
    known = stem.shape[1] - PITCH_SIZE
    unheard = torch.zeros(stem.shape[0], dims - known, stem.shape[2])
    weights["stem.weight"] = torch.cat([stem[:, :known], unheard, stem[:, known:]], dim=1)
    if wide.attention is not None:
        project = INITIAL_ATTENTION * torch.eye(dims).repeat(wide.attention.heads, 1, 1)
        project[:, :known, :known] = weights["attention.project"]
        weights["attention.project"] = project
    wide.load_state_dict(weights)
    return wide


def grow_converter(net: ConverterNet, blocks: int, expansion: int) -> ConverterNet:
    """``net`` with ``blocks`` blocks, whose perceptrons have ``expansion`` times its width.

    Neither is less than its own. The further blocks, spread among its own, and the further hidden
    values add nothing yet.
    """
    large = ConverterNet(**{**net.arguments, "blocks": blocks, "expansion": expansion})
    weights = {
        name: torch.zeros_like(values) if ".project." in name else values.clone()
        for name, values in large.state_dict().items()
    }
    for name, values in _on_cpu(net).items():
        place = name
        if name.startswith("blocks."):
            _, index, part = name.split(".", 2)
            place = f"blocks.{-(-int(index) * blocks // len(net.blocks))}.{part}"
        # The first of the hidden values are its own; nothing else differs in size.
        weights[place][tuple(slice(size) for size in values.shape)] = values
    large.load_state_dict(weights)
    return large


def _on_cpu(net: nn.Module) -> dict[str, Tensor]:
    """Copies: the network may be one that a registry lends, on its own device."""
    return {name: values.detach().cpu().clone() for name, values in net.state_dict().items()}


def _longer(values: Tensor, rows: int) -> Tensor:
    return torch.cat([values, torch.zeros(rows - len(values), *values.shape[1:])])
