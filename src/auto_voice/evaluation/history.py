"""Figures over time: a JSONL log, and what became worse from run to run."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from auto_voice.errors import EvaluationError
from auto_voice.evaluation.results import METRICS, Estimate, Evaluation, load_evaluation
from auto_voice.evaluation.tables import figure, title

# Layout of a line of the log; lines of another are refused.
SCHEMA = 1


@dataclass(frozen=True)
class LogEntry:
    """One line of the log.

    Attributes:
        pairs_digest: fingerprint of the pair ids; entries over other pairs are not compared.
        estimates: metric key to its figure and interval.
        reference_text: where the words come from; empty in lines of before it was kept.
        left_out: conversions that could not be scored.
    """

    name: str
    created: str
    pairs: int
    pairs_digest: str
    estimates: Mapping[str, Estimate]
    models: Mapping[str, str]
    system: Mapping[str, str]
    machine: Mapping[str, Any]
    reference_text: str = ""
    left_out: int = 0

    @property
    def label(self) -> str:
        """Day and commit, or version."""
        commit = str(self.machine.get("commit") or self.machine.get("auto_voice") or "")
        return f"{self.created[:10]} {commit}".strip()


@dataclass(frozen=True)
class Shortfall:
    """One figure that fails a limit or has become worse."""

    metric: str
    message: str


def to_entry(evaluation: Evaluation) -> LogEntry:
    """What the log keeps of an evaluation."""
    ids = "\n".join(sorted(p.id for p in evaluation.pairs))
    return LogEntry(
        name=evaluation.name,
        created=evaluation.created,
        pairs=len(evaluation.pairs),
        pairs_digest=hashlib.sha256(ids.encode()).hexdigest()[:16],
        estimates=evaluation.estimates,
        models=evaluation.models,
        system=evaluation.system,
        machine=evaluation.machine,
        reference_text=str(evaluation.settings.get("reference_text", "")),
        left_out=evaluation.left_out,
    )


def append_history(evaluation: Evaluation, path: str | Path) -> LogEntry:
    """Add one line to the log; the file is made if it is not there.

    Raises:
        EvaluationError: the file cannot be written.
    """
    entry = to_entry(evaluation)
    line = json.dumps(_plain(entry), ensure_ascii=False, allow_nan=False) + "\n"
    try:
        # One write to a file opened for appending: concurrent runs do not mix their lines.
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if _broken_off(descriptor):
                line = "\n" + line
            os.write(descriptor, line.encode(errors="backslashreplace"))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise EvaluationError(f"{path} cannot be written: {error.strerror}.") from error
    return entry


def _broken_off(descriptor: int) -> bool:
    """Whether the last line of a log has no end: a run was killed while it wrote."""
    size = os.lseek(descriptor, 0, os.SEEK_END)
    if not size:
        return False
    os.lseek(descriptor, size - 1, os.SEEK_SET)
    return os.read(descriptor, 1) != b"\n"


_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


def read_history(path: str | Path) -> list[LogEntry]:
    """All entries, oldest first.

    Raises:
        EvaluationError: the file is missing, empty, or a line is damaged (its number is named).
    """
    file = Path(path)
    try:
        # Not by splitlines: a name may hold other marks that it takes for the end of a line.
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(
            f"{file} cannot be read; `autovoice evaluate … --history {file}` starts a log."
        ) from error
    entries = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entries.append(_entry(json.loads(line)))
        except _DAMAGE as error:
            raise EvaluationError(
                f"{file}:{number} is not a line of an evaluation log; remove it."
            ) from error
    if not entries:
        raise EvaluationError(f"{file} has no entries; `autovoice evaluate … --history` adds one.")
    return entries


def comparable(a: LogEntry, b: LogEntry) -> bool:
    """Whether two entries measured the same pairs of the same system by the same judges."""
    return a.name == b.name and alike(a, b)


def alike(a: LogEntry, b: LogEntry) -> bool:
    """Whether two entries were measured in the same way: pairs, judges, source of the words."""
    texts = {a.reference_text, b.reference_text} - {""}
    return (a.pairs_digest, a.models) == (b.pairs_digest, b.models) and len(texts) < 2


def regressions(entries: Sequence[LogEntry]) -> tuple[list[Shortfall], LogEntry | None]:
    """What the last entry does worse than the comparable ones before it, beyond both intervals.

    Worse means: each of the two figures lies outside the other's 95 % interval, on the wrong
    side. Steps too small to be seen from one run to the next are seen against older runs, once:
    what the run before had already lost is not told again. Speed counts only on the same hardware.

    Returns:
        The shortfalls, and the entry before the last that is comparable (None if there is none).
    """
    last = entries[-1]
    earlier = [e for e in entries[:-1] if comparable(e, last)]
    if not earlier:
        return [], None
    *older, before = earlier
    shortfalls = {f.metric: f for f in worse_than(last, before, {})}
    for entry in older:
        known = {f.metric for f in worse_than(before, entry, {})}
        for f in worse_than(last, entry, {}):
            if f.metric in known:
                continue
            drift = Shortfall(f.metric, f"{f.message}, little by little since {entry.created[:10]}")
            shortfalls.setdefault(f.metric, drift)
    return list(shortfalls.values()), before


def worse_than(last: LogEntry, before: LogEntry, margins: Mapping[str, float]) -> list[Shortfall]:
    """Metrics of ``last`` that are worse than ``before`` beyond the intervals, or beyond a margin.

    Args:
        margins: metric key to how much worse is allowed, in place of the intervals.
    """
    shortfalls = []
    for key, metric in METRICS.items():
        old, new = before.estimates.get(key), last.estimates.get(key)
        if old is None or not metric.better:
            continue
        if "machine" in metric.judges and not (new and _same_hardware(last, before)):
            continue
        if new is None or not math.isfinite(new.value):
            # The same judges listened, so there was nothing left that they could measure.
            if metric.judges:
                message = f"{title(metric)} could be measured before and no longer can"
                shortfalls.append(Shortfall(key, message))
            continue
        sign = 1 if metric.better == "up" else -1
        loss = sign * (old.value - new.value)
        if key in margins:
            worse = loss > margins[key]
        else:
            worse = (
                loss > 0 and _outside(new.value, old, sign) and _outside_up(old.value, new, sign)
            )
        if worse:
            shortfalls.append(
                Shortfall(
                    key,
                    f"{title(metric)} went from {figure(metric, old.value)} to "
                    f"{figure(metric, new.value)}",
                )
            )
    return shortfalls


def load_entry(path: str | Path) -> LogEntry:
    """The evaluation of a JSON file, or the last line of a JSONL log.

    Raises:
        EvaluationError: the file is neither.
    """
    if Path(path).suffix == ".jsonl":
        return read_history(path)[-1]
    return to_entry(load_evaluation(path))


def sparkline(values: Sequence[float]) -> str:
    """Values as a row of eight heights, for a terminal."""
    known = [v for v in values if math.isfinite(v)]
    if not known:
        return ""
    low, span = min(known), (max(known) - min(known)) or 1.0
    heights = "▁▂▃▄▅▆▇█"
    return "".join(
        heights[round((v - low) / span * 7)] if math.isfinite(v) else " " for v in values
    )


def _outside(value: float, other: Estimate, sign: int) -> bool:
    bound = other.low if sign > 0 else other.high
    return math.isfinite(bound) and sign * (value - bound) < 0


def _outside_up(value: float, other: Estimate, sign: int) -> bool:
    bound = other.high if sign > 0 else other.low
    return math.isfinite(bound) and sign * (value - bound) > 0


def _same_hardware(a: LogEntry, b: LogEntry) -> bool:
    keys = ("system", "processor", "cores")
    return [a.machine.get(k) for k in keys] == [b.machine.get(k) for k in keys]


def _plain(entry: LogEntry) -> dict[str, Any]:
    figures = {
        key: [None if not math.isfinite(x) else round(x, 6) for x in (e.value, e.low, e.high)]
        + [e.n]
        for key, e in entry.estimates.items()
    }
    return {
        "schema": SCHEMA,
        "name": entry.name,
        "created": entry.created,
        "pairs": entry.pairs,
        "pairs_digest": entry.pairs_digest,
        "estimates": figures,
        "models": dict(entry.models),
        "system": dict(entry.system),
        "machine": dict(entry.machine),
        "reference_text": entry.reference_text,
        "left_out": entry.left_out,
    }


def _entry(data: Any) -> LogEntry:
    if data.pop("schema") != SCHEMA:
        raise ValueError("schema")
    figures = {}
    for key, (value, low, high, n) in data.pop("estimates").items():
        value, low, high = (math.nan if x is None else float(x) for x in (value, low, high))
        figures[key] = Estimate(value, low, high, int(n))
    texts = ("name", "created", "pairs_digest")
    maps = ("models", "system", "machine")
    if not all(isinstance(data[k], str) for k in texts) or not all(
        isinstance(data[k], dict) for k in maps
    ):
        raise TypeError("fields")
    return LogEntry(estimates=figures, **data)
