"""From folders of sound to results, and the results' files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile

from auto_voice.audio.pitch import PITCH_RULES
from auto_voice.batch.executors import InlineExecutor, WorkerSpec
from auto_voice.errors import ConfigError, EvaluationError
from auto_voice.evaluation import (
    evaluate,
    load_evaluation,
    load_judges,
    read_pairs,
    save_evaluation,
    scoring,
)
from auto_voice.evaluation.judges import DEFAULT_MODELS, Judges
from auto_voice.evaluation.pairs import Pair, convert_all, read_test_set
from auto_voice.evaluation.results import write_text
from auto_voice.evaluation.scoring import evaluate_on, pair_spec
from auto_voice.evaluation.tables import markdown, pair_rows_csv
from evaluation_kit import PINS, RATE, Copycat, TableRecogniser, judging, sing

Folder = Callable[..., Path]


@pytest.mark.slow
def test_a_good_system_scores_above_a_copy_of_the_source(
    make_folder: Folder, judges: Judges
) -> None:
    good = evaluate(read_pairs(make_folder("good")), judges, name="good").estimates
    copy = evaluate(read_pairs(make_folder("copy", quality=0.0)), judges, name="copy").estimates
    assert good["secs"].value > 0.8 > copy["secs"].value
    assert copy["source_similarity"].value > good["source_similarity"].value
    assert copy["secs"].value == pytest.approx(copy["unconverted_secs"].value, abs=0.05)
    assert good["secs"].low < good["secs"].value < good["secs"].high
    assert good["f0_correlation"].value > 0.95
    assert good["duration_ratio"].value == pytest.approx(1.0)
    assert good["wer"].value == 0.0


def test_word_errors_are_pooled_over_pairs(make_folder: Folder, judges: Judges) -> None:
    root = make_folder(pairs=2)
    (root / "transcripts").mkdir()
    (root / "transcripts/p0.txt").write_text("red cat blue")
    (root / "transcripts/p1.txt").write_text("red cat blue dog")
    result = evaluate(read_pairs(root), judges, name="x")
    assert [p.counts["word_edits"] for p in result.pairs] == [1, 0]
    assert result.estimates["wer"].value == pytest.approx(1 / 7)
    assert result.settings["reference_text"] == "given"


def test_a_shared_recording_is_judged_once(
    make_folder: Folder, judges: Judges, recogniser: TableRecogniser
) -> None:
    pair = read_pairs(make_folder(pairs=1))[0]
    evaluate([pair, replace(pair, id="again"), replace(pair, id="third")], judges, name="x")
    assert recogniser.calls == 3  # the source, twice, and the conversion


def test_what_the_recogniser_is_unsure_of_is_told(
    make_folder: Folder, judges: Judges, recogniser: TableRecogniser
) -> None:
    pair = read_pairs(make_folder(pairs=1))[0]
    steady = evaluate([pair], judges, name="x").estimates["unconverted_wer"]
    assert steady.value == 0.0
    samples = soundfile.info(pair.source).frames
    recogniser.table = {samples: "the quick brown fox", samples + RATE // 10: "the quick brown box"}
    unsure = evaluate([pair], judges, name="x").estimates["unconverted_wer"]
    assert unsure.value == 0.25
    told = replace(pair, transcript="a quick brown fox")
    recogniser.table = {samples: "the quick brown fox", samples + RATE // 10: "nothing alike"}
    assert evaluate([told], judges, name="x").estimates["unconverted_wer"].value == 0.25


def test_a_verifier_tells_good_conversions_apart_and_copies_not(
    make_folder: Folder, judges: Judges
) -> None:
    found = evaluate(read_pairs(make_folder("good")), judges, name="x").verification["speaker"]
    assert (found["same"], found["different"]) == (4, 12)
    assert 0.0 <= found["eer"] <= 1.0


def test_an_unreadable_conversion_is_left_out_and_named(
    make_folder: Folder, judges: Judges
) -> None:
    root = make_folder(pairs=3)
    (root / "converted/p1.wav").write_bytes(b"no sound")
    result = evaluate(read_pairs(root), judges, name="x")
    assert [p.id for p in result.pairs] == ["p0", "p2"]
    assert any(note.startswith("p1 was left out") for note in result.notes)
    assert result.estimates["secs"].n == 2
    for name in ("p0", "p2"):
        (root / f"converted/{name}.wav").write_bytes(b"no sound")
    with pytest.raises(EvaluationError, match="None of the 3"):
        evaluate(read_pairs(root), judges, name="x")


def test_a_parallel_recording_gives_a_cepstral_distance(
    make_folder: Folder, judges: Judges
) -> None:
    pair = read_pairs(make_folder(pairs=1))[0]
    assert pair.converted is not None
    same = evaluate([replace(pair, parallel=pair.converted)], judges, name="x")
    other = evaluate([replace(pair, parallel=pair.targets[0])], judges, name="x")
    assert same.estimates["mcd_db"].value == pytest.approx(0.0, abs=1e-3)
    assert other.estimates["mcd_db"].value > 1.0


def test_several_references_count_as_one_voice(make_folder: Folder, judges: Judges) -> None:
    pair = read_pairs(make_folder(pairs=1))[0]
    twice = replace(pair, targets=pair.targets * 2)
    one, two = (evaluate([i], judges, name="x").estimates["secs"].value for i in (pair, twice))
    assert one == pytest.approx(two)


def test_left_out_groups_are_absent(make_folder: Folder) -> None:
    result = evaluate(read_pairs(make_folder(pairs=2)), Judges(pitch=False), name="x")
    assert set(result.estimates) == {
        "duration_ratio",
        "loudness_lufs",
        "loudness_change_lu",
        "clipped",
    }
    assert result.verification == {}


def test_results_survive_the_file(make_folder: Folder, judges: Judges, tmp_path: Path) -> None:
    result = evaluate(read_pairs(make_folder(pairs=1)), judges, name="näme", group_by="target")
    path = save_evaluation(result, tmp_path / "r.json")
    again = load_evaluation(path)
    assert again.to_json() == result.to_json()
    assert again.models == PINS
    assert json.loads(path.read_text(encoding="utf-8"))["estimates"]["secs"]["low"] is None
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".r")] == []


@pytest.mark.parametrize(
    ("text", "says"),
    [("{", "not JSON"), ("[]", "not an evaluation"), ('{"schema": 1}', "lacks or has a field")],
)
def test_foreign_files_are_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(EvaluationError, match=says):
        load_evaluation(tmp_path / "x.json")
    with pytest.raises(EvaluationError, match="cannot be read"):
        load_evaluation(tmp_path / "nowhere.json")
    with pytest.raises(EvaluationError, match="cannot be written"):
        write_text(tmp_path / "no" / "folder", "x")


def test_tables_hold_every_pair_and_do_not_run_in_a_spreadsheet(
    make_folder: Folder, judges: Judges, recogniser: TableRecogniser
) -> None:
    recogniser.otherwise = '=HYPERLINK("x")'
    result = evaluate(read_pairs(make_folder(pairs=2)), judges, name="a|b")
    rows = list(csv.DictReader(io.StringIO(pair_rows_csv(result))))
    assert [r["id"] for r in rows] == ["p0", "p1"]
    assert float(rows[0]["secs"]) == pytest.approx(result.pairs[0].values["secs"], rel=1e-5)
    assert rows[0]["heard"].startswith("'=")
    assert not any(r["loudness_lufs"].startswith("'") for r in rows)
    text = markdown(result)
    assert "### a\\|b: 2 conversions" in text
    assert "| SECS ↑ |" in text
    assert "recogniser table@1" in text


class FakeRegistry:
    """Answers with the name of what was asked for."""

    def __init__(self, resolved: str = "") -> None:
        self.asked: list[tuple[str, str | None]] = []
        self.answer = resolved

    def load(self, name: str, version: str | None = None) -> Any:
        self.asked.append((name, version))
        return SimpleNamespace(sample_rate=RATE)

    def resolved(self, spec: str) -> str:
        return self.answer or f"{spec.partition('@')[0]}@1.0"


def test_judges_come_from_the_registry_and_are_pinned() -> None:
    registry = FakeRegistry()
    judges = load_judges(registry, models={"recogniser": "recogniser_tiny_en@1.0"})  # type: ignore[arg-type]
    assert ("recogniser_tiny_en", "1.0") in registry.asked
    assert judges.pins["speaker2"] == "speaker_dvector@1.0"
    assert judges.pins["pitch"].startswith("swift_f0@")
    assert judges.pins["pitch"].endswith(f"+{PITCH_RULES}")
    assert set(judges.pins) == {*DEFAULT_MODELS, "pitch"}


def test_left_out_judges_are_not_loaded() -> None:
    registry = FakeRegistry()
    judges = load_judges(registry, without=("words", "similarity", "pitch"))  # type: ignore[arg-type]
    assert registry.asked == [("quality_dnsmos", None)]
    assert (judges.recogniser, judges.pitch) == (None, False)


def test_no_substitute_may_judge() -> None:
    with pytest.raises(EvaluationError, match=r"cannot judge.*autovoice models pull"):
        load_judges(FakeRegistry("mock (fallback: unreachable)"))  # type: ignore[arg-type]


def test_unknown_groups_and_judges_are_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="similarity, words"):
        load_judges(FakeRegistry(), without=("taste",))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="speaker, speaker2"):
        load_judges(FakeRegistry(), models={"taster": "x"})  # type: ignore[arg-type]


def speakers(root: Path) -> list[Pair]:
    """Pairs between two speakers of three recordings each."""
    for number, speaker in enumerate(("../up", "b")):
        folder = root / speaker.replace("/", "_")
        folder.mkdir(parents=True)
        for k in range(3):
            soundfile.write(folder / f"x{number}{k}.wav", sing(120 + 60 * number).samples, RATE)
    return read_test_set(root, per_speaker=2)


def test_a_pipeline_run_keeps_speed_and_versions(tmp_path: Path, judges: Judges) -> None:
    pairs = speakers(tmp_path / "set")
    pipeline = Copycat()
    made = convert_all(pipeline, pairs, tmp_path / "out")  # type: ignore[arg-type]
    assert len(pipeline.cloned) == 2
    assert (
        sorted(p.parent for p in (i.converted for i in made.pairs) if p) == [tmp_path / "out"] * 4
    )
    assert made.notes == ("converter: a (fallback: b)",)
    result = evaluate(
        made.pairs, judges, name="x", extra=made.extra, system=made.system,
        peak_memory_mb=made.peak_memory_mb,
    )  # fmt: skip
    assert result.estimates["rtf"].value == 0.25
    assert result.system == {"converter": "copycat@1"}
    assert result.estimates["source_similarity"].value == pytest.approx(1.0)
    assert result.peak_memory_mb is None or result.peak_memory_mb > 10


def test_workers_find_what_one_process_finds(tmp_path: Path, judges: Judges) -> None:
    pairs = speakers(tmp_path / "set")
    made = convert_all(Copycat(), pairs, tmp_path / "here")  # type: ignore[arg-type]
    (tmp_path / "there").mkdir()
    spec = replace(pair_spec({}), factory="evaluation_kit:judging")
    found = evaluate_on(InlineExecutor(), spec, pairs, tmp_path / "there", name="x")
    expected = evaluate(made.pairs, judges, name="x", extra=made.extra, system=made.system)
    assert found.estimates == expected.estimates
    assert found.verification == expected.verification
    assert (found.models, found.system) == (expected.models, expected.system)
    assert [p.id for p in found.pairs] == [p.id for p in expected.pairs]
    assert found.notes[0] == made.notes[0]


def test_a_worker_keeps_few_recordings_and_finds_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = speakers(tmp_path / "set")
    spec = replace(pair_spec({}), factory="evaluation_kit:judging")
    for place in ("all", "few"):
        (tmp_path / place).mkdir()
    kept_all = evaluate_on(InlineExecutor(), spec, pairs, tmp_path / "all", name="x")
    made: list[scoring.Judging] = []
    monkeypatch.setattr(
        WorkerSpec, "build", lambda spec, number=0: made.append(judging()) or made[0]
    )
    monkeypatch.setattr(scoring, "RECORDINGS_KEPT", 1)
    monkeypatch.setattr(scoring, "SHARED_KEPT", 1)
    kept_few = evaluate_on(InlineExecutor(), spec, pairs, tmp_path / "few", name="x")
    assert kept_few.estimates == kept_all.estimates
    assert kept_few.verification == kept_all.verification
    assert len(made[0].scorer._recordings) == len(made[0]._voices) == 1


def test_a_worker_forgets_conversions_and_what_it_could_not_judge(tmp_path: Path) -> None:
    pairs = speakers(tmp_path / "set")
    soundfile.write(pairs[1].source, np.zeros(RATE), RATE)
    worker = judging()
    for number, pair in enumerate(pairs, 1):
        worker(scoring._job(str(number), pair, tmp_path))
    left = set(worker.scorer._recordings)
    assert left
    assert left <= {p.resolve() for pair in pairs for p in (pair.source, *pair.targets)}
    assert pairs[1].source.resolve() not in left
    assert all(record._audio is None for record in worker.scorer._recordings.values())


def test_a_pair_that_no_worker_can_judge_is_left_out_and_named(tmp_path: Path) -> None:
    pairs = speakers(tmp_path / "set")
    soundfile.write(pairs[1].source, np.zeros(RATE), RATE)
    spec = replace(pair_spec({}), factory="evaluation_kit:judging")
    found = evaluate_on(InlineExecutor(), spec, pairs, tmp_path, name="x")
    assert found.left_out == 1
    assert len(found.pairs) == len(pairs) - 1
    assert any(note.startswith(f"{pairs[1].id} was left out: ") for note in found.notes)


def test_mock_noise_is_not_scored(tmp_path: Path, make_folder: Folder) -> None:
    pairs = read_pairs(make_folder(pairs=1))
    with pytest.raises(EvaluationError, match="Mock models make noise"):
        convert_all(Copycat(mock=True), pairs, tmp_path / "out")  # type: ignore[arg-type]


def test_silence_is_refused_not_scored(make_folder: Folder, judges: Judges) -> None:
    root = make_folder(pairs=2)
    soundfile.write(root / "converted/p0.wav", np.zeros(RATE), RATE)
    result = evaluate(read_pairs(root), judges, name="x")
    assert [p.id for p in result.pairs] == ["p1"]
