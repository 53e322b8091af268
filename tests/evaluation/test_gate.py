"""The gate holds what it was told to hold, renews with a reason, and hears a worse conversion."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from test_comparison import BASE, results

from auto_voice.cli.main import main
from auto_voice.errors import EvaluationError
from auto_voice.evaluation import save_evaluation
from auto_voice.evaluation.gate import (
    BOUNDS_FILE,
    Bound,
    check_bounds,
    read_bounds,
    renewed,
    write_bounds,
)
from auto_voice.evaluation.history import to_entry

ENTRY = to_entry(results("mine", BASE))
SECS = float(BASE.mean())


def bounds_of(reason: str = "first", margin: float = 0.02):
    bounds = renewed(None, with_all(ENTRY), reason, {"secs": margin})
    return replace(bounds, metrics={"secs": bounds.metrics["secs"]})


def with_all(entry):
    """The entry with every metric that bounds hold by default."""
    secs = entry.estimates["secs"]
    others = {k: replace(secs, value=0.5) for k in ("secs2", "wer", "dnsmos", "f0_correlation")}
    return replace(entry, estimates={**entry.estimates, **others})


def worse(by: float):
    return to_entry(results("mine", BASE - by))


def test_a_figure_may_be_worse_by_its_margin_and_no_more() -> None:
    bounds = bounds_of(margin=0.02)
    assert check_bounds(worse(0.019), bounds) == []
    (shortfall,) = check_bounds(worse(0.021), bounds)
    assert shortfall.metric == "secs"
    assert check_bounds(worse(-0.2), bounds) == []


def test_where_lower_is_better_the_margin_lies_above() -> None:
    bounds = replace(bounds_of(), metrics={"wer": Bound(0.10, 0.05)})
    entry = with_all(ENTRY)
    for value, holds in ((0.149, True), (0.151, False), (0.0, True)):
        wer = replace(entry.estimates["wer"], value=value)
        found = check_bounds(replace(entry, estimates={"wer": wer}), bounds)
        assert (found == []) == holds


def test_a_metric_that_was_not_measured_fails() -> None:
    bounds = replace(bounds_of(), metrics={"dnsmos": Bound(3.0, 0.1)})
    (shortfall,) = check_bounds(ENTRY, bounds)
    assert "was not measured" in shortfall.message


def test_other_pairs_and_other_judges_cannot_be_held_to_the_bounds() -> None:
    bounds = bounds_of()
    with pytest.raises(EvaluationError, match="other pairs"):
        check_bounds(replace(ENTRY, pairs_digest="other"), bounds)
    models = {**ENTRY.models, "recogniser": "table@2"}
    with pytest.raises(EvaluationError, match="recogniser was table@1"):
        check_bounds(replace(ENTRY, models=models), bounds)
    # A new release of the pitch tracker measures the same Hz.
    models = {**ENTRY.models, "pitch": "swift_f0@next"}
    assert check_bounds(replace(ENTRY, models=models), bounds) == []


def test_a_renewal_needs_a_reason_and_keeps_the_ones_before(tmp_path: Path) -> None:
    bounds = renewed(bounds_of("first"), worse(0.1), "a faster vocoder", {})
    assert bounds.metrics["secs"].figure == pytest.approx(SECS - 0.1, abs=1e-4)
    assert bounds.metrics["secs"].margin == 0.02
    path = tmp_path / "gate.yaml"
    write_bounds(bounds, path)
    again = read_bounds(path)
    assert again == bounds
    assert [r.reason for r in again.renewals] == ["first", "a faster vocoder"]
    with pytest.raises(EvaluationError, match="--reason"):
        renewed(bounds, ENTRY, "  ", {})
    with pytest.raises(EvaluationError, match="could not be scored"):
        renewed(bounds, replace(ENTRY, left_out=1), "x", {})


@pytest.mark.parametrize("text", ["", "a: [", "schema: 2\n", "schema: 1\nmetrics: {taste: 1}\n"])
def test_a_file_that_holds_no_bounds_says_how_to_write_it(tmp_path: Path, text: str) -> None:
    path = tmp_path / "gate.yaml"
    path.write_text(text)
    with pytest.raises(EvaluationError, match="evaluate gate --update"):
        read_bounds(path)
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_bounds(tmp_path / "nothing.yaml")


def test_the_command_renews_and_holds_a_file_of_bounds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = (
        str(save_evaluation(results("mine", BASE - by), tmp_path / f"{by}.json"))
        for by in (0.0, 0.1)
    )
    path = tmp_path / "gate.yaml"
    write_bounds(bounds_of(), path)
    held = ["--bounds", str(path)]
    assert main(["evaluate", "gate", good, *held]) == 0
    assert "margin" in capsys.readouterr().out
    assert main(["evaluate", "gate", bad, *held]) == 1
    assert "failed: SECS" in capsys.readouterr().out
    assert main(["evaluate", "gate", bad, *held, "--update"]) == 2
    assert main(["evaluate", "gate", bad, *held, "--update", "--reason", "known"]) == 0
    assert main(["evaluate", "gate", bad, *held]) == 0


def test_the_bounds_of_the_default_models_are_complete() -> None:
    bounds = read_bounds(BOUNDS_FILE)
    assert set(bounds.metrics) == {"secs", "secs2", "wer", "dnsmos", "f0_correlation"}
    assert set(bounds.models) == {"speaker", "speaker2", "recogniser", "quality", "pitch"}
    assert all(bound.margin > 0 for bound in bounds.metrics.values())
    newest = bounds.renewals[-1]
    assert newest.reason
    assert newest.figures == {key: bound.figure for key, bound in bounds.metrics.items()}


@pytest.fixture
def gate_here(weights_dir: Path) -> list[str]:
    return ["evaluate", "gate", "--model-dir", str(weights_dir), "--device", "cpu", "--quiet"]


@pytest.mark.weights
@pytest.mark.slow
def test_the_default_models_sound_as_they_should(
    gate_here: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Six real conversions: a change that moves the sound on purpose renews the bounds."""
    code = main(gate_here)
    print(capsys.readouterr().out)
    assert code == 0


@pytest.mark.weights
@pytest.mark.slow
def test_a_worse_conversion_does_not_pass(
    gate_here: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code = main([*gate_here, "--vocoder", "griffin_lim"])
    said = capsys.readouterr().out
    assert code == 1, said
    assert "failed: DNSMOS" in said
