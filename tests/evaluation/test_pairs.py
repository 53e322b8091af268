"""Lists of conversions from CSV files and folders, and sentences for bad ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import soundfile

from auto_voice.errors import EvaluationError
from auto_voice.evaluation.pairs import read_pairs, read_test_set, read_trials
from evaluation_kit import RATE, sing


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def test_csv_rows_are_relative_to_the_file(tmp_path: Path) -> None:
    touch(*(tmp_path / n for n in ("s.wav", "t1.wav", "t2.wav", "c.wav", "p.wav")))
    (tmp_path / "list.csv").write_text(
        "\ufeffSource,target,converted,transcript,parallel,target_speaker\n"
        's.wav,t1.wav|t2.wav,c.wav,"Hello, you",p.wav,ann\n',
        encoding="utf-8",
    )
    (pair,) = read_pairs(tmp_path / "list.csv")
    assert pair.id == "s__t1"
    assert [t.name for t in pair.targets] == ["t1.wav", "t2.wav"]
    assert (pair.transcript, pair.target_speaker, pair.source_speaker) == ("Hello, you", "ann", "s")
    assert pair.parallel == tmp_path / "p.wav"


def test_tabs_separate_too_and_equal_pairs_get_their_own_ids(tmp_path: Path) -> None:
    touch(*(tmp_path / n for n in ("s.wav", "t.wav", "c.wav")))
    (tmp_path / "pairs.csv").write_text("source\ttarget\tconverted\n" + "s.wav\tt.wav\tc.wav\n" * 2)
    assert [i.id for i in read_pairs(tmp_path)] == ["s__t", "s__t#2"]


def test_a_folder_pairs_files_by_name(tmp_path: Path) -> None:
    touch(
        *(tmp_path / p / f"a{e}" for p, e in
          (("source", ".wav"), ("target", ".flac"), ("converted", ".mp3"), ("transcripts", ".txt")))
    )  # fmt: skip
    (tmp_path / "transcripts" / "a.txt").write_text("hello\n")
    (pair,) = read_pairs(tmp_path)
    assert (pair.id, pair.transcript, pair.targets[0].suffix) == ("a", "hello", ".flac")


def test_a_folder_names_source_and_target_in_the_converted_file(tmp_path: Path) -> None:
    touch(
        tmp_path / "source/tale.wav",
        tmp_path / "target/ann/1.wav",
        tmp_path / "target/ann/2.wav",
        tmp_path / "target/bob.wav",
        tmp_path / "converted/tale__ann.wav",
        tmp_path / "converted/tale_to_bob.wav",
        tmp_path / "converted/.hidden.wav",
        tmp_path / "converted/readme.txt",
    )
    ann, bob = read_pairs(tmp_path)
    assert (ann.target_speaker, len(ann.targets)) == ("ann", 2)
    assert (bob.target_speaker, len(bob.targets)) == ("bob", 1)
    assert ann.source == bob.source


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("source,target\ns.wav,t.wav\n", "lacks the column converted"),
        ("source,target,converted\n", "has no rows"),
        ("", "lacks the column"),
        ("source,target,converted\ns.wav,t.wav,nowhere.wav\n", r"list.csv:2: nowhere.wav"),
        ("source,target,converted\ns.wav,,s.wav\n", "target is empty"),
        ("source,target,converted\n,t.wav,s.wav\n", "an empty cell"),
    ],
)
def test_a_bad_list_is_answered_with_the_line(tmp_path: Path, content: str, says: str) -> None:
    touch(tmp_path / "s.wav", tmp_path / "t.wav")
    (tmp_path / "list.csv").write_text(content)
    with pytest.raises(EvaluationError, match=says):
        read_pairs(tmp_path / "list.csv")


def test_bad_places_are_answered_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="does not exist"):
        read_pairs(tmp_path / "nowhere")
    with pytest.raises(EvaluationError, match="no folder source"):
        read_pairs(tmp_path)
    for name in ("source", "target", "converted"):
        (tmp_path / name).mkdir()
    with pytest.raises(EvaluationError, match="holds no conversions"):
        read_pairs(tmp_path)
    touch(tmp_path / "converted/lonely.wav")
    with pytest.raises(EvaluationError, match="no recording named lonely"):
        read_pairs(tmp_path)
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EvaluationError, match="UTF-8"):
        read_pairs(tmp_path / "bytes.csv")


def test_a_test_set_is_every_ordered_pair_without_reusing_a_recording(tmp_path: Path) -> None:
    touch(*(tmp_path / s / f"{s}{k}.wav" for s in "abc" for k in range(4)))
    (tmp_path / "a" / "a1.txt").write_text("words of a one")
    pairs = read_test_set(tmp_path, per_speaker=2, references=2)
    assert len(pairs) == 3 * 2 * 2
    assert {(i.source_speaker, i.target_speaker) for i in pairs} == {
        (x, y) for x in "abc" for y in "abc" if x != y
    }
    sources = {i.source for i in pairs}
    assert not sources & {t for i in pairs for t in i.targets}
    assert all(len(i.targets) == 2 for i in pairs)
    assert len(read_test_set(tmp_path, limit=5)) == 5
    assert len({i.source_speaker for i in read_test_set(tmp_path, limit=3)}) > 1
    assert {len(i.targets) for i in read_test_set(tmp_path, references=0)} == {3}
    transcripts = {i.transcript for i in read_test_set(tmp_path, references=1)}
    assert transcripts == {"", "words of a one"}


def test_a_test_set_needs_two_speakers(tmp_path: Path) -> None:
    touch(tmp_path / "a/1.wav", tmp_path / "a/2.wav", tmp_path / "b/1.wav")
    with pytest.raises(EvaluationError, match="at least two folders"):
        read_test_set(tmp_path)
    with pytest.raises(EvaluationError, match="not a folder"):
        read_test_set(tmp_path / "a/1.wav")


def test_trials_say_who_is_the_same(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "x.wav", sing().samples, RATE)
    (tmp_path / "t.csv").write_text("a,b,same\nx.wav,x.wav,1\nx.wav,x.wav,no\n")
    assert [t[2] for t in read_trials(tmp_path / "t.csv")] == [True, False]
    (tmp_path / "t.csv").write_text("a,b,same\nx.wav,x.wav,perhaps\n")
    with pytest.raises(EvaluationError, match=":2: the column same says 'perhaps'"):
        read_trials(tmp_path / "t.csv")


def test_a_quoted_transcript_may_span_lines(tmp_path: Path) -> None:
    for name in ("s.wav", "t.wav", "c.wav"):
        (tmp_path / name).touch()
    table = tmp_path / "pairs.csv"
    table.write_text('source,target,converted,transcript\ns.wav,t.wav,c.wav,"one\ntwo"\n')
    assert read_pairs(table)[0].transcript.split() == ["one", "two"]
