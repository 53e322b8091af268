"""Which model runs where: one device, one for a kind or a model, several for several workers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from auto_voice.batch.executors import WorkerSpec
from auto_voice.errors import ConfigError
from auto_voice.models import ModelRegistry
from auto_voice.models.registry.catalog_schema import load_catalog
from auto_voice.models.runtime import devices, sessions
from auto_voice.models.runtime.devices import CUDA_PROCESS_MB, parse_devices, plan_workers
from auto_voice.settings import get_settings

CUDA, OPENVINO = "CUDAExecutionProvider", "OpenVINOExecutionProvider"


def machine(
    monkeypatch: pytest.MonkeyPatch, *providers: str, gpus_mb: tuple[int, ...] = ()
) -> None:
    """A machine whose runtime has these providers, and whose driver shows these GPUs."""
    for module in (devices, sessions):
        monkeypatch.setattr(
            module, "available_providers", lambda: ("CPUExecutionProvider", *providers)
        )
    monkeypatch.setattr(devices, "gpu_memory_mb", lambda: list(gpus_mb))


# The setting


@pytest.mark.parametrize(
    ("given", "means"),
    [
        ("cuda:1", "cuda:1"),
        (" cuda:0, cuda:1 ", "cuda:0,cuda:1"),
        ("cuda:0,cuda:0", "cuda:0"),
        (["auto", "vocoder=cuda:1"], "auto,vocoder=cuda:1"),
        ({"default": "cuda:0", "vocoder": "cuda:1"}, "cuda:0,vocoder=cuda:1"),
        ({"hifigan_universal@1.0": "openvino:bf16"}, "hifigan_universal@1.0=openvino:bf16"),
    ],
)
def test_a_text_a_list_and_a_mapping_say_the_same(given: Any, means: str) -> None:
    assert get_settings(device=given).device == means


@pytest.mark.parametrize(
    "given", ["gpu", "cuda:x", "vocoder=", "=cuda", "cpu,,cuda", {"a": "b"}, 3]
)
def test_what_is_no_device_is_told_with_examples(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"device must be one of auto, cpu.*cuda:0,cuda:1"):
        get_settings(device=given)


def test_a_yaml_may_hold_a_mapping(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("settings:\n  device: {default: cpu, vocoder: 'cuda:1'}\n")
    assert get_settings(config=path).device == "cpu,vocoder=cuda:1"


def test_the_most_exact_name_decides() -> None:
    plan = parse_devices("cuda:0,vocoder=cuda:1,hifigan_universal=cuda:2,griffin_lim@1.0=cpu")
    catalog = load_catalog()
    assert plan.of(catalog.version("hifigan_universal")) == "cuda:2"
    assert plan.of(catalog.version("griffin_lim")) == "cpu"
    assert plan.of(catalog.version("content_whisper")) == "cuda:0"
    assert parse_devices("vocoder=cpu").of(catalog.version("content_whisper")) == "auto"


def test_a_name_that_is_neither_kind_nor_model_is_told_when_a_model_loads(tmp_path: Path) -> None:
    registry = ModelRegistry(tmp_path, device="cpu,vocodr=cpu", offline=True)
    with pytest.raises(
        ConfigError, match=r"device names vocodr, which is neither a kind of models"
    ):
        registry.load("content_compact")


# Each model where it belongs


def test_a_model_falls_back_to_the_cpu_alone_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, CUDA, gpus_mb=(8000, 10))
    registry = ModelRegistry(tmp_path, device="cpu,converter=cuda:1,speaker=cuda:3", offline=True)
    assert registry.load("content_compact").device == "cpu"
    assert registry.resolved("content_compact") == "content_compact@2.0"
    assert registry.load("converter_compact").device == "cpu"
    assert "on the CPU, since cuda:1 is missing or too small" in registry.resolved(
        "converter_compact"
    )


@pytest.mark.parametrize(
    ("device", "told"),
    [
        ("cuda:1", {"device_id": 1}),
        ("openvino", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 3}),
        ("openvino:bf16", {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": 3}),
    ],
)
def test_a_provider_is_told_its_device_its_threads_and_its_precision(
    device: str, told: dict[str, Any]
) -> None:
    options = devices.provider_options(device, threads=3)
    found = json.loads(options["load_config"])["CPU"] if "load_config" in options else options
    assert {key: found[key] for key in told} == told


def test_the_precision_of_a_device_reaches_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, OPENVINO)
    version = load_catalog().version("hifigan_universal")
    assert devices.choose_device("openvino:bf16", version) == "openvino:bf16"


# Several


def versions() -> list[Any]:
    catalog = load_catalog()
    names = ("content_whisper", "speaker_encoder", "converter_compact", "hifigan_universal")
    return [catalog.version(name) for name in names]


MODELS_MB = sum(version.needs.vram_mb for version in versions())
WORKER_MB = CUDA_PROCESS_MB + MODELS_MB


def never() -> list[Any]:
    raise AssertionError("read the catalog where no memory has to be planned")


def test_workers_are_spread_over_devices_with_every_models_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(monkeypatch, CUDA, gpus_mb=(80_000, 80_000))
    assert plan_workers("cuda:0,cuda:1,content=cpu", versions, 3) == (
        "cuda:0,content=cpu",
        "cuda:1,content=cpu",
        "cuda:0,content=cpu",
    )


def test_a_gpu_gets_no_more_workers_than_fit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine(monkeypatch, CUDA, gpus_mb=(WORKER_MB - 1, 2 * WORKER_MB))
    assert plan_workers("cuda:0,cuda:1", versions, 4) == ("cuda:1", "cuda:1")
    assert f"cuda:0 has {WORKER_MB - 1} MB, and a worker needs {WORKER_MB} MB" in caplog.text
    assert "2 instead of 4 workers fit" in caplog.text
    # What has another device needs no room here.
    assert plan_workers("cuda:0,vocoder=cpu", versions, 1) == ("cuda:0,vocoder=cpu",)


def test_where_none_fits_a_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, CUDA, gpus_mb=(500, 600))
    with pytest.raises(ConfigError, match=r"cuda:0 has 500 MB.*cuda:1 has 600.*--device cpu"):
        plan_workers("cuda:0,cuda:1", versions, 2)


def test_without_a_gpu_nothing_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    assert plan_workers("auto", never, 2) == ("auto", "auto")
    assert plan_workers("cuda:0,cuda:1", never, 2) == ("cuda:0", "cuda:1")


def test_each_worker_of_a_batch_gets_its_place() -> None:
    spec = WorkerSpec("builtins:dict", {"a": 1, "device": ""}, ({"device": "x"}, {"device": "y"}))
    made: list[Any] = [spec.build(worker) for worker in range(3)]
    assert [place["device"] for place in made] == ["x", "y", "x"]
    assert made[0]["a"] == 1


# The wheels of the runtime


def test_the_command_that_changes_the_wheel_removes_what_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = {"onnxruntime": "1.2", "onnxruntime-gpu": "1.1"}
    monkeypatch.setattr(devices, "installed_wheels", lambda: there)
    assert devices.change_wheel("onnxruntime-gpu") == (
        "pip uninstall onnxruntime onnxruntime-gpu, then pip install onnxruntime-gpu"
    )
