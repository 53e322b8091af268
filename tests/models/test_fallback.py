"""Fallbacks: only what the policy allows, and never unseen."""

from __future__ import annotations

import logging
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
from auto_voice.models import FallbackWarning, ModelRegistry
from auto_voice.models.registry.fallback import RECOVERABLE, reason_of
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
    assert model is found.load("griffin_lim")
    expected = "griffin_lim@1.0 stands in for my_vocoder@1, which is unreachable."
    assert [str(w.message) for w in warned] == [expected]
    assert expected in caplog.text
    assert "my_vocoder@1 unreachable: No source could serve" in caplog.text
    assert found.resolved("my_vocoder") == "griffin_lim@1.0 (fallback: my_vocoder unreachable)"
    assert not found.is_mock("my_vocoder")


def test_who_steps_in_speaks_the_same_space(config: Path) -> None:
    for version in ("1.2", "1.5"):
        found = ModelRegistry(config.parent / "m", fallback="compact", offline=True)
        with pytest.warns(FallbackWarning):
            model = found.load("content_whisper", version)
        assert model.name == f"content_compact@{version}"
        assert model.space == f"content_space@{version}"


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
    with pytest.warns(FallbackWarning):
        found.load("my_vocoder")


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


def test_mock_is_the_last_resort_after_compact(
    config: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = registry(config, "mock")
    with pytest.warns(FallbackWarning):
        found.load("my_vocoder")
    assert found.resolved("my_vocoder").startswith("griffin_lim@1.0")

    def fail(*_: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr("auto_voice.models.griffin_lim_model.build", fail)
    found = registry(config, "mock")
    with caplog.at_level(logging.WARNING), pytest.warns(FallbackWarning, match="A mock"):
        assert found.load("my_vocoder").mock
    assert "griffin_lim@1.0 cannot stand in for my_vocoder@1" in caplog.text


def test_the_compact_model_has_no_compact_model(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr("auto_voice.models.griffin_lim_model.build", fail)
    with pytest.raises(ModelLoadError):
        registry(config, "compact").load("griffin_lim")


def test_offline_is_said_as_such(tmp_path: Path) -> None:
    found = ModelRegistry(tmp_path / "m", offline=True, fallback="compact")
    with pytest.warns(FallbackWarning, match="not installed and offline"):
        found.load_hifigan()
    assert found.resolved("hifigan_universal") == (
        "griffin_lim@1.0 (fallback: hifigan_universal not installed and offline)"
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
