"""When the pipeline fits the converter to a voice, and when it does not."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from auto_voice import load_voice, save_voice
from auto_voice.errors import ConfigError, VoiceError
from auto_voice.inference import PipelineConfig
from auto_voice.inference.checkpoint import fingerprint
from auto_voice.inference.controls import Controls
from auto_voice.progress import Progress
from auto_voice.types import Waveform
from auto_voice.voices.blending import blend_voices
from hand_made_stages import LocalConverter, speech_like


class Learning(LocalConverter):
    """Counts how often it is fitted, and for how long."""

    def __init__(self):
        super().__init__()
        self.fitted = []

    def fine_tune(self, voice, steps, progress=None):
        self.fitted.append(steps)
        if progress is not None:
            progress(1.0)
        learnt = {"weight": np.full(3, float(steps), np.float16)}
        return replace(voice, fine_tuning=learnt, fine_tuned_converter=self.name)


@pytest.fixture
def learning(hand_made):
    def make(**config):
        converter = Learning()
        asked = {"fine_tune": True} | config
        pipeline, _ = hand_made(PipelineConfig(**asked), converter_compact=converter)
        return pipeline, converter

    return make


def test_cloning_fits_once_and_remembers(learning, reference, source):
    pipeline, converter = learning(fine_tune_steps=12)
    voice = pipeline.clone(reference)
    assert voice.fine_tuned_converter == "follow@1"
    assert converter.fitted == [12]
    pipeline.convert(source, voice)
    assert converter.calls[-1].voice.fine_tuning["weight"][0] == 12
    pipeline.convert(source, reference)  # The same recording again.
    assert converter.fitted == [12]


@pytest.mark.parametrize("config", [{"fine_tune_steps": 0}, {"fine_tune": False}])
def test_a_converter_is_not_fine_tuned_unless_asked(learning, reference, config):
    pipeline, converter = learning(**config)
    assert not pipeline.clone(reference).fine_tuning
    assert converter.fitted == []
    assert PipelineConfig().fine_tune is False


def test_a_voice_asked_for_its_embedding_alone_is_not_fitted(learning, reference):
    pipeline, converter = learning()
    pipeline.clone(reference, fine_tune=False)
    assert converter.fitted == []


def test_a_voice_stored_fine_tuned_is_used_so_without_asking(learning, reference, source, tmp_path):
    path = save_voice(tmp_path / "ann.safetensors", learning()[0].clone(reference))
    pipeline, converter = learning(fine_tune=False)
    assert pipeline.convert(source, path).voice.fine_tuned_converter == "follow@1"
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
    assert result.voice.fine_tuned_converter == "follow@2"


def test_a_blend_has_no_recording_to_learn_from(learning, reference, source):
    pipeline, converter = learning()
    second = pipeline.clone(Waveform(speech_like(6.0, 100.0, seed=9), 16000))
    blend = blend_voices([(pipeline.clone(reference), 0.5), (second, 0.5)])
    fitted = len(converter.fitted)
    result = pipeline.convert(source, blend)
    assert len(converter.fitted) == fitted
    assert result.voice.fine_tuning["weight"][0] == pytest.approx(40, rel=1e-3)


def test_a_fitting_to_another_converter_that_cannot_be_made_again_is_named(
    learning, reference, source
):
    pipeline, converter = learning()
    old = replace(pipeline.clone(reference), fine_tuned_converter="follow@0")
    blend = replace(old, speech=None)
    result = pipeline.convert(source, blend)
    assert any(
        "was fine-tuned with follow@0 and is spoken by follow@1" in note for note in result.notes
    )
    assert not converter.calls[-1].voice.fine_tuning
    unfitting, _ = learning(fine_tune_steps=0)
    assert any("fine-tuned with follow@0" in note for note in unfitting.convert(source, old).notes)
    again = pipeline.convert(source, old)
    assert not any("follow@0" in note for note in again.notes)
    assert again.voice.fine_tuned_converter == "follow@1"


def test_progress_of_the_fitting_is_told(learning, reference):
    seen = []
    pipeline, _ = learning()
    pipeline.clone(reference, name="ann", progress=seen.append)
    assert [event for event in seen if event.stage == "fine-tune"] == [
        Progress("fine-tune", 40, 40, "ann")
    ]


@pytest.mark.parametrize("steps", [-1, 10**6])
def test_impossible_numbers_of_steps(steps):
    with pytest.raises(ConfigError, match="fine_tune_steps must lie between 0 and"):
        PipelineConfig(fine_tune_steps=steps)


def test_threads_that_want_one_voice_fit_it_once(learning, reference):
    pipeline, converter = learning()
    entered, go_on = threading.Event(), threading.Event()
    fit = converter.fine_tune

    def slow(voice, steps, progress=None):
        entered.set()
        assert go_on.wait(30)
        return fit(voice, steps, progress)

    converter.fine_tune = slow
    voice = pipeline.clone(reference, fine_tune=False)
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(pipeline.voice, voice)
        assert entered.wait(30)
        rest = [pool.submit(pipeline.voice, voice) for _ in range(3)]
        go_on.set()
        found = [one.result() for one in (first, *rest)]
    assert converter.fitted == [40]
    assert all(one.fine_tuned_converter == "follow@1" for one in found)


def test_a_fitting_that_is_stopped_is_begun_again(learning, reference):
    pipeline, converter = learning()
    voice = pipeline.clone(reference, fine_tune=False)
    fit = converter.fine_tune

    def stopped(*_):
        raise InterruptedError

    converter.fine_tune = stopped
    with pytest.raises(InterruptedError):
        pipeline.voice(voice)
    converter.fine_tune = fit
    assert pipeline.voice(voice).fine_tuning


def test_another_voice_from_the_same_recording_is_fitted_by_itself(learning, reference):
    """The same speech heard through other features teaches other weights."""
    pipeline, converter = learning()
    voice = pipeline.clone(reference)
    other = {**voice.frames, "mel": voice.frames["mel"] + 1}
    pipeline.voice(replace(voice, frames=other, fine_tuning={}, fine_tuned_converter=""))
    assert len(converter.fitted) == 2


def test_a_partial_of_another_fitting_is_another_work(learning, reference, tmp_path):
    voice = learning()[0].clone(reference)
    changed = {"weight": voice.fine_tuning["weight"] + np.float16(1)}
    keys = {
        fingerprint("source", one, Controls(), {}, 30.0)
        for one in (voice, replace(voice, fine_tuning=changed), replace(voice, fine_tuning={}))
    }
    assert len(keys) == 3


@pytest.mark.parametrize(
    "forged",
    [
        {"weight": np.full(3, 1e3, np.float16)},
        {"weight": np.full(3, np.inf, np.float16)},
        {"weight": np.full(3, 1e9, np.float64)},
        {"weight": np.ones(3, np.int16)},
        {f"weight.{n}": np.zeros(1, np.float16) for n in range(1001)},
        {"w" * 201: np.zeros(1, np.float16)},
    ],
    ids=["large", "infinite", "beyond half precision", "whole numbers", "many", "long name"],
)
def test_a_forged_fine_tuning_in_a_file_is_refused(learning, reference, tmp_path, forged):
    voice = replace(learning()[0].clone(reference), fine_tuning=forged)
    with pytest.raises(VoiceError, match="clone the voice again"):
        load_voice(save_voice(tmp_path / "forged.safetensors", voice))


def test_a_blend_says_who_was_fitted_to_another_converter(learning, reference):
    voice = learning()[0].clone(reference)
    other = replace(voice, name="ben", fine_tuned_converter="follow@2")
    notes = blend_voices([(voice, 0.5), (other, 0.5)]).notes
    assert any("ben was fine-tuned with follow@2" in note for note in notes)


def test_the_warm_up_gives_no_advice(learning, caplog):
    caplog.set_level(logging.INFO)
    learning()[0].warmup()
    assert "bare embedding" not in caplog.text


def test_a_voice_stored_without_fine_tuning_is_used_without(learning, reference, source, tmp_path):
    made, _ = learning(fine_tune=False)
    path = save_voice(tmp_path / "ann.safetensors", made.clone(reference))
    assert load_voice(path).speech is not None
    pipeline, converter = learning(fine_tune=False)
    pipeline.convert(source, path)
    pipeline.convert(source, load_voice(path))
    assert converter.fitted == []
