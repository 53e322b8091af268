"""Intervals and significance: bootstrap by pair or by speaker, Wilcoxon's test, Holm."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import erfc, sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Draws of a bootstrap: the ends of a 95 % interval then vary by a sixtieth of its width.
RESAMPLES = 2000
# Any number; always the same, so that the same conversions get the same intervals.
SEED = 20240229
# Pairs up to which the signed-rank distribution is counted out instead of approximated.
EXACT_UP_TO = 50
_BLOCK = 1_000_000

Array = NDArray[np.float64]
NAN = float("nan")


@dataclass(frozen=True)
class Estimate:
    """A figure and the interval that holds it.

    Attributes:
        value: mean, or sum of numerators over sum of denominators.
        low, high: 95 % percentile bootstrap interval; NaN below two resampling units.
        n: pairs that had a value.
    """

    value: float
    low: float
    high: float
    n: int


def estimate(
    numerators: ArrayLike,
    denominators: ArrayLike | None = None,
    *,
    groups: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Estimate:
    """``sum(numerators) / sum(denominators)`` with a 95 % bootstrap interval.

    Args:
        numerators: ``(pairs,)``; pairs that are not finite are left out.
        denominators: ``(pairs,)``; None for ones, which makes it the mean.
        groups: one label a pair: whole groups are resampled, because pairs that share a speaker
            are not independent; None resamples pairs.
        resamples: bootstrap draws.
        seed: of the draws, so that the same data gives the same interval.
    """
    top = np.asarray(numerators, dtype=np.float64)
    bottom = np.ones_like(top) if denominators is None else np.asarray(denominators, np.float64)
    keep = np.isfinite(top) & np.isfinite(bottom)
    n = int(keep.sum())
    if not n or bottom[keep].sum() == 0:
        return Estimate(NAN, NAN, NAN, 0)
    labels = list(range(len(top))) if groups is None else list(groups)
    sums = group_sums(top[keep], bottom[keep], [g for g, k in zip(labels, keep, strict=True) if k])
    value = float(top[keep].sum() / bottom[keep].sum())
    if sums.shape[1] < 2:
        return Estimate(value, NAN, NAN, n)
    low, high = np.percentile(_draws(sums, resamples, seed), [2.5, 97.5])
    return Estimate(value, float(low), float(high), n)


def group_sums(top: Array, bottom: Array, labels: Sequence[Hashable]) -> Array:
    """``(2, groups)``: sums of numerators and of denominators by label, as they first appear."""
    ids = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    index = np.array([ids[label] for label in labels])
    return np.stack([np.bincount(index, weights=w, minlength=len(ids)) for w in (top, bottom)])


def _draws(sums: Array, resamples: int, seed: int) -> Array:
    units = sums.shape[1]
    rng = np.random.default_rng(seed)
    per_block = max(1, _BLOCK // units)
    out: list[Array] = []
    for start in range(0, resamples, per_block):
        index = rng.integers(0, units, (min(per_block, resamples - start), units))
        bottom = sums[1][index].sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            out.append(sums[0][index].sum(1) / bottom)
    ratios = np.concatenate(out)
    return ratios[np.isfinite(ratios)]


def wilcoxon(differences: ArrayLike) -> float:
    """Two-sided p of Wilcoxon's signed-rank test that differences are symmetric around zero.

    Zeros are dropped. Up to ``EXACT_UP_TO`` differences the distribution is counted out, equal
    sizes sharing their mean rank; beyond, it is the normal approximation with tie and continuity
    corrections, which for a few equal differences would claim more than they can show. 1 where
    nothing differs.
    """
    d = np.asarray(differences, dtype=np.float64)
    d = d[np.isfinite(d) & (d != 0)]
    n = len(d)
    if not n:
        return 1.0
    ranks, tied = _ranks(np.abs(d))
    positive = float(ranks[d > 0].sum())
    if n <= EXACT_UP_TO:
        return _exact_p(positive, ranks)
    mean = n * (n + 1) / 4
    variance = n * (n + 1) * (2 * n + 1) / 24 - float((tied**3 - tied).sum()) / 48
    if variance <= 0:
        return 1.0
    z = max(abs(positive - mean) - 0.5, 0.0) / sqrt(variance)
    return erfc(z / sqrt(2))


def _ranks(values: Array) -> tuple[Array, Array]:
    """Mid-ranks from 1, and the sizes of the groups of equal values (only those above one)."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    middle = last - (counts - 1) / 2
    return middle[inverse], counts[counts > 1].astype(np.float64)


def _exact_p(positive: float, ranks: Array) -> float:
    # Mid-ranks are halves, so twice a rank is a whole number.
    doubled = np.rint(2 * ranks).astype(int)
    total = int(doubled.sum())
    ways = np.zeros(total + 1)
    ways[0] = 1
    for rank in doubled:
        ways[rank:] += ways[:-rank].copy()
    tail = min(round(2 * positive), total - round(2 * positive))
    return float(min(1.0, 2 * ways[: tail + 1].sum() / 2.0 ** len(ranks)))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values corrected for having asked several questions (Holm's step-down), by name."""
    ordered = sorted(p_values, key=lambda name: p_values[name])
    corrected: dict[str, float] = {}
    floor = 0.0
    for position, name in enumerate(ordered):
        floor = max(floor, min(1.0, p_values[name] * (len(ordered) - position)))
        corrected[name] = floor
    return corrected
