"""Graph equals definition: any weights, any length, any batch; and every model has its graph."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

from auto_voice.errors import ModelLoadError  # noqa: E402
from auto_voice.models.converter_model import ConverterShape  # noqa: E402
from auto_voice.models.runtime import graphs  # noqa: E402
from auto_voice.training import export_graphs  # noqa: E402
from auto_voice.training.networks.generators import ConverterNet, VoiceCondition  # noqa: E402

NEEDED = {graphs.graph_name(*pair): pair for pair in export_graphs.needed(
    export_graphs.catalog_versions()
)}  # fmt: skip
# Variable axes: sizes beyond the batch that each network is tried at.
LENGTHS = {
    "mel_converter": [(1, 1), (1, 0), (7, 1), (30, 17), (101, 64)],
    "hifigan": [(1,), (2,), (31,), (64,)],
    "hubert": [(400,), (719,), (4001,)],
    "ge2e": [(1,), (160,), (33,)],
    "whisper_content": [(2,), (14,), (202,), (2800,)],
    "whisper_live": [(4, 1), (18, 0), (50, 1400)],
}
CASES = [
    pytest.param(name, batch, sizes, id=f"{name}-{batch}x{'.'.join(map(str, sizes))}")
    for name, (architecture, _) in NEEDED.items()
    for sizes in LENGTHS[architecture]
    for batch in (1, 3)
    if not (batch == 3 and max(sizes) > 1000)
]


@pytest.fixture(scope="module")
def built() -> dict[str, Any]:
    return {}


def pair(name: str, built: dict[str, Any]) -> tuple[Any, Any]:
    """The network in torch and the committed graph with the same weights."""
    if name not in built:
        architecture, shape = NEEDED[name]
        torch.manual_seed(1)
        net = export_graphs.DEFINITIONS[architecture].make(shape).eval()
        with torch.no_grad():
            for key, parameter in net.named_parameters():
                if "/" in key:  # Whisper's are empty until weights are given.
                    parameter.normal_(std=0.03)
                elif parameter.ndim == 1:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        graph = graphs.read_graph(architecture, shape, {}, name)
        network = graphs.bound_network(graph, export_graphs.weights_of(net), "weights", name)
        built.clear()  # One large network at a time.
        built[name] = net, network
    found: tuple[Any, Any] = built[name]
    return found


def resized(architecture: str, shape: Any, batch: int, sizes: tuple[int, ...]) -> list[Any]:
    """Random inputs of ``batch`` rows whose variable axes have ``sizes``, in order of naming."""
    definition = export_graphs.DEFINITIONS[architecture]
    given: dict[str, int] = {"batch": batch}
    rng = np.random.default_rng(sizes[0])
    inputs = []
    for example, axes in zip(definition.example(shape), definition.inputs.values(), strict=True):
        wanted = list(example.shape)
        for axis, axis_name in axes.items():
            if axis_name not in given:
                given[axis_name] = sizes[len(given) - 1]
            wanted[axis] = given[axis_name]
        if example.dtype == torch.int64:
            inputs.append(example)
        elif example.dtype == torch.bool:
            inputs.append(torch.from_numpy(rng.random(wanted) < 0.8))
        else:
            inputs.append(torch.from_numpy(rng.standard_normal(wanted, np.float32)))
    return inputs


@pytest.mark.slow
@pytest.mark.parametrize(("name", "batch", "sizes"), CASES)
def test_a_graph_computes_what_its_definition_does(
    name: str, batch: int, sizes: tuple[int, ...], built: dict[str, Any]
) -> None:
    architecture, shape = NEEDED[name]
    net, network = pair(name, built)
    inputs = resized(architecture, shape, batch, sizes)
    with torch.no_grad():
        if isinstance(net, ConverterNet):
            expected = net(*inputs[:2], VoiceCondition(*inputs[2:]))
        else:
            expected = net(*inputs)
    states = expected if isinstance(expected, tuple) else (expected,)
    assert len(states) == len(network.outputs)
    for output, state in zip(network.outputs, states, strict=True):
        found = network(*(values.numpy() for values in inputs), output=output)
        assert found.dtype == np.float32
        assert found.shape == tuple(state.shape)
        assert np.abs(found - state.numpy()).max() <= 1e-4 * max(1.0, float(state.abs().max()))


def test_every_model_of_the_catalog_has_its_graph_and_no_other_lies_there() -> None:
    assert {path.stem for path in graphs.FOLDER.glob("*.onnx")} == set(NEEDED)


@pytest.mark.parametrize("name", NEEDED)
def test_a_graph_expects_the_parameters_of_its_definition_and_holds_none(name: str) -> None:
    architecture, shape = NEEDED[name]
    with torch.device("meta"):
        state = export_graphs.DEFINITIONS[architecture].make(shape).state_dict()
    graph = graphs.read_graph(architecture, shape, {}, name)
    assert graphs.initialisers(graph) == {key: tuple(v.shape) for key, v in state.items()}
    assert len(graph) < 300_000


def test_sizes_have_the_defaults_of_the_definition() -> None:
    sizes, arguments = asdict(ConverterShape()), ConverterNet().arguments
    without = {key: value for key, value in sizes.items() if key not in arguments}
    assert arguments | without == sizes


def test_sizes_that_are_no_default_name_the_graph_and_cepstra_do_not() -> None:
    name = graphs.graph_name("mel_converter", ConverterShape(dims=8, cepstra=True))
    assert name == "mel_converter-dims8"


def test_an_export_is_the_same_each_time_and_leaves_the_generator_alone() -> None:
    before = torch.random.get_rng_state()
    shape = ConverterShape(dims=4, width=8, blocks=1, heads=1)
    assert export_graphs.export("mel_converter", shape) == export_graphs.export(
        "mel_converter", shape
    )
    assert torch.equal(torch.random.get_rng_state(), before)


def test_sizes_without_a_graph_say_how_to_get_one() -> None:
    with pytest.raises(ModelLoadError, match="export_graphs CATALOG FOLDER"):
        graphs.read_graph("mel_converter", ConverterShape(dims=5), {}, "mine@1")
    with pytest.raises(ModelLoadError, match="depth"):
        graphs.shape_from(ConverterShape, {"depth": 5}, "mine@1")


def test_a_user_catalog_gets_the_graphs_that_the_package_lacks(tmp_path: Any) -> None:
    catalog = tmp_path / "mine.yaml"
    catalog.write_text(
        "models:\n  converter_compact:\n    versions:\n      '9':\n"
        "        architecture: mel_converter\n        licence: MIT\n        files: []\n"
        "        params: {content_space: x, net: {dims: 8, width: 16, blocks: 1, heads: 1}}\n"
    )
    assert export_graphs.main([str(catalog), str(tmp_path / "graphs")]) == 0
    found = [path.name for path in (tmp_path / "graphs").iterdir()]
    assert found == ["mel_converter-dims8-width16-blocks1-heads1.onnx"]


def test_unused_parameters_are_expected_too() -> None:
    """So that a file of weights has the network's names, whatever the network makes of them."""
    shape = ConverterShape(dims=4, width=8, blocks=1, heads=1, use_profile=False)
    net = ConverterNet(**asdict(shape)).eval()
    network = export_graphs.as_network("mel_converter", shape, net)
    assert network.outputs == ("mel",)
