"""When the pipeline fits the converter to a voice, and when it does not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hand_made_stages import LocalConverter, speech_like

from auto_voice.errors import ConfigError
from auto_voice.inference import PipelineConfig, save_voice
from auto_voice.inference.blending import blend_voices
from auto_voice.types import Waveform


class Learning(LocalConverter):
    """Counts how often it is fitted, and for how long."""

    def __init__(self):
        super().__init__()
        self.fitted = []

    def adapt(self, voice, steps, progress=None):
        self.fitted.append(steps)
        if progress is not None:
            progress(1.0)
        learnt = {"weight": np.full(3, float(steps), np.float16)}
        return replace(voice, adaptation=learnt, adapted_to=self.name)


@pytest.fixture
def learning(hand_made):
    def make(**config):
        converter = Learning()
        pipeline, _ = hand_made(PipelineConfig(**config), converter_compact=converter)
        return pipeline, converter

    return make


def test_cloning_fits_once_and_remembers(learning, reference, source):
    pipeline, converter = learning(adaptation_steps=12)
    voice = pipeline.clone(reference)
    assert voice.adapted_to == "follow@1"
    assert converter.fitted == [12]
    pipeline.convert(source, voice)
    assert converter.calls[-1].voice.adaptation["weight"][0] == 12
    pipeline.convert(source, reference)  # The same recording again.
    assert converter.fitted == [12]


def test_no_steps_no_fitting(learning, reference):
    pipeline, converter = learning(adaptation_steps=0)
    assert not pipeline.clone(reference).adaptation
    assert converter.fitted == []


def test_a_voice_asked_for_its_embedding_alone_is_not_fitted(learning, reference):
    pipeline, converter = learning()
    pipeline.clone(reference, adapt=False)
    assert converter.fitted == []


def test_a_stored_voice_is_used_as_it_is_and_refitted_for_another_converter(
    learning, reference, source, tmp_path
):
    pipeline, _ = learning()
    path = save_voice(tmp_path / "ann.safetensors", pipeline.clone(reference))
    fresh, other = learning()
    fresh.convert(source, path)
    assert other.fitted == []
    other.name = "follow@2"
    result = fresh.convert(source, path)
    assert len(other.fitted) == 1
    assert result.voice.adapted_to == "follow@2"


def test_a_blend_has_no_recording_to_learn_from(learning, reference, source):
    pipeline, converter = learning()
    second = pipeline.clone(Waveform(speech_like(6.0, 100.0, seed=9), 16000))
    blend = blend_voices([(pipeline.clone(reference), 0.5), (second, 0.5)])
    fitted = len(converter.fitted)
    result = pipeline.convert(source, blend)
    assert len(converter.fitted) == fitted
    assert result.voice.adaptation["weight"][0] == pytest.approx(40, rel=1e-3)


def test_progress_of_the_fitting_is_told(learning, reference):
    seen = []
    pipeline, _ = learning()
    pipeline.clone(reference, progress=seen.append)
    assert seen == [1.0]


@pytest.mark.parametrize("steps", [-1, 10**6])
def test_impossible_numbers_of_steps(steps):
    with pytest.raises(ConfigError, match="adaptation_steps must lie between 0 and"):
        PipelineConfig(adaptation_steps=steps)
