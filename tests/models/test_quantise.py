"""Versions in other precision: how near they are, who chooses them, and that none is ever half."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from auto_voice.audio.mel import HIFIGAN_MEL, log_mel
from auto_voice.cli.main import main
from auto_voice.errors import AudioContentError, ConfigError, ModelLoadError
from auto_voice.models import ModelRegistry
from auto_voice.models.mock_models import mock_sample
from auto_voice.models.registry.catalog_schema import builtin_catalog, load_catalog
from auto_voice.models.runtime import graphs, quantise
from auto_voice.models.runtime.weights import map_safetensors
from auto_voice.progress import Progress, told_to
from auto_voice.types import Waveform
from registry_kit import file_entry, model_entry, write_catalog

GRAPH = (graphs.FOLDER / "hifigan.onnx").read_bytes()
RANGES = "hifigan_universal-1.0-int8.safetensors"


def signal_to_noise_db(exact: np.ndarray, found: np.ndarray) -> float:
    noise = np.square(exact.astype(np.float64) - found).sum()
    return float(10 * np.log10(np.square(exact.astype(np.float64)).sum() / noise))


def random_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Of HiFi-GAN's shape; each layer gives numbers about as large as it gets."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, shape in graphs.initialisers(GRAPH).items():
        rows = shape[0] if name.startswith("ups") else shape[-2:][0]
        spread = 0.01 if len(shape) == 1 else 1 / np.sqrt(rows * shape[-1])
        arrays[name] = (spread * rng.standard_normal(shape, np.float32)).astype(np.float32)
    return arrays


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return random_weights()


def mel(frames: int, f0_hz: float = 120.0) -> np.ndarray:
    speech = mock_sample(1.0, 22050, f0_hz=f0_hz)
    return log_mel(speech.samples, HIFIGAN_MEL)[None, :, 10 : 10 + frames].astype(np.float32)


@pytest.fixture(scope="module")
def ranges(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return quantise.calibration(GRAPH, weights, [mel(16), mel(16, 210.0)])


# How near


@pytest.mark.parametrize(("low", "high"), [(-3.0, 5.0), (0.0, 1.0), (-2.0, 0.0), (0.0, 0.0)])
def test_eight_bits_reach_from_end_to_end_and_hold_zero(low: float, high: float) -> None:
    step, zero = (float(number) for number in quantise.step_and_zero(low, high))
    assert zero in range(256)
    assert (0 - zero) * step == pytest.approx(low, abs=step / 2 + 1e-9)
    assert (255 - zero) * step == pytest.approx(high, abs=step / 2 + 1e-6)


@pytest.mark.slow
def test_int8_is_near_at_any_length(
    weights: dict[str, np.ndarray], ranges: dict[str, np.ndarray]
) -> None:
    exact = graphs.bound_network(GRAPH, weights, "weights", "exact")
    low = graphs.bound_network(GRAPH, quantise.int8_arrays(weights, ranges), "weights", "low")
    for frames in (5, 24):
        expected, found = exact(mel(frames)), low(mel(frames))
        assert found.shape == expected.shape == (1, 1, 256 * frames)
        assert signal_to_noise_db(expected, found) > 18


@pytest.mark.slow
def test_wide_convolutions_alone_take_eight_bits(
    weights: dict[str, np.ndarray], ranges: dict[str, np.ndarray]
) -> None:
    made = quantise.int8_arrays(weights, ranges)
    whole = {name for name, values in made.items() if values.dtype == np.int8}
    assert len(whole) == 36
    assert {made[name].shape[0] for name in whole} == {64, 128}
    assert not {"conv_pre.weight", "conv_post.weight"} & whole
    # No processor that adds two products in 16 bits overflows.
    assert max(int(np.abs(made[name]).max()) for name in whole) == 63
    for name in whole:
        again = made[name] * made[f"{name}:step"][:, None, None]
        assert np.abs(again - weights[name]).max() <= made[f"{name}:step"].max() * 0.5001


@pytest.mark.parametrize(
    ("graph", "shapes"),
    [
        ("hifigan", {(128, 128), (64, 64)}),
        # The widest are 128 on one side, so they are among them.
        ("hifigan-hidden_share0.5", {(128, 256), (64, 128), (32, 64)}),
    ],
)
def test_eight_bits_are_for_what_is_wide_and_not_the_widest_on_both_sides(
    graph: str, shapes: set[tuple[int, int]]
) -> None:
    data = (graphs.FOLDER / f"{graph}.onnx").read_bytes()
    known = graphs.initialisers(data)
    found = quantise.eight_bit_convolutions(data)
    # 18 convolutions a stage.
    assert len(found) == 18 * len(shapes)
    assert {tuple(sorted(known[node.inputs[1]][:2])) for node in found} == shapes


@pytest.mark.slow
@pytest.mark.parametrize(("to", "decibels"), [("fp16", 50), ("bf16", 30)])
def test_half_precision_is_nearer(
    to: str, decibels: float, weights: dict[str, np.ndarray], tmp_path: Path
) -> None:
    exact = graphs.bound_network(GRAPH, weights, "weights", "exact")
    arrays = quantise.half_arrays(weights) if to == "fp16" else weights
    quantise.write_arrays(tmp_path / "w.safetensors", arrays, to)
    low = graphs.bound_network(GRAPH, map_safetensors(tmp_path / "w.safetensors"), "w", "low")
    found = signal_to_noise_db(exact(mel(12)), low(mel(12)))
    assert found > decibels
    assert (tmp_path / "w.safetensors").stat().st_size < 28e6


def test_bfloat16_is_rounded_to_the_nearest_and_even(tmp_path: Path) -> None:
    # 1 + 2**-8 lies between two numbers, 1 + 3 * 2**-8 as well; each goes to the even one.
    values = np.array([[1.0, 1 + 2**-8, 1 + 3 * 2**-8, -3.14159]], np.float32)
    quantise.write_arrays(tmp_path / "b.safetensors", {"m": values, "v": values[0]}, "bf16")
    found = map_safetensors(tmp_path / "b.safetensors")
    np.testing.assert_array_equal(found["m"], [[1.0, 1.0, 1 + 2**-6, -3.140625]])
    np.testing.assert_array_equal(found["v"], values[0])


def test_what_is_written_is_read_by_the_library_of_the_format(tmp_path: Path) -> None:
    arrays = {
        "whole": np.arange(-6, 6, dtype=np.int8).reshape(3, 4),
        "half": np.ones((2, 3), np.float16),
        "one": np.array(0.5, np.float32),
    }
    quantise.write_arrays(tmp_path / "a.safetensors", arrays, "int8")
    for name, values in load_file(tmp_path / "a.safetensors").items():
        assert values.dtype == arrays[name].dtype
        np.testing.assert_array_equal(values, arrays[name])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (":step", None),
        (":read", None),
        (":step", np.zeros(128, np.float32)),
        (":step", np.ones(3, np.float32)),
        (":read", np.array([-1.0, 0.0], np.float32)),
        (":given", np.array([1.0, 300.0], np.float32)),
        (":given", np.array([np.nan, 0.0], np.float32)),
        ("", np.zeros((1, 2, 3), np.int8)),
    ],
)
def test_damaged_numbers_are_one_sentence(
    key: str, value: np.ndarray | None, weights: dict[str, np.ndarray]
) -> None:
    name = "resblocks.3.convs1.0.weight"
    numbers = {f"{name}:read": [0.1, 3.0], f"{name}:given": [0.1, 128.0]}
    arrays = quantise.int8_arrays(weights, {k: np.array(v) for k, v in numbers.items()})
    arrays.pop(name + key) if value is None else arrays.update({name + key: value})
    with pytest.raises(ModelLoadError, match=r"^the file .*resblocks\.3\.convs1\.0\.weight"):
        graphs.bound_network(GRAPH, arrays, "the file", "test")


def test_ranges_of_another_model_are_refused(weights: dict[str, np.ndarray]) -> None:
    with pytest.raises(ModelLoadError, match="another model"):
        quantise.int8_arrays(weights, {"layer.weight:read": np.array([0.1, 3.0])})


# The shipped version


@pytest.mark.parametrize(
    ("name", "graph"),
    [("hifigan_universal", "hifigan"), ("vocoder_compact", "hifigan-hidden_share0.5")],
)
def test_the_shipped_ranges_are_of_the_graph_that_runs(name: str, graph: str) -> None:
    version = load_catalog([builtin_catalog()]).version(name, "1.0-int8")
    assert version.quantised is not None
    (file,) = (file for file in version.files if file.file == version.quantised.calibration)
    found = map_safetensors(Path(quantise.__file__).parents[2] / "weights" / file.file)
    data = (graphs.FOLDER / f"{graph}.onnx").read_bytes()
    names = {node.inputs[1] for node in quantise.eight_bit_convolutions(data)}
    assert set(found) == {f"{name}{end}" for name in names for end in (":read", ":given")}
    assert all(step > 0 and 0 <= zero <= 255 for step, zero in found.values())


def test_no_bare_name_or_alias_means_a_quantised_version(tmp_path: Path) -> None:
    registry = ModelRegistry(tmp_path, offline=True)
    for number in (None, "latest", "stable"):
        assert registry.version("hifigan_universal", number).version == "1.0"


@pytest.mark.parametrize(
    ("prefer", "device", "meant"),
    [
        ("exact", "cpu", "1.0"),
        ("fastest", "cpu", "1.0-int8"),
        ("smallest", "cpu", "1.0-int8"),
    ],
)
def test_prefer_chooses_the_version_of_a_bare_name(
    prefer: str, device: str, meant: str, tmp_path: Path
) -> None:
    registry = ModelRegistry(tmp_path, device=device, prefer=prefer)
    assert registry.version("hifigan_universal").version == meant
    assert registry.resolved("hifigan_universal") == f"hifigan_universal@{meant}"
    assert registry.version("hifigan_universal@1.0").version == "1.0"
    assert registry.version("converter_compact").quantised is None
    registry.pin("hifigan_universal", "1.0")
    assert registry.version("hifigan_universal").version == "1.0"


def test_the_fastest_on_a_gpu_is_the_exact_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = ModelRegistry(tmp_path, prefer="fastest")
    monkeypatch.setattr(registry, "_device", lambda version: "cuda:0")
    assert registry.version("hifigan_universal").version == "1.0"


def test_another_preference_is_refused() -> None:
    with pytest.raises(ConfigError, match="prefer must be one of exact, fastest, smallest"):
        ModelRegistry(prefer="best")


@pytest.fixture(scope="module")
def catalog(weights: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalog with ``mine@1``, a HiFi-GAN, and ``mine@1-int8``, whose ranges it ships."""
    folder = tmp_path_factory.mktemp("vocoder")
    save_file(weights, folder / "mine.safetensors")
    names = [node.inputs[1] for node in quantise.eight_bit_convolutions(GRAPH)]
    numbers = {f"{name}{end}": np.array([0.02, 128], np.float32) for name in names
               for end in (":read", ":given")}  # fmt: skip
    save_file(numbers, folder / "ranges.safetensors")
    entry = {"architecture": "hifigan", "licence": "MIT", "needs": {"ram_mb": 120},
             "params": {"sample_rate": 22050, "hop_samples": 256, "bands": 80}}  # fmt: skip
    weight_file = file_entry(folder / "mine.safetensors")
    shipped = {"of": "1", "to": "int8", "speed": 1.9, "calibration": "ranges.safetensors"}
    versions = {
        "1": {**entry, "files": [weight_file]},
        "1-int8": {
            **entry,
            "files": [weight_file, file_entry(folder / "ranges.safetensors")],
            "quantised": shipped,
        },
    }
    models = {"mine": model_entry(versions, "vocoder", default="1")}
    return write_catalog(folder / "mine.yaml", models)


@pytest.fixture
def vocoder(tmp_path: Path, catalog: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model folder of a user whose YAML is ``catalog``."""
    monkeypatch.setenv("AUTOVOICE_CONFIG", str(catalog))
    monkeypatch.setenv("AUTOVOICE_MODEL_DIR", str(tmp_path / "models"))
    monkeypatch.setenv("AUTOVOICE_DEVICE", "cpu")
    return tmp_path / "models"


def derived(folder: Path) -> Path:
    (found,) = folder.glob("mine/1-int8/mine.safetensors.int8-*.safetensors")
    return found


@pytest.mark.slow
def test_a_shipped_version_is_quantised_once_and_made_anew_when_damaged(vocoder: Path) -> None:
    first = ModelRegistry(offline=True, progress=False).load("mine@1-int8")
    path = derived(vocoder)
    made = path.read_bytes()
    record = json.loads((path.parent / "metadata.json").read_text())["derived"][path.name]
    assert record["of"] == "mine.safetensors"
    assert len(made) < 30e6
    expected = first.synthesize(mel(6))
    path.write_bytes(b"\0" * len(made))
    again = ModelRegistry(offline=True, progress=False).load("mine@1-int8")
    assert path.read_bytes() == made
    np.testing.assert_array_equal(again.synthesize(mel(6)), expected)
    assert again.name == "mine@1-int8"


def test_a_catalog_that_names_no_such_ranges_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"a": np.zeros(3, np.float32)}, path)
    version = {
        "architecture": "hifigan", "licence": "MIT", "files": [file_entry(path)],
        "quantised": {"of": "1", "to": "int8", "calibration": "other.safetensors"},
    }  # fmt: skip
    catalog = write_catalog(tmp_path / "c.yaml", {"m": model_entry({"1-int8": version}, "vocoder")})
    with pytest.raises(ConfigError, match=r"calibration.*names other\.safetensors, which is none"):
        load_catalog([catalog])


# What a user makes


def speech() -> Iterator[Waveform]:
    for f0_hz in (120.0, 210.0):
        yield mock_sample(1.6, f0_hz=f0_hz)


@pytest.mark.slow
def test_a_user_makes_a_version_that_is_listed_chosen_and_removed(
    vocoder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantise, "MOST_PIECES", 2)
    monkeypatch.setattr(quantise, "PIECE_FRAMES", 10)
    monkeypatch.setattr(quantise, "TIMED_RUNS", 2)
    seen: list[Progress] = []
    registry = ModelRegistry(progress=False)
    with told_to(seen.append):
        made = quantise.quantise(registry, "mine", "int8", speech=speech(), number="1-own")
    parts = [progress.fraction for progress in seen if progress.stage == "quantise"]
    assert parts == sorted(parts)
    assert parts[-1] == 1
    assert made.key == "mine@1-own"
    registry = ModelRegistry(offline=True, progress=False)
    exact, low = registry.load("mine@1"), registry.load("mine@1-own")
    assert signal_to_noise_db(exact.synthesize(mel(12)), low.synthesize(mel(12))) > 15
    (row,) = [row for row in registry.status() if row.version == "1-own"]
    assert (row.installed, row.default, row.quantised) == (True, False, "int8")
    assert 0 < row.ram_mb < 120
    assert ModelRegistry(prefer="smallest").version("mine").version == "1-own"
    assert main(["models", "list", "--kind", "vocoder"]) == 0
    listed = capsys.readouterr().out
    assert "mine@1-own (not default)" in listed
    assert f"{row.ram_mb} MB" in listed
    assert "a test model, in int8" in listed
    with pytest.raises(ConfigError, match="there is a mine@1-own already"):
        quantise.check_request(registry, registry.version("mine"), "int8", "1-own")
    assert main(["models", "remove", "mine@1-own"]) == 0
    assert "1-own" not in ModelRegistry().catalog.entry("mine").versions
    assert not (vocoder / "mine" / "1-own").exists()


def untouched(folder: Path) -> bool:
    names = {path.name for path in folder.rglob("*") if path.suffix != ".lock"}
    return not any("own" in name or name.startswith("import-") for name in names) and (
        "own" not in (folder / "catalog.yaml").read_text()
        if (folder / "catalog.yaml").exists() else True
    )  # fmt: skip


@pytest.mark.slow
def test_a_version_that_is_stopped_while_it_is_made_is_not_there(
    vocoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantise, "MOST_PIECES", 2)
    monkeypatch.setattr(quantise, "PIECE_FRAMES", 10)
    monkeypatch.setattr(quantise, "TIMED_RUNS", 2)

    def stop(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    registry = ModelRegistry(progress=False)
    with (
        told_to(lambda p: stop() if p.stage == "quantise" else None),
        pytest.raises(KeyboardInterrupt),
    ):
        quantise.quantise(registry, "mine", "int8", speech=speech(), number="1-own")
    assert untouched(vocoder)
    for place in ("write_arrays", "_times_as_fast", "extend_folder_catalog"):
        with monkeypatch.context() as patch:
            patch.setattr(quantise, place, stop)
            with pytest.raises(KeyboardInterrupt):
                quantise.quantise(registry, "mine", "fp16", number="1-own")
        assert untouched(vocoder), place
    assert quantise.quantise(registry, "mine", "fp16", number="1-own").bytes < 28.5e6


@pytest.mark.parametrize(
    ("name", "to", "message"),
    [
        ("mine@1-int8", "fp16", "mine@1-int8 is quantised already; give the version it was made"),
        ("mine", "int8", "there is a mine@1-int8 already; give another number with --as"),
        ("nobody", "fp16", "there is no model nobody"),
        ("mine@7", "fp16", "mine has no version 7"),
        ("griffin_lim", "fp16", "griffin_lim@1.0 has no version of other precision"),
        ("speaker_encoder", "fp16", "speaker_encoder@1.0 has no version of other precision"),
        ("content_compact", "int8", "int8 gains no time with content_compact@2.0"),
        ("converter_compact", "fp16", "weights of converter_compact@2.0 are in half precision"),
        ("content_compact", "fp16", "weights of content_compact@2.0 are in 8 bits already"),
        ("vocoder_compact", "fp16", "weights of vocoder_compact@1.0 are in 8 bits already"),
    ],
)
def test_what_cannot_be_quantised_is_one_sentence(
    name: str, to: str, message: str, vocoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", "quantize", name, "--to", to, "--no-report"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert untouched(vocoder)


def test_too_little_speech_is_refused(vocoder: Path) -> None:
    with pytest.raises(AudioContentError, match=r"^1\.0 s of speech are too few"):
        quantise.quantise(
            ModelRegistry(progress=False), "mine", "int8", speech=[mock_sample(1.0)], number="2"
        )


@pytest.mark.weights
def test_int8_of_the_real_vocoder_is_near_on_real_speech(weights_dir: Path) -> None:
    registry = ModelRegistry(weights_dir, device="cpu", progress=False)
    recording = registry.load("sample_clone_test")
    from auto_voice.audio.resample import resample

    heard = log_mel(resample(recording.samples, recording.sample_rate, 22050), HIFIGAN_MEL)[:, :200]
    exact = registry.load("hifigan_universal@1.0").synthesize(heard)
    low = registry.load("hifigan_universal@1.0-int8").synthesize(heard)
    assert low.shape == exact.shape
    assert signal_to_noise_db(exact, low) > 18
