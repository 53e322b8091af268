"""What commands share to judge conversions, and those that judge results against others:
``autovoice evaluate gate`` and ``autovoice compare``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from auto_voice.cli.options import REGISTRY_OPTIONS, device_option, fine_tune_options, plain
from auto_voice.cli.showing import shown_progress

if TYPE_CHECKING:
    from auto_voice.batch.executors import Executor
    from auto_voice.evaluation.gate import Bounds
    from auto_voice.evaluation.history import LogEntry, Shortfall
    from auto_voice.evaluation.judges import Judges
    from auto_voice.evaluation.pairs import Pair
    from auto_voice.evaluation.results import Evaluation
    from auto_voice.models.model_registry import ModelRegistry

F = TypeVar("F", bound=Callable[..., Any])
FILE = click.Path(path_type=Path)
GROUP_NAMES = ("similarity", "words", "quality", "pitch", "signal")
# Exit code of a gate or a history that found something worse; 2 is left to errors.
FAILED = 1
# Stages of single conversions, within the progress over all pairs.
INNER = ("convert", "fine-tune")
# Names of the options of ``stage_options``.
STAGE_NAMES = ("content_encoder", "converter", "vocoder", "fine_tune", "fine_tune_steps")

resample_option = click.option(
    "--resample",
    type=click.Choice(["pair", "source", "target"]),
    default="pair",
    show_default=True,
    help="What intervals are drawn over: conversions, or whole speakers.",
)


def judge_options(command: F) -> F:
    """Which models judge, and where models are kept."""
    options = (
        click.option("--recogniser", metavar="MODEL", help="NAME[@VERSION] [recogniser_base]."),
        *REGISTRY_OPTIONS,
        device_option,
    )
    for option in reversed(options):
        command = option(command)
    return command


def stage_options(command: F) -> F:
    """Which models convert."""
    options = (
        click.option("--content-encoder", metavar="MODEL", help="NAME[@VERSION]."),
        click.option("--converter", metavar="MODEL", help="NAME[@VERSION]."),
        *fine_tune_options,
        click.option("--vocoder", metavar="MODEL", help="NAME[@VERSION]."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def registry_for(options: dict[str, Any]) -> ModelRegistry:
    """The registry that the options ask for."""
    from auto_voice.models.model_registry import ModelRegistry

    return ModelRegistry(
        options["model_dir"],
        config=options["config"],
        offline=options["offline"],
        mirrors=options["mirrors"],
        device=options["device"],
    )


def judges_for(options: dict[str, Any], registry: ModelRegistry | None = None) -> Judges:
    """The judges that the options ask for."""
    from auto_voice.evaluation.judges import load_judges

    models = {"recogniser": options["recogniser"]} if options["recogniser"] else {}
    return load_judges(registry or registry_for(options), without=options["without"], models=models)


def convert_and_score(
    pairs: Sequence[Pair],
    folder: Path,
    name: str,
    options: dict[str, Any],
    registry: ModelRegistry | None = None,
) -> Evaluation:
    """Convert the pairs into ``folder`` with the stages that the options ask for, and score them.

    Args:
        name: of the system, for tables.
        options: of ``stage_options`` and ``judge_options``, and ``without``, ``resample`` and
            ``quiet``.
        registry: None makes one from the options.
    """
    from auto_voice.evaluation.pairs import convert_all
    from auto_voice.evaluation.scoring import evaluate
    from auto_voice.inference.voice_conversion_pipeline import (
        PipelineConfig,
        VoiceConversionPipeline,
    )

    config = PipelineConfig(**{k: options[k] for k in STAGE_NAMES if options[k] is not None})
    registry = registry or registry_for(options)
    pipeline = VoiceConversionPipeline(config, model_registry=registry)
    with shown_progress(hidden=options["quiet"], without=INNER):
        made = convert_all(pipeline, pairs, folder)
        return evaluate(
            made.pairs,
            judges_for(options, registry),
            name=name,
            group_by=options["resample"],
            extra=made.extra,
            system=made.system,
            peak_memory_mb=made.peak_memory_mb,
            notes=made.notes,
        )


def evaluate_elsewhere(
    pairs: Sequence[Pair], folder: Path, name: str, options: dict[str, Any], executor: Executor
) -> Evaluation:
    """As :func:`convert_and_score`, by the workers of ``executor``, which open the registry that
    the options ask for themselves."""
    from auto_voice.evaluation.scoring import evaluate_on, pair_spec

    given = ("model_dir", "config", "offline", "mirrors", "device")
    judges = {"models": {"recogniser": options["recogniser"]}} if options["recogniser"] else {}
    settings = {
        "registry": {n: plain(options[n]) for n in given if options[n] is not None},
        "pipeline": {n: options[n] for n in STAGE_NAMES if options[n] is not None},
        "judges": {**judges, "without": list(options["without"])},
    }
    with shown_progress(hidden=options["quiet"], without=INNER):
        return evaluate_on(
            executor, pair_spec(settings), pairs, folder, name=name, group_by=options["resample"]
        )


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


@click.command()
@click.argument("systems", nargs=-1, required=True, type=FILE)
@click.option("--html", type=FILE, help="Write the tables as a page.")
@click.option("--markdown", is_flag=True, help="Print Markdown.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--strict", is_flag=True, help="Refuse results whose judges differ, instead of saying so."
)
@click.option(
    "--without",
    multiple=True,
    type=click.Choice(GROUP_NAMES),
    help="Where folders are scored: leave out a group of metrics.",
)
@resample_option
@judge_options
def compare(
    systems: tuple[Path, ...],
    html: Path | None,
    markdown: bool,
    as_json: bool,
    strict: bool,
    resample: str,
    **options: Any,
) -> None:
    """Compare each further system with the first one, pair by pair.

    SYSTEMS are results (`autovoice evaluate … --json FILE`), or folders and CSV files of
    conversions, which are scored now. A conversion is paired by its id, or by the file names of
    its source and target.

    \b
    autovoice compare mine.json theirs.json --html compared.html
    autovoice compare mine/ theirs/
    """
    from auto_voice.errors import EvaluationError
    from auto_voice.evaluation import tables
    from auto_voice.evaluation.comparison import (
        COMPARISON_HEADER,
        comparison_rows,
    )
    from auto_voice.evaluation.comparison import (
        compare as pair_up,
    )
    from auto_voice.evaluation.results import write_text

    if len(systems) < 2:
        raise click.UsageError("give at least two systems to compare")
    with shown_progress(hidden=as_json):
        loaded = _load_all(systems, options)
    found = [pair_up(loaded[0], other, group_by=resample) for other in loaded[1:]]
    if strict:
        blocked = [d.why_not for c in found for d in c.differences if d.why_not]
        if blocked:
            raise EvaluationError(f"{blocked[0]} Evaluate both with the same models.")
    if html is not None:
        from auto_voice.evaluation.report import comparison_report

        write_text(html, comparison_report(found))
    if as_json:
        click.echo(json.dumps([c.to_json() for c in found], ensure_ascii=False, allow_nan=False))
        return
    shape = tables.markdown_table if markdown else tables.plain_table
    for c in found:
        click.echo(f"A: {c.a}\nB: {c.b}\n{c.pairs} shared pairs\n")
        click.echo(shape(COMPARISON_HEADER, comparison_rows(c)))
        for note in c.notes:
            click.echo(f"note: {note}")


def _load_all(systems: tuple[Path, ...], options: dict[str, Any]) -> list[Evaluation]:
    from auto_voice.evaluation.pairs import read_pairs
    from auto_voice.evaluation.results import load_evaluation
    from auto_voice.evaluation.scoring import evaluate

    judges: Judges | None = None
    loaded = []
    for path in systems:
        if path.suffix == ".json":
            loaded.append(load_evaluation(path))
            continue
        pairs = read_pairs(path)
        judges = judges or judges_for(options)
        loaded.append(evaluate(pairs, judges, name=path.resolve().stem))
    return loaded
