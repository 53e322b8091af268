"""Networks of torch as inference runs them, for tests at sizes that no committed graph has."""

from __future__ import annotations

from functools import cache
from typing import Any

from auto_voice.models.content_model import CompactContentEncoder, ContentShape
from auto_voice.models.converter_model import CompactConverter, ConverterShape
from auto_voice.models.runtime.graphs import bound_network
from auto_voice.models.runtime.sessions import Network
from auto_voice.training import export_graphs

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


def content_encoder(net: Any, name: str, space: str, **more: bool) -> CompactContentEncoder:
    """``net``, a ``ContentNet``, as a stage."""
    shape = ContentShape(**net.arguments)
    return CompactContentEncoder(
        network("content_student", shape, net), shape.dims, name, space, **more
    )
