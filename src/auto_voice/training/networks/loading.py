"""Weights of the catalog's models in networks of torch, to go on training or to judge with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from auto_voice.models import speaker_encoder
from auto_voice.models.model_registry import ModelRegistry
from auto_voice.models.registry.catalog import ModelVersion
from auto_voice.models.runtime.graphs import check_fit, weight_file
from auto_voice.models.runtime.weights import Array, read_weights
from auto_voice.models.whisper_encoder import WhisperShape, encoder_arrays, read_arrays
from auto_voice.training.networks.content import ContentNet
from auto_voice.training.networks.converter import ConverterNet
from auto_voice.training.networks.speaker import SpeakerNet
from auto_voice.training.networks.whisper import WhisperNet

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
