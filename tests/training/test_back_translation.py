"""Back-translation: what is converted into whose voice, and the list to train on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from auto_voice.batch.jobs import Defaults, collect
from auto_voice.errors import TrainingError
from auto_voice.inference.result import OutputSpec
from auto_voice.training.back_translation import plan
from auto_voice.training.corpus import Corpus, LoadedUtterance
from auto_voice.training.data import hold_out, scan


@pytest.fixture
def people(tmp_path):
    """Twelve speakers with four recordings each, as files of a few bytes."""
    for speaker in range(12):
        folder = tmp_path / "speech" / f"p{speaker:02d}"
        folder.mkdir(parents=True)
        for index in range(4):
            (folder / f"a{index}.wav").write_bytes(b"RIFF")
    return scan([tmp_path / "speech"])


def loaded(utterance):
    track = np.ones(10, np.float32)
    features = {"mel": np.zeros((80, 10)), "voiced": track, "log_f0": 5 * track}
    return LoadedUtterance(utterance, features)


def test_every_speaker_says_some_recordings_in_the_voices_of_others(people, tmp_path):
    out = tmp_path / "made"
    count, table, speech = plan(people, out, per_speaker=2)
    jobs = collect([str(table)], Defaults(output=OutputSpec(out)))
    assert count == len(jobs) == 24
    speaker_of = {str(u.path.resolve()): u.speaker for u in people}
    said = [speaker_of[job.source] for job in jobs]
    assert all(said.count(speaker) == 2 for speaker in set(speaker_of.values()))
    for job, speaker in zip(jobs, said, strict=True):
        voices = {speaker_of[path] for path in job.voice}
        assert len(job.voice) == 3
        assert len(voices) == 1
        assert speaker not in voices
    assert len({job.target for job in jobs}) == 24
    # Nearly all voices are heard, as nobody is preferred.
    assert len({speaker_of[job.voice[0]] for job in jobs}) > 6

    listed = scan([speech])
    assert {u.path.resolve() for u in people} <= {u.path.resolve() for u in listed}
    made = {str(u.path) for u in listed if u.source_only}
    assert made == {job.target for job in jobs}
    groups = Corpus([loaded(u) for u in listed]).converted
    assert len(groups) == 24
    for group in groups:
        (target,), (source,) = group.targets, group.sources
        assert target.utterance.speaker == source.utterance.speaker
        assert source.utterance.path.name.startswith(target.utterance.path.stem)
    train, held = hold_out(listed, 0.3)
    assert held
    assert not {u.speaker for u in train} & {u.speaker for u in held}
    train, held = hold_out(listed, 0.3, by="recording")
    assert {u.parallel for u in held} - {""}
    assert not {u.parallel for u in train} & {u.parallel for u in held} - {""}


def test_the_same_is_drawn_again_and_something_else_with_another_seed(people, tmp_path):
    tables = [
        plan(people, tmp_path / str(number), 2, seed)[1].read_text()
        for number, seed in enumerate((1, 1, 2))
    ]
    assert tables[0] == tables[1] != tables[2]


def test_what_is_aligned_already_is_listed_and_not_converted(people, tmp_path):
    _, _, speech = plan(people, tmp_path / "one", 1)
    count, table, again = plan(scan([speech]), tmp_path / "two", 4)
    # One recording of each speaker and its conversion belong together and stay as they are.
    assert count == 12 * 3
    assert ".wav" in table.read_text()
    assert "/one/" not in table.read_text()
    before = {u.path.resolve() for u in scan([speech])}
    assert before < {u.path.resolve() for u in scan([again])}


def test_what_was_made_before_is_no_speech_to_convert(people, tmp_path):
    out = tmp_path / "speech" / "made"
    count, table, speech = plan(scan([tmp_path / "speech"]), out, 1)
    for job in collect([str(table)], Defaults(output=OutputSpec(out))):
        (out / job.target).write_bytes(b"RIFF")
    before = table.read_text(), speech.read_text()
    assert plan(scan([tmp_path / "speech"]), out, 1)[0] == count
    assert before == (table.read_text(), speech.read_text())
    # Nor where a list tells it.
    rows = speech.read_text().replace(",made,", ",other,")
    (tmp_path / "list.csv").write_text(
        "\n".join(
            f"{out / cells[0]},{cells[1]},{cells[2]},,{cells[4]}"
            for cells in (row.split(",") for row in rows.splitlines()[1:])
        ).join(("path,speaker,corpus,parallel,role\n", "\n"))
    )
    _, again, _ = plan(scan([tmp_path / "list.csv"]), tmp_path / "two", 4)
    assert "/made/" not in again.read_text()


def test_paths_are_those_that_were_given(people, tmp_path, monkeypatch, caplog):
    """Links are kept, relative paths count from here, and what no table can name is left out."""
    shown = tmp_path / "links"
    for index, utterance in enumerate(people):
        link = shown / utterance.speaker.partition("/")[2] / f"l{index}.wav"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(utterance.path)
    (shown / "p00" / "a|b.wav").write_bytes(b"RIFF")
    monkeypatch.chdir(tmp_path)
    _, table, _ = plan(scan([tmp_path / "links"]), tmp_path / "made", 4)
    jobs = collect([str(table)], Defaults(output=OutputSpec("made")))
    assert len(jobs) == 48
    assert all(path.startswith(f"{shown}/p") for job in jobs for path in (job.source, *job.voice))
    assert "a|b.wav" in caplog.text


def test_bad_input_is_told(people, tmp_path):
    twice = [*people, replace(people[0], speaker="somebody else")]
    with pytest.raises(TrainingError, match=r"listed twice, as .* list it once"):
        plan(twice, tmp_path / "made")
    alone = [u for u in people if u.speaker == people[0].speaker]
    with pytest.raises(TrainingError, match="fewer than two; add speakers"):
        plan(alone, tmp_path / "made")
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"cannot be written .* another folder with --out"):
        plan(people, tmp_path / "file")
