"""What an evaluation found: figures by pair, estimates over pairs, and what they rest on.

Intervals are bootstrapped by pair or by speaker; systems are compared by Wilcoxon's test and Holm's
correction.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import erfc, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from auto_voice import __version__
from auto_voice.errors import EvaluationError
from auto_voice.filesystem import atomic_write

# Layout of stored results; another one is refused.
SCHEMA = 1
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
class Metric:
    """One figure of a pair.

    Attributes:
        key: its name in files. label: its name for people.
        unit: what stands behind the number; ``%`` shows 0.034 as 3.4 %.
        better: ``up``, ``down``, or ``""`` where neither is.
        digits: shown after the point.
        judges: pinned models it depends on (keys of ``Evaluation.models``).
        meaning: one line for the report.
        ratio: numerator and denominator among the counts of a pair: the estimate is their
            ratio of sums, not the mean of the pairs' rates.
    """

    key: str
    label: str
    unit: str
    better: str
    digits: int
    judges: tuple[str, ...]
    meaning: str
    ratio: tuple[str, str] | None = None


METRICS: Mapping[str, Metric] = {
    m.key: m
    for m in (
        Metric("secs", "SECS", "", "up", 3, ("speaker",),
               "speaker similarity to the target, cosine of GE2E embeddings; converters see "
               "such an embedding, so it flatters them"),
        Metric("secs2", "SECS2", "", "up", 3, ("speaker2",),
               "speaker similarity to the target by an independent d-vector encoder"),
        Metric("source_similarity", "Similarity to source", "", "down", 3, ("speaker",),
               "how much of the source's voice is left (GE2E)"),
        Metric("source_similarity2", "Similarity to source 2", "", "down", 3, ("speaker2",),
               "the same by the independent encoder"),
        Metric("unconverted_secs", "Unconverted SECS", "", "", 3, ("speaker",),
               "source against target: the score of doing nothing"),
        Metric("unconverted_secs2", "Unconverted SECS2", "", "", 3, ("speaker2",),
               "the same by the independent encoder"),
        Metric("wer", "WER", "%", "down", 1, ("recogniser",),
               "words lost, added or changed, of all words", ("word_edits", "words")),
        Metric("unconverted_wer", "Unconverted WER", "%", "", 1, ("recogniser",),
               "the source itself against the same words, played a tenth of a second later where "
               "they are its own transcript: how unsure the recogniser is",
               ("unconverted_edits", "words")),
        Metric("cer", "CER", "%", "down", 1, ("recogniser",),
               "characters lost, added or changed", ("character_edits", "characters")),
        Metric("dnsmos", "DNSMOS overall", "", "up", 2, ("quality",),
               "predicted listener score, 1 bad to 5 excellent"),
        Metric("dnsmos_speech", "DNSMOS speech", "", "up", 2, ("quality",),
               "how undistorted the voice is"),
        Metric("dnsmos_background", "DNSMOS background", "", "up", 2, ("quality",),
               "how free of noise"),
        Metric("dnsmos_source", "DNSMOS of source", "", "", 2, ("quality",),
               "the source's own score, for scale"),
        Metric("f0_correlation", "F0 correlation", "", "up", 3, ("pitch",),
               "how well the melody follows the source; transposition does not count"),
        Metric("melody_correlation", "F0 correlation without leaps", "", "up", 3, ("pitch",),
               "the same but for frames that lie an octave from those around them on the source"),
        Metric("f0_rmse_cents", "F0 RMSE", "cents", "down", 0, ("pitch",),
               "melody error after the mean shift is removed; 100 cents are a semitone"),
        Metric("voicing_error", "Voicing error", "%", "down", 1, ("pitch",),
               "frames voiced in only one of source and conversion"),
        Metric("register_cents", "Register error", "cents", "down", 0, ("pitch",),
               "distance of the mean pitch from the target's"),
        Metric("mcd_db", "Mel-cepstral distance", "dB", "down", 2, (),
               "distance to the target saying the same words (parallel recordings only)"),
        Metric("duration_ratio", "Duration ratio", "", "", 3, (),
               "seconds out per second in"),
        Metric("loudness_lufs", "Loudness", "LUFS", "", 1, (),
               "integrated loudness of the conversion (ITU-R BS.1770)"),
        Metric("loudness_change_lu", "Loudness change", "LU", "", 1, (),
               "conversion minus source"),
        Metric("clipped", "Clipped samples", "%", "down", 3, (),
               "samples at full scale"),
        Metric("rtf", "Real-time factor", "", "down", 3, ("machine",),
               "seconds of computing per second of audio"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class PairScore:
    """Figures of one conversion.

    Attributes:
        id: names the pair in every system's results.
        source, converted: file names as given; ``targets`` likewise.
        source_speaker, target_speaker: who, as far as known; bootstrap groups.
        values: metric key to figure; a metric that could not be measured is absent.
        counts: numerators and denominators of ratio metrics.
        texts: ``reference`` and ``heard`` words, and those heard in the source ``unconverted``.
        notes: what went wrong or was altered, one sentence each.
    """

    id: str
    source: str
    targets: tuple[str, ...]
    converted: str
    source_speaker: str
    target_speaker: str
    values: Mapping[str, float]
    counts: Mapping[str, int] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


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


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation.

    Attributes:
        name: of the system.
        created: ISO 8601 time, UTC.
        pairs: figures by pair.
        estimates: metric key to its figure over all pairs.
        models: role of each judge (``speaker``, ``speaker2``, ``recogniser``, ``quality``,
            ``pitch``) to its ``name@version``; results with other judges are not comparable.
        system: stage to ``name@version`` of the pipeline, where this project ran it.
        settings: how intervals were drawn and text was taken.
        machine: where, and with which versions.
        verification: equal error rates by encoder, with numbers of trials.
        peak_memory_mb: of the conversions, where this project ran them.
        notes: about the whole.
        left_out: conversions that could not be scored; the notes name them.
    """

    name: str
    created: str
    pairs: tuple[PairScore, ...]
    estimates: Mapping[str, Estimate]
    models: Mapping[str, str]
    system: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    verification: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    peak_memory_mb: float | None = None
    notes: tuple[str, ...] = ()
    left_out: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON; numbers that are not finite become null."""
        plain: dict[str, Any] = _finite({"schema": SCHEMA, **asdict(self)})
        return plain


def estimate_all(
    pairs: Sequence[PairScore], *, group_by: str = "pair", resamples: int, seed: int
) -> dict[str, Estimate]:
    """Each metric that at least one pair has, over all pairs.

    Args:
        group_by: what the bootstrap resamples: ``pair``, ``source`` or ``target`` (speakers).
    """
    groups = resampling_groups(pairs, group_by)
    found = {}
    for key in METRICS:
        top, bottom = metric_columns(pairs, key)
        result = estimate(top, bottom, groups=groups, resamples=resamples, seed=seed)
        if result.n:
            found[key] = result
    return found


def resampling_groups(pairs: Iterable[PairScore], group_by: str) -> list[str] | None:
    """The speaker whose pairs stay together, for each pair; None where pairs are drawn singly."""
    if group_by == "pair":
        return None
    return [p.source_speaker if group_by == "source" else p.target_speaker for p in pairs]


def metric_columns(pairs: Iterable[PairScore], key: str) -> tuple[list[float], list[float] | None]:
    """Numerators and denominators of a metric by pair; NaN where it is missing."""
    metric = METRICS[key]
    if metric.ratio is None:
        return [p.values.get(key, math.nan) for p in pairs], None
    top, bottom = metric.ratio
    rows = [p.counts for p in pairs]
    return [float(r.get(top, math.nan)) for r in rows], [
        float(r.get(bottom, math.nan)) for r in rows
    ]


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


def machine() -> dict[str, Any]:
    """Where and with what this runs, without naming the host."""
    return {
        "auto_voice": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "system": platform.system(),
        "processor": platform.machine(),
        "cores": os.cpu_count() or 1,
    }


def _commit() -> str:
    """Commit of the git checkout that the command runs in; empty outside of one."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def save_evaluation(evaluation: Evaluation, path: str | Path) -> Path:
    """Write the JSON file that ``load_evaluation``, ``compare`` and ``gate`` read."""
    target = Path(path)
    text = json.dumps(evaluation.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
    write_text(target, text + "\n")
    return target


def load_evaluation(path: str | Path) -> Evaluation:
    """Read what ``save_evaluation`` wrote.

    Raises:
        EvaluationError: the file is missing, no JSON, or not an evaluation of this schema.
    """
    file = Path(path)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise EvaluationError(f"{file} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise EvaluationError(
            f"{file} is not JSON; give a file that `autovoice evaluate --json` wrote."
        ) from error
    return evaluation_from_json(data, str(file))


def evaluation_from_json(data: Any, where: str) -> Evaluation:
    """Plain data back to the record.

    Raises:
        EvaluationError: it is not an evaluation of this schema.
    """
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise EvaluationError(
            f"{where} is not an evaluation of schema {SCHEMA}; write it again with "
            "`autovoice evaluate --json`."
        )
    try:
        pairs = tuple(
            PairScore(**{**p, "targets": tuple(p["targets"]), "notes": tuple(p["notes"])})
            for p in data["pairs"]
        )
        estimates = {key: _estimate(fields) for key, fields in data["estimates"].items()}
        rest = {k: v for k, v in data.items() if k not in ("schema", "pairs", "estimates", "notes")}
        return Evaluation(
            pairs=pairs, estimates=estimates, notes=tuple(data.get("notes", ())), **rest
        )
    except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as error:
        raise EvaluationError(
            f"{where} lacks or has a field that an evaluation does not ({error}); write it again "
            "with `autovoice evaluate --json`."
        ) from error


def _estimate(fields: Mapping[str, Any]) -> Estimate:
    value, low, high = (
        math.nan if fields[name] is None else float(fields[name])
        for name in ("value", "low", "high")
    )
    return Estimate(value, low, high, int(fields["n"]))


def write_text(path: Path, text: str) -> None:
    """Write through a temporary file beside ``path``, so that a reader sees all or nothing.

    Raises:
        EvaluationError: the folder does not exist or cannot be written.
    """
    try:
        # A file name need not be UTF-8; what is not is written as \\udcXX, in JSON an escape.
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise EvaluationError(f"{path} cannot be written: {error.strerror}.") from error


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value
