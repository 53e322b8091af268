"""Training curves as a picture."""

from __future__ import annotations

import json
from pathlib import Path

from auto_voice.errors import MissingDependencyError

PREFIXES = ("train_", "held_out_")
LABELS = ("training speakers", "held-out speakers")


def read_log(folder: Path) -> list[dict[str, float]]:
    """Rows of a run folder's ``log.jsonl``; a line that a crash cut short is left out."""
    path = folder / "log.jsonl"
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def plot_curves(folder: Path) -> Path | None:
    """Draws every logged figure over the steps into ``curves.png``; None without any rows."""
    rows = read_log(folder)
    if not rows:
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "Curves need matplotlib; install it with: pip install 'auto-voice[plot]'"
        ) from error
    names = sorted({_figure(key) for row in rows for key in row if key.startswith(PREFIXES)})
    figure = Figure(figsize=(4.2 * len(names), 3.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for prefix, style, label in zip(PREFIXES, ("-", "o-"), LABELS, strict=True):
            points = [(r["step"], r[prefix + name]) for r in rows if prefix + name in r]
            if points:
                axes.plot(*zip(*points, strict=True), style, markersize=3, label=label)
        axes.set(title=name, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend()
    target = folder / "curves.png"
    figure.savefig(target, dpi=110)
    return target


def _figure(key: str) -> str:
    for prefix in PREFIXES:
        key = key.removeprefix(prefix)
    return key
