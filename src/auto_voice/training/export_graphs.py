"""The graphs that inference runs, exported from the definitions in torch.

    python -m auto_voice.training.export_graphs                   the package's own, all of them
    python -m auto_voice.training.export_graphs CATALOG FOLDER    those that a catalog needs further

A graph holds no weights: each parameter is an initialiser that lies outside of it, under the name
that it has in the network.
"""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto
from torch import Tensor, nn

from auto_voice.audio.mel import GE2E_MEL, HIFIGAN_MEL
from auto_voice.models.converter_model import PITCH_SIZE, PROFILE_SIZE, ConverterShape
from auto_voice.models.hifigan_model import HiFiGANShape
from auto_voice.models.hubert_model import HuBERTShape
from auto_voice.models.registry.catalog import ModelVersion
from auto_voice.models.registry.catalog_schema import builtin_catalog, load_catalog
from auto_voice.models.runtime.graphs import (
    FOLDER,
    SUFFIX,
    UNUSED,
    bound_network,
    graph_name,
    shape_from,
)
from auto_voice.models.runtime.sessions import Network
from auto_voice.models.speaker_encoder import SpeakerShape
from auto_voice.models.whisper_encoder import HEAD, WhisperShape
from auto_voice.training.networks.encoders import (
    ContentNet,
    HuBERTNet,
    SpeakerNet,
    WhisperLiveNet,
    WhisperNet,
)
from auto_voice.training.networks.generators import ConverterNet, HiFiGANNet, VoiceCondition

# LayerNormalization is one operation from here on, and every provider knows so much.
OPSET = 17
# Any numbers above one do: traced, a size of one would look like a constant.
BATCH, FRAMES, REFERENCE = 2, 30, 17
FLOATS = TensorProto.FLOAT


@dataclass(frozen=True)
class Definition:
    """How the network of an architecture is made and traced.

    Attributes:
        shape: dataclass of its sizes.
        make: the network of such sizes.
        inputs: names of the inputs, with names of their variable axes by position.
        example: inputs for a shape.
        outputs: names of the outputs for a shape.
        sizes: the shape that a catalog's version has.
        serves: architecture of the versions that need it; empty for its own name.
    """

    shape: Callable[..., Any]
    make: Callable[[Any], nn.Module]
    inputs: Mapping[str, Mapping[int, str]]
    example: Callable[[Any], tuple[Tensor, ...]]
    outputs: Callable[[Any], Sequence[str]]
    sizes: Callable[[ModelVersion], Any]
    serves: str = ""


class ConverterGraph(nn.Module):
    """``ConverterNet`` with the condition's fields as inputs of their own."""

    def __init__(self, net: ConverterNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, content: Tensor, pitch: Tensor, *voice: Tensor) -> Tensor:
        mel: Tensor = self.net(content, pitch, VoiceCondition(*voice))
        return mel


def _converter_example(shape: ConverterShape) -> tuple[Tensor, ...]:
    return (
        torch.randn(BATCH, FRAMES, shape.dims),
        torch.randn(BATCH, FRAMES, PITCH_SIZE),
        torch.randn(BATCH, 256),
        torch.randn(BATCH, PROFILE_SIZE),
        torch.randn(BATCH, REFERENCE, shape.dims),
        torch.randn(BATCH, REFERENCE, HIFIGAN_MEL.bands),
        torch.ones(BATCH, REFERENCE, dtype=torch.bool),
    )


def _live_example(shape: WhisperShape) -> tuple[Tensor, ...]:
    heads = shape.width // HEAD
    return (
        torch.randn(BATCH, shape.bands, 2 * FRAMES),
        torch.tensor([1]),
        torch.tensor([REFERENCE]),
        torch.randn(shape.layers, 2, BATCH, heads, REFERENCE, HEAD),
    )


def _net_sizes(kind: Callable[..., Any]) -> Callable[[ModelVersion], Any]:
    return lambda version: shape_from(kind, version.params.get("net", {}), version.key)


# Axes of a graph that may have any length, by their names.
_BATCH = {0: "batch"}
_ROWS = {0: "batch", 1: "frames"}
_REFERENCE = {0: "batch", 1: "reference"}

DEFINITIONS: Mapping[str, Definition] = {
    "hifigan": Definition(
        HiFiGANShape, HiFiGANNet, {"mel": {0: "batch", 2: "frames"}},
        lambda shape: (torch.randn(BATCH, shape.bands, FRAMES),), lambda _: ("audio",),
        lambda version: HiFiGANShape.from_params(version.params),
    ),
    "hubert": Definition(
        HuBERTShape, HuBERTNet, {"samples": {0: "batch", 1: "samples"}},
        lambda _: (torch.randn(BATCH, 4000),),
        lambda shape: [f"hidden_{layer}" for layer in range(shape.layers + 1)],
        lambda version: HuBERTShape.from_params(version.params),
    ),
    "ge2e": Definition(
        SpeakerShape, lambda shape: SpeakerNet(**asdict(shape)), {"mels": _ROWS},
        lambda _: (torch.rand(BATCH, 160, GE2E_MEL.bands),), lambda _: ("embedding",),
        lambda _: SpeakerShape(),
    ),
    "whisper_content": Definition(
        WhisperShape, WhisperNet, {"mel": {0: "batch", 2: "frames"}},
        lambda shape: (torch.randn(BATCH, shape.bands, 2 * FRAMES),), lambda _: ("hidden",),
        lambda version: WhisperShape.from_params(version.params),
    ),
    "whisper_live": Definition(
        WhisperShape, WhisperLiveNet,
        {
            "mel": {0: "batch", 2: "frames"}, "skip": {}, "start": {},
            "memory": {2: "batch", 4: "earlier"},
        },
        _live_example, lambda _: ("hidden", "held"),
        lambda version: WhisperShape.from_params(version.params), serves="whisper_content",
    ),
    "mel_converter": Definition(
        ConverterShape, lambda shape: ConverterNet(**asdict(shape)),
        {
            "content": _ROWS, "pitch": _ROWS, "embedding": _BATCH, "profile": _BATCH,
            "keys": _REFERENCE, "values": _REFERENCE, "mask": _REFERENCE,
        },
        _converter_example, lambda _: ("mel",), _net_sizes(ConverterShape),
    ),
}  # fmt: skip


def export(architecture: str, shape: Any) -> bytes:
    """The graph of the network of such sizes, without weights."""
    definition = DEFINITIONS[architecture]
    with torch.random.fork_rng():
        net = definition.make(shape).eval()
        # Equal parameters would become one initialiser.
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.normal_()
        example = definition.example(shape)
    traced = ConverterGraph(net) if isinstance(net, ConverterNet) else net
    file = io.BytesIO()
    with warnings.catch_warnings():
        # The tracing exporter keeps the parameters' names, and needs no further package.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            traced, example,
            file,  # type: ignore[arg-type]
            dynamo=False, opset_version=OPSET, do_constant_folding=False,
            input_names=list(definition.inputs), output_names=list(definition.outputs(shape)),
            dynamic_axes={name: dict(axes) for name, axes in definition.inputs.items()},
        )  # fmt: skip
    return _weightless(file.getvalue(), net)


def _weightless(data: bytes, net: nn.Module) -> bytes:
    """The model with each parameter of ``net`` outside of it, and without notes of the tracing."""
    model = onnx.load_from_string(data)
    model.producer_name, model.producer_version = "auto_voice", ""
    own = net.state_dict()
    kept = []
    for tensor in model.graph.initializer:
        name = tensor.name.removeprefix("net.") if isinstance(net, ConverterNet) else tensor.name
        if name not in own:
            kept.append(tensor)
            continue
        for node in model.graph.node:
            for place, value in enumerate(node.input):
                if value == tensor.name:
                    node.input[place] = name
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    # Also those that this network does not use, so that a file of weights has the network's names.
    read = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(
        _outside(name, value, "" if name in read else UNUSED) for name, value in own.items()
    )
    for node in model.graph.node:
        node.doc_string = ""
    return bytes(model.SerializeToString(deterministic=True))


def _outside(name: str, value: Tensor, note: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=FLOATS, dims=list(value.shape), doc_string=note)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights")
    return tensor


def weights_of(net: nn.Module) -> dict[str, Any]:
    """The parameters of ``net`` as arrays by name, of a content encoder those of its layers."""
    own = net.encoder_weights() if isinstance(net, ContentNet) else net.state_dict()
    return {name: value.detach().cpu().numpy() for name, value in own.items()}


def as_network(architecture: str, shape: Any, net: nn.Module, device: str = "cpu") -> Network:
    """``net``, a network of such sizes, as inference runs it."""
    return bound_network(
        export(architecture, shape), weights_of(net), "the network", architecture, device
    )


def needed(versions: Sequence[ModelVersion]) -> Iterator[tuple[str, Any]]:
    """Architecture and shape of every graph that the versions need, each once."""
    found = {}
    for version in versions:
        for name, definition in DEFINITIONS.items():
            if version.architecture == (definition.serves or name):
                shape = definition.sizes(version)
                found[graph_name(name, shape)] = (name, shape)
    return iter(found.values())


def write_graphs(versions: Sequence[ModelVersion], folder: Path) -> list[Path]:
    """Exports what the versions need into ``folder``; what is there is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for architecture, shape in needed(versions):
        path = folder / f"{graph_name(architecture, shape)}{SUFFIX}"
        path.write_bytes(export(architecture, shape))
        written.append(path)
    return written


def catalog_versions(*overlays: Path) -> list[ModelVersion]:
    """Every version of the built-in catalog, under those of ``overlays``."""
    catalog = load_catalog([builtin_catalog(), *overlays])
    return [
        catalog.version(entry.name, number)
        for entry in catalog.models.values()
        for number in entry.versions
    ]


def main(arguments: Sequence[str]) -> int:
    """Exports and names what was written."""
    if len(arguments) not in (0, 2):
        print(__doc__, file=sys.stderr)
        return 2
    own = {graph_name(*pair) for pair in needed(catalog_versions())}
    if not arguments:
        for path in FOLDER.glob(f"*{SUFFIX}"):
            path.unlink()
        written = write_graphs(catalog_versions(), FOLDER)
    else:
        catalog, folder = map(Path, arguments)
        versions = [
            v for v in catalog_versions(catalog) for pair in needed([v])
            if graph_name(*pair) not in own
        ]  # fmt: skip
        written = write_graphs(versions, folder)
    for path in written:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
