"""The log over time, its regressions, and the gate."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from test_comparison import BASE, results

from auto_voice.cli.main import main
from auto_voice.errors import EvaluationError
from auto_voice.evaluation import save_evaluation
from auto_voice.evaluation.history import (
    append_history,
    load_entry,
    read_history,
    regressions,
    sparkline,
)
from evaluation_kit import PINS


def log_of(path: Path, *shifts: float) -> Path:
    for shift in shifts:
        append_history(results("mine", BASE + shift), path)
    return path


def test_a_line_holds_what_was_measured(tmp_path: Path) -> None:
    evaluation = results("mine", BASE)
    append_history(evaluation, tmp_path / "log.jsonl")
    (entry,) = read_history(tmp_path / "log.jsonl")
    assert entry.estimates["secs"].value == pytest.approx(BASE.mean(), abs=1e-6)
    assert entry.models == PINS
    assert entry.pairs == 40


def test_only_a_loss_beyond_both_intervals_is_a_regression(tmp_path: Path) -> None:
    entries = read_history(log_of(tmp_path / "log.jsonl", 0.0, -0.02, 0.3, 0.0))
    assert regressions(entries[:1]) == ([], None)
    assert regressions(entries[:2])[0] == []
    assert regressions(entries[:3])[0] == []
    shortfalls, before = regressions(entries)
    assert [f.metric for f in shortfalls] == ["secs"]
    assert before is entries[2]


def test_a_slow_slide_is_told_as_long_as_it_goes_on(tmp_path: Path) -> None:
    steps = (0.0, -0.05, -0.1, -0.15, -0.15, -0.15)
    entries = read_history(log_of(tmp_path / "log.jsonl", *steps))
    told = [regressions(entries[: n + 1])[0] for n in range(len(entries))]
    assert [len(shortfalls) for shortfalls in told] == [0, 0, 1, 1, 0, 0]
    (shortfall,) = told[2]
    assert shortfall.metric == "secs"
    assert shortfall.message.endswith("little by little since 2024-01-01")
    quick = read_history(log_of(tmp_path / "quick.jsonl", 0.0, -0.3, -0.3))
    assert [len(regressions(quick[:n])[0]) for n in (2, 3)] == [1, 0]


def test_runs_by_other_judges_or_over_other_pairs_are_passed_over(tmp_path: Path) -> None:
    path = log_of(tmp_path / "log.jsonl", 0.4)
    append_history(replace(results("mine", BASE + 0.4), models={"speaker": "other@1"}), path)
    append_history(results("mine", BASE[:20] + 0.4), path)
    append_history(results("mine", BASE), path)
    shortfalls, before = regressions(read_history(path))
    assert [f.metric for f in shortfalls] == ["secs"]
    assert before is not None
    assert before.estimates["secs"].value == pytest.approx((BASE + 0.4).mean(), abs=1e-6)


def test_damaged_logs_are_named_by_line(tmp_path: Path) -> None:
    path = log_of(tmp_path / "log.jsonl", 0.0)
    with path.open("a") as file:
        file.write("\n{broken\n")
    with pytest.raises(EvaluationError, match=r"log\.jsonl:3"):
        read_history(path)
    path.write_text("\n")
    with pytest.raises(EvaluationError, match="no entries"):
        read_history(path)
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_history(tmp_path / "nowhere.jsonl")
    with pytest.raises(EvaluationError, match="cannot be written"):
        append_history(results("mine", BASE), tmp_path)


def test_the_command_names_the_regression_and_exits_with_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(log_of(tmp_path / "log.jsonl", 0.3, 0.0))
    page = tmp_path / "trend.html"
    assert main(["evaluate", "history", path, "--html", str(page)]) == 1
    out = capsys.readouterr().out
    assert "2 comparable runs of 2" in out
    assert "regression since 2024-01-01" in out
    assert "SECS" in out.split("regression")[1]
    assert page.read_text(encoding="utf-8").count("<svg") >= 2
    assert main(["evaluate", "history", path, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["regressions"][0]["metric"] == "secs"
    assert main(["evaluate", "history", str(log_of(tmp_path / "fine.jsonl", 0.0, 0.0))]) == 0


@pytest.fixture
def result(tmp_path: Path) -> str:
    return str(save_evaluation(results("mine", BASE), tmp_path / "r.json"))


@pytest.mark.parametrize(
    ("limits", "code", "says"),
    [
        (["--min", "secs=0.4", "--max", "wer=0.2"], 0, "passed: mine, 40 conversions"),
        (["--min", "secs=0.95"], 1, "failed: SECS ↑ is 0.6"),
        (["--max", "wer=0.05"], 1, "failed: WER, % ↓ is 10.0, above the limit 5.0"),
        (["--min", "dnsmos=1"], 1, "was not measured"),
    ],
)
def test_the_gate_answers_by_exit_code(
    result: str, limits: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "gate", result, *limits]) == code
    assert says in capsys.readouterr().out


def test_the_gate_compares_with_a_baseline(
    result: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    better = str(save_evaluation(results("old", BASE + 0.2), tmp_path / "old.json"))
    assert main(["evaluate", "gate", result, "--baseline", better]) == 1
    assert "SECS ↑ went from" in capsys.readouterr().out
    wide = [*["evaluate", "gate", result, "--baseline", better], "--margin", "secs=0.25"]
    assert main(wide) == 0
    log = str(log_of(tmp_path / "log.jsonl", 0.5, 0.0))
    assert main(["evaluate", "gate", result, "--baseline", log]) == 0
    assert load_entry(log).name == "mine"


def test_the_gate_refuses_what_it_cannot_judge(
    result: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = replace(results("old", BASE), models={"speaker": "other@1"})
    path = str(save_evaluation(other, tmp_path / "old.json"))
    for given, says in (
        (["--baseline", path], "other models, over other pairs"),
        ([], "at least one of"),
        (["--min", "taste=1"], "no metric 'taste'"),
        (["--min", "secs=high"], "should look like secs=0.5"),
        (["--min", "secs=1", "--margin", "secs=1"], "needs --baseline"),
    ):
        assert main(["evaluate", "gate", result, *given]) == 2
        assert says in capsys.readouterr().err


def test_sparklines_show_the_shape() -> None:
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([1.0, float("nan"), 1.0]) == "▁ ▁"
    assert sparkline([float("nan")]) == ""


def test_a_line_that_broke_off_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = log_of(tmp_path / "log.jsonl", 0.0)
    path.write_text(path.read_text() + '{"schema": 1, "na')
    log_of(path, 0.1)
    with pytest.raises(EvaluationError, match=r"log\.jsonl:2 is not a line"):
        read_history(path)
    lines = path.read_text().split("\n")
    path.write_text("\n".join([lines[0], lines[2]]))
    assert len(read_history(path)) == 2


def test_a_name_may_hold_marks_that_look_like_ends_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    append_history(replace(results("mine", BASE), name="a\u2028b\x85c"), path)
    assert read_history(path)[0].name == "a\u2028b\x85c"


@pytest.mark.parametrize("spoilt", ['"name": 5', '"models": []', '"pairs_digest": null'])
def test_fields_of_a_wrong_kind_are_a_damaged_line(tmp_path: Path, spoilt: str) -> None:
    path = log_of(tmp_path / "log.jsonl", 0.0)
    path.write_text(json.dumps(json.loads(path.read_text()) | json.loads(f"{{{spoilt}}}")))
    with pytest.raises(EvaluationError, match=":1 is not a line"):
        read_history(path)


def test_a_gate_fails_where_conversions_could_not_be_scored(tmp_path: Path) -> None:
    path = save_evaluation(replace(results("mine", BASE), left_out=3), tmp_path / "a.json")
    assert main(["evaluate", "gate", str(path), "--min", "secs=0"]) == 1


def test_a_gate_fails_where_a_figure_can_no_longer_be_measured(tmp_path: Path) -> None:
    good = results("mine", BASE)
    old = save_evaluation(good, tmp_path / "old.json")
    new = save_evaluation(replace(good, estimates={}), tmp_path / "new.json")
    assert main(["evaluate", "gate", str(old), "--baseline", str(old)]) == 0
    assert main(["evaluate", "gate", str(new), "--baseline", str(old), "--margin", "secs=1"]) == 1


def test_a_gate_does_not_compare_a_log_with_itself(tmp_path: Path) -> None:
    log = str(log_of(tmp_path / "log.jsonl", 0.3))
    assert main(["evaluate", "gate", log, "--baseline", log]) == 2
    log_of(Path(log), 0.0)
    assert main(["evaluate", "gate", log, "--baseline", log]) == 1


def test_a_gate_takes_no_limit_that_nothing_can_fail(tmp_path: Path) -> None:
    path = str(save_evaluation(results("mine", BASE), tmp_path / "a.json"))
    assert main(["evaluate", "gate", path, "--min", "secs=nan"]) == 2
    neutral = ["--baseline", path, "--margin", "duration_ratio=0.1"]
    assert main(["evaluate", "gate", path, *neutral]) == 2
