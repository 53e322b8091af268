"""``--device`` and ``doctor --devices`` on machines that are made up: no test needs a GPU."""

from __future__ import annotations

import json

import click

from auto_voice.batch.executors import cores
from auto_voice.cli.batch import _spec
from auto_voice.cli.options import REGISTRY_NAMES, device_option
from auto_voice.cli.serve import make_pipelines
from auto_voice.models.runtime import devices, sessions


def machine(monkeypatch, *providers, gpus_mb=()):
    """A machine whose runtime claims these providers, and whose driver shows these GPUs."""
    found = ("CPUExecutionProvider", *providers)
    for module in (devices, sessions):
        monkeypatch.setattr(module, "available_providers", lambda: found)
    monkeypatch.setattr("auto_voice.cli.doctor.available_providers", lambda: found)
    for module in ("auto_voice.cli.doctor", "auto_voice.models.runtime.devices"):
        monkeypatch.setattr(f"{module}.gpu_memory_mb", lambda: list(gpus_mb))


def test_the_option_may_be_repeated_and_joined():
    @click.command()
    @device_option
    def command(device):
        print(device)

    for words, means in (
        ([], None),
        (["--device", "cuda:0,cuda:1"], "cuda:0,cuda:1"),
        (["--device", "auto", "--device", "vocoder=cuda:1"], "auto,vocoder=cuda:1"),
    ):
        with command.make_context("command", words) as context:
            assert context.params["device"] == means


def test_a_device_that_cannot_be_is_one_sentence(run):
    code, out, err = run("models", "status")
    assert code == 0
    code, out, err = run("demo", "--mock", "--device", "cuda:1,vocoder=gpu", "-o", "here")
    assert (code, out) == (2, "")
    assert "device must be one of auto, cpu, cuda" in err


def test_workers_of_a_batch_get_a_device_each(monkeypatch):
    machine(monkeypatch, "CUDAExecutionProvider", gpus_mb=(40_000, 40_000))
    options = dict.fromkeys(REGISTRY_NAMES) | {"device": "cuda:0,cuda:1,content=cpu"}
    spec = _spec(False, 3, options)
    assert [place["registry"]["device"] for place in spec.places] == [
        "cuda:0,content=cpu",
        "cuda:1,content=cpu",
        "cuda:0,content=cpu",
    ]
    machine(monkeypatch)
    usual = _spec(False, None, dict.fromkeys(REGISTRY_NAMES))
    assert len(usual.places) == max(1, cores() // 2)


def test_a_server_has_a_set_of_models_for_each_device(monkeypatch):
    machine(monkeypatch, "CUDAExecutionProvider", gpus_mb=(40_000, 100, 40_000))
    options = dict.fromkeys(REGISTRY_NAMES) | {"device": "cuda:0,cuda:1,cuda:2"}
    made = make_pipelines(False, options)
    assert [pipeline.registry.settings.device for pipeline in made] == ["cuda:0", "cuda:2"]
    assert len(make_pipelines(True, dict.fromkeys(REGISTRY_NAMES))) == 1


def test_doctor_says_of_each_device_whether_it_really_runs(run, monkeypatch):
    machine(monkeypatch, "CUDAExecutionProvider", "AzureExecutionProvider", gpus_mb=(8000, 9000))
    code, out, _ = run("doctor", "--json")
    found = {finding["what"]: finding["detail"] for finding in json.loads(out)}
    assert code in (0, 2)
    assert found["device cpu"] == "runs a test network"
    for index, memory in ((0, 8000), (1, 9000)):
        detail = found[f"device cuda:{index}"]
        assert detail.startswith("does not run a test network: ")
        assert detail.endswith(f", {memory} MB")
    assert found["device coreml"] == "only a Mac has it"
    assert "pip install onnxruntime-openvino" in found["device openvino"]
    assert "nothing here uses it" in found["provider AzureExecutionProvider"]


def test_doctor_names_builds_of_the_runtime_that_overwrite_each_other(run, monkeypatch):
    there = {"onnxruntime": "1.20.0", "onnxruntime-gpu": "1.19.0"}
    for module in ("auto_voice.cli.doctor", "auto_voice.models.runtime.devices"):
        monkeypatch.setattr(f"{module}.installed_wheels", lambda: there)
    code, out, _ = run("doctor")
    assert code == 2
    assert (
        "MISSING onnxruntime: onnxruntime 1.20.0, onnxruntime-gpu 1.19.0 overwrite each other; pip "
        "uninstall onnxruntime onnxruntime-gpu, then pip install onnxruntime-gpu"
    ) in out


def test_doctor_compares_models_on_each_device_with_the_cpu(run, monkeypatch):
    monkeypatch.setattr("auto_voice.cli.doctor.COMPARED_SECONDS", 0.5)
    monkeypatch.setattr("auto_voice.cli.doctor.COMPARED_RUNS", 1)
    # What the package itself holds, so that nothing is fetched.
    monkeypatch.setattr("auto_voice.cli.doctor.PIPELINE_MODELS", {"converter": "converter_compact"})
    machine(monkeypatch)
    code, out, err = run("doctor", "--devices", "--json")
    rows = json.loads(out)
    assert (code, err) == (0, "")
    assert [(row["model"], row["runs_on"], row["snr_db"]) for row in rows] == [
        ("converter_compact@2.0", "cpu", None),
        ("content_compact@2.0", "cpu", None),
        ("vocoder_compact@1.0", "cpu", None),
    ]
    # A device whose driver is there and whose provider does not start is no pass.
    machine(monkeypatch, "CUDAExecutionProvider", gpus_mb=(8000,))
    code, out, _ = run("doctor", "--devices")
    assert code == 2
    assert out.count("cuda:0 (ran on cpu)") == 3
