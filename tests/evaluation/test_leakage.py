"""Content leakage on a made-up voice space in which the answer is known."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from auto_voice.errors import EvaluationError
from auto_voice.evaluation.leakage import (
    content_parts,
    measure,
    read_sentences,
    read_trials,
    throat_shares,
)
from auto_voice.models.whisper_encoder import ContentSpace, WhisperContentEncoder


def corpus(folder: Path, voices: int = 4, sentences: int = 3) -> Path:
    rows = [
        (f"{s}/{v}.wav", f"voice{v}", f"sentence{s}")
        for s in range(sentences)
        for v in range(voices)
    ]
    with (folder / "speech.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "speaker", "parallel"), *rows])
    return folder


def voice(path: Path) -> int:
    return int(path.stem)


def test_own_and_other_say_the_same_sentence_and_the_reference_another(tmp_path: Path) -> None:
    trials = read_trials(corpus(tmp_path), 9)
    assert len(trials) == 9
    for trial in trials:
        assert trial.own.parent == trial.other.parent != trial.reference.parent
        assert voice(trial.own) == voice(trial.reference) != voice(trial.other)


def test_the_other_throat_is_another_speakers(tmp_path: Path) -> None:
    rows = [("0/0.wav", "a", "s0"), ("0/1.wav", "a", "s0"), ("0/2.wav", "b", "s0"),
            ("1/0.wav", "a", "s1"), ("1/2.wav", "b", "s1")]  # fmt: skip
    with (tmp_path / "speech.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "speaker", "parallel"), *rows])
    speaker = {tmp_path / path: name for path, name, _ in rows}
    for trial in read_trials(tmp_path, 12):
        assert speaker[trial.own] != speaker[trial.other]


def test_a_list_without_speakers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "speech.csv").write_text("path,parallel\n0/0.wav,s0\n")
    with pytest.raises(EvaluationError, match="lacks one of the columns"):
        read_trials(tmp_path, 1)


def test_a_draw_is_repeated_by_its_seed_and_spreads_over_voices(tmp_path: Path) -> None:
    corpus(tmp_path)
    assert read_trials(tmp_path, 4) == read_trials(tmp_path, 4)
    assert {voice(t.own) for t in read_trials(tmp_path, 4)} == {0, 1, 2, 3}


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_leakage_is_the_share_of_the_source_that_comes_through(
    tmp_path: Path, share: float
) -> None:
    """A converter that keeps ``share`` of the source's vector: own speech costs nothing."""
    vectors = np.eye(8)
    made: dict[Path, np.ndarray] = {}

    def convert(source: Path, reference: Path) -> Path:
        out = tmp_path / f"{source.parent.name}-{source.stem}-{reference.stem}.out"
        made[out] = (1 - share) * vectors[voice(reference)] + share * vectors[voice(source)]
        return out

    def embed(path: Path) -> np.ndarray:
        return made[path] if path in made else vectors[voice(path)]

    found = measure(read_trials(corpus(tmp_path), 8), convert, {"known": embed})["known"]
    assert found["real"].value == pytest.approx(1)
    assert found["own"].value == pytest.approx(1)
    assert found["leakage"].value == pytest.approx(share)
    assert found["unconverted"].value == pytest.approx(0)


def test_a_folder_without_a_list_is_told(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="train corpus"):
        read_trials(tmp_path, 3)


def test_a_voice_with_one_sentence_cannot_be_tried(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="two sentences"):
        read_trials(corpus(tmp_path, sentences=1), 3)


def test_sentences_are_those_that_several_speakers_say(tmp_path: Path) -> None:
    rows = [("0/0.wav", "a", "s0"), ("0/1.wav", "b", "s0"), ("1/0.wav", "a", "s1"),
            ("1/1.wav", "a", "s1"), ("2/0.wav", "a", "")]  # fmt: skip
    with (tmp_path / "speech.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "speaker", "parallel"), *rows])
    assert read_sentences(tmp_path, 5) == [[tmp_path / "0/0.wav", tmp_path / "0/1.wav"]]
    assert len(read_sentences(corpus(tmp_path, sentences=6), 4)) == 4
    assert read_sentences(tmp_path, 4) == read_sentences(tmp_path, 4)
    with pytest.raises(EvaluationError, match="no sentence that several speakers say"):
        read_sentences(corpus(tmp_path, voices=1), 4)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_throats_share_of_the_content_is_its_share_of_the_variance(share: float) -> None:
    """Frames and throats are drawn with known variances, in one group of dims and not the other."""
    rng = np.random.default_rng(0)

    def encode(path: Path) -> np.ndarray:
        words = np.random.default_rng(int(path.parent.name)).standard_normal((400, 8))
        throat = rng.standard_normal((400 + voice(path) % 2, 8))
        throat[:400, 4:] = np.sqrt(1 - share) * words[:, 4:] + np.sqrt(share) * throat[:400, 4:]
        throat[:400, :4] = words[:, :4]
        return throat

    sentences = [[Path(f"{s}/{v}.wav") for v in range(6)] for s in range(5)]
    found = throat_shares(sentences, encode, {"words": slice(0, 4), "both": slice(4, 8)})
    assert found["words"].value == pytest.approx(0)
    assert found["both"].value == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize(
    ("envelope", "cepstra", "parts"),
    [
        (False, False, {"learnt": (0, 16)}),
        (True, False, {"learnt": (0, 16), "envelope": (16, 24)}),
        (True, True, {"learnt": (0, 16), "envelope": (16, 24), "cepstra": (24, 64)}),
    ],
)
def test_parts_of_the_content_are_told_apart(
    envelope: bool, cepstra: bool, parts: dict[str, tuple[int, int]]
) -> None:
    class Nothing:
        device = "cpu"

    subspace = ContentSpace(np.zeros(64), np.ones(64), np.zeros((64, 16)))
    encoder = WhisperContentEncoder(Nothing(), subspace, "a@1", "b", envelope, cepstra)  # type: ignore[arg-type]
    assert {k: (v.start, v.stop) for k, v in content_parts(encoder)[1].items()} == parts
    assert encoder.dims == max(end for _, end in parts.values())


def test_content_of_another_encoder_is_one_part() -> None:
    class Other:
        sample_rate = 16000

    assert content_parts(Other())[1] == {"all": slice(None)}
