"""Models of one's own: ONNX files from outside, architectures of other packages, files in place."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper  # noqa: E402

from auto_voice.errors import (  # noqa: E402
    AutoVoiceError,
    ConfigError,
    IntegrityError,
    ModelLoadError,
    OfflineError,
    UnsafeFileError,
)
from auto_voice.models import ModelRegistry  # noqa: E402
from auto_voice.models.additions import Addition  # noqa: E402
from auto_voice.models.registry import architectures  # noqa: E402
from auto_voice.models.registry.architectures import (  # noqa: E402
    Architecture,
    register_architecture,
)
from fault_server import fault_server  # noqa: E402

FLOAT = TensorProto.FLOAT
HOP, BANDS = 256, 80


def number(name: str, values: Any, dtype: Any = np.int64) -> Any:
    return onnx.numpy_helper.from_array(np.asarray(values, dtype), name)


def saved(
    path: Path,
    nodes: list[Any],
    takes: list[Any],
    gives: list[Any],
    numbers: list[Any],
    functions: tuple[Any, ...] = (),
) -> Path:
    graph = helper.make_graph(nodes, "g", takes, gives, numbers)
    domains = {node.domain for node in nodes} | {f.domain for f in functions} | {""}
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid(domain, 17 if not domain else 1) for domain in domains],
        functions=list(functions),
        ir_version=9,
    )
    path.write_bytes(model.SerializeToString())
    return path


def vocoder(path: Path, **other: Any) -> Path:
    """Each frame becomes 256 samples of the mean of its bands: upsampling and nothing else."""
    hop, shape = other.get("hop", HOP), other.get("shape", ["b", BANDS, "t"])
    dtype = other.get("dtype", FLOAT)
    nodes = [
        helper.make_node("Cast", ["mel"], ["float"], to=FLOAT),
        helper.make_node("ReduceMean", ["float"], ["mean"], axes=[1], keepdims=1),
        helper.make_node("Resize", ["mean", "", "scales"], ["audio"], mode="nearest",
                         nearest_mode="floor", coordinate_transformation_mode="asymmetric"),
    ]  # fmt: skip
    return saved(
        path,
        nodes,
        [helper.make_tensor_value_info("mel", dtype, shape)],
        [helper.make_tensor_value_info("audio", FLOAT, ["b", 1, "n"])],
        [number("scales", [1, 1, hop], np.float32)],
    )


def content(path: Path, hop: int = 320) -> Path:
    """Windows of 400 samples, 320 apart, through one linear map to 6 numbers."""
    weights = np.random.default_rng(0).standard_normal((6, 1, 400)) / 20
    nodes = [
        helper.make_node("Unsqueeze", ["samples", "one"], ["wide"]),
        helper.make_node("Conv", ["wide", "weights"], ["maps"], strides=[hop]),
        helper.make_node("Transpose", ["maps"], ["features"], perm=[0, 2, 1]),
    ]
    return saved(
        path,
        nodes,
        [helper.make_tensor_value_info("samples", FLOAT, ["b", "n"])],
        [helper.make_tensor_value_info("features", FLOAT, ["b", "frames", 6])],
        [number("one", [1]), number("weights", weights, np.float32)],
    )


def speaker(path: Path) -> Path:
    """The size of the samples and of their steps: two numbers whatever the length."""
    nodes = [
        helper.make_node("ReduceL2", ["samples"], ["size"], axes=[1], keepdims=1),
        helper.make_node("ReduceMax", ["samples"], ["peak"], axes=[1], keepdims=1),
        helper.make_node("Concat", ["size", "peak"], ["embedding"], axis=1),
    ]
    return saved(
        path,
        nodes,
        [helper.make_tensor_value_info("samples", FLOAT, ["b", "n"])],
        [helper.make_tensor_value_info("embedding", FLOAT, ["b", 2])],
        [],
    )


@pytest.fixture
def registry(tmp_path: Path) -> ModelRegistry:
    return ModelRegistry(tmp_path / "models", offline=True, device="cpu", progress=False)


def add(registry: ModelRegistry, path: Path, kind: str = "vocoder", **more: Any) -> Any:
    return registry.add(Addition("mine", (str(path),), "MIT", kind, **more))


# What works without a line of code


def test_an_onnx_vocoder_is_used_as_it_is(registry: ModelRegistry, tmp_path: Path) -> None:
    version = add(registry, vocoder(tmp_path / "up.onnx"))
    assert (version.architecture, version.needs.ram_mb) == ("onnx_vocoder", 1)
    stage = registry.load("mine")
    mel = np.random.default_rng(1).standard_normal((2, BANDS, 11)).astype(np.float32)
    expected = np.repeat(mel.mean(axis=1), HOP, axis=1)
    np.testing.assert_allclose(stage.synthesize(mel), expected, atol=1e-6)
    np.testing.assert_allclose(stage.synthesize(mel[0]), expected[:1], atol=1e-6)
    # Another process finds it described, and its bytes in the model folder.
    (tmp_path / "up.onnx").unlink()
    again = ModelRegistry(registry.model_dir, offline=True, progress=False)
    np.testing.assert_allclose(again.load("mine@1.0").synthesize(mel), expected, atol=1e-6)


def test_an_onnx_content_encoder_keeps_time(registry: ModelRegistry, tmp_path: Path) -> None:
    add(registry, content(tmp_path / "c.onnx"), "content", params={"space": "theirs"})
    encoder = registry.load("mine")
    click = np.zeros(16_000, np.float32)
    click[320 * 20 + 160] = 1.0
    found = encoder.encode(click)
    assert (found.space, found.frame_rate, found.features.shape) == ("theirs", 50.0, (50, 6))
    loudest = np.abs(found.features).sum(axis=1)
    assert np.flatnonzero(loudest > 1e-4).tolist() == [20], "frame 20 is centred on its click"
    rows = np.stack([click, click])
    features = encoder.extract_features(rows, np.array([16_000, 8_000]))
    np.testing.assert_allclose(features[0], encoder.extract_features(click)[0], atol=1e-6)
    assert not features[1, 24:].any()


def test_an_onnx_speaker_encoder_gives_unit_vectors(
    registry: ModelRegistry, tmp_path: Path
) -> None:
    add(registry, speaker(tmp_path / "s.onnx"), "speaker")
    encoder = registry.load("mine")
    found = encoder.embed_utterance(np.sin(np.arange(8000)).astype(np.float32))
    assert (encoder.dims, found.shape) == (2, (2,))
    assert np.linalg.norm(found) == pytest.approx(1)
    assert encoder.similarity(found, found) == pytest.approx(1)


# What is not what its kind promises


def two_inputs(path: Path) -> Path:
    return saved(
        path,
        [helper.make_node("Add", ["mel", "f0"], ["audio"])],
        [helper.make_tensor_value_info(name, FLOAT, ["b", BANDS, "t"]) for name in ("mel", "f0")],
        [helper.make_tensor_value_info("audio", FLOAT, ["b", BANDS, "t"])],
        [],
    )


@pytest.mark.parametrize(
    ("make", "kind", "told"),
    [
        (lambda p: vocoder(p, hop=512), "vocoder", r"20480 samples of 40 frames.*must be 10240"),
        (lambda p: vocoder(p, shape=["b", BANDS, 100]), "vocoder", "fixed time axis of 100"),
        (lambda p: vocoder(p, shape=[8, BANDS, "t"]), "vocoder", "fixed batch axis of 8"),
        (lambda p: vocoder(p, shape=["b", 100, "t"]), "vocoder", "100 bands, and converters give"),
        (lambda p: vocoder(p, dtype=TensorProto.DOUBLE), "vocoder", r"tensor\(double\).*float32"),
        (vocoder, "content", r"3 axes, and a content takes samples \(batch, n\) at 16 kHz"),
        (two_inputs, "vocoder", r"2 inputs \(mel, f0\), and a vocoder takes one: mel"),
        (lambda p: content(p, hop=160), "content", "98 frames of one second and 198 of two"),
        (content, "speaker", "3 axes, and a speaker gives an embedding"),
        (speaker, "content", "2 axes, and a content gives features"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_added(
    make: Callable[[Path], Path], kind: str, told: str, registry: ModelRegistry, tmp_path: Path
) -> None:
    with pytest.raises(ModelLoadError, match=told):
        add(registry, make(tmp_path / "m.onnx"), kind)
    assert not (registry.model_dir / "catalog.yaml").exists()
    assert not (registry.model_dir / "mine").exists()


# What is not to be trusted


def numbers_elsewhere(path: Path) -> Path:
    vocoder(path)
    model = onnx.load(path)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    path.write_bytes(model.SerializeToString())
    return path


def numbers_elsewhere_in_a_branch(path: Path) -> Path:
    """In the constant of a branch of a condition, where no list of initialisers shows it."""
    tensor = number("hidden", [1.0], np.float32)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    gives = helper.make_tensor_value_info("y", FLOAT, None)
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["y"], value=tensor)], "b", [], [gives]
    )
    condition = helper.make_node("If", ["yes"], ["audio"], then_branch=branch, else_branch=branch)
    return saved(
        path,
        [condition],
        [helper.make_tensor_value_info("mel", FLOAT, ["b", BANDS, "t"])],
        [helper.make_tensor_value_info("audio", FLOAT, None)],
        [number("yes", True, np.bool_)],
    )


def foreign(operation: str, domain: str) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        return saved(
            path,
            [helper.make_node(operation, ["mel"], ["audio"], domain=domain)],
            [helper.make_tensor_value_info("mel", FLOAT, ["b", BANDS, "t"])],
            [helper.make_tensor_value_info("audio", FLOAT, ["b", "n"])],
            [],
        )

    return make


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (numbers_elsewhere, "keeps its numbers in another file"),
        (numbers_elsewhere_in_a_branch, "keeps its numbers in another file"),
        (foreign("Evil", "evil.example"), "Evil of evil.example, which is none of ONNX"),
        (foreign("EPContext", "com.microsoft"), "EPContext, which reads another file"),
    ],
)
def test_a_file_that_reaches_beyond_itself_is_refused(
    make: Callable[[Path], Path], told: str, registry: ModelRegistry, tmp_path: Path
) -> None:
    with pytest.raises(UnsafeFileError, match=told):
        add(registry, make(tmp_path / "m.onnx"))


def test_a_function_that_the_file_defines_itself_is_no_foreign_operation(
    registry: ModelRegistry, tmp_path: Path
) -> None:
    body = [
        helper.make_node("ReduceMean", ["x"], ["m"], axes=[1], keepdims=1),
        helper.make_node("Resize", ["m", "", "s"], ["y"], mode="nearest"),
    ]
    imports = [helper.make_opsetid("", 17)]
    function = helper.make_function("its.own", "Up", ["x", "s"], ["y"], body, imports)
    path = saved(
        tmp_path / "f.onnx",
        [helper.make_node("Up", ["mel", "scales"], ["audio"], domain="its.own")],
        [helper.make_tensor_value_info("mel", FLOAT, ["b", BANDS, "t"])],
        [helper.make_tensor_value_info("audio", FLOAT, ["b", 1, "n"])],
        [number("scales", [1, 1, HOP], np.float32)],
        (function,),
    )
    assert add(registry, path).key == "mine@1.0"


@pytest.mark.parametrize("data", [b"", b"junk", b"\x08\x09\x3a\xff\xff\xff\xff\x0f", bytes(1000)])
def test_what_is_no_onnx_file_is_one_sentence(
    data: bytes, registry: ModelRegistry, tmp_path: Path
) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    with pytest.raises(ModelLoadError, match=r"m\.onnx"):
        add(registry, path)


def test_any_damage_of_a_file_is_answered_by_an_error_of_ours(tmp_path: Path) -> None:
    good = vocoder(tmp_path / "good.onnx").read_bytes()
    rng = np.random.default_rng(0)
    from auto_voice.models.runtime.graphs import check_foreign

    for _ in range(200):
        data = bytearray(good)
        for at in rng.integers(0, len(data), 3):
            data[at] = rng.integers(0, 256)
        path = tmp_path / "bad.onnx"
        path.write_bytes(data[: rng.integers(1, len(data) + 1)])
        with contextlib.suppress(ModelLoadError, UnsafeFileError):
            check_foreign(path, "bad")


# What the user says of a model


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"kind": ""}, "add --kind with one of content, speaker, vocoder"),
        ({"kind": "converter"}, "add --kind with one of"),
        ({"architecture": "hifigan", "kind": "speaker"}, "hifigan makes a vocoder, not a speaker"),
        ({"architecture": "x"}, "there is no architecture x; known: hubert"),
    ],
)
def test_what_contradicts_itself_is_told(
    more: dict[str, Any], told: str, registry: ModelRegistry, tmp_path: Path
) -> None:
    given = {"kind": "vocoder", **more}
    with pytest.raises(ConfigError, match=told):
        add(registry, vocoder(tmp_path / "m.onnx"), **given)


def test_an_address_needs_the_network(registry: ModelRegistry) -> None:
    far = Addition("mine", ("https://example.org/m.onnx",), "MIT", "vocoder")
    with pytest.raises(OfflineError, match="network is switched off"):
        registry.add(far)
    with pytest.raises(ConfigError, match="leave --in-place out"):
        registry.add(Addition("mine", far.sources, "MIT", "vocoder", in_place=True))


def test_a_file_from_an_address_is_fetched_once_and_hashed(tmp_path: Path) -> None:
    data = vocoder(tmp_path / "m.onnx").read_bytes()
    registry = ModelRegistry(tmp_path / "models", progress=False)
    with fault_server() as server:
        address = server.serve("v1/up%20x.onnx", data)
        version = registry.add(Addition("mine", (address,), "MIT", "vocoder"))
        assert len(server.of("v1/up%20x.onnx")) == 1
    assert version.files[0].file == "up_x.onnx"
    assert registry.path("mine").read_bytes() == data
    assert not list((registry.model_dir / ".partial").glob("*.part"))


# Where it lies


def test_a_file_in_place_is_not_copied_and_its_change_is_noticed(
    registry: ModelRegistry, tmp_path: Path
) -> None:
    path = vocoder(tmp_path / "my vocoder.onnx")
    before = path.read_bytes()
    add(registry, path, in_place=True)
    assert registry.path("mine") == path
    registry.load("mine")
    folder = registry.model_dir / "mine" / "1.0"
    assert [found.name for found in folder.iterdir()] == ["metadata.json"]
    assert path.stat().st_nlink == 1, "no blob may be another name of a file that is not ours"
    path.write_bytes(before + b"\0")
    registry.unload()
    with pytest.raises(IntegrityError, match=r"has other bytes than when mine@1\.0 was added"):
        registry.load("mine")
    assert path.exists(), "nor is it set aside"
    path.unlink()
    with pytest.raises(IntegrityError, match="is no longer there"):
        registry.load("mine")
    path.write_bytes(before)
    registry.load("mine")
    from auto_voice.models.registry import maintenance

    maintenance.remove(registry.store, "mine", "1.0")
    assert path.read_bytes() == before


# Architectures of other packages


class Silence:
    """A vocoder of another package: whatever it is asked for, it says nothing."""

    sample_rate, hop_samples, bands = 22_050, HOP, BANDS

    def __init__(self, name: str) -> None:
        self.name = name

    def synthesize(self, mel: Any) -> np.ndarray:
        return np.zeros((1, np.shape(mel)[-1] * HOP), np.float32)


@pytest.fixture
def silent_package(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    module = types.ModuleType("silent_package")
    module.build = lambda files, version, device: Silence(version.key)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "silent_package", module)
    table = dict(architectures._TABLE)
    yield "silent_package"
    architectures._TABLE.clear()
    architectures._TABLE.update(table)


def test_another_package_registers_an_architecture(
    silent_package: str, registry: ModelRegistry, tmp_path: Path
) -> None:
    made = Architecture(silent_package, "vocoder")
    register_architecture("silence", made)
    register_architecture("silence", made)
    path = tmp_path / "weights.bin"
    path.write_bytes(b"none")
    add(registry, path, architecture="silence")
    assert registry.load("mine").synthesize(np.zeros((80, 3))).shape == (1, 768)
    for name, architecture, told in (
        ("hifigan", made, "is an architecture hifigan already"),
        ("Silence!", made, "is no name of an architecture"),
        ("other", Architecture(silent_package, "smell"), "other makes a smell; kinds are"),
    ):
        with pytest.raises(ConfigError, match=told):
            register_architecture(name, architecture)


class Point:
    """An entry point of an installed package."""

    value = "silent_package:register"

    def __init__(self, call: Callable[[], None]) -> None:
        self.load = lambda: call


def test_an_installed_package_offers_its_architecture_by_an_entry_point(
    silent_package: str, registry: ModelRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered: list[Point] = []
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: offered)
    path = tmp_path / "weights.bin"
    path.write_bytes(b"none")
    architectures.load_plugins.cache_clear()
    with pytest.raises(ConfigError, match="no architecture silence"):
        add(registry, path, architecture="silence")
    offered.append(
        Point(lambda: register_architecture("silence", Architecture(silent_package, "vocoder")))
    )
    architectures.load_plugins.cache_clear()
    assert add(registry, path, architecture="silence").architecture == "silence"

    def broken() -> None:
        raise RuntimeError("too old")

    offered[:] = [Point(broken)]
    architectures.load_plugins.cache_clear()
    with pytest.raises(AutoVoiceError, match=r"silent_package:register offers.*too old"):
        architectures.load_plugins()
    architectures.load_plugins.cache_clear()
