"""Results as text: Markdown for documents, CSV for spreadsheets, aligned columns for a terminal."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence

from auto_voice.evaluation.results import METRICS, Estimate, Evaluation, Metric

ARROWS = {"up": "↑", "down": "↓", "": ""}
ROLES = {
    "speaker": "speaker encoder",
    "speaker2": "independent speaker encoder",
    "recogniser": "recogniser",
    "quality": "quality model",
    "pitch": "pitch tracker",
}
NOTHING = "–"


def figure(metric: Metric, value: float | None, *, signed: bool = False) -> str:
    """A number as the metric's unit asks for it, without the unit."""
    if value is None or not math.isfinite(value):
        return NOTHING
    scaled = value * 100 if metric.unit == "%" else value
    return f"{scaled:{'+' if signed else ''}.{metric.digits}f}"


def title(metric: Metric) -> str:
    """Label, unit, and which way is better."""
    unit = f", {metric.unit}" if metric.unit else ""
    arrow = f" {ARROWS[metric.better]}" if metric.better else ""
    return f"{metric.label}{unit}{arrow}"


def interval(metric: Metric, estimate: Estimate) -> str:
    """``low – high`` in the metric's unit."""
    if not math.isfinite(estimate.low):
        return NOTHING
    return f"{figure(metric, estimate.low)} – {figure(metric, estimate.high)}"


def summary_rows(evaluation: Evaluation) -> list[list[str]]:
    """Title, figure, interval and number of pairs of each metric that was measured."""
    return [
        [title(m), figure(m, e.value), interval(m, e), str(e.n)]
        for key, m in METRICS.items()
        if (e := evaluation.estimates.get(key)) is not None
    ]


def markdown(evaluation: Evaluation) -> str:
    """The summary, what judged it, and the notes, as Markdown."""
    parts = [
        f"### {_cell(evaluation.name)}: {len(evaluation.pairs)} conversions",
        "",
        markdown_table(["metric", "value", "95 % interval", "pairs"], summary_rows(evaluation)),
        "",
        *verification_lines(evaluation),
        "Judges: "
        + "; ".join(f"{ROLES.get(r, r)} {m}" for r, m in evaluation.models.items())
        + ".",
    ]
    if evaluation.system:
        named = (f"{stage} {_cell(model)}" for stage, model in evaluation.system.items())
        parts.append(f"System: {'; '.join(named)}.")
    parts += [f"- {_cell(note)}" for note in evaluation.notes]
    return "\n".join(parts) + "\n"


def verification_lines(evaluation: Evaluation) -> list[str]:
    """One sentence for each equal error rate."""
    return [
        f"Telling whose voice it is, the {ROLES[role]} has an equal error rate of "
        f"{100 * v['eer']:.1f} % (50 % is guessing; {v['same']:.0f} trials against the target, "
        f"{v['different']:.0f} against others)."
        for role, v in evaluation.verification.items()
    ]


def pair_rows_csv(evaluation: Evaluation) -> str:
    """One line per pair: names, every figure as a plain number, words, notes."""
    keys = [k for k in METRICS if any(k in p.values for p in evaluation.pairs)]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = ["id", "source", "targets", "converted", "source_speaker", "target_speaker"]
    writer.writerow([*names, *keys, "reference", "heard", "notes"])
    for p in evaluation.pairs:
        cells = [p.id, p.source, "|".join(p.targets), p.converted]
        cells += [p.source_speaker, p.target_speaker]
        cells += [f"{p.values[k]:.6g}" if k in p.values else "" for k in keys]
        cells += [p.texts.get("reference", ""), p.texts.get("heard", ""), " ".join(p.notes)]
        writer.writerow([_no_formula(c) for c in cells])
    return out.getvalue()


def plain_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    table = [list(header), *[list(r) for r in rows]]
    widths = [max(len(r[i]) for r in table) for i in range(len(header))]
    lines = []
    for row in table:
        cells = [row[0].ljust(widths[0])]
        cells += [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the others to the right."""
    lines = [f"| {' | '.join(header)} |", "|---|" + "---:|" * (len(header) - 1)]
    lines += [f"| {' | '.join(_cell(c) for c in row)} |" for row in rows]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("\n", " ").replace("|", "\\|").replace("<", "&lt;")


def _no_formula(cell: str) -> str:
    """A spreadsheet runs cells that start so; file names and transcripts are untrusted."""
    risky = cell[:1] in ("=", "+", "@", "\t", "\r") or (cell[:1] == "-" and not _number(cell))
    return f"'{cell}" if risky else cell


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def pins_text(models: Mapping[str, str]) -> str:
    """Judges as one line."""
    return ", ".join(f"{ROLES.get(role, role)} {model}" for role, model in models.items())
