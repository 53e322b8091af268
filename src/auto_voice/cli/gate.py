"""``autovoice evaluate gate``: an exit status that says whether the sound holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from auto_voice.cli.judging import (
    FAILED,
    FILE,
    convert_and_score,
    judge_options,
    registry_for,
    stage_options,
)

if TYPE_CHECKING:
    from auto_voice.evaluation.gate import Bounds
    from auto_voice.evaluation.history import LogEntry, Shortfall
    from auto_voice.evaluation.results import Evaluation


@click.command()
@click.argument("result", type=FILE, required=False)
@click.option(
    "--bounds",
    type=FILE,
    help="Stored bounds (YAML) that must hold [without RESULT: those of the default models].",
)
@click.option("--min", "minimum", multiple=True, metavar="METRIC=VALUE", help="At least this.")
@click.option("--max", "maximum", multiple=True, metavar="METRIC=VALUE", help="At most this.")
@click.option("--baseline", type=FILE, help="Results (JSON) or log (JSONL) to be no worse than.")
@click.option(
    "--margin",
    multiple=True,
    metavar="METRIC=VALUE",
    help="How much worse than the baseline is allowed, in place of the intervals; with --update, "
    "than the new bound.",
)
@click.option("--update", is_flag=True, help="Renew the bounds instead of checking them.")
@click.option("--reason", default="", metavar="TEXT", help="Why the bounds are renewed.")
@click.option("--json", "json_", type=FILE, help="Write the results of the six conversions.")
@click.option("--keep", type=FILE, help="Folder for the six conversions [default: none].")
@stage_options
@judge_options
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
def gate(
    result: Path | None,
    bounds: Path | None,
    baseline: Path | None,
    update: bool,
    reason: str,
    **options: Any,
) -> int:
    """Exit with 0 if the sound holds, 1 if it does not, 2 if it cannot be judged.

    Without RESULT, the models convert six pairs of sample recordings, which are then judged and
    held to the stored bounds. RESULT (JSON or log of `evaluate`) is held to the limits given.
    Values are as in JSON: WER 0.05 is 5 %.

    \b
    autovoice evaluate gate
    autovoice evaluate gate --update --reason "the vocoder now runs in int8"
    autovoice evaluate gate mine.json --min secs2=0.6 --max wer=0.1
    """
    from auto_voice.evaluation import gate as g
    from auto_voice.evaluation.history import load_entry, to_entry
    from auto_voice.evaluation.results import METRICS, save_evaluation

    names = ("minimum", "maximum", "margin")
    at_least, at_most, margins = (_limits(options[name]) for name in names)
    if result is not None and not (at_least or at_most or baseline or bounds or update):
        raise click.UsageError("give at least one of --min, --max, --bounds and --baseline")
    if margins and not (baseline or update):
        raise click.UsageError("--margin needs --baseline or --update")
    if neutral := [key for key in margins if not METRICS[key].better]:
        raise click.UsageError(f"{neutral[0]} has no better and worse; use --min and --max")
    if update and not reason.strip():
        raise click.UsageError("--update needs --reason, which is kept with the figures")
    stored = bounds or (g.BOUNDS_FILE if result is None or update else None)
    if result is None:
        evaluation = _six_conversions(options)
        if options["json_"] is not None:
            save_evaluation(evaluation, options["json_"])
        entry = to_entry(evaluation)
    else:
        entry = load_entry(result)
    if update and stored is not None:
        before = g.read_bounds(stored) if stored.exists() else None
        after = g.renewed(before, entry, reason, margins)
        g.write_bounds(after, stored)
        _show(entry, after)
        click.echo(f"renewed: {stored}")
        return 0
    shortfalls = g.check_limits(entry, at_least, at_most)
    if stored is not None:
        held = g.read_bounds(stored)
        shortfalls += g.check_bounds(entry, held)
        _show(entry, held)
    if baseline is not None:
        shortfalls += _against(entry, baseline, margins, result)
    for shortfall in shortfalls:
        click.echo(f"failed: {shortfall.message}")
    if not shortfalls:
        click.echo(f"passed: {entry.name}, {entry.pairs} conversions")
    return FAILED if shortfalls else 0


def _six_conversions(options: dict[str, Any]) -> Evaluation:
    import tempfile

    from auto_voice.evaluation.gate import sample_pairs

    options |= {"without": (), "resample": "pair"}
    registry = registry_for(options)
    with tempfile.TemporaryDirectory(prefix="autovoice-") as temporary:
        pairs = sample_pairs(registry, Path(temporary) / "samples")
        folder = options["keep"] or Path(temporary) / "converted"
        return convert_and_score(pairs, folder, "the six sample conversions", options, registry)


def _show(entry: LogEntry, bounds: Bounds) -> None:
    """Each bounded figure beside what it was and how much worse it may be."""
    from auto_voice.evaluation.results import METRICS
    from auto_voice.evaluation.tables import figure, plain_table, title

    rows = []
    for key, bound in bounds.metrics.items():
        m, found = METRICS[key], entry.estimates.get(key)
        now = figure(m, found.value if found else None)
        rows.append([title(m), now, figure(m, bound.figure), figure(m, bound.margin)])
    click.echo(plain_table(["metric", "now", "stored", "margin"], rows))


def _against(
    entry: LogEntry, baseline: Path, margins: dict[str, float], result: Path | None
) -> list[Shortfall]:
    """What ``entry`` does worse than another result, or than the run before it in the same log."""
    from auto_voice.errors import EvaluationError
    from auto_voice.evaluation import history as h

    before = h.load_entry(baseline)
    if result is not None and baseline.suffix == ".jsonl" and baseline.samefile(result):
        before = h.regressions(h.read_history(baseline))[1] or before
        if before == entry:
            raise EvaluationError(
                f"{baseline} has no earlier run over the same pairs by the same judges."
            )
    if not h.alike(before, entry):
        raise EvaluationError(
            f"{entry.name} and {baseline} were judged by other models, over other pairs or against "
            "other texts, so neither can be better; evaluate both in the same way."
        )
    if not margins and not any(e.low == e.low for e in entry.estimates.values()):
        raise EvaluationError(
            f"{entry.name} has one conversion and so no intervals; give each limit as --margin."
        )
    return h.worse_than(entry, before, margins)


def _limits(given: tuple[str, ...]) -> dict[str, float]:
    from auto_voice.evaluation.results import METRICS

    limits = {}
    for text in given:
        key, _, value = text.partition("=")
        if key not in METRICS:
            raise click.UsageError(f"no metric {key!r}; they are {', '.join(METRICS)}")
        try:
            limits[key] = float(value)
            if limits[key] != limits[key]:
                raise ValueError("nan")
        except ValueError:
            raise click.UsageError(f"{text!r} should look like {key}=0.5") from None
    return limits
