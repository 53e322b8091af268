"""Networks of torch with weights of the catalog, and small ones grown to do the same at first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from auto_voice.errors import TrainingError
from auto_voice.models import hifigan_model, speaker_encoder
from auto_voice.models.hifigan_model import HiFiGANShape
from auto_voice.models.model_registry import ModelRegistry
from auto_voice.models.registry.catalog import ModelVersion
from auto_voice.models.runtime.graphs import check_fit, weight_file
from auto_voice.models.runtime.weights import Array, read_weights
from auto_voice.models.whisper_encoder import WhisperShape, encoder_arrays, read_arrays
from auto_voice.training.networks.encoders import ContentNet, SpeakerNet, WhisperNet
from auto_voice.training.networks.generators import ConverterNet, HiFiGANNet

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


def content_net(path: Path, components: int, layers: int = 4, hidden: int = 2048) -> ContentNet:
    """The first layers of the encoder in a CTranslate2 file, to be trained; no subspace yet.

    Args:
        components: of the subspace that is to come.
        hidden: values of each perceptron that stay, those of the largest weights.

    Raises:
        TrainingError: the file has fewer.
    """
    whole = read_arrays(path)
    known = WhisperShape.of(whole, layers)
    if not 0 < hidden <= known.hidden or not 0 < layers <= _layers(whole):
        raise TrainingError(
            f"content.net asks for {layers} layers with {hidden} hidden values; the teacher has "
            f"{_layers(whole)} with {known.hidden}."
        )
    arrays = encoder_arrays(whole, layers)
    for place in (f"layer_{index}/ffn/linear" for index in range(layers)):
        names = f"{place}_0/weight", f"{place}_0/bias", f"{place}_1/weight"
        first, bias, second = (np.asarray(arrays[name], np.float32) for name in names)
        size = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=0)
        kept = np.sort(np.argsort(-size)[:hidden])
        arrays |= dict(zip(names, (first[kept], bias[kept], second[:, kept]), strict=True))
    net = ContentNet(replace(known, hidden=hidden), components)
    net.take_encoder(arrays, str(path))
    return net


def _layers(arrays: Mapping[str, Array]) -> int:
    return sum(name.endswith("/ffn/linear_0/bias") for name in arrays)


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


def vocoder_net(registry: ModelRegistry, name: str, shape: HiFiGANShape) -> HiFiGANNet:
    """A vocoder's network.

    Args:
        shape: its sizes.

    Raises:
        ModelLoadError: the model has others.
    """
    _, path = _fetched(registry, name)
    arrays = read_weights(path, convert=hifigan_model.convert_checkpoint)
    return with_weights(lambda: HiFiGANNet(shape), arrays, str(path))


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
