from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile
import yaml

from auto_voice.cli import main
from auto_voice.errors import ConfigError, ModelLoadError
from auto_voice.inference import PipelineConfig, VoiceConversionPipeline
from auto_voice.models import ModelRegistry
from auto_voice.models.content_map import map_encoder
from auto_voice.models.registry.catalog_schema import builtin_catalog
from auto_voice.models.registry.store import ModelStore
from auto_voice.types import Content, Waveform
from hand_made_stages import HandMade, LocalContent, speech_like

MIXING = np.random.default_rng(5).standard_normal((2, 6)).astype(np.float32)


class Mixed(LocalContent):
    """The same content, linearly mixed into six dimensions, with an offset."""

    name, space, dims = "hubert_base@1.0", "mixed", 6

    def encode(self, samples):
        content = super().encode(samples)
        return Content(content.features @ MIXING + 3, content.frame_rate, self.space)


class CentredLocal(LocalContent):
    """Content without its utterance mean, as encoders that feed converters give it."""

    def encode(self, samples):
        content = super().encode(samples)
        return Content(content.features - content.features.mean(0), 50.0, self.space)


@pytest.fixture
def registry(tmp_path):
    made = HandMade(content_whisper=CentredLocal(), hubert_base=Mixed())
    made.KINDS = made.KINDS | {"hubert_base": "content"}
    made.store = ModelStore(tmp_path / "models")
    return made


@pytest.fixture
def pipeline(registry):
    config = PipelineConfig(content_encoder="hubert_base")
    return VoiceConversionPipeline(config, model_registry=registry)


@pytest.fixture
def recordings():
    pitches_hz = (110.0, 150.0, 190.0)
    return [Waveform(speech_like(12.0, f0), 16000) for f0 in pitches_hz]


def test_an_encoder_that_was_not_fitted_names_the_command(pipeline, source, reference):
    with pytest.raises(ModelLoadError, match="autovoice models map hubert_base"):
        pipeline.convert(source, reference)


def test_a_converter_of_another_space_names_the_encoder_that_gives_it(tmp_path, source, reference):
    """The bundled weights under other versions, in a space of their own."""
    bundled = yaml.safe_load(builtin_catalog().read_text())["models"]
    other = {}
    for name, key in (("content_compact", "space"), ("converter_compact", "content_space")):
        version = dict(bundled[name]["versions"][bundled[name]["default"]])
        version["params"] = {**version["params"], key: "content_space@9"}
        other[name] = {"versions": {"9": version}}
    catalog = tmp_path / "models.yaml"
    catalog.write_text(yaml.safe_dump({"schema": 1, "models": other}))
    registry = ModelRegistry(tmp_path / "models", config=catalog, offline=True)
    chosen = {"content_encoder": "content_compact", "converter": "converter_compact@9"}
    pipeline = VoiceConversionPipeline(PipelineConfig(**chosen), model_registry=registry)
    with pytest.raises(ModelLoadError, match=r"choose the content encoder content_compact@9"):
        pipeline.content_encoder  # noqa: B018
    chosen["content_encoder"] = "content_compact@9"
    pipeline = VoiceConversionPipeline(PipelineConfig(**chosen), model_registry=registry)
    assert pipeline.content_encoder.space == pipeline.converter.content_space


def test_a_fitted_encoder_speaks_like_the_converters_own(
    registry, pipeline, source, reference, recordings
):
    found, path = map_encoder(registry, "hubert_base", recordings)
    assert found.r2 > 0.99
    assert path.is_file()
    own = VoiceConversionPipeline(model_registry=registry).convert(source, reference)
    through = pipeline.convert(source, reference)
    error = np.linalg.norm(own.samples - through.samples) / np.linalg.norm(own.samples)
    assert error < 0.02
    assert through.models["content"] == "hubert_base@1.0"


def test_what_cannot_be_fitted_is_said(registry, recordings):
    with pytest.raises(ConfigError, match="nothing to do"):
        map_encoder(registry, "content_whisper", recordings)
    with pytest.raises(ConfigError, match="name the encoder that the converter was trained on"):
        map_encoder(registry, "content_whisper", recordings, own_encoder="hubert_base")


def test_the_map_command(registry, recordings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("auto_voice.models.ModelRegistry", lambda **where: registry)
    folder = tmp_path / "speech"
    folder.mkdir()
    for index, recording in enumerate(recordings):
        soundfile.write(folder / f"{index}.wav", recording.samples, 16000)
    (folder / "broken.wav").write_text("no audio")
    assert main.main(["models", "map", "hubert_base", "--speech", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert "on 36 s of speech: it explains 100 %" in out
    assert "left out" in err
    command = ["models", "map", "hubert_base", "--json", "--speech", str(folder / "0.wav")]
    more = [arg for i in (1, 2) for arg in ("--speech", str(folder / f"{i}.wav"))]
    assert main.main([*command, *more]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["target"] == "local"
    (tmp_path / "nothing").mkdir()
    command[-1] = str(tmp_path / "nothing")
    assert main.main(command) == 2
    assert "holds no recordings" in capsys.readouterr().err
