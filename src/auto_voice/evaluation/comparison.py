"""Two or more systems on the same pairs: paired differences, intervals, significance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from auto_voice.errors import EvaluationError
from auto_voice.evaluation.results import (
    METRICS,
    RESAMPLES,
    SEED,
    Estimate,
    Evaluation,
    Metric,
    PairScore,
    estimate,
    group_sums,
    holm,
    metric_columns,
    resampling_groups,
    wilcoxon,
)
from auto_voice.evaluation.tables import ROLES, figure, interval, title

# Chance of calling systems different that are not, over all metrics together (Holm).
ALPHA = 0.05


@dataclass(frozen=True)
class Difference:
    """One metric of system B against system A.

    Attributes:
        metric: its key.
        a, b: the two figures over the shared pairs.
        difference: B minus A over pairs, with its paired interval.
        p: Wilcoxon's signed-rank test on the pairs, corrected for the number of metrics that
            have a better and a worse (Holm).
        verdict: ``better``, ``worse``, ``different`` (where neither is better), or ``""`` where
            no difference is shown.
        why_not: why the figures must not be compared; empty if they may.
    """

    metric: str
    a: float
    b: float
    difference: Estimate
    p: float
    verdict: str
    why_not: str = ""


@dataclass(frozen=True)
class Comparison:
    """B against A.

    Attributes:
        a, b: names. pairs: shared pairs that the figures rest on.
        notes: what is not comparable and which pairs were left out.
    """

    a: str
    b: str
    pairs: int
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON; numbers that are not finite become null."""

        def plain(value: Any) -> Any:
            if isinstance(value, float) and not math.isfinite(value):
                return None
            if isinstance(value, dict):
                return {k: plain(v) for k, v in value.items()}
            return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

        found: dict[str, Any] = plain(asdict(self))
        return found


def compare(
    a: Evaluation,
    b: Evaluation,
    *,
    group_by: str = "pair",
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Comparison:
    """B against A, pair by pair, over the pairs that both have (by id).

    A metric whose judges differ between the two results is listed with the reason and without
    figures: a score by another recogniser is another scale.

    Args:
        group_by: what intervals and p rest on: ``pair``, or ``source`` or ``target`` for whole
            speakers, whose pairs are not independent.
        resamples, seed: of the bootstrap.

    Raises:
        EvaluationError: no pair is shared.
    """
    of_b = {p.id: p for p in b.pairs}
    shared = [(p, of_b[p.id]) for p in a.pairs if p.id in of_b]
    if not shared:
        raise EvaluationError(
            f"{a.name} and {b.name} share no pair; their conversions must have the same ids "
            "(or the same file names of source and target)."
        )
    notes = []
    left = len(a.pairs) + len(b.pairs) - 2 * len(shared)
    if left:
        notes.append(f"{left} pairs that only one of the two has are left out.")
    groups = resampling_groups([pair for pair, _ in shared], group_by)
    units = len(shared) if groups is None else len(set(groups))
    what = "pairs" if groups is None else f"{group_by} speakers"
    rows, blocked = [], {}
    for key, metric in METRICS.items():
        reason = _not_comparable(metric, a, b)
        if key not in a.estimates or key not in b.estimates:
            continue
        if reason:
            blocked[key] = reason
            nothing = Estimate(math.nan, math.nan, math.nan, 0)
            rows.append(Difference(key, math.nan, math.nan, nothing, math.nan, "", reason))
        else:
            rows.append(_difference(metric, shared, groups, resamples, seed))
    notes += [f"{reason}" for reason in dict.fromkeys(blocked.values())]
    for only, with_it, without in ((a, a, b), (b, b, a)):
        missing = [
            METRICS[k].label
            for k in METRICS
            if k in with_it.estimates and k not in without.estimates
        ]
        if missing:
            notes.append(f"Only {only.name} has {', '.join(missing)}.")
    for row in rows:
        if not row.why_not and row.difference.n < len(shared):
            notes.append(
                f"{METRICS[row.metric].label} rests on the {row.difference.n} pairs for which both "
                "have it."
            )
    asked = {d.metric: d.p for d in rows if math.isfinite(d.p) and METRICS[d.metric].better}
    corrected = holm(asked)
    judged = tuple(_judged(d, corrected.get(d.metric, d.p)) for d in rows)
    # The smallest p that so many units can give is 2 / 2^units: all differences of one sign.
    enough = 1 + math.ceil(math.log2(max(len(asked), 1) / ALPHA))
    if units < enough:
        notes.append(
            f"{units} {what} are too few to show any difference over {len(asked)} metrics; "
            f"compare at least {enough}."
        )
    return Comparison(a.name, b.name, len(shared), judged, tuple(notes))


def _difference(
    metric: Metric,
    shared: Sequence[tuple[PairScore, PairScore]],
    groups: Sequence[str] | None,
    resamples: int,
    seed: int,
) -> Difference:
    sides = []
    for side in (0, 1):
        top, bottom = metric_columns([pair[side] for pair in shared], metric.key)
        values = np.array(top)
        weights = np.ones(len(values)) if bottom is None else np.array(bottom)
        sides.append((values, weights))
    (top_a, weight_a), (top_b, weight_b) = sides
    both = np.isfinite(top_a) & np.isfinite(top_b)
    # Both systems speak the same reference words, so their weights agree and the difference of
    # the two ratios is one ratio, which keeps the pairing through the bootstrap.
    weight = np.where(weight_a == weight_b, weight_a, (weight_a + weight_b) / 2)
    change = np.where(both, top_b - top_a, np.nan)
    found = estimate(change, weight, groups=groups, resamples=resamples, seed=seed)
    total = float(weight[both].sum()) or math.nan
    rates = _rates(change, weight, groups)
    return Difference(
        metric.key,
        float(top_a[both].sum()) / total,
        float(top_b[both].sum()) / total,
        found,
        wilcoxon(rates) if found.n else math.nan,
        "",
    )


def _rates(
    change: NDArray[np.float64], weight: NDArray[np.float64], groups: Sequence[str] | None
) -> NDArray[np.float64]:
    """What the signed-rank test sees: the change of each pair, or of each speaker's pairs."""
    if groups is not None:
        known = np.isfinite(change)
        labels = [group for group, there in zip(groups, known, strict=True) if there]
        change, weight = group_sums(change[known], weight[known], labels)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(weight > 0, change / weight, np.nan)


def _judged(d: Difference, p: float) -> Difference:
    if d.why_not:
        return d
    interval_clear = d.difference.low > 0 or d.difference.high < 0
    verdict = ""
    if p < ALPHA and interval_clear:
        better = METRICS[d.metric].better
        up = d.difference.value > 0
        verdict = ("better" if up == (better == "up") else "worse") if better else "different"
    return Difference(d.metric, d.a, d.b, d.difference, p, verdict, d.why_not)


def _not_comparable(metric: Metric, a: Evaluation, b: Evaluation) -> str:
    if "recogniser" in metric.judges and (
        a.settings.get("reference_text") != b.settings.get("reference_text")
    ):
        return "The reference texts come from different places, so their errors are not comparable."
    for role in metric.judges:
        if role == "machine":
            if hardware(a) != hardware(b):
                return "The real-time factors were taken on different machines."
            continue
        one, other = a.models.get(role), b.models.get(role)
        if one != other:
            return (
                f"The {ROLES[role]}s differ ({one} and {other}), so what they judge is not "
                "comparable."
            )
    return ""


def hardware(evaluation: Evaluation) -> tuple[object, ...]:
    """What two timings must share before they are compared."""
    return tuple(evaluation.machine.get(k) for k in ("system", "processor", "cores"))


def comparison_rows(comparison: Comparison) -> list[list[str]]:
    """Title, A, B, difference, interval, p and verdict of each metric."""
    rows = []
    for d in comparison.differences:
        m = METRICS[d.metric]
        verdict = "not comparable" if d.why_not else d.verdict or "no difference shown"
        p = "–" if math.isnan(d.p) else "<0.001" if d.p < 0.001 else f"{d.p:.3f}"
        rows.append(
            [
                title(m),
                figure(m, d.a),
                figure(m, d.b),
                figure(m, d.difference.value, signed=True),
                interval(m, d.difference),
                p,
                verdict,
            ]
        )
    return rows


COMPARISON_HEADER = ("metric", "A", "B", "B − A", "95 % interval", "p (Holm)", "B is")
