"""The gate on the sound: what an evaluation must hold, and the six conversions that CI judges.

The six are all ordered pairs of the three speakers whose recordings the catalog names as samples.
``gate.yaml`` beside this module holds the figures of the default models on them and how much worse
each may become. A change that moves the sound on purpose renews it, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from auto_voice.audio.io import write_audio
from auto_voice.errors import EvaluationError
from auto_voice.evaluation.history import LogEntry, Shortfall
from auto_voice.evaluation.pairs import Pair
from auto_voice.evaluation.results import METRICS, write_text
from auto_voice.evaluation.tables import ROLES, figure, title
from auto_voice.types import Waveform

if TYPE_CHECKING:
    from auto_voice.models.model_registry import ModelRegistry

# Layout of the stored bounds; another one is refused.
SCHEMA = 1
BOUNDS_FILE = Path(__file__).with_name("gate.yaml")
# Sample of the catalog to seconds of it that are converted and that serve as reference; cut where
# the reader pauses. The two short recordings serve as both, never in the same pair.
SPEAKERS: Mapping[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "sample_two_cities": ((28.5, 42.3), (0.0, 15.0)),
    "sample_clone_test": ((0.0, 4.2), (0.0, 4.2)),
    "sample_beckett": ((0.0, 10.0), (0.0, 10.0)),
}
# How much worse a figure may be than the stored one before the gate fails, in the metric's own
# unit (rates as fractions). Where the sources begin 50 ms later, which is no other sound, SECS
# moves by 0.0003, SECS2 by 0.012, WER by two of 112 words, DNSMOS by 0.01 and the F0 correlation
# by 0.004.
MARGINS: Mapping[str, float] = {
    "secs": 0.02,
    "secs2": 0.03,
    "wer": 0.03,
    "dnsmos": 0.10,
    "f0_correlation": 0.02,
}
_HEADER = """\
# What `autovoice evaluate gate` holds the default models to. After a change that moves the sound on
# purpose: autovoice evaluate gate --update --reason "what changed and why the figures may move"
"""


@dataclass(frozen=True)
class Bound:
    """What one metric must hold.

    Attributes:
        figure: its value when the bounds were last renewed.
        margin: how much worse it may be.
    """

    figure: float
    margin: float


@dataclass(frozen=True)
class Renewal:
    """One renewal of the bounds.

    Attributes:
        date: day, ISO 8601.
        reason: what changed, as the person who renewed them wrote it.
        figures: metric key to its value from then on.
        system: stage to the ``name@version`` that gave the figures.
    """

    date: str
    reason: str
    figures: Mapping[str, float]
    system: Mapping[str, str]


@dataclass(frozen=True)
class Bounds:
    """Stored bounds of one set of pairs.

    Attributes:
        pairs_digest: fingerprint of the pair ids.
        models: role of each judge to its ``name@version``.
        metrics: metric key to its bound.
        renewals: why the figures are what they are, oldest first.
    """

    pairs_digest: str
    models: Mapping[str, str]
    metrics: Mapping[str, Bound]
    renewals: tuple[Renewal, ...]


def sample_pairs(registry: ModelRegistry, folder: Path) -> list[Pair]:
    """The six pairs, their sources and references cut into ``folder``.

    Raises:
        ModelError: a sample cannot be had.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sources, references = {}, {}
    for name, (source, reference) in SPEAKERS.items():
        recording = registry.load(name)
        speaker = name.removeprefix("sample_")
        sources[speaker] = _piece(recording, source, folder / f"{speaker}_source.wav")
        references[speaker] = _piece(recording, reference, folder / f"{speaker}_reference.wav")
    return [
        Pair(
            id=f"{source}__{target}",
            source=sources[source],
            targets=(references[target],),
            source_speaker=source,
            target_speaker=target,
        )
        for source in sources
        for target in references
        if source != target
    ]


def _piece(recording: Waveform, seconds: tuple[float, float], path: Path) -> Path:
    start, end = (round(s * recording.sample_rate) for s in seconds)
    write_audio(path, Waveform(recording.samples[start:end], recording.sample_rate))
    return path


def check_bounds(entry: LogEntry, bounds: Bounds) -> list[Shortfall]:
    """Metrics that are worse than their bound.

    Raises:
        EvaluationError: the entry rests on other pairs, or on judges of another scale.
    """
    if entry.pairs_digest != bounds.pairs_digest:
        raise EvaluationError(
            f"{entry.name} was judged on other pairs than the bounds were taken on; evaluate the "
            "same pairs, or renew the bounds with --update."
        )
    # A pitch tracker's pin holds the version of its package, and F0 in Hz has but one scale.
    for role, model in bounds.models.items():
        if role != "pitch" and entry.models.get(role) != model:
            raise EvaluationError(
                f"The {ROLES[role]} was {model} when the bounds were taken and is "
                f"{entry.models.get(role, 'missing')} now; renew the bounds with --update."
            )
    at_least, at_most = {}, {}
    for key, bound in bounds.metrics.items():
        if METRICS[key].better == "up":
            at_least[key] = bound.figure - bound.margin
        else:
            at_most[key] = bound.figure + bound.margin
    return check_limits(entry, at_least, at_most)


def check_limits(
    entry: LogEntry, at_least: Mapping[str, float], at_most: Mapping[str, float]
) -> list[Shortfall]:
    """Metrics outside of fixed limits; a metric that was not measured fails its limit.

    Raises:
        EvaluationError: no such metric; the message lists the known ones.
    """
    shortfalls = []
    if entry.left_out:
        message = f"{entry.left_out} conversions could not be scored and are in no figure"
        shortfalls.append(Shortfall("", message))
    for limits, sign, words in ((at_least, 1, "below"), (at_most, -1, "above")):
        for key, limit in limits.items():
            metric = METRICS.get(key)
            if metric is None:
                raise EvaluationError(f"There is no metric {key!r}; they are {', '.join(METRICS)}.")
            found = entry.estimates.get(key)
            if found is None:
                shortfalls.append(Shortfall(key, f"{title(metric)} was not measured"))
            elif sign * (found.value - limit) < 0 or not math.isfinite(found.value):
                message = (
                    f"{title(metric)} is {figure(metric, found.value)}, {words} the limit "
                    f"{figure(metric, limit)}"
                )
                shortfalls.append(Shortfall(key, message))
    return shortfalls


def renewed(
    bounds: Bounds | None, entry: LogEntry, reason: str, margins: Mapping[str, float]
) -> Bounds:
    """Bounds with the figures of ``entry``; margins that are not given stay what they were.

    Raises:
        EvaluationError: there is no reason, a conversion could not be scored, or a metric that
            the bounds hold was not measured.
    """
    if not reason.strip():
        raise EvaluationError("Say with --reason why the figures may move; it is kept with them.")
    if entry.left_out:
        raise EvaluationError(
            f"{entry.left_out} conversions could not be scored, so bounds cannot rest on them."
        )
    kept = {key: b.margin for key, b in bounds.metrics.items()} if bounds else dict(MARGINS)
    metrics = {}
    for key, margin in {**kept, **margins}.items():
        found = entry.estimates.get(key)
        if found is None or not math.isfinite(found.value):
            raise EvaluationError(f"{title(METRICS[key])} was not measured, so it has no bound.")
        metrics[key] = Bound(round(found.value, 4), margin)
    now = Renewal(
        date=datetime.now(timezone.utc).date().isoformat(),
        reason=reason.strip(),
        figures={key: bound.figure for key, bound in metrics.items()},
        system=dict(entry.system),
    )
    earlier = bounds.renewals if bounds else ()
    return Bounds(entry.pairs_digest, dict(entry.models), metrics, (*earlier, now))


def read_bounds(path: str | Path = BOUNDS_FILE) -> Bounds:
    """Bounds that ``write_bounds`` wrote.

    Raises:
        EvaluationError: the file is missing or holds something else.
    """
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA:
            raise ValueError("schema")
        metrics = {
            k: Bound(float(b["figure"]), float(b["margin"])) for k, b in data["metrics"].items()
        }
        if unknown := sorted(set(metrics) - {k for k, m in METRICS.items() if m.better}):
            raise ValueError(unknown[0])
        renewals = tuple(
            Renewal(str(r["date"]), str(r["reason"]), dict(r["figures"]), dict(r["system"]))
            for r in data["renewals"]
        )
        return Bounds(str(data["pairs_digest"]), dict(data["models"]), metrics, renewals)
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise EvaluationError(
            f"{path} does not hold bounds of the gate ({error}); write it with "
            "autovoice evaluate gate --update --reason TEXT"
        ) from error


def write_bounds(bounds: Bounds, path: str | Path = BOUNDS_FILE) -> None:
    """Write the file that ``read_bounds`` reads.

    Raises:
        EvaluationError: it cannot be written.
    """
    data: dict[str, Any] = {
        "schema": SCHEMA,
        "pairs_digest": bounds.pairs_digest,
        "models": dict(bounds.models),
        "metrics": {k: {"figure": b.figure, "margin": b.margin} for k, b in bounds.metrics.items()},
        "renewals": [
            {
                "date": r.date,
                "reason": r.reason,
                "figures": dict(r.figures),
                "system": dict(r.system),
            }
            for r in bounds.renewals
        ],
    }
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)
    write_text(Path(path), _HEADER + text)
