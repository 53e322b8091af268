"""Fitting a converter to a voice: it learns, it is exact about what it changes, it is safe."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from auto_voice import load_voice, save_voice
from auto_voice.audio.mel import CEPSTRA_SIZE
from auto_voice.errors import MissingDependencyError, VoiceError
from auto_voice.models import converter_model
from auto_voice.training import fine_tuning
from auto_voice.training.fine_tuning import (
    LEAST_FRAMES,
    MOST_TIMES_LONGER,
    SEEN_FRAMES,
    SHORT_FRAMES,
    Adam,
    FineTuningPlan,
    _leave_out,
    fine_tune,
)
from auto_voice.training.networks.generators import ConverterNet
from auto_voice.types import Content, Pitch, Voice
from auto_voice.voices.blending import blend_voices
from graph_kit import converter as stage

FRAMES = 240
RATE = 22050 / 256


@pytest.fixture
def converter():
    torch.manual_seed(0)
    return stage(ConverterNet(dims=4, width=32, blocks=2, heads=2).eval())


def voice(tilt=0.0, frames=FRAMES, seed=0, **changes):
    """A speaker whose mel is a fixed function of content, darker or brighter by ``tilt``."""
    rng = np.random.default_rng(seed)
    content = np.repeat(rng.normal(size=(-(-frames // 12), 4)), 12, axis=0)[:frames]
    mixing = np.random.default_rng(7).normal(size=(4, 80))
    mel = -5.5 + 0.6 * content @ mixing + tilt * np.linspace(-1, 1, 80)
    pitch = np.stack([np.full(frames, np.log(150.0)), np.ones(frames)], axis=1)
    embedding = np.eye(256, dtype=np.float32)[0]
    fields = {
        "embedding": embedding, "log_f0_mean": float(np.log(150.0)), "log_f0_std": 0.1,
        "content_space": "toy", "encoder": "ge2e@1.0", "name": "ann",
        "frames": {
            "mel": mel.astype(np.float32), "content": content.astype(np.float32),
            "pitch": pitch.astype(np.float32),
        },
    }  # fmt: skip
    return Voice(**fields | changes)


def spoken(converter, target, seed=5, frames=120):
    """New content in the voice: what the converter gives, and what the speaker would have."""
    other = voice(seed=seed, frames=frames)
    content = Content(other.frames["content"], RATE, "toy")
    pitch = Pitch(np.full(frames, 150.0, np.float32), np.ones(frames, bool), RATE)
    return converter.convert(content, pitch, target, frames).values.T


@pytest.mark.slow
def test_new_words_come_closer_to_the_speaker(converter):
    """Judged on content that was never in the reference."""
    target = voice(tilt=2.0)
    truth = voice(tilt=2.0, seed=5, frames=120).frames["mel"]
    before = np.abs(spoken(converter, target) - truth).mean()
    after = np.abs(spoken(converter, converter.fine_tune(target, 60)) - truth).mean()
    assert after < 0.75 * before


@pytest.mark.slow
def test_each_speaker_gets_what_is_theirs(converter):
    dark = converter.fine_tune(voice(tilt=-2.0), 60)
    bright = converter.fine_tune(voice(tilt=2.0), 60)
    slope = np.linspace(-1, 1, 80)
    assert (spoken(converter, bright) @ slope).mean() > (spoken(converter, dark) @ slope).mean() + 5


def test_the_converter_itself_stays_as_it_was(converter):
    before = {k: v.copy() for k, v in converter.weights.items()}
    plain = spoken(converter, voice())
    converter.fine_tune(voice(tilt=2.0), 10)
    for name, values in converter.weights.items():
        np.testing.assert_array_equal(values, before[name], err_msg=name)
    np.testing.assert_array_equal(spoken(converter, voice()), plain)


def test_the_steps_are_those_of_the_librarys_adam():
    rng = np.random.default_rng(3)
    start = [rng.normal(size=shape) for shape in ((4, 3), (5,), ())]
    ours, theirs = ([torch.tensor(x, requires_grad=True) for x in start] for _ in range(2))
    mine, reference = Adam(ours, (0.9, 0.98)), torch.optim.Adam(theirs, betas=(0.9, 0.98))
    for step in range(12):
        gradients = [torch.tensor(rng.normal(size=x.shape) * 10.0 ** (step % 3)) for x in start]
        mine.step(gradients, rate=0.01 * (step + 1))
        reference.param_groups[0]["lr"] = 0.01 * (step + 1)
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-9)


WITHOUT_COMPILER = """
import sys
import torch
from auto_voice.models.converter_model import PITCH_SIZE, PROFILE_SIZE
from auto_voice.training.fine_tuning import FineTuningPlan, Speech, difference
from auto_voice.training.networks.generators import ConverterNet
from auto_voice.training.networks.loading import with_weights
make = lambda: ConverterNet(dims=4, width=32, blocks=2, heads=2)
arrays = {key: value.numpy() for key, value in make().state_dict().items()}
shapes = (240, 4), (240, PITCH_SIZE), (240, 80), (256,), (PROFILE_SIZE,)
speech = Speech(*(torch.rand(shape) for shape in shapes))
assert difference(with_weights(make, arrays, "a test"), speech, FineTuningPlan(steps=2))
print({"torch._dynamo", "torch.fx.experimental.symbolic_shapes", "sympy"} & set(sys.modules))
"""


@pytest.mark.slow
def test_fine_tuning_imports_no_compiler():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.stdout == "set()\n", done.stderr


def test_the_same_speech_gives_the_same_numbers(converter):
    one, two = converter.fine_tune(voice(), 5), converter.fine_tune(voice(), 5)
    for name, values in one.fine_tuning.items():
        np.testing.assert_array_equal(values, two.fine_tuning[name])


def test_more_speech_is_learnt_from_for_longer():
    plan = FineTuningPlan(steps=40)
    assert plan.steps_for(SHORT_FRAMES // 5) == plan.steps_for(SHORT_FRAMES) == 40
    assert plan.steps_for(2 * SHORT_FRAMES) == 80
    assert plan.steps_for(100 * SHORT_FRAMES) == round(40 * MOST_TIMES_LONGER)
    assert FineTuningPlan(steps=0).steps_for(2 * SHORT_FRAMES) == 0


def test_more_of_what_more_speech_taught_is_kept(converter):
    plan = FineTuningPlan(share=0.5, most_share=0.9)
    assert plan.share_for(SHORT_FRAMES // 5) == plan.share_for(SHORT_FRAMES) == 0.5
    assert plan.share_for(round(1.75 * SHORT_FRAMES)) == pytest.approx(0.7)
    assert plan.share_for(100 * SHORT_FRAMES) == pytest.approx(0.9)
    target = voice(tilt=2.0)
    learnt = {}
    for share in (0.3, 0.6):
        tuned = fine_tune(converter, target, 5, plan=FineTuningPlan(share=share))
        learnt[share] = tuned.fine_tuning["head.bias"].astype(np.float32)
    np.testing.assert_allclose(2 * learnt[0.3], learnt[0.6], rtol=0.01, atol=1e-5)


def test_no_step_shows_the_attention_what_it_must_predict(converter, monkeypatch):
    """Of speech longer than is seen at once, too: the crop may lie outside of what is seen."""
    seen = []

    class Watching(ConverterNet):
        def forward(self, content, pitch, voice):
            for row, crop in enumerate(content[:, :, 0]):
                kept = voice.keys[row, voice.mask[row], 0]
                seen.append((set(crop.tolist()) & set(kept.tolist()), len(voice.mask[row])))
            return super().forward(content, pitch, voice)

    frames = 3 * SEEN_FRAMES
    target = voice(frames=frames)
    target.frames["content"][:, 0] = np.arange(frames)  # A frame tells where it lies.
    monkeypatch.setattr(fine_tuning, "ConverterNet", Watching)
    fine_tune(
        converter, target, 3, plan=FineTuningPlan(noise=0.0)
    )  # With some, no frame would tell.
    assert seen
    assert all(not shared and length == SEEN_FRAMES for shared, length in seen)


def test_progress_ends_at_one_and_may_break_off(converter):
    seen = []
    converter.fine_tune(voice(), 4, seen.append)
    assert seen == [0.25, 0.5, 0.75, 1.0]

    def stop(done):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        converter.fine_tune(voice(), 4, stop)


@pytest.mark.parametrize(
    "unfit",
    [
        voice(frames=LEAST_FRAMES - 1),
        replace(voice(), frames={}),
        voice(content_space="another"),
        replace(voice(), frames={k: v for k, v in voice().frames.items() if k != "pitch"}),
    ],
    ids=["short", "bare", "space", "no pitch"],
)
def test_a_voice_without_enough_to_learn_from_comes_back_as_it_was(converter, unfit):
    assert converter.fine_tune(unfit, 5) is unfit


def test_a_fine_tuning_of_another_converter_changes_nothing(converter):
    learnt = converter.fine_tune(voice(tilt=2.0), 5)
    other = converter_model.CompactConverter(
        converter.graph, converter.weights, converter.shape, "toy@2.0", "toy"
    )
    np.testing.assert_array_equal(spoken(other, learnt), spoken(other, voice(tilt=2.0)))


def test_a_forged_fine_tuning_is_refused_with_a_sentence(converter):
    learnt = converter.fine_tune(voice(), 2)
    for forged in (
        {"stem.weight": np.zeros((2, 2), np.float16)},
        {"no.such": np.zeros(3, np.float16)},
    ):
        bad = voice(fine_tuning=forged, fine_tuned_converter=learnt.fine_tuned_converter)
        with pytest.raises(VoiceError, match="enrol it again"):
            spoken(converter, bad)


def test_a_voice_file_keeps_it(converter, tmp_path):
    learnt = converter.fine_tune(voice(tilt=1.0), 5)
    again = load_voice(save_voice(tmp_path / "ann.safetensors", learnt))
    assert again.fine_tuned_converter == "toy@1.0"
    assert set(again.frames) == set(learnt.frames)
    np.testing.assert_array_equal(spoken(converter, again), spoken(converter, learnt))


def test_damaged_numbers_in_it_are_refused(converter, tmp_path):
    learnt = converter.fine_tune(voice(), 2)
    name = next(iter(learnt.fine_tuning))
    learnt.fine_tuning[name].flat[0] = np.nan
    with pytest.raises(VoiceError, match="damaged"):
        load_voice(save_voice(tmp_path / "ann.safetensors", learnt))


@pytest.mark.slow
def test_a_blend_is_between_its_voices(converter):
    one, two = converter.fine_tune(voice(tilt=-2.0), 20), converter.fine_tune(voice(tilt=2.0), 20)
    blend = blend_voices([(one, 0.5), (two, 0.5)])
    name = "head.bias"
    middle = (one.fine_tuning[name].astype(float) + two.fine_tuning[name]) / 2
    np.testing.assert_allclose(blend.fine_tuning[name], middle, atol=1e-4)
    stranger = voice()
    half = blend_voices([(one, 0.5), (stranger, 0.5)])
    np.testing.assert_allclose(
        half.fine_tuning[name], one.fine_tuning[name].astype(float) / 2, atol=1e-4
    )


@pytest.mark.slow
def test_threads_with_voices_of_their_own_do_not_hear_each_other(converter):
    """Each result is what the voice gives alone, and the converter ends as it began."""
    voices = [
        converter.fine_tune(voice(tilt=-2.0), 20),
        converter.fine_tune(voice(tilt=2.0), 20),
        voice(),
    ]
    alone = [spoken(converter, v) for v in voices]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda i: spoken(converter, voices[i % 3]), range(12)))
    finally:
        sys.setswitchinterval(interval)
    for index, values in enumerate(found):
        np.testing.assert_allclose(values, alone[index % 3], atol=1e-4)


def test_a_caller_in_inference_mode_may_fit_too(converter):
    with torch.inference_mode():
        learnt = converter.fine_tune(voice(tilt=2.0), 5)
    again = converter.fine_tune(voice(tilt=2.0), 5)
    for name, values in learnt.fine_tuning.items():
        np.testing.assert_array_equal(values, again.fine_tuning[name])


def test_a_fitting_that_diverges_changes_nothing(converter, caplog):
    broken = voice(embedding=np.full(256, np.nan, np.float32))
    assert converter.fine_tune(broken, 3) is broken
    assert "diverged" in caplog.text


@pytest.mark.slow
def test_a_voice_is_not_learnt_from_its_own_cepstra():
    """A source's will be another's: what hangs on them at the voice's own size is not kept."""
    torch.manual_seed(0)
    dims = 4 + CEPSTRA_SIZE
    net = ConverterNet(dims=dims, width=32, blocks=2, heads=2, cepstra=True).eval()
    shaped = stage(net)
    target = voice()
    cepstra = np.random.default_rng(3).normal(size=(FRAMES, CEPSTRA_SIZE)).astype(np.float32)
    content = np.hstack([target.frames["content"], cepstra])
    target = replace(target, frames={**target.frames, "content": content})
    learnt = {}
    for warp in (0.0, 0.3):
        plan = FineTuningPlan(warp=warp)
        learnt[warp] = fine_tune(shaped, target, 20, plan=plan).fine_tuning
        again = fine_tune(shaped, target, 20, plan=plan).fine_tuning
        assert all(np.array_equal(again[name], values) for name, values in learnt[warp].items())
    assert any(not np.array_equal(learnt[0.0][n], learnt[0.3][n]) for n in learnt[0.0])
    deaf = stage(ConverterNet(dims=4, width=32, blocks=2, heads=2).eval(), "t@1")
    found = []
    for warp in (0.0, 0.3):
        found.append(fine_tune(deaf, voice(), 20, plan=FineTuningPlan(warp=warp)).fine_tuning)
    assert all(np.array_equal(found[0][name], found[1][name]) for name in found[0])


def test_a_fitting_draws_from_no_generator_but_its_own(converter):
    """So that what other threads draw meanwhile changes nothing, and theirs stay as they were."""
    before = torch.random.get_rng_state()
    quietly = converter.fine_tune(voice(), 5).fine_tuning
    assert torch.equal(torch.random.get_rng_state(), before)

    amid = converter.fine_tune(voice(), 5, progress=lambda _: torch.rand(3)).fine_tuning
    for name, values in quietly.items():
        np.testing.assert_array_equal(values, amid[name])


@pytest.mark.slow
def test_words_that_were_said_once_are_not_learnt_by_heart(converter):
    """Noise on the content: less of what only the reference's few words have, so others fit."""
    rng = np.random.default_rng(1)
    target = voice(tilt=2.0, frames=120)
    spelled = target.frames["mel"] + 2.0 * rng.normal(size=(120, 80)).astype(np.float32)
    target = replace(target, frames={**target.frames, "mel": spelled})
    truth = voice(tilt=2.0, seed=5, frames=120).frames["mel"]

    def missed(plan):
        tuned = fine_tune(converter, target, 200, plan=plan)
        return np.abs(spoken(converter, tuned) - truth).mean()

    plan = FineTuningPlan(share=1.0)
    assert missed(plan) < 0.99 * missed(replace(plan, noise=0.0))


def test_a_fitting_leaves_out_the_share_of_hidden_values_that_it_says():
    plan = FineTuningPlan(dropout=0.25)
    net = ConverterNet(dims=4, width=32, blocks=2, heads=2).eval()
    student = copy.deepcopy(net)
    _leave_out(student, plan)
    for block in student.blocks:
        kept = block.dropout(torch.ones(2, 100, 64))
        assert kept.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
        assert (kept == 0).float().mean() == pytest.approx(0.25, abs=0.02)
    assert {block.dropout.p for block in net.blocks} == {0.0}
    one, other = (block.dropout(torch.ones(1, 9, 64)) for block in student.blocks)
    assert not torch.equal(one, other)
    _leave_out(student, replace(plan, dropout=0.0))
    assert torch.equal(student.blocks[0].dropout(torch.ones(1, 9, 64)), torch.ones(1, 9, 64))


@pytest.mark.slow
def test_voices_fitted_at_once_are_what_they_are_alone(converter):
    voices = [voice(tilt=tilt, seed=seed) for tilt, seed in ((2.0, 0), (-2.0, 1), (0.0, 2))]
    alone = [converter.fine_tune(one, 6).fine_tuning for one in voices]
    with ThreadPoolExecutor(3) as pool:
        at_once = [
            made.fine_tuning for made in pool.map(lambda v: converter.fine_tune(v, 6), voices)
        ]
    for first, second in zip(alone, at_once, strict=True):
        for name, values in first.items():
            np.testing.assert_array_equal(values, second[name])


def test_what_a_session_speaks_is_the_network_with_the_difference_added(converter):
    """The fine-tuned weights, put into torch by hand, give what the voice gives in its session."""
    learnt = converter.fine_tune(voice(tilt=2.0), 10)
    changed = {
        name: values + learnt.fine_tuning[name].astype(np.float32)
        if name in learnt.fine_tuning
        else values
        for name, values in converter.weights.items()
    }
    other = converter_model.CompactConverter(
        converter.graph, changed, converter.shape, "toy@2.0", "toy"
    )
    np.testing.assert_allclose(spoken(converter, learnt), spoken(other, voice(tilt=2.0)), atol=1e-5)


def test_few_sessions_of_fine_tuned_voices_are_kept(converter, monkeypatch):
    monkeypatch.setattr(converter_model, "FINE_TUNED_KEPT", 2)
    voices = [converter.fine_tune(voice(tilt=tilt), 2) for tilt in (-1.0, 0.0, 1.0)]
    first = spoken(converter, voices[0])
    for one in voices:
        spoken(converter, one)
    assert len(converter._fine_tuned) == 2
    np.testing.assert_array_equal(spoken(converter, voices[0]), first)


def test_without_torch_a_voice_converts_and_is_told_what_fine_tuning_needs(converter, monkeypatch):
    learnt = converter.fine_tune(voice(tilt=2.0), 5)
    monkeypatch.setitem(sys.modules, "auto_voice.training.fine_tuning", None)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert spoken(converter, learnt).shape == (120, 80)
    with pytest.raises(MissingDependencyError, match=r"auto-voice\[train\]"):
        converter.fine_tune(voice(), 5)
