"""What a training step sees, and that it learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from auto_voice.audio.mel import CEPSTRA_SIZE, cepstral_warp
from auto_voice.errors import TrainingError
from auto_voice.inference.effects import band_centres
from auto_voice.training.corpus import Corpus, crop
from auto_voice.training.networks import encoders
from auto_voice.training.networks.encoders import WhisperLiveNet
from auto_voice.training.tasks import (
    GUARD_FRAMES,
    ContentTask,
    ConverterTask,
    VoiceChange,
    running_peak,
)
from graph_kit import content_net
from speech_kit import DIMS, corpus, item

SMALL = {"dims": DIMS, "width": 32, "blocks": 2}


def test_a_companion_is_another_utterance_of_the_same_speaker() -> None:
    speech = corpus(speakers=3, each=3)
    rng = np.random.default_rng(0)
    for _ in range(30):
        (drawn,) = speech.draw(rng, 1)
        other = speech.same_speaker(rng, drawn)
        assert other is not drawn
        assert other.utterance.speaker == drawn.utterance.speaker


def test_a_lone_utterance_is_its_own_companion() -> None:
    speech = corpus(speakers=2, each=1)
    first = speech.items[0]
    assert speech.same_speaker(np.random.default_rng(0), first) is first


def test_a_speaker_with_much_speech_does_not_drown_the_others() -> None:
    speech = Corpus([item(0, n) for n in range(16)] + [item(1, 0)])
    drawn = speech.draw(np.random.default_rng(0), 4000)
    share = sum(i.utterance.speaker == "speaker1" for i in drawn) / 4000
    # By square roots: 1 against 4.
    assert share == pytest.approx(0.2, abs=0.03)


def test_no_features_is_an_error() -> None:
    with pytest.raises(TrainingError, match="says why"):
        Corpus([])


def test_crops_stay_inside() -> None:
    rng = np.random.default_rng(0)
    for total in (5, 50, 51):
        part = crop(rng, total, 50)
        assert 0 <= part.start < part.stop <= total
        assert part.stop - part.start == min(total, 50)


def test_a_reference_never_shows_the_crop_it_must_explain() -> None:
    speech = corpus(speakers=1, each=1)
    only = speech.items[0]
    # Frame i carries its own number in band 0, so overlap shows.
    numbers = np.arange(only.frames)
    only.features["mel"] = np.tile(numbers.astype(np.float16), (80, 1))
    task = ConverterTask(speech, speech, SMALL, 2, 40, 400, embedding_only=0.0)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        part = crop(rng, only.frames, 40)
        (_, _, _, values), _ = task._voice(speech, only, part, rng, "teacher")
        seen = np.round(values[:, 0] * 2.2 - 5.5)
        assert not ((seen >= part.start - GUARD_FRAMES) & (seen < part.stop + GUARD_FRAMES)).any()


def _train(task: ContentTask | ConverterTask, steps: int) -> tuple[float, float]:
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(task.model.parameters(), 3e-3)
    first = float(task.loss(np.random.default_rng(0))["loss"].detach())
    for step in range(steps):
        loss = task.loss(np.random.default_rng(step))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return first, float(task.loss(np.random.default_rng(0))["loss"].detach())


def test_the_content_task_learns_through_perturbation() -> None:
    torch.manual_seed(0)
    task = ContentTask(corpus(), corpus(2), content_net(DIMS), 8, 40)
    first, last = _train(task, 60)
    assert last < 0.7 * first
    figures = task.validate()
    assert figures["r2_clean"] > 0.3
    assert figures["r2_streamed"] > 0.3
    assert figures == task.validate()


def test_a_content_encoder_begins_with_the_best_subspace_of_its_states() -> None:
    torch.manual_seed(0)
    speech, net = corpus(), content_net(DIMS)
    with torch.no_grad():
        net.projection.zero_()
    task = ContentTask(speech, speech, net, 8, 40)
    begun = task.validate()["r2_clean"]
    assert begun > 0
    with torch.no_grad():
        net.projection.mul_(1.3)
    assert task.validate()["r2_clean"] < begun
    known = net.projection.clone()
    assert torch.equal(ContentTask(speech, speech, net, 8, 40).model.projection, known)


@pytest.mark.parametrize("remembered", [400, 11])
@pytest.mark.parametrize(("block", "ahead"), [(8, 5), (3, 1), (40, 0), (7, 9)])
def test_content_is_learnt_from_a_stream_as_a_stream_is_encoded(
    block: int, ahead: int, remembered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What training computes in one go is what the network that remembers gives part by part."""
    monkeypatch.setattr(encoders, "REMEMBERED_FRAMES", remembered)
    torch.manual_seed(0)
    net, frames = content_net(DIMS, layers=2), 40
    mel = torch.randn(1, 80, 2 * frames)
    live = WhisperLiveNet(net.shape)
    live.load_state_dict(net.encoder_weights())
    with torch.no_grad():
        learnt = net.states(mel, 7, block, ahead)[0]
        memory = torch.zeros(2, 2, 1, 1, 0, 64)
        for start in range(0, frames, block):
            stop, seen = min(start + block, frames), min(start + block + ahead, frames)
            # The sound goes on here, where a stream has nothing yet beyond what it sees.
            states, held = live.continued(
                net._begun(mel)[:, start:seen], torch.tensor([7 + start]), memory
            )
            memory = torch.cat([memory, held[:, :, :, :, : stop - start]], dim=4)
            memory = memory[:, :, :, :, -remembered:]
            torch.testing.assert_close(states[0, : stop - start], learnt[start:stop])


def test_the_peak_of_a_crop_is_what_a_stream_knows_of_it() -> None:
    energies = np.random.default_rng(0).normal(size=(80, 2 * 30)).astype(np.float32)
    assert running_peak(energies, 0, 0) == energies.max()
    block, ahead = 7, 3
    found = running_peak(energies, block, ahead)
    assert found.shape == (60,)
    for start in range(0, 30, block):
        known = energies[:, : 2 * (start + block + ahead)].max()
        assert (found[2 * start : 2 * (start + block)] == known).all()


def test_content_is_drawn_to_a_mean_of_nothing() -> None:
    """A stream begins before the mean of its content is known."""
    torch.manual_seed(0)
    net = content_net(DIMS)
    task = ContentTask(corpus(), corpus(2), net, 8, 40, streamed=0.0)

    def penalty() -> float:
        terms = task.loss(np.random.default_rng(0))
        return float(terms["loss"].detach() - (1 - terms["r2"]))

    before = penalty()
    with torch.no_grad():
        net.mean.add_(1.0)  # All content moves by one vector.
    moved = penalty()
    assert 0 <= before < moved
    _train(task, 60)
    assert penalty() < 0.5 * moved


@pytest.mark.slow
def test_the_converter_task_learns_the_speaker_from_the_reference() -> None:
    torch.manual_seed(0)
    speech = corpus(speakers=6)
    task = ConverterTask(speech, corpus(2), SMALL, 8, 40, 80)
    first, last = _train(task, 60)
    assert last < 0.5 * first
    # With the voice of somebody else the same content must come out differently.
    rng = np.random.default_rng(1)
    own, _, _ = task.forward(speech, rng, 4)
    for i in speech.items:
        i.features["embedding"] = np.roll(i.features["embedding"], 1)
        i.features["mel"] = i.features["mel"][::-1].copy()
    other, _, _ = task.forward(speech, np.random.default_rng(1), 4)
    assert (own - other).abs().mean() > 0.05


def test_an_invented_voice_moves_crop_reference_and_pitch_alike() -> None:
    speech = corpus(speakers=1, each=1)
    only = speech.items[0]
    only.features["mel"] = np.full_like(only.features["mel"], -9.0)
    only.features["mel"][30] = 0.0
    task = ConverterTask(speech, speech, SMALL, 2, 40, 400, embedding_only=0.0)
    part = slice(0, 40)
    plain, mean = task._voice(speech, only, part, np.random.default_rng(0), "teacher")
    moved, mean_moved = task._voice(
        speech, only, part, np.random.default_rng(0), "teacher", VoiceChange(1.2)
    )
    assert mean_moved - mean == pytest.approx(np.log(1.2))
    assert not moved[0].any()
    assert plain[0].any()
    centres = band_centres()
    ratio = centres[moved[3].mean(0).argmax()] / centres[plain[3].mean(0).argmax()]
    assert ratio == pytest.approx(1.2, abs=0.04)
    np.testing.assert_array_equal(moved[2], plain[2])  # What is said stays.


def test_a_changed_voice_has_one_response_on_crop_and_reference() -> None:
    speech = corpus(speakers=2, each=2)
    for one in speech.items:
        one.features["mel"] = np.full_like(one.features["mel"], -7.0)
    task = ConverterTask(
        speech, speech, SMALL, 2, 40, 200, embedding_only=0.0, vtlp=1.0, response_db=6.0
    )
    ((_, _, mel, (_, _, _, values)),) = task._crops(speech, np.random.default_rng(0), 1)
    assert mel[0].std() > 0.05
    # Flat before, whatever frequencies are moved by.
    np.testing.assert_allclose(mel, np.broadcast_to(values[0], mel.shape), atol=1e-5)


def test_a_response_is_as_wide_as_asked_and_keeps_mean_and_silence() -> None:
    rng = np.random.default_rng(0)
    responses = np.stack([VoiceChange.draw(rng, 6.0).response for _ in range(500)])
    decibels = responses * 20 / np.log(10)
    assert decibels.std() == pytest.approx(0.49 * 6, rel=0.1)
    np.testing.assert_allclose(responses.mean(1), 0, atol=1e-6)
    assert np.abs(np.diff(decibels, axis=1)).max() < 2  # Neighbouring bands are alike.
    silence = np.full((80, 3), np.log(1e-5), np.float32)
    assert VoiceChange(1.0, responses[0])(silence).min() == pytest.approx(np.log(1e-5))
    assert VoiceChange.draw(rng, 0.0).response is None


def test_a_reference_is_taken_from_several_recordings_where_one_is_too_short() -> None:
    speech = corpus(speakers=2, each=4, seconds=2.0)
    for number, one in enumerate(speech.items):
        one.features["mel"] = np.full_like(one.features["mel"], -number)
    frames = {}
    for most in (1, 3):
        task = ConverterTask(
            speech, speech, SMALL, 2, 40, 1000, embedding_only=0.0, references=most
        )
        rng = np.random.default_rng(0)
        seen, counts = set(), set()
        for _ in range(40):
            (_, _, keys, values), _ = task._voice(
                speech, speech.items[0], slice(0, 40), rng, "teacher"
            )
            numbers = set(np.round(5.5 - 2.2 * values[:, 0]).astype(int))
            assert len(keys) == len(values)
            # Of the speaker, and never the recording that is to be said.
            assert numbers <= {1, 2, 3}
            seen |= numbers
            counts.add(len(numbers))
            frames[most] = max(frames.get(most, 0), len(values))
        assert seen == {1, 2, 3}
        assert max(counts) == most
    assert frames[1] == speech.items[0].frames
    assert frames[3] == 3 * frames[1]


def test_vtlp_changes_targets_only_where_asked() -> None:
    speech = corpus(speakers=3, each=2)
    targets = {}
    for share in (0.0, 1.0):
        task = ConverterTask(speech, speech, SMALL, 4, 40, 60, vtlp=share)
        _, targets[share], _ = task.forward(speech, np.random.default_rng(3), 4)
        before = task.validate()
        assert task.vtlp == share
        assert before == task.validate()
    assert targets[0.0].shape[-1] == targets[1.0].shape[-1] == 80
    assert not torch.allclose(targets[0.0], targets[1.0])


def test_the_converter_never_hears_a_sources_cepstra_as_they_are() -> None:
    speech = corpus(speakers=3, each=2)
    rng = np.random.default_rng(0)
    for one in speech.items:
        shape = rng.normal(size=(len(one.features["teacher"]), CEPSTRA_SIZE))
        one.features["teacher"] = np.hstack([one.features["teacher"], shape]).astype(np.float16)
    heard = {}
    net = {**SMALL, "dims": DIMS + CEPSTRA_SIZE, "cepstra": True}
    for warp in (0.0, 0.2):
        task = ConverterTask(speech, speech, net, 4, 40, 60, cepstral_vtlp=warp)
        seen: list[torch.Tensor] = []
        task.model.stem.register_forward_hook(lambda _, given, __, seen=seen: seen.append(given[0]))
        task.forward(speech, np.random.default_rng(3), 4)
        heard[warp] = seen[0]
    said, warped = heard[0.0], heard[0.2]
    torch.testing.assert_close(said[:, :DIMS], warped[:, :DIMS])
    end = DIMS + CEPSTRA_SIZE
    torch.testing.assert_close(said[:, end:], warped[:, end:])
    for plain, moved in zip(said[:, DIMS:end], warped[:, DIMS:end], strict=True):
        assert (plain - moved).abs().mean() > 0.01
        # Of one vocal tract: some factor explains the whole crop.
        errors = [
            np.abs(plain.numpy().T @ cepstral_warp(f) - moved.numpy().T).mean()
            for f in np.exp(np.linspace(-0.6, 0.6, 241))
        ]
        assert min(errors) < 0.2 * float((plain - moved).abs().mean())


def test_dropout_leaves_values_out_of_what_trains_alone() -> None:
    speech = corpus(speakers=2, each=2)
    for share in (0.0, 0.5):
        task = ConverterTask(speech, speech, SMALL, 2, 40, 60, dropout=share)
        once, again = (
            task.forward(speech, np.random.default_rng(0), 2)[0].detach() for _ in range(2)
        )
        assert torch.equal(once, again) == (share == 0.0)
        task.model.eval()
        assert task.validate() == task.validate()
