"""Fallbacks: only what the policy allows, and never unseen."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from auto_voice.errors import (
    DiskSpaceError,
    IntegrityError,
    MissingDependencyError,
    ModelLoadError,
    ModelUnavailableError,
    OfflineError,
    StoreError,
)
from auto_voice.models import FallbackWarning, ModelRegistry, ModelVersion
from auto_voice.models.registry.loading import RECOVERABLE, reason_of
from registry_kit import model_entry, version_entry, write_catalog, write_tone


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A vocoder and a speaker encoder whose only source is gone."""
    gone = write_tone(tmp_path / "gone.wav")
    models = {
        "my_vocoder": model_entry({"1": version_entry(gone, "hifigan")}, kind="vocoder"),
        "my_speaker": model_entry({"1": version_entry(gone, "ge2e")}, kind="speaker"),
    }
    path = write_catalog(tmp_path / "mine.yaml", models)
    gone.unlink()
    return path


def registry(config: Path, fallback: str, **more: object) -> ModelRegistry:
    return ModelRegistry(
        config.parent / "m", config=config, fallback=fallback, progress=False, **more
    )


def test_without_a_fallback_the_reason_is_raised(config: Path) -> None:
    with pytest.raises(ModelUnavailableError, match=r"gone.wav"):
        registry(config, "none").load("my_vocoder")


def test_the_compact_model_of_the_kind_steps_in_and_everyone_gets_to_know(
    config: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = registry(config, "compact")
    with caplog.at_level(logging.WARNING), pytest.warns(FallbackWarning) as warned:
        model = found.load("my_vocoder")
    assert model.synthesize(np.full((80, 4), -5.0, np.float32)).shape == (1, 1024)
    assert model is found.load("vocoder_compact")
    expected = "vocoder_compact@1.0 stands in for my_vocoder@1, which is unreachable: No source"
    assert len(warned) == 1
    assert str(warned[0].message).startswith(expected)
    assert expected in caplog.text
    assert found.resolved("my_vocoder") == "vocoder_compact@1.0 (fallback: my_vocoder unreachable)"
    assert not found.is_mock("my_vocoder")


def test_who_steps_in_speaks_the_same_space(config: Path) -> None:
    found = ModelRegistry(config.parent / "m", fallback="compact", offline=True)
    with pytest.warns(FallbackWarning):
        model = found.load("content_whisper", "1.5")
    assert model.name == "content_compact@2.0"
    assert model.space == "content_space@1.5"


def test_it_warns_once_and_does_not_try_the_network_again(config: Path) -> None:
    found = registry(config, "compact")
    with pytest.warns(FallbackWarning):
        first = found.load("my_vocoder")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found.load("my_vocoder") is first


def test_after_unload_the_full_model_gets_another_chance(config: Path, tmp_path: Path) -> None:
    found = registry(config, "compact")
    with pytest.warns(FallbackWarning):
        found.load("my_vocoder")
    found.unload("my_vocoder")
    assert found.resolved("my_vocoder") == "my_vocoder@1"
    assert found.loaded() == ()
    with pytest.warns(FallbackWarning):
        found.load("my_vocoder")


def test_unload_leaves_a_substitute_that_another_name_uses(tmp_path: Path) -> None:
    found = ModelRegistry(tmp_path / "m", fallback="compact", offline=True)
    with pytest.warns(FallbackWarning):
        found.load("hifigan_universal")
    own = found.load("vocoder_compact")
    found.unload("hifigan_universal")
    assert found.load("vocoder_compact") is own
    found.unload("vocoder_compact")
    assert found.loaded() == ()


def test_a_kind_without_a_compact_model_fails_under_compact_and_mocks_under_mock(
    config: Path,
) -> None:
    with pytest.raises(ModelUnavailableError):
        registry(config, "compact").load("my_speaker")
    found = registry(config, "mock")
    with pytest.warns(FallbackWarning, match="A mock, which makes no speech, stands in"):
        model = found.load("my_speaker")
    assert model.mock
    assert found.resolved("my_speaker") == "mock (fallback: my_speaker unreachable)"
    assert found.is_mock("my_speaker")


def test_a_stand_in_that_fails_is_told_and_not_taken(
    config: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr("auto_voice.models.hifigan_model.build", fail)
    with caplog.at_level(logging.WARNING), pytest.raises(ModelUnavailableError):
        registry(config, "compact").load("my_vocoder")
    assert "vocoder_compact@1.0 cannot stand in for my_vocoder@1" in caplog.text


def test_the_compact_model_has_no_compact_model(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr("auto_voice.models.hifigan_model.build", fail)
    with pytest.raises(ModelLoadError):
        registry(config, "compact").load("vocoder_compact")


def test_offline_is_said_as_such(tmp_path: Path) -> None:
    found = ModelRegistry(tmp_path / "m", offline=True, fallback="compact")
    with pytest.warns(FallbackWarning, match="not installed and offline"):
        found.load_hifigan()
    assert found.resolved("hifigan_universal") == (
        "vocoder_compact@1.0 (fallback: hifigan_universal not installed and offline)"
    )


def test_use_mock_is_no_fallback_and_says_what_it_is(tmp_path: Path) -> None:
    found = ModelRegistry(tmp_path / "m", use_mock=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found.load_hifigan().mock
    assert found.resolved("hifigan_universal") == "mock (use_mock, for hifigan_universal@1.0)"
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OfflineError(""), "not installed and offline"),
        (ModelUnavailableError(""), "unreachable"),
        (IntegrityError(""), "served with wrong bytes"),
        (DiskSpaceError(""), "too big for the disk"),
        (StoreError(""), "not storable"),
        (MissingDependencyError(""), "not runnable without a missing dependency"),
        (ModelLoadError(""), "not loadable"),
    ],
)
def test_each_reason_has_its_words(error: Exception, reason: str) -> None:
    assert isinstance(error, RECOVERABLE)
    assert reason_of(error) == reason


# What a fallback may not change


def test_hubert_gives_its_own_shape_under_every_policy(tmp_path: Path) -> None:
    second = np.full(16000, 0.1, np.float32)
    with pytest.raises(OfflineError, match=r"hubert_base@1\.0 needs pytorch_model\.bin"):
        ModelRegistry(tmp_path / "m", offline=True, fallback="compact").load_hubert()
    mocked = ModelRegistry(tmp_path / "m", offline=True, fallback="mock")
    with pytest.warns(FallbackWarning, match="A mock"):
        hubert = mocked.load_hubert()
    assert np.asarray(hubert.extract_features(second)).shape[-1] == 768
    assert mocked.is_mock("hubert_base")


def test_another_installed_version_comes_before_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version 2 of a vocoder cannot be had; version 1, of the same promises, is installed."""
    built: list[str] = []

    def build(files: object, version: ModelVersion, device: str) -> ModelVersion:
        built.append(version.key)
        return version

    monkeypatch.setattr("auto_voice.models.hifigan_model.build", build)
    old, new = (write_tone(tmp_path / f"{n}.wav", 100.0 * n) for n in (1, 2))
    promises = {"sample_rate": 22050, "hop_samples": 256, "bands": 80}
    versions = {
        "0.5": version_entry(old, "hifigan", params={**promises, "sample_rate": 24000}),
        "1": version_entry(old, "hifigan", params=promises),
        "2": version_entry(new, "hifigan", params=promises),
    }
    path = write_catalog(tmp_path / "c.yaml", {"mine": model_entry(versions, kind="vocoder")})
    registry(path, "none").pull("mine", "1")
    registry(path, "none").pull("mine", "0.5")
    new.unlink()
    for policy in ("compact", "mock"):
        found = registry(path, policy)
        with pytest.warns(FallbackWarning, match="mine@1 stands in for mine@2"):
            assert found.load("mine").key == "mine@1"
        assert found.resolved("mine") == "mine@1 (fallback: mine unreachable)"
    assert set(built) == {"mine@1"}


def test_the_policy_mock_means_the_mock(config: Path) -> None:
    found = registry(config, "mock")
    with pytest.warns(FallbackWarning, match="A mock, which makes no speech, stands in"):
        assert found.load("my_vocoder").mock
    assert found.resolved("my_vocoder") == "mock (fallback: my_vocoder unreachable)"


def test_a_missing_device_keeps_the_model_and_moves_it_to_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    devices: list[str] = []

    def build(files: object, version: ModelVersion, device: str) -> object:
        devices.append(device)
        return object()

    monkeypatch.setattr("auto_voice.models.hifigan_model.build", build)
    wave = write_tone(tmp_path / "v.wav")
    entry = model_entry({"1": version_entry(wave, "hifigan")}, kind="vocoder")
    path = write_catalog(tmp_path / "c.yaml", {"mine": entry})
    absent = "cuda:97"
    for policy in ("none", "compact", "mock"):
        found = registry(path, policy, device=absent)
        with caplog.at_level(logging.WARNING):
            found.load("mine")
        assert "mine@1 runs on the CPU, because device cuda" in caplog.text
        assert devices.pop() == "cpu"
        why = "on the CPU, since cuda:97 is missing or too small"
        assert found.resolved("mine") == f"mine@1 ({why})"


def test_a_fallback_is_told_once_and_points_at_the_caller(
    config: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = registry(config, "compact")
    with caplog.at_level(logging.WARNING), pytest.warns(FallbackWarning) as warned:
        found.load("my_vocoder")
    assert len(caplog.records) == 1
    assert [warning.filename for warning in warned] == [__file__]


def test_a_fallback_points_at_a_script_that_nothing_calls(config: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from auto_voice.models import ModelRegistry\n"
        f"registry = ModelRegistry({str(tmp_path)!r}, config={str(config)!r}, fallback='compact')\n"
        "registry.load('my_vocoder')\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=True, env=environment
    )
    assert f"{script}:3: FallbackWarning" in done.stderr


# Warming up


def test_a_warm_up_warms_what_is_loaded_afterwards(tmp_path: Path) -> None:
    found = ModelRegistry(tmp_path / "m", use_mock=True)
    names = set(found.warmup_models())
    assert {"hubert_base", "hifigan_universal", "speaker_encoder"} <= names
    before = found.loaded()
    found.load_hubert()
    found.load_hifigan()
    found.load_speaker_encoder()
    assert set(found.loaded()) == set(before)


def test_a_warm_up_includes_what_was_loaded_by_name(tmp_path: Path) -> None:
    found = ModelRegistry(tmp_path / "m", use_mock=True)
    found.load("vocoder_compact")
    assert "vocoder_compact@1.0" in found.warmup_models()


def test_a_warm_up_fetches_no_model_that_no_conversion_uses(tmp_path: Path) -> None:
    assert "hubert_base" not in ModelRegistry(tmp_path / "m", offline=True)._usual_names()


def test_a_mock_stands_in_with_the_content_space_of_the_real_model(tmp_path: Path) -> None:
    """The bundled converter takes it, so that a pipeline with one missing model still runs."""
    found = ModelRegistry(tmp_path / "m", offline=True, fallback="mock")
    with pytest.warns(FallbackWarning, match="A mock"):
        encoder = found.load("content_whisper")
    converter = found.load("converter_compact")
    content = encoder.encode(np.ones(16000, np.float32) * 0.1)
    assert content.space == encoder.space == converter.content_space
    assert content.features.shape == (50, encoder.dims)


def test_a_stale_pin_of_hubert_stops_no_warm_up(tmp_path: Path) -> None:
    found = ModelRegistry(tmp_path / "m", use_mock=True)
    usual = found._usual_names()
    assert "hubert_base" in usual
    (tmp_path / "m").mkdir(exist_ok=True)
    pin = {"hubert_base": {"version": "0.0", "sha256": {}}}
    found.pins.path.write_text(json.dumps({"schema": 1, "pins": pin}))
    assert found.pins.problem(found.catalog, "hubert_base")
    assert set(found.warmup_models()) == set(usual) - {"hubert_base"}
