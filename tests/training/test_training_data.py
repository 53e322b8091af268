"""Which speech is found, and who is held out."""

from __future__ import annotations

from pathlib import Path

import pytest

from auto_voice.batch.executors import InlineExecutor
from auto_voice.errors import OfflineError, TrainingError
from auto_voice.training import features
from auto_voice.training.data import Utterance, hold_out, scan


def _touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def test_subfolders_are_speakers_and_loose_files_speak_for_themselves(tmp_path: Path) -> None:
    for name in ("anna/1.wav", "anna/deep/2.flac", "ben/1.mp3", "loose.ogg", "notes.txt"):
        _touch(tmp_path / "speech" / name)
    found = {u.path.name: u.speaker for u in scan([tmp_path / "speech"])}
    assert found["1.wav"] == "speech/ben" or found["1.wav"] == "speech/anna"
    speakers = [u.speaker for u in scan([tmp_path / "speech"])]
    assert sorted(speakers) == ["speech/anna", "speech/anna", "speech/ben", "speech/loose"]


def test_a_list_names_speakers_and_corpora(tmp_path: Path) -> None:
    listing = tmp_path / "list.csv"
    listing.write_text("path,speaker,corpus\na.wav,s1,c1\nb.wav,,c2\n")
    assert scan([listing]) == [
        Utterance(tmp_path / "a.wav", "s1", "c1"),
        Utterance(tmp_path / "b.wav", "c2/b", "c2"),
    ]


@pytest.mark.parametrize(
    ("content", "says"),
    [("file,who\na.wav,s\n", "path,speaker"), ("path,speaker\n", "holds no recordings")],
)
def test_a_list_without_its_columns_or_rows_says_so(
    tmp_path: Path, content: str, says: str
) -> None:
    listing = tmp_path / "list.csv"
    listing.write_text(content)
    with pytest.raises(TrainingError, match=says):
        scan([listing])


def test_a_missing_folder_and_an_empty_one_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="not a folder"):
        scan([tmp_path / "nowhere"])
    with pytest.raises(TrainingError, match="holds no recordings"):
        scan([tmp_path])
    with pytest.raises(TrainingError, match="cannot be read"):
        scan([tmp_path / "nowhere.csv"])


def test_whole_speakers_are_held_out_and_more_data_moves_none_of_them() -> None:
    def utterances(speakers: int) -> list[Utterance]:
        return [Utterance(Path(f"{s}-{n}"), f"s{s}", "c") for s in range(speakers) for n in (0, 1)]

    train, held = hold_out(utterances(200), 0.1)
    assert {u.speaker for u in train}.isdisjoint(u.speaker for u in held)
    assert 8 <= len({u.speaker for u in held}) <= 40
    more_train, _ = hold_out(utterances(400), 0.1)
    assert {u.speaker for u in held}.isdisjoint(u.speaker for u in more_train)


def test_recordings_of_one_speaker_are_held_out_one_by_one() -> None:
    speech = [Utterance(Path(f"{i}.wav"), "anna", "c") for i in range(40)]
    assert not all(hold_out(speech, 0.2))
    train, held = hold_out(speech, 0.2, "recording")
    assert sorted([*train, *held], key=lambda u: int(u.path.stem)) == speech
    assert 2 <= len(held) <= 16
    more = [*speech, Utterance(Path("new.wav"), "anna", "c")]
    assert set(held) <= set(hold_out(more, 0.2, "recording")[1])


def test_two_recordings_are_enough_to_hold_one_out() -> None:
    speech = [Utterance(Path(f"{i}.wav"), "anna", "c") for i in range(2)]
    assert [len(side) for side in hold_out(speech, 0.5, "recording")] == [1, 1]


def test_workers_look_for_models_where_the_training_does(tmp_path, monkeypatch):
    """With its catalog, and without a network where it has none."""
    config = tmp_path / "own.yaml"
    config.write_text("settings:\n  fallback: none\n")
    monkeypatch.setattr(features, "load_file", lambda _: {})
    monkeypatch.setattr(features, "ContentSpace", lambda: None)
    seen = []
    monkeypatch.setattr(features, "load_teacher", lambda registry, _: seen.append(registry))
    models = features.Models(tmp_path / "models", tmp_path / "space", config=config, offline=True)
    with pytest.raises(OfflineError):
        features._loaded(models)
    assert (seen[0].settings.config, seen[0].settings.offline) == (config, True)


def test_a_recording_that_is_gone_is_a_failure_and_stops_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "_loaded", lambda _: None)
    (tmp_path / "anna").mkdir()
    (tmp_path / "anna" / "dead.wav").symlink_to("nowhere.wav")
    (tmp_path / "list.csv").write_text("path,speaker\ngone.wav,ben\n")
    utterances = [*scan([tmp_path / "list.csv"]), *scan([tmp_path])]
    assert [features.load(tmp_path, utterance) for utterance in utterances] == [None, None]
    models = features.Models(tmp_path, tmp_path)
    failures = features.extract(utterances, tmp_path, models, executor=InlineExecutor())
    assert all("does not exist" in why for why in failures.values())
    assert [path.name for path in failures] == ["gone.wav", "dead.wav"]
