"""Paired comparison: real differences are found, chance is not, other judges are refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from auto_voice.errors import EvaluationError
from auto_voice.evaluation import Evaluation, PairScore, compare
from auto_voice.evaluation.comparison import comparison_rows
from auto_voice.evaluation.results import estimate_all
from evaluation_kit import PINS


def results(name: str, secs: np.ndarray, edits: np.ndarray | None = None) -> Evaluation:
    """An evaluation with the given similarity and word edits (of ten) by pair."""
    pairs = tuple(
        PairScore(
            id=f"p{i}",
            source="s.wav",
            targets=("t.wav",),
            converted="c.wav",
            source_speaker=f"s{i % 3}",
            target_speaker=f"t{i % 4}",
            values={"secs": float(v), "rtf": 0.3},
            counts={"word_edits": int(edits[i]) if edits is not None else 1, "words": 10},
        )
        for i, v in enumerate(secs)
    )
    return Evaluation(
        name=name,
        created="2024-01-01T00:00:00+00:00",
        pairs=pairs,
        estimates=estimate_all(pairs, resamples=500, seed=0),
        models=PINS,
        machine={"system": "Linux", "processor": "x", "cores": 2},
    )


BASE = np.random.default_rng(0).uniform(0.3, 0.9, 40)


def test_a_small_steady_gain_is_found_under_large_spread() -> None:
    gain = np.random.default_rng(1).normal(0.02, 0.01, 40)
    found = {
        d.metric: d for d in compare(results("a", BASE), results("b", BASE + gain)).differences
    }
    assert found["secs"].verdict == "better"
    assert found["secs"].difference.value == pytest.approx(gain.mean(), abs=1e-6)
    assert found["secs"].p < 0.001
    assert found["wer"].verdict == ""
    assert found["wer"].p == 1.0


def test_whole_speakers_say_less_than_their_pairs() -> None:
    # What differs is the target: a chance of four, not of forty.
    gain = np.tile([0.1, -0.02, 0.08, 0.06], 10)
    a, b = results("a", BASE), results("b", BASE + gain)
    by_pair, by_speaker = compare(a, b), compare(a, b, group_by="target")
    secs = [next(d for d in c.differences if d.metric == "secs") for c in (by_pair, by_speaker)]
    assert secs[0].verdict == "better"
    assert secs[1].verdict == ""
    assert secs[1].difference.value == pytest.approx(secs[0].difference.value)
    width = [d.difference.high - d.difference.low for d in secs]
    assert width[1] > 2 * width[0]
    # Three up, one down of rank one: 2 * 2 of the 16 ways of signs are as far out, times three
    # metrics that were asked.
    assert secs[1].p == pytest.approx(3 * 4 / 16)
    assert "4 target speakers are too few" in " ".join(by_speaker.notes)


def test_the_other_way_round_is_worse() -> None:
    found = compare(results("b", BASE + 0.05), results("a", BASE)).differences
    assert next(d for d in found if d.metric == "secs").verdict == "worse"


def test_more_errors_are_worse_and_pooled() -> None:
    few, many = np.zeros(40), np.ones(40)
    many[:10] = 5
    found = compare(results("a", BASE, few), results("b", BASE, many)).differences
    wer = next(d for d in found if d.metric == "wer")
    assert wer.verdict == "worse"
    assert (wer.a, wer.b) == (0.0, pytest.approx((10 * 5 + 30) / 400))


def test_chance_is_rarely_called_a_difference() -> None:
    rng = np.random.default_rng(2)
    called = 0
    for _ in range(100):
        noise = rng.normal(0, 0.02, 40)
        found = compare(results("a", BASE), results("b", BASE + noise), resamples=200)
        called += any(d.verdict for d in found.differences)
    assert called <= 9


def test_other_judges_are_said_to_be_not_comparable() -> None:
    b = replace(results("b", BASE), models=PINS | {"recogniser": "table@2"})
    comparison = compare(results("a", BASE), b)
    rows = {row[0]: row for row in comparison_rows(comparison)}
    assert rows["WER, % ↓"][-1] == "not comparable"
    assert rows["WER, % ↓"][1] == "–"
    assert rows["SECS ↑"][-1] == "no difference shown"
    assert any("table@1 and table@2" in note for note in comparison.notes)


def test_speed_counts_on_the_same_machine_only() -> None:
    b = replace(results("b", BASE), machine={"system": "Linux", "processor": "x", "cores": 64})
    found = {d.metric: d for d in compare(results("a", BASE), b).differences}
    assert "different machines" in found["rtf"].why_not


def test_only_shared_pairs_count() -> None:
    a, b = results("a", BASE), results("b", BASE[:30])
    comparison = compare(a, b)
    assert comparison.pairs == 30
    assert "10 pairs" in comparison.notes[0]
    strangers = replace(b, pairs=tuple(replace(p, id=f"q{p.id}") for p in b.pairs))
    with pytest.raises(EvaluationError, match="share no pair"):
        compare(a, strangers)


def test_plain_data_has_no_nan() -> None:
    import json

    b = replace(results("b", BASE), models=PINS | {"recogniser": "table@2"})
    json.dumps(compare(results("a", BASE), b).to_json(), allow_nan=False)


def test_too_few_pairs_are_said_to_be_too_few() -> None:
    found = compare(results("a", BASE[:5]), results("b", BASE[:5] + 0.3))
    assert not any(d.verdict for d in found.differences)
    assert "5 pairs are too few" in found.notes[-1]
    assert "compare at least 7" in found.notes[-1]  # three metrics: 3 * 2 / 2^7 < 0.05
