"""HuBERT: equal to the reference implementation at every layer, alone or in a padded batch."""

from __future__ import annotations

import collections
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from auto_voice.errors import AudioContentError, ConfigError, ModelLoadError
from auto_voice.models import ModelRegistry
from auto_voice.models.additions import Addition
from auto_voice.models.base import ContentEncoder
from auto_voice.models.registry.catalog import ModelVersion

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import graph_kit  # noqa: E402
from auto_voice.models import hubert_model as hubert  # noqa: E402

SMALL = {
    "dims": 48,
    "layers": 4,
    "heads": 3,
    "feed_forward": 96,
    "channels": 24,
    "position_kernel": 16,
    "position_groups": 4,
}


def reference(**sizes: int) -> Any:
    """The reference implementation at random weights, in evaluation mode."""
    torch.manual_seed(0)
    config = transformers.HubertConfig()
    if sizes:
        config = transformers.HubertConfig(
            hidden_size=sizes["dims"],
            num_hidden_layers=sizes["layers"],
            num_attention_heads=sizes["heads"],
            intermediate_size=sizes["feed_forward"],
            conv_dim=(sizes["channels"],) * 7,
            num_conv_pos_embeddings=sizes["position_kernel"],
            num_conv_pos_embedding_groups=sizes["position_groups"],
        )
    model = transformers.HubertModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def published_state(model: Any) -> dict[str, Any]:
    """Its tensors under the names of the published ``pytorch_model.bin``."""
    spelling = {"original0": "weight_g", "original1": "weight_v"}
    return {
        name.replace(f"parametrizations.weight.{name[-9:]}", spelling.get(name[-9:], "")): value
        for name, value in model.state_dict().items()
    }


def version(**params: object) -> ModelVersion:
    return ModelVersion(
        "hubert_base", "1.0", "content", "hubert", (), "Apache-2.0", {**SMALL, **params}
    )


@pytest.fixture(scope="module")
def expected() -> Any:
    return reference(**SMALL)


@pytest.fixture(scope="module")
def checkpoint(expected: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hubert") / "pytorch_model.bin"
    torch.save(published_state(expected), path)
    return path


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("graph") / "hubert.onnx"
    path.write_bytes(graph_kit.graph("hubert", hubert.HuBERTShape(**SMALL)))
    return {path.name: path}


@pytest.fixture(scope="module")
def model(checkpoint: Path, graph: dict[str, Path]) -> hubert.HuBERTModel:
    return hubert.build({"pytorch_model.bin": checkpoint, **graph}, version(), "cpu")


def speech(*seconds: float, seed: int = 0) -> np.ndarray:
    """Rows of decaying noise bursts, zero-padded to the longest."""
    rng = np.random.default_rng(seed)
    rows = np.zeros((len(seconds), round(max(seconds) * 16000)), np.float32)
    for row, duration in zip(rows, seconds, strict=True):
        n = round(duration * 16000)
        row[:n] = 0.1 * rng.standard_normal(n) * np.sin(np.arange(n) / 3000.0)
    return rows


def hidden_states(network: Any, audio: np.ndarray) -> list[np.ndarray]:
    with torch.no_grad():
        answer = network(torch.from_numpy(audio), output_hidden_states=True)
    return [state.numpy() for state in answer.hidden_states]


def test_the_published_layout_is_what_the_test_writes(checkpoint: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)
    assert "encoder.pos_conv_embed.conv.weight_g" in state
    assert "encoder.pos_conv_embed.conv.weight_v" in state
    assert "masked_spec_embed" in state
    assert state["encoder.pos_conv_embed.conv.weight_g"].shape == (1, 1, 16)


def test_every_layer_equals_the_reference(model: hubert.HuBERTModel, expected: Any) -> None:
    audio = speech(1.3, 1.3)
    states = hidden_states(expected, audio)
    assert len(states) == SMALL["layers"] + 1
    for layer, state in enumerate(states):
        ours = model.extract_features(audio, layer=layer)
        assert ours.shape == state.shape
        assert np.abs(ours - state).max() <= 1e-4, layer
    np.testing.assert_array_equal(model.extract_features(audio), ours)


@pytest.mark.slow
def test_the_full_size_equals_the_reference(tmp_path: Path) -> None:
    network = reference()
    path = tmp_path / "pytorch_model.bin"
    torch.save(published_state(network), path)
    full = ModelVersion("hubert_base", "1.0", "content", "hubert", (), "Apache-2.0", {})
    ours = hubert.build({path.name: path}, full, "cpu")
    assert sum(a.size for a in hubert.convert_checkpoint(path).values()) == 94_370_816
    audio = speech(1.0)
    for layer, state in enumerate(hidden_states(network, audio)):
        features = ours.extract_features(audio, layer=layer)
        assert features.shape == (1, 49, 768)
        assert np.abs(features - state).max() <= 1e-4, layer


def test_a_padded_batch_equals_each_row_alone(model: hubert.HuBERTModel, expected: Any) -> None:
    seconds = (1.0, 0.31, 0.7, 0.025)
    audio = speech(*seconds)
    lengths = np.array([round(s * 16000) for s in seconds])
    # What lies in the padding must not matter either.
    for row, length in zip(audio, lengths, strict=True):
        row[length:] = 0.5
    for layer in (0, 2, None):
        batch = model.extract_features(audio, lengths, layer=layer)
        assert batch.shape == (4, 49, SMALL["dims"])
        for row, length, features in zip(audio, lengths, batch, strict=True):
            alone = model.extract_features(row[:length], layer=layer)[0]
            frames = hubert.frames_of(int(length))
            assert alone.shape == (frames, SMALL["dims"])
            assert np.abs(features[:frames] - alone).max() <= 1e-5
            assert not features[frames:].any()
    state = hidden_states(expected, audio[1:2, : lengths[1]])[-1]
    frames = state.shape[1]
    assert np.abs(model.extract_features(audio, lengths)[1, :frames] - state[0]).max() <= 1e-4


def test_a_batch_whose_longest_row_is_padded_keeps_its_frames(model: hubert.HuBERTModel) -> None:
    audio = np.pad(speech(0.5, 0.4), ((0, 0), (0, 4000)))
    features = model.extract_features(audio, np.array([8000, 6400]))
    assert features.shape[1] == hubert.frames_of(12000)
    assert not features[:, hubert.frames_of(8000) :].any()


@pytest.mark.parametrize("samples", [400, 719, 720, 721, 1039, 1040, 16000, 16239, 16240])
def test_frame_count_is_that_of_the_convolutions(
    samples: int, model: hubert.HuBERTModel, expected: Any
) -> None:
    count = int(expected._get_feat_extract_output_lengths(torch.tensor(samples)))
    assert hubert.frames_of(samples) == count
    assert model.extract_features(speech(samples / 16000)).shape[1] == count


def test_torch_and_numpy_inputs_give_the_same(model: hubert.HuBERTModel) -> None:
    audio = speech(0.5)
    ours = model.extract_features(torch.from_numpy(audio[0]).double())
    np.testing.assert_array_equal(ours, model.extract_features(audio))
    assert ours.dtype == np.float32


@pytest.mark.parametrize("dbfs", [-30.0, -42.0, -52.0, -65.0])
def test_the_level_hardly_matters(dbfs: float, model: hubert.HuBERTModel) -> None:
    audio = speech(0.6)
    audio *= 10 ** (-20 / 20) / np.sqrt(np.mean(audio**2))
    loud, soft = (model.extract_features(audio * 10 ** (d / 20)) for d in (0.0, dbfs + 20))
    assert np.abs(loud - soft).max() < 0.02 * np.abs(loud).max()


def test_rows_are_levelled_by_what_is_in_them_and_never_beyond_forty_decibels() -> None:
    row = np.zeros(1000, np.float32)
    row[:500] = 0.001
    raised = hubert._raised(row, 500)
    assert 20 * np.log10(raised[0]) == pytest.approx(-30)
    assert hubert._raised(1e-6 * row, 500)[0] == pytest.approx(1e-9 * 100)
    assert hubert._raised(100 * row, 500) is not None
    np.testing.assert_array_equal(hubert._raised(100 * row, 500), 100 * row)


def test_normalisation_makes_it_exactly_immaterial(
    checkpoint: Path, graph: dict[str, Path]
) -> None:
    model = hubert.build({"f": checkpoint, **graph}, version(normalise=True), "cpu")
    audio = speech(0.6, 0.3)
    lengths = np.array([9600, 4800])
    loud = model.extract_features(audio, lengths)
    soft = model.extract_features(0.1 * audio + 0.01, lengths)
    assert np.abs(loud - soft).max() < 1e-2
    alone = model.extract_features(audio[1, :4800])[0]
    assert np.abs(loud[1, : len(alone)] - alone).max() <= 1e-5


def test_silence_gives_finite_features(model: hubert.HuBERTModel) -> None:
    assert np.isfinite(model.extract_features(np.zeros(8000))).all()


def test_content_frames_are_the_middle_of_their_20_ms(model: hubert.HuBERTModel) -> None:
    audio = speech(0.61)[0]
    content = model.encode(audio)
    assert isinstance(model, ContentEncoder)
    assert content.features.shape == (len(audio) // 320, SMALL["dims"])
    assert (content.frame_rate, content.space) == (50.0, "hubert_base@1.0/layer4")
    padded = np.pad(audio, 40)
    np.testing.assert_array_equal(content.features, model.extract_features(padded, layer=4)[0])


def test_the_content_layer_is_part_of_the_space(checkpoint: Path, graph: dict[str, Path]) -> None:
    model = hubert.build({"f": checkpoint, **graph}, version(content_layer=2), "cpu")
    audio = speech(0.3)[0]
    content = model.encode(audio)
    assert content.space == "hubert_base@1.0/layer2"
    expected = model.extract_features(np.pad(audio, 40), layer=2)[0]
    np.testing.assert_array_equal(content.features, expected)


def test_a_converted_checkpoint_loads_as_the_published_one(
    checkpoint: Path, model: hubert.HuBERTModel, graph: dict[str, Path], tmp_path: Path
) -> None:
    from safetensors.numpy import save_file

    arrays = hubert.convert_checkpoint(checkpoint)
    assert not [key for key in arrays if key.endswith(("weight_g", "weight_v"))]
    save_file(arrays, tmp_path / "model.safetensors")
    converted = hubert.build({"f": tmp_path / "model.safetensors", **graph}, version(), "cpu")
    audio = speech(0.5)
    np.testing.assert_array_equal(converted.extract_features(audio), model.extract_features(audio))


@pytest.mark.parametrize("prefix", ["", "hubert."])
def test_safetensors_of_the_library_load_directly(
    prefix: str, expected: Any, graph: dict[str, Path], tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    state = {f"{prefix}{key}": value for key, value in expected.state_dict().items()}
    if prefix:
        state["lm_head.weight"] = torch.ones(2, 2)
    save_file(state, tmp_path / "model.safetensors")
    model = hubert.build({"f": tmp_path / "model.safetensors", **graph}, version(), "cpu")
    audio = speech(0.4)
    ours = model.extract_features(audio)
    assert np.abs(ours - hidden_states(expected, audio)[-1]).max() <= 1e-4


# A HuBERT that the user already has


def fairseq_state(model: Any) -> dict[str, Any]:
    """Its tensors under the names of fairseq, with those that only its training needs."""
    ours = {
        "feature_projection.layer_norm.": "layer_norm.",
        "feature_projection.projection.": "post_extract_proj.",
        "encoder.pos_conv_embed.conv.": "encoder.pos_conv.0.",
        ".attention.": ".self_attn.",
        ".feed_forward.intermediate_dense.": ".fc1.",
        ".feed_forward.output_dense.": ".fc2.",
        ".conv.": ".0.",
        "masked_spec_embed": "mask_emb",
    }
    found = {}
    for key, value in published_state(model).items():
        name = key
        if name.startswith("encoder.layers."):
            name = re.sub(
                r"^(encoder\.layers\.\d+)\.layer_norm\.", r"\1.self_attn_layer_norm.", name
            )
        if name.startswith("feature_extractor."):
            name = name.replace(".layer_norm.", ".2.")
        for theirs, fairseq in ours.items():
            name = name.replace(theirs, fairseq)
        found[name] = value
    return {**found, "label_embs_concat": torch.ones(5, 3), "final_proj.weight": torch.ones(3, 3)}


class Namespace:
    """Options of a training program that no other program has."""

    def __init__(self) -> None:
        self.arch = "hubert"
        self.nested = {"dropout": 0.1}


def of_fairseq(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An object whose class pickle finds in fairseq, while the test writes it."""
    module = types.ModuleType("fairseq")
    made = type("HubertConfig", (Namespace,), {"__module__": module.__name__})
    module.HubertConfig = made  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return made()


def as_safetensors(path: Path, state: dict[str, Any]) -> Path:
    from safetensors.torch import save_file

    save_file({key: value.contiguous() for key, value in state.items()}, path)
    return path


def as_checkpoint(path: Path, state: Any, **how: Any) -> Path:
    torch.save(state, path, **how)
    return path


def user_folder(folder: Path, model: Any, write: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(model.config.to_json_string())
    write(folder)
    return folder


@pytest.mark.parametrize(
    ("layout", "derived"),
    [
        ("folder of safetensors", 0),
        ("folder of a checkpoint", 1),
        ("folder of an old checkpoint", 1),
        ("safetensors of a fine-tuned model", 0),
        ("safetensors of fairseq", 0),
        ("checkpoint of fairseq", 1),
    ],
)
def test_a_hubert_that_is_there_loads_from_where_it_lies(
    layout: str,
    derived: int,
    expected: Any,
    graph: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state, theirs = expected.state_dict(), tmp_path / "theirs"
    if layout == "folder of safetensors":
        user_folder(theirs, expected, lambda f: as_safetensors(f / "model.safetensors", state))
    elif layout.startswith("folder"):
        old = {"_use_new_zipfile_serialization": False} if "old" in layout else {}
        published = published_state(expected)
        user_folder(
            theirs, expected, lambda f: as_checkpoint(f / "pytorch_model.bin", published, **old)
        )
    elif layout == "safetensors of a fine-tuned model":
        prefixed = {f"hubert.{key}": value for key, value in state.items()}
        theirs = as_safetensors(
            tmp_path / "tuned.safetensors", {**prefixed, "lm_head.weight": torch.ones(2, 2)}
        )
    elif layout == "safetensors of fairseq":
        theirs = as_safetensors(tmp_path / "fairseq.safetensors", fairseq_state(expected))
    else:
        whole = {
            "args": of_fairseq(monkeypatch),
            "model": fairseq_state(expected),
            "task_state": collections.defaultdict(dict),
            "best": np.float64(0.5),
        }
        theirs = as_checkpoint(tmp_path / "checkpoint_best.pt", whole)
        monkeypatch.delitem(sys.modules, "fairseq")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    registry = ModelRegistry(tmp_path / "models", offline=True, device="cpu", progress=False)
    heads = {} if theirs.is_dir() else {"heads": SMALL["heads"]}
    sources = (str(theirs), str(next(iter(graph.values()))))
    added = registry.add(
        Addition(
            "hubert_base@mine", sources, "MIT", "content", "hubert", params=heads, in_place=True
        )
    )
    assert {key: added.params[key] for key in SMALL} == SMALL
    ours = registry.load("hubert_base@mine")
    audio = speech(0.5)
    for layer, hidden in enumerate(hidden_states(expected, audio)):
        assert np.abs(ours.extract_features(audio, layer=layer) - hidden).max() <= 1e-4
    folder = registry.model_dir / "hubert_base" / "mine"
    made = [path for path in folder.iterdir() if path.name != "metadata.json"]
    assert len(made) == derived
    assert not list(registry.model_dir.rglob("blobs/*"))
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert registry.resolved("hubert_base") == "hubert_base@1.0", "the catalog's own stays"


def test_what_a_pickle_says_of_fairseq_runs_nothing(tmp_path: Path) -> None:
    from auto_voice.errors import UnsafeFileError

    class Bomb:
        def __init__(self, call: Any) -> None:
            self.call = call

        def __reduce__(self) -> Any:
            return self.call, (str(tmp_path / "crater"),)

    for call in (os.mkdir, eval, exec):
        path = as_checkpoint(tmp_path / "evil.pt", {"args": Bomb(call), "model": {}})
        with pytest.raises(UnsafeFileError, match="could run code"):
            hubert.convert_checkpoint(path)
    assert not (tmp_path / "crater").exists()


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, "holds no model.safetensors or pytorch_model.bin: name the file itself"),
        ({"model.safetensors.index.json": "{}"}, r"it is split \(model.safetensors.index.json\)"),
        ({"pytorch_model.bin": "x", "config.json": "["}, r"config\.json cannot be read"),
        (
            {"pytorch_model.bin": "x", "config.json": '{"feat_extract_norm": "layer"}'},
            "says feat_extract_norm 'layer', and HuBERT base has 'group'",
        ),
    ],
)
def test_a_folder_of_something_else_is_told(
    files: dict[str, str], told: str, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises((ConfigError, ModelLoadError), match=told):
        hubert.describe([tmp_path], "content", {})


def test_another_networks_weights_are_told(tmp_path: Path) -> None:
    path = as_safetensors(tmp_path / "m.safetensors", {"encoder.weight": torch.ones(2, 2)})
    with pytest.raises(ModelLoadError, match="holds no HuBERT by the names of transformers or"):
        hubert.describe([path], "content", {})


def test_another_shape_is_named(checkpoint: Path) -> None:
    with pytest.raises(ModelLoadError, match="no graph is installed"):
        hubert.build({"f": checkpoint}, version(), "cpu")
    full = ModelVersion("hubert_base", "1.0", "content", "hubert", (), "Apache-2.0", {})
    with pytest.raises(ModelLoadError, match=r"pytorch_model\.bin .*'encoder.layers.4"):
        hubert.build({"f": checkpoint}, full, "cpu")


def test_bad_requests_are_refused(
    model: hubert.HuBERTModel, checkpoint: Path, graph: dict[str, Path]
) -> None:
    with pytest.raises(AudioContentError, match="400 samples"):
        model.extract_features(np.zeros(399))
    with pytest.raises(AudioContentError, match="400 samples"):
        model.extract_features(np.zeros((2, 8000)), np.array([8000, 100]))
    for lengths in ([8000], [8000, 8001]):
        with pytest.raises(AudioContentError, match="lengths"):
            model.extract_features(np.zeros((2, 8000)), np.array(lengths))
    for layer in (-1, 5):
        with pytest.raises(ConfigError, match="layers 0 to 4"):
            model.extract_features(np.zeros(8000), layer=layer)
    with pytest.raises(ConfigError, match="layers 0 to 4"):
        hubert.build({"f": checkpoint, **graph}, version(content_layer=7), "cpu")
    with pytest.raises(ModelLoadError, match="exactly one"):
        hubert.build({}, version(), "cpu")
