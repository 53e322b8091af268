"""Learning across throats: aligned recordings, perturbed copies, pauses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from auto_voice.audio.mel import HIFIGAN_MEL, log_mel
from auto_voice.errors import TrainingError
from auto_voice.training.corpus import Corpus, LoadedUtterance
from auto_voice.training.data import Utterance, hold_out, scan
from auto_voice.training.features import Pauses, perturbed_copy
from auto_voice.training.tasks import ConverterTask, standardise
from speech_kit import DIMS, item

SMALL = {"dims": DIMS, "width": 32, "blocks": 2}


def said(speaker: int, sentence: int, source_only: bool = False) -> LoadedUtterance:
    """A sentence with the content that all say, on the speaker's own tilt, which also shows in
    the content: a throat that a converter could read."""
    speech = item(speaker, sentence)
    content = item(99, sentence).features["teacher"].astype(np.float32)
    content[:, -1] = speaker
    features = dict(speech.features)
    frames = speech.frames
    where = np.arange(frames) * len(content) // frames
    bands = np.arange(80)[:, None]
    tilt = np.cos(np.pi * bands / 80 * (1 + speaker)) * 1.5
    bump = 2 * np.exp(-((bands - 40 - 12 * content[where, 0]) ** 2) / 50)
    features |= {"teacher": content.astype(np.float16), "mel": (tilt - 5.5 + bump).astype("f2")}
    utterance = replace(speech.utterance, parallel=f"sentence{sentence}", source_only=source_only)
    return LoadedUtterance(utterance, features)


def parallel(speakers: int = 3, sentences: int = 3) -> Corpus:
    return Corpus([said(v, s) for v in range(speakers) for s in range(sentences)])


def task(corpus: Corpus, held: Corpus | None = None, **wanted: object) -> ConverterTask:
    return ConverterTask(
        corpus, held or corpus, SMALL, batch=2, frames=64, reference_frames=96, **wanted
    )


def test_a_crop_has_the_content_of_one_and_the_mel_of_another() -> None:
    corpus = parallel()
    made = task(corpus, parallel=1)
    tilts = {v: standardise(said(v, 0).features["mel"].T).mean(0) for v in range(3)}
    for turn in range(20):
        rng = np.random.default_rng(turn)
        ((content, _, mel, (embedding, *_)),) = made._aligned_crops(corpus, corpus.parallel, rng, 1)
        source = round(float(content[:, -1].mean()))
        target = int(embedding.argmax())
        assert source != target
        nearest = min(tilts, key=lambda v: np.abs(tilts[v] - mel.mean(0)).mean())
        assert nearest == target


def test_a_changed_voice_leaves_the_content_of_a_crop_as_it_is() -> None:
    corpus = parallel()
    made = {}
    for share in (0.0, 1.0):
        asked = task(corpus, parallel=1, vtlp=share, embedding_only=0.0)
        rng = np.random.default_rng(4)
        (made[share],) = asked._aligned_crops(corpus, corpus.parallel, rng, 1)
        # Comparisons are of the voices that there are.
        rng = np.random.default_rng(4)
        (plain,) = asked._aligned_crops(corpus, corpus.parallel, rng, 1, training=False)
        assert plain[3][0].any()
    (content, pitch, mel, voice), (same, moved, warped, unknown) = made[0.0], made[1.0]
    np.testing.assert_array_equal(content, same)
    assert voice[0].any()
    assert not unknown[0].any()
    # By one factor, and as far from the voice's mean as before.
    shift = moved[:, 0] - pitch[:, 0]
    assert abs(shift[0]) > 1e-3
    np.testing.assert_allclose(shift, shift[0], atol=1e-5)
    np.testing.assert_allclose(moved[:, 1], pitch[:, 1], atol=1e-5)
    assert np.abs(mel.mean(0) - warped.mean(0)).max() > 0.05


def test_the_same_crop_can_have_its_own_content_for_comparison() -> None:
    corpus = parallel()
    crops = task(corpus, parallel=1)._aligned_crops(
        corpus, corpus.parallel, np.random.default_rng(3), 8, across=False, training=False
    )
    for content, _, _, (embedding, *_) in crops:
        assert round(float(content[:, -1].mean())) == embedding.argmax()


def test_what_a_converter_made_is_a_source_and_never_a_target() -> None:
    corpus = Corpus([said(0, 0), said(0, 1), said(1, 0, source_only=True)])
    assert not corpus.parallel
    (group,) = corpus.converted
    rng = np.random.default_rng(0)
    for _ in range(10):
        target, source = group.draw(rng)
        assert not target.utterance.source_only
        assert source.utterance.source_only
    assert not any(drawn.utterance.source_only for drawn in corpus.draw(rng, 200))
    assert "speaker1" not in corpus.by_speaker


def test_crops_that_are_asked_for_and_cannot_be_had_are_an_error() -> None:
    with pytest.raises(TrainingError, match="parallel crops"):
        task(Corpus([item(0, 0), item(1, 0)]), parallel=4)
    with pytest.raises(TrainingError, match="back_translated crops"):
        task(parallel(), back_translated=4)


@pytest.mark.slow
def test_the_converter_learns_to_take_the_voice_from_the_reference_alone() -> None:
    """The content tells the throat; with aligned crops it stops to matter."""
    torch.manual_seed(0)
    corpus = parallel()
    costs = {}
    for crops in (0, 6):
        torch.manual_seed(0)
        made = task(corpus, parallel=crops)
        made.batch = 8 - crops
        optimiser = torch.optim.Adam(made.model.parameters(), 3e-3)
        for step in range(120):
            optimiser.zero_grad()
            made.loss(np.random.default_rng(step))["loss"].backward()
            optimiser.step()
        made.parallel, made.batch = 6, 8
        figures = made.validate()
        costs[crops] = figures["l1_across_throats"] - figures["l1_same_throat"]
    assert costs[6] < 0.5 * costs[0]


def test_aligned_sentences_are_held_out_whole_and_converted_copies_with_their_speaker() -> None:
    aligned = [
        Utterance(Path(f"{s}-{v}.wav"), f"v{v}", "p", f"s{s}") for s in range(60) for v in range(3)
    ]
    train, held = hold_out(aligned, 0.2)
    assert held
    assert not {u.parallel for u in train} & {u.parallel for u in held}
    copies = [
        Utterance(Path(f"{v}{c}.wav"), f"v{v}", "r", f"s{v}", bool(c))
        for v in range(60)
        for c in (0, 1)
    ]
    train, held = hold_out(copies, 0.2)
    assert held
    assert not {u.speaker for u in train} & {u.speaker for u in held}
    assert len(held) % 2 == 0


def test_a_list_names_what_is_aligned_and_what_is_only_a_source(tmp_path: Path) -> None:
    listing = tmp_path / "list.csv"
    listing.write_text("path,speaker,parallel,role\na.wav,s,7,\nb.wav,s,7,source\nc.wav,s,,\n")
    a, b, c = scan([listing])
    assert a.parallel == b.parallel != "" == c.parallel
    assert [u.source_only for u in (a, b, c)] == [False, True, False]
    listing.write_text("path,speaker,role\na.wav,s,target\n")
    with pytest.raises(TrainingError, match="role"):
        scan([listing])


def test_pauses_lie_around_the_speech_and_noise_at_its_level() -> None:
    speech = np.sin(np.arange(16000) / 16000 * 2 * np.pi * 200).astype(np.float32) * 0.05
    out = Pauses(0.5, 0.25, -60.0, -3.0, seed=1).insert(speech)
    assert len(out) == 16000 + 8000 + 4000
    level = 20 * np.log10(np.sqrt(np.mean(out[:8000] ** 2)))
    assert level == pytest.approx(-60, abs=1.5)
    assert np.array_equal(Pauses().insert(speech), speech)
    silent = Pauses(0.5, 0.5).insert(speech)
    assert not silent[:8000].any()
    assert not silent[-8000:].any()


def test_hum_stands_at_its_frequency() -> None:
    out = Pauses(hum_hz=50.0, hum_dbfs=-50.0, seed=2).insert(np.zeros(16000, np.float32))
    peak = np.abs(np.fft.rfft(out)).argmax()
    assert peak in (50, 100, 150, 200, 250)


def test_pauses_are_drawn_for_a_share() -> None:
    rng = np.random.default_rng(0)
    drawn = [Pauses.draw(rng, 0.3) != Pauses() for _ in range(400)]
    assert np.mean(drawn) == pytest.approx(0.3, abs=0.07)


def test_a_perturbed_copy_has_its_events_where_the_speed_says() -> None:
    """A click at one second: read back in the original's time it must be at one second."""
    samples = np.zeros(32000, np.float32)
    samples[16000] = 1.0
    for seed in range(6):
        played, speed = perturbed_copy(samples, np.random.default_rng(seed))
        assert len(played) == pytest.approx(32000 / speed, abs=2)
        assert np.abs(played).argmax() / 16000 * speed == pytest.approx(1.0, abs=0.005)


def test_a_perturbed_copy_moves_the_spectrum() -> None:
    time = np.arange(16000) / 16000
    samples = np.sin(2 * np.pi * 1000 * time).astype(np.float32)
    played, speed = perturbed_copy(samples, np.random.default_rng(4))
    spectrum = np.abs(np.fft.rfft(played))
    assert spectrum.argmax() * 16000 / len(played) == pytest.approx(1000 * speed, rel=0.02)
    assert log_mel(played, HIFIGAN_MEL).shape[1] > 0
