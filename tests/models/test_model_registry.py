"""The registry as a user meets it: names in, verified and shared models out."""

from __future__ import annotations

import json
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from auto_voice.errors import (
    CatalogError,
    ConfigError,
    IntegrityError,
    ModelError,
    ModelLoadError,
    ModelUnavailableError,
    OfflineError,
    StoreError,
    UnknownModelError,
    UnsafeFileError,
)
from auto_voice.models import ModelRegistry
from auto_voice.models.registry import architectures as table
from auto_voice.models.registry.catalog_schema import load_catalog
from auto_voice.models.runtime import devices, sessions
from auto_voice.models.runtime.devices import choose_device
from registry_kit import (
    file_entry,
    model_entry,
    tone_catalog,
    version_entry,
    write_catalog,
    write_tone,
)


@pytest.fixture
def catalog(tmp_path: Path) -> Path:
    return tone_catalog(tmp_path, ("1.0", "1.1"))


@pytest.fixture
def registry(tmp_path: Path, catalog: Path) -> ModelRegistry:
    return ModelRegistry(tmp_path / "models", config=catalog, progress=False)


def peak_hz(samples: np.ndarray, rate: int) -> float:
    return float(np.argmax(np.abs(np.fft.rfft(samples))) * rate / len(samples))


# Loading


def test_a_custom_model_loads_from_the_users_yaml(registry: ModelRegistry) -> None:
    tone = registry.load("tone", "1.0")
    assert peak_hz(tone.samples, tone.sample_rate) == pytest.approx(220, abs=3)
    assert registry.resolved("tone@1.0") == "tone@1.0"
    assert registry.loaded() == ("tone@1.0",)
    assert not registry.is_mock("tone")


def test_a_load_gives_the_same_object_until_it_is_unloaded(registry: ModelRegistry) -> None:
    first = registry.load("tone")
    assert registry.load("tone", "latest") is first
    assert registry.load("tone@1.1") is first
    registry.unload("tone")
    assert registry.loaded() == ()
    assert registry.load("tone") is not first
    registry.unload()
    assert registry.loaded() == ()


def test_two_versions_live_side_by_side_and_a_pin_chooses(
    registry: ModelRegistry, catalog: Path
) -> None:
    low, high = registry.load("tone@1.0"), registry.load("tone@1.1")
    assert peak_hz(low.samples, 16000) < 300 < peak_hz(high.samples, 16000)
    assert registry.path("tone@1.0") != registry.path("tone@1.1")
    assert registry.version("tone").key == "tone@1.1"

    registry.pin("tone", "1.0")
    assert registry.load("tone") is low
    later = ModelRegistry(registry.model_dir, config=catalog)
    assert later.version("tone").key == "tone@1.0"
    assert later.version("tone", "latest").key == "tone@1.1", "a named version beats the pin"

    later.unpin("tone")
    assert registry.version("tone").key == "tone@1.1"


def test_a_pin_fixes_an_alias_to_the_version_it_means_now(registry: ModelRegistry) -> None:
    assert registry.pin("tone@latest").key == "tone@1.1"
    record = json.loads((registry.model_dir / "models.lock.json").read_text())
    assert record["pins"]["tone"]["version"] == "1.1"
    assert set(record["pins"]["tone"]["sha256"]) == {"tone.wav"}
    assert registry.pin("tone").key == "tone@1.1"


def test_a_pin_notices_that_the_catalog_changed_its_bytes(
    registry: ModelRegistry, tmp_path: Path
) -> None:
    registry.pin("tone", "1.0")
    other = write_tone(tmp_path / "other" / "tone.wav", 999)
    changed = write_catalog(
        tmp_path / "changed.yaml", {"tone": model_entry({"1.0": version_entry(other)})}
    )
    stale = ModelRegistry(registry.model_dir, config=changed)
    with pytest.raises(IntegrityError, match=r"lock\.json pins tone to version 1\.0, whose bytes"):
        stale.load("tone")
    assert stale.load("tone@1.0") is not None


@pytest.mark.parametrize("change", ["bytes", "version"])
def test_a_stale_pin_is_a_row_of_the_listing_and_can_be_replaced(
    registry: ModelRegistry, tmp_path: Path, change: str
) -> None:
    registry.pin("tone", "1.0")
    other = write_tone(tmp_path / "other" / "tone.wav", 999)
    numbers = ("1.0", "2.0") if change == "bytes" else ("2.0",)
    entries = {number: version_entry(other) for number in numbers}
    config = write_catalog(tmp_path / "changed.yaml", {"tone": model_entry(entries)})
    stale = ModelRegistry(registry.model_dir, config=config)
    rows = [row for row in stale.status() if row.name == "tone"]
    (row,) = [row for row in rows if row.default]
    assert row.version == "2.0"
    assert "pins tone to version 1.0" in row.problem
    assert "run `autovoice models pin tone`" in row.problem
    assert [other.problem for other in stale.status() if other.name != "tone"].count("") == len(
        stale.status()
    ) - len(rows)
    with pytest.raises(ModelError, match="pin --remove tone"):
        stale.version("tone")
    assert stale.pin("tone").version == "2.0"
    assert stale.version("tone").version == "2.0"


@pytest.mark.parametrize("name", [None, 3, b"tone"])
def test_a_name_that_is_no_text_is_one_sentence(registry: ModelRegistry, name: Any) -> None:
    with pytest.raises(UnknownModelError, match="a model is named by text"):
        registry.load(name)


@pytest.mark.parametrize("text", ["{", "[]", '{"pins": []}', '{"pins": {"tone": {"version": 1}}}'])
def test_a_damaged_lock_file_is_named(registry: ModelRegistry, text: str) -> None:
    registry.model_dir.mkdir(parents=True)
    (registry.model_dir / "models.lock.json").write_text(text)
    with pytest.raises(StoreError, match=r"models.lock.json is damaged"):
        registry.load("tone")


def test_paths_and_pulls(registry: ModelRegistry) -> None:
    path = registry.path("tone@1.0")
    assert path == registry.model_dir / "tone" / "1.0" / "tone.wav"
    assert registry.path("tone@1.0", file="tone.wav") == path
    assert registry.pull("griffin_lim") == {}
    with pytest.raises(UnknownModelError, match=r"tone@1.0 has no file x; its files: tone.wav"):
        registry.path("tone@1.0", file="x")
    with pytest.raises(UnknownModelError, match="it has no files"):
        registry.path("griffin_lim")
    before = path.stat().st_ino
    registry.pull("tone", "1.0", force=True)
    assert path.stat().st_ino != before, "forced: fetched again and renamed over"


def test_status_tells_what_is_where(registry: ModelRegistry) -> None:
    registry.load("tone@1.0")
    registry.pin("tone@1.0")
    rows = {f"{row.name}@{row.version}": row for row in registry.status()}
    one, two = rows["tone@1.0"], rows["tone@1.1"]
    assert (one.installed, one.loaded, one.pinned, one.default) == (True, True, True, True)
    assert (two.installed, two.loaded, two.pinned, two.default) == (False, False, False, False)
    assert rows["griffin_lim@1.0"].installed, "what needs no files is always there"
    assert rows["hubert_base@1.0"].bytes == 377_569_754


def test_all_settings_are_keyword_arguments(tmp_path: Path, catalog: Path) -> None:
    registry = ModelRegistry(
        str(tmp_path / "m"),
        config=str(catalog),
        offline=True,
        device="cpu",
        fallback="compact",
        memory_budget_mb=10,
    )
    settings = registry.settings
    assert (settings.model_dir, settings.offline, settings.device) == (tmp_path / "m", True, "cpu")
    assert (settings.fallback, settings.memory_budget_mb) == ("compact", 10)
    with pytest.raises(ConfigError, match="fallback must be one of"):
        ModelRegistry(fallback="maybe")


# Memory


def budget_registry(tmp_path: Path, budget_mb: int) -> ModelRegistry:
    models = {
        name: model_entry(
            {"1": version_entry(write_tone(tmp_path / name / "t.wav"), needs={"ram_mb": 40})}
        )
        for name in ("a", "b", "c")
    }
    config = write_catalog(tmp_path / "three.yaml", models)
    return ModelRegistry(tmp_path / "models", config=config, memory_budget_mb=budget_mb)


def test_the_least_recently_used_model_makes_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry = budget_registry(tmp_path, 100)
    first = registry.load("a")
    registry.load("b")
    registry.load("a")
    with caplog.at_level(logging.INFO, "auto_voice"):
        registry.load("c")
    assert registry.loaded() == ("a@1", "c@1")
    assert "unloading b@1 to make room for c@1" in caplog.text
    assert registry.load("a") is first


def test_a_model_above_the_budget_is_refused_with_both_figures(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="a@1 needs 40 MB, more than the memory budget of 30"):
        budget_registry(tmp_path, 30).load("a")


def test_unloading_closes_what_can_be_closed(
    registry: ModelRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []

    class Session:
        def close(self) -> None:
            closed.append(True)

    monkeypatch.setattr("auto_voice.models.sample_model.build", lambda *_: Session())
    registry.load("tone")
    registry.unload("tone")
    registry.unload("tone")
    assert closed == [True]


# What cannot be loaded


def test_unknown_names_list_the_known_ones(registry: ModelRegistry) -> None:
    with pytest.raises(UnknownModelError, match=r"there is no model tnoe; did you mean tone\?"):
        registry.load("tnoe")
    with pytest.raises(UnknownModelError, match="tone has no version 3"):
        registry.load("tone@3")
    with pytest.raises(UnknownModelError):
        registry.unload("tnoe")


def test_a_broken_catalog_is_named_at_first_use(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("models:\n  tone: {kind: sampel}\n")
    registry = ModelRegistry(tmp_path / "m", config=mine)
    with pytest.raises(CatalogError, match=r"mine.yaml:2: models.tone"):
        registry.load("tone")


def test_offline_with_nothing_cached_names_the_file_and_the_command(tmp_path: Path) -> None:
    registry = ModelRegistry(tmp_path / "m", offline=True)
    with pytest.raises(OfflineError, match=r"pytorch_model.bin.*autovoice models pull hubert_base"):
        registry.load_hubert()


def test_a_missing_source_says_what_it_answered(tmp_path: Path, catalog: Path) -> None:
    (tmp_path / "source-1.0" / "tone.wav").unlink()
    with pytest.raises(ModelUnavailableError, match=r"tone.wav"):
        ModelRegistry(tmp_path / "m", config=catalog).load("tone@1.0")


def test_wrong_bytes_are_never_loaded(tmp_path: Path, catalog: Path) -> None:
    source = tmp_path / "source-1.0" / "tone.wav"
    data = bytearray(source.read_bytes())
    data[-1] ^= 1
    source.write_bytes(data)
    with pytest.raises(IntegrityError):
        ModelRegistry(tmp_path / "m", config=catalog).load("tone@1.0")


def test_a_flipped_byte_in_the_store_is_caught_and_repaired(
    registry: ModelRegistry, catalog: Path
) -> None:
    path = registry.path("tone@1.0")
    good = path.read_bytes()
    path.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    fresh = ModelRegistry(registry.model_dir, config=catalog, progress=False)
    assert peak_hz(fresh.load("tone@1.0").samples, 16000) == pytest.approx(220, abs=3)
    assert path.read_bytes() == good


def checkpoint_registry(tmp_path: Path, path: Path, architecture: str, kind: str) -> ModelRegistry:
    entry = model_entry({"1": version_entry(path, architecture)}, kind=kind)
    config = write_catalog(tmp_path / "mine.yaml", {"mine": entry})
    return ModelRegistry(tmp_path / "models", config=config, device="cpu", progress=False)


class Bomb:
    """Unpickled, it would create a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (os.mkdir, (str(self.target),))


@pytest.mark.parametrize("layout", ["pickle", "torch zip"])
@pytest.mark.parametrize(
    ("architecture", "kind"), [("hifigan", "vocoder"), ("ge2e", "speaker"), ("hubert", "content")]
)
def test_a_pickle_bomb_does_not_go_off(
    tmp_path: Path, layout: str, architecture: str, kind: str
) -> None:
    crater = tmp_path / "crater"
    path = tmp_path / "evil.pt"
    if layout == "pickle":
        path.write_bytes(pickle.dumps({"generator": Bomb(crater)}))
    else:
        import torch

        torch.save({"generator": Bomb(crater)}, path)
    registry = checkpoint_registry(tmp_path, path, architecture, kind)
    with pytest.raises(UnsafeFileError, match="run code"):
        registry.load("mine")
    assert not crater.exists()


def test_an_unsafe_file_is_no_reason_to_fall_back(tmp_path: Path) -> None:
    path = tmp_path / "evil.pt"
    path.write_bytes(pickle.dumps(Bomb(tmp_path / "crater")))
    entry = model_entry({"1": version_entry(path, "hifigan")}, kind="vocoder")
    config = write_catalog(tmp_path / "mine.yaml", {"mine": entry})
    registry = ModelRegistry(tmp_path / "models", config=config, fallback="mock", progress=False)
    with pytest.raises(UnsafeFileError):
        registry.load("mine")


def test_wrong_shapes_name_the_file_and_the_key(tmp_path: Path) -> None:
    import torch

    from auto_voice.training.networks.encoders import SpeakerNet

    state = SpeakerNet().state_dict()
    key = next(iter(state))
    state[key] = torch.zeros(3, 3)
    path = tmp_path / "wrong.pt"
    torch.save({"model_state": state}, path)
    registry = checkpoint_registry(tmp_path, path, "ge2e", "speaker")
    with pytest.raises(ModelLoadError, match=rf"wrong.pt.*{key}.*\(3, 3\)"):
        registry.load("mine")


def test_missing_keys_name_the_file_and_the_key(tmp_path: Path) -> None:
    import torch

    path = tmp_path / "little.pt"
    torch.save({"generator": {"conv_pre.bias": torch.zeros(512)}}, path)
    registry = checkpoint_registry(tmp_path, path, "hifigan", "vocoder")
    with pytest.raises(ModelLoadError, match=r"little.pt.* lacks 'conv_pre.weight'"):
        registry.load("mine")


@pytest.mark.parametrize("data", [b"", b"not a checkpoint at all", b"PK\x03\x04 cut"])
def test_a_damaged_checkpoint_is_a_load_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "damaged.pt"
    path.write_bytes(data or b"\0")
    registry = checkpoint_registry(tmp_path, path, "ge2e", "speaker")
    with pytest.raises((ModelLoadError, UnsafeFileError), match=r"damaged.pt"):
        registry.load("mine")


@pytest.mark.parametrize(
    ("raised", "says"),
    [
        (MemoryError(), "does not fit into memory"),
        (RuntimeError("CUDA error"), "could not be loaded on cpu .RuntimeError: CUDA error"),
    ],
)
def test_foreign_exceptions_become_ours(
    registry: ModelRegistry, monkeypatch: pytest.MonkeyPatch, raised: Exception, says: str
) -> None:
    def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr("auto_voice.models.sample_model.build", fail)
    with pytest.raises(ModelLoadError, match=says):
        registry.load("tone")
    assert registry.loaded() == ()


def test_a_missing_dependency_is_named_with_its_command(
    registry: ModelRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    from auto_voice.errors import MissingDependencyError

    def fail(*_: object) -> None:
        raise ImportError("No module named 'numba'", name="numba")

    monkeypatch.setattr("auto_voice.models.sample_model.build", fail)
    with pytest.raises(MissingDependencyError, match="numba is not installed; run: pip install"):
        registry.load("tone")
    absent = table.Architecture("auto_voice.models.no_such_module", "sample", "eval")
    monkeypatch.setattr(
        "auto_voice.models.model_registry.ARCHITECTURES", {**table.ARCHITECTURES, "sample": absent}
    )
    with pytest.raises(MissingDependencyError, match=r'pip install "auto-voice\[eval\]"'):
        registry.load("tone")


# Conversion of published checkpoints


def small_speaker_checkpoint(tmp_path: Path) -> Path:
    import torch

    from auto_voice.training.networks.encoders import SpeakerNet

    torch.manual_seed(0)
    path = tmp_path / "speaker.pt"
    torch.save({"model_state": SpeakerNet().state_dict()}, path)
    return path


def test_a_checkpoint_is_converted_once_beside_the_original(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from auto_voice.models import speaker_encoder

    registry = checkpoint_registry(tmp_path, small_speaker_checkpoint(tmp_path), "ge2e", "speaker")
    audio = np.random.default_rng(0).standard_normal(20000).astype(np.float32) * 0.1
    before = registry.load("mine").embed_utterance(audio)
    made = registry.path("mine").with_name("speaker.pt.safetensors")
    assert made.is_file()
    metadata = registry.store.metadata("mine", "1")
    assert metadata is not None
    assert "speaker.pt.safetensors" in metadata["derived"]

    def never(path: Path) -> None:
        raise AssertionError("converted twice")

    monkeypatch.setattr(speaker_encoder, "convert_checkpoint", never)
    again = ModelRegistry(registry.model_dir, config=registry.settings.config, device="cpu")
    np.testing.assert_array_equal(again.load("mine").embed_utterance(audio), before)


def test_a_damaged_conversion_is_made_again(tmp_path: Path) -> None:
    registry = checkpoint_registry(tmp_path, small_speaker_checkpoint(tmp_path), "ge2e", "speaker")
    registry.load("mine")
    made = registry.path("mine").with_name("speaker.pt.safetensors")
    good = made.read_bytes()
    made.unlink()
    made.write_bytes(good[:-1] + b"\x55")
    registry.unload()
    registry.load("mine")
    assert made.read_bytes() == good


def test_a_store_that_cannot_be_written_still_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = checkpoint_registry(tmp_path, small_speaker_checkpoint(tmp_path), "ge2e", "speaker")
    registry.pull("mine")

    def refuse(*_: object) -> None:
        raise StoreError("read-only")

    monkeypatch.setattr(registry.store, "add_derived", refuse)
    assert registry.load("mine").dims == 256
    assert not registry.path("mine").with_name("speaker.pt.safetensors").exists()


# Devices


def needs_gpu(tmp_path: Path) -> ModelRegistry:
    path = tmp_path / "w.bin"
    path.write_bytes(b"x")
    entry = version_entry(path, "hifigan", needs={"gpu": "required", "vram_mb": 1 << 30})
    config = write_catalog(tmp_path / "g.yaml", {"big": model_entry({"1": entry}, kind="vocoder")})
    return ModelRegistry(tmp_path / "m", config=config)


def machine(monkeypatch: pytest.MonkeyPatch, *providers: str, gpus_mb: list[int]) -> None:
    """A machine whose runtime has these providers, and whose driver shows these GPUs."""
    found = ("CPUExecutionProvider", *providers)
    monkeypatch.setattr(devices, "available_providers", lambda: found)
    monkeypatch.setattr(devices, "gpu_memory_mb", lambda: gpus_mb)


@pytest.mark.parametrize(
    ("device", "why"),
    [
        ("cuda", "pip install onnxruntime-gpu"),
        ("cuda:1", "pip install onnxruntime-gpu"),
        ("directml", "pip install onnxruntime-directml"),
        ("openvino", "pip install onnxruntime-openvino"),
        ("coreml", "only a Mac"),
    ],
)
def test_a_device_that_is_not_there_gives_way_to_the_cpu_and_what_would_bring_it_is_told(
    device: str, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine(monkeypatch, gpus_mb=[])
    version = load_catalog().version("hifigan_universal")
    assert choose_device(device, version) == "cpu"
    assert f"{version.key} runs on the CPU, because device {device}" in caplog.text
    assert why in caplog.text


def test_a_gpu_that_cannot_run_a_model_leaves_it_to_the_cpu_and_the_result_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, "CUDAExecutionProvider", gpus_mb=[8000])
    monkeypatch.setattr(sessions, "available_providers", lambda: ("CUDAExecutionProvider",))
    registry = ModelRegistry(tmp_path / "m", device="cuda", offline=True)
    assert registry.load("content_compact").device == "cpu"
    assert "on the CPU, since cuda:0 cannot run it" in registry.resolved("content_compact")


def test_without_an_accelerator_auto_is_the_cpu_and_says_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine(monkeypatch, gpus_mb=[])
    for name in ("hifigan_universal", "griffin_lim"):
        assert choose_device("auto", load_catalog().version(name)) == "cpu"
        assert choose_device("cpu", load_catalog().version(name)) == "cpu"
    assert not caplog.text


def test_a_gpu_is_taken_where_there_is_one_with_room(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    version = load_catalog().version("hifigan_universal")
    machine(monkeypatch, "CUDAExecutionProvider", gpus_mb=[8000, 8000])
    assert choose_device("auto", version) == "cuda:0"
    assert choose_device("cuda", version) == "cuda:0"
    assert choose_device("cuda:1", version) == "cuda:1"
    assert choose_device("cuda:2", version) == "cpu"
    assert "the driver shows 2 CUDA devices" in caplog.text
    assert choose_device("cuda", load_catalog().version("griffin_lim")) == "cpu"
    machine(monkeypatch, "CUDAExecutionProvider", gpus_mb=[1])
    assert choose_device("auto", version) == "cpu", "too little room on the GPU"
    machine(monkeypatch, "OpenVINOExecutionProvider", gpus_mb=[])
    assert choose_device("openvino", version) == "openvino"


def test_a_model_that_needs_a_gpu_says_so(tmp_path: Path) -> None:
    registry = needs_gpu(tmp_path)
    with pytest.raises(ModelLoadError, match=r"big@1 needs a GPU"):
        choose_device("cpu", registry.version("big"))


# Warm-up


def test_warm_up_runs_every_stage_and_tells_how_long_it_took() -> None:
    registry = ModelRegistry(use_mock=True)
    names = [
        "hubert_base",
        "hifigan_universal",
        "speaker_encoder",
        "recogniser_base",
        "quality_dnsmos",
        "sample_beckett",
    ]
    timings = registry.warmup_models(names)
    assert list(timings) == names
    for name, timing in timings.items():
        assert timing.model == f"mock (use_mock, for {name}@1.0)"
        assert timing.inference_s >= 0
    assert len(registry.loaded()) == len(names)


@pytest.mark.weights
def test_real_weights_end_to_end(weights_registry: ModelRegistry) -> None:
    names = ["hifigan_universal", "speaker_encoder"]
    timings = weights_registry.warmup_models(names)
    assert [timing.model for timing in timings.values()] == [f"{name}@1.0" for name in names]
    for name in names:
        folder = weights_registry.path(name).parent
        assert list(folder.glob("*.safetensors")), "converted beside the original"
    sample = weights_registry.load("sample_beckett")
    assert sample.seconds == pytest.approx(10, abs=0.5)


def test_a_joined_source_is_one_file(tmp_path: Path) -> None:
    whole = write_tone(tmp_path / "whole" / "tone.wav")
    data = whole.read_bytes()
    for name, part in (("a", data[:1000]), ("b", data[1000:])):
        (tmp_path / name).write_bytes(part)
    entry = {
        "architecture": "sample",
        "licence": "MIT",
        **file_entry(whole, sources=[[str(tmp_path / "a"), str(tmp_path / "b")]]),
    }
    config = write_catalog(tmp_path / "j.yaml", {"joined": model_entry({"1": entry})})
    registry = ModelRegistry(tmp_path / "m", config=config, progress=False)
    assert registry.path("joined").read_bytes() == data
