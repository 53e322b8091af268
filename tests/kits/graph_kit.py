"""Networks of torch as inference runs them, for tests at sizes that no committed graph has."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from auto_voice.models.converter_model import CompactConverter, ConverterShape
from auto_voice.models.runtime.graphs import bound_network
from auto_voice.models.runtime.sessions import Network
from auto_voice.models.whisper_encoder import (
    WhisperContentEncoder,
    WhisperEncoder,
    WhisperShape,
)
from auto_voice.training import export_graphs
from auto_voice.training.networks.encoders import ContentNet

# The graph of sizes is the same for all weights.
graph = cache(export_graphs.export)


def network(architecture: str, shape: Any, net: Any) -> Network:
    """``net`` in a session."""
    weights = export_graphs.weights_of(net)
    return bound_network(graph(architecture, shape), weights, "the network", "test")


def converter(net: Any, name: str = "toy@1.0", space: str = "toy") -> CompactConverter:
    """``net``, a ``ConverterNet``, as a stage."""
    shape = ConverterShape(**net.arguments)
    weights = {k: v.copy() for k, v in export_graphs.weights_of(net).items()}
    return CompactConverter(graph("mel_converter", shape), weights, shape, name, space)


def content_net(dims: int, layers: int = 1) -> ContentNet:
    """A small one of random weights."""
    net = ContentNet(WhisperShape(width=64, layers=layers, positions=400, hidden=96), dims)
    with torch.no_grad():
        for name, values in net.state_dict().items():
            if name not in ("mean", "scale"):
                values.normal_(std=0.1)
    return net.eval()


def content_encoder(net: ContentNet, name: str, space: str, **more: bool) -> WhisperContentEncoder:
    """``net`` as a stage."""
    encoder = WhisperEncoder(network("whisper_content", net.shape, net), net.shape.width)
    return WhisperContentEncoder(encoder, net.subspace(), name, space, **more)
