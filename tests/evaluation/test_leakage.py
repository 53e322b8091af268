"""Content leakage on a made-up voice space in which the answer is known."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from auto_voice.errors import EvaluationError
from auto_voice.evaluation.leakage import measure, read_trials


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
