"""``autovoice evaluate``: score conversions or a pipeline, follow the figures, gate on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from auto_voice.cli.options import adaptation_option
from auto_voice.cli.showing import quiet_progress

if TYPE_CHECKING:
    from auto_voice.evaluation.judges import Judges
    from auto_voice.evaluation.results import Evaluation
    from auto_voice.models.model_registry import ModelRegistry

F = TypeVar("F", bound=Callable[..., Any])
FILE = click.Path(path_type=Path)
GROUP_NAMES = ("similarity", "words", "quality", "pitch", "signal")
FAILED = 1


resample_option = click.option(
    "--resample",
    type=click.Choice(["pair", "source", "target"]),
    default="pair",
    show_default=True,
    help="What intervals are drawn over: conversions, or whole speakers.",
)


class _DefaultGroup(click.Group):
    """``evaluate PATH`` means ``evaluate files PATH``."""

    default = "files"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [self.default, *args]
        return super().parse_args(ctx, args)


@click.group(cls=_DefaultGroup)
def evaluate() -> None:
    """Measure how good conversions are, of any system.

    \b
    autovoice evaluate conversions/ --html report.html
    autovoice evaluate pairs.csv --json mine.json --csv mine.csv
    autovoice evaluate pipeline speakers/ --limit 12 --history log.jsonl
    autovoice evaluate history log.jsonl
    autovoice evaluate gate mine.json --min secs2=0.6 --max wer=0.1

    PATH is a CSV file with the columns source, target and converted (and, if you like,
    transcript, parallel, source_speaker, target_speaker), or a folder with the folders
    source, target and converted whose files have the same names.
    """


def output_options(command: F) -> F:
    """What is judged, and where the results go."""
    options = (
        click.option("--name", help="Of the system, for tables [default: the path's name]."),
        click.option("--html", type=FILE, help="Write one self-contained page to look at."),
        click.option(
            "--json", "json_", type=FILE, help="Write the results for compare and gate; - prints."
        ),
        click.option("--csv", "csv_", type=FILE, help="Write one line per conversion."),
        click.option("--markdown", type=FILE, help="Write the summary as Markdown; - prints."),
        click.option("--history", type=FILE, help="Append the figures to this log (JSONL)."),
        click.option(
            "--without",
            multiple=True,
            type=click.Choice(GROUP_NAMES),
            help="Leave out a group of metrics and its models; repeat it for more.",
        ),
        resample_option,
        click.option(
            "--examples",
            type=click.IntRange(min=0),
            default=6,
            show_default=True,
            help="Conversions to hear in the page.",
        ),
        click.option(
            "--audio-mb",
            type=click.FloatRange(0, 1e4),
            default=16.0,
            show_default=True,
            help="Limit of sound in the page, MB.",
        ),
        click.option("-q", "--quiet", is_flag=True, help="Print no summary and no progress."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def judge_options(command: F) -> F:
    """Which models judge, and where models are kept."""
    options = (
        click.option("--recogniser", metavar="MODEL", help="NAME[@VERSION] [recogniser_base]."),
        click.option("--config", type=FILE, help="YAML of settings and models."),
        click.option("--model-dir", type=FILE, help="Where models are kept."),
        click.option("--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps."),
        click.option("--offline", is_flag=True, default=None, help="Open no connection."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@evaluate.command("files")
@click.argument("path", type=FILE)
@judge_options
@output_options
def files(path: Path, **options: Any) -> None:
    """Score the finished conversions that PATH lists or holds.

    \b
    autovoice evaluate conversions/ --html report.html
    """
    from auto_voice.evaluation.items import read_items
    from auto_voice.evaluation.scoring import evaluate as score

    _check_outputs(options)
    items = read_items(path)
    with quiet_progress("judging", hidden=options["quiet"]) as progress:
        result = score(
            items,
            judges_for(options),
            name=options["name"] or path.resolve().stem,
            group_by=options["resample"],
            progress=progress,
        )
    deliver(result, options)


@evaluate.command("pipeline")
@click.argument("speakers", type=FILE)
@click.option("--per-speaker", default=1, show_default=True, help="Sources from each speaker.")
@click.option(
    "--references",
    default=1,
    show_default=True,
    help="Recordings that stand for each target; 0 for all that are not sources.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Keep so many pairs, spread evenly.")
@click.option("--keep", type=FILE, help="Folder for the conversions [default: a temporary one].")
@click.option("--content-encoder", metavar="MODEL", help="NAME[@VERSION].")
@click.option("--converter", metavar="MODEL", help="NAME[@VERSION].")
@adaptation_option
@click.option("--vocoder", metavar="MODEL", help="NAME[@VERSION].")
@judge_options
@output_options
def pipeline(
    speakers: Path,
    per_speaker: int,
    references: int,
    limit: int | None,
    keep: Path | None,
    **options: Any,
) -> None:
    """Convert between all speakers of a folder (one folder each), then score the results.

    \b
    autovoice evaluate pipeline speakers/ --limit 12
    """
    import tempfile

    from auto_voice.evaluation.items import read_test_set

    _check_outputs(options)
    items = read_test_set(speakers, per_speaker=per_speaker, references=references, limit=limit)
    if keep is not None:
        _run_pipeline(items, keep, speakers, options)
        return
    with tempfile.TemporaryDirectory(prefix="autovoice-") as folder:
        _run_pipeline(items, Path(folder), speakers, options)


def _run_pipeline(items: Any, folder: Path, speakers: Path, options: dict[str, Any]) -> None:
    from auto_voice.evaluation.conversions import convert_all
    from auto_voice.evaluation.scoring import evaluate as score
    from auto_voice.inference.voice_conversion_pipeline import (
        PipelineConfig,
        VoiceConversionPipeline,
    )

    chosen = ("content_encoder", "converter", "vocoder", "adaptation_steps")
    config = PipelineConfig(**{k: options[k] for k in chosen if options[k] is not None})
    registry = _registry(options)
    made_by = VoiceConversionPipeline(config, model_registry=registry)
    with quiet_progress("converting", hidden=options["quiet"]) as progress:
        made = convert_all(made_by, items, folder, progress=progress)
    with quiet_progress("judging", hidden=options["quiet"]) as progress:
        result = score(
            made.items,
            judges_for(options, registry),
            name=options["name"] or f"auto_voice on {speakers.resolve().name}",
            group_by=options["resample"],
            extra=made.extra,
            system=made.system,
            peak_memory_mb=made.peak_memory_mb,
            notes=made.notes,
            progress=progress,
        )
    deliver(result, options)


@evaluate.command("trials")
@click.argument("path", type=FILE)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@judge_options
def trials(path: Path, as_json: bool, **options: Any) -> None:
    """Equal error rate over speaker trials: a CSV file with the columns a, b and same (1 or 0).

    \b
    autovoice evaluate trials trials.csv
    """
    from auto_voice.evaluation.items import read_trials
    from auto_voice.evaluation.scoring import Scorer
    from auto_voice.evaluation.tables import ROLES

    listed = read_trials(path)
    options["without"] = ("words", "quality", "pitch", "signal")
    judges = judges_for(options)
    found = Scorer(judges).trials([((a,), (b,), same) for a, b, same in listed])
    if as_json:
        click.echo(json.dumps({"models": dict(judges.pins), "verification": found}))
        return
    for role, v in found.items():
        click.echo(
            f"{ROLES[role]} {judges.pins[role]}: equal error rate {100 * v['eer']:.2f} % at "
            f"{v['threshold']:.3f} ({v['same']:.0f} same, {v['different']:.0f} different)"
        )


@evaluate.command("history")
@click.argument("log", type=FILE)
@click.option("--html", type=FILE, help="Write the trends as a page.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def history(log: Path, html: Path | None, as_json: bool) -> int:
    """Show how the figures moved, and name what became worse beyond the intervals (exit code 1).

    \b
    autovoice evaluate history log.jsonl
    """
    from auto_voice.evaluation import history as h
    from auto_voice.evaluation.results import METRICS, write_text
    from auto_voice.evaluation.tables import figure, plain_table, title

    entries = h.read_history(log)
    series = [e for e in entries if h.comparable(e, entries[-1])]
    findings, before = h.regressions(entries)
    if html is not None:
        from auto_voice.evaluation.report import history_report

        write_text(html, history_report(series, findings))
    if as_json:
        worse = [{"metric": f.metric, "message": f.message} for f in findings]
        click.echo(json.dumps({"runs": len(series), "regressions": worse}))
        return FAILED if findings else 0
    rows = []
    nan = float("nan")
    for key, m in METRICS.items():
        values = [e.estimates[key].value if key in e.estimates else nan for e in series]
        if key in entries[-1].estimates:
            first = next(v for v in values if v == v)
            cells = [title(m), figure(m, first), figure(m, values[-1]), h.sparkline(values)]
            rows.append(cells)
    click.echo(f"{entries[-1].name}: {len(series)} comparable runs of {len(entries)}")
    click.echo(plain_table(["metric", "first", "last", "trend"], rows))
    if before is None:
        click.echo("There is no earlier run over the same pairs by the same judges.")
    for finding in findings:
        click.echo(f"regression since {before.label if before else ''}: {finding.message}")
    return FAILED if findings else 0


@evaluate.command("gate")
@click.argument("result", type=FILE)
@click.option("--min", "minimum", multiple=True, metavar="METRIC=VALUE", help="At least this.")
@click.option("--max", "maximum", multiple=True, metavar="METRIC=VALUE", help="At most this.")
@click.option("--baseline", type=FILE, help="Results (JSON) or log (JSONL) to be no worse than.")
@click.option(
    "--margin",
    multiple=True,
    metavar="METRIC=VALUE",
    help="How much worse than the baseline is allowed, in place of the intervals.",
)
def gate(
    result: Path,
    minimum: tuple[str, ...],
    maximum: tuple[str, ...],
    baseline: Path | None,
    margin: tuple[str, ...],
) -> int:
    """Exit with 0 if RESULT (JSON or log) holds, 1 if it does not, 2 if it cannot be judged.

    Values are as in JSON: WER 0.05 is 5 %.

    \b
    autovoice evaluate gate mine.json --min secs2=0.6 --max wer=0.1
    """
    from auto_voice.errors import EvaluationError
    from auto_voice.evaluation import history as h
    from auto_voice.evaluation.results import METRICS

    at_least, at_most, margins = (_limits(x) for x in (minimum, maximum, margin))
    if not (at_least or at_most or baseline):
        raise click.UsageError("give at least one of --min, --max and --baseline")
    if margins and baseline is None:
        raise click.UsageError("--margin needs --baseline")
    if neutral := [key for key in margins if not METRICS[key].better]:
        raise click.UsageError(f"{neutral[0]} has no better and worse; use --min and --max")
    entry = h.load_entry(result)
    findings = h.check_limits(entry, at_least, at_most)
    if baseline is not None:
        before = h.load_entry(baseline)
        if baseline.suffix == ".jsonl" and baseline.resolve() == result.resolve():
            before = h.regressions(h.read_history(baseline))[1] or before
            if before == entry:
                raise EvaluationError(
                    f"{baseline} has no earlier run over the same pairs by the same judges."
                )
        if not h.alike(before, entry):
            raise EvaluationError(
                f"{result} and {baseline} were judged by other models, over other pairs or against "
                "other texts, so neither can be better; evaluate both in the same way."
            )
        if not margins and not any(e.low == e.low for e in entry.estimates.values()):
            raise EvaluationError(
                f"{result} has one conversion and so no intervals; give each limit as --margin."
            )
        findings += h.worse_than(entry, before, margins)
    for finding in findings:
        click.echo(f"failed: {finding.message}")
    if not findings:
        click.echo(f"passed: {entry.name}, {entry.pairs} conversions")
    return FAILED if findings else 0


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


def _check_outputs(options: dict[str, Any]) -> None:
    """What cannot be written is said before minutes of judging, not after."""
    import os

    from auto_voice.errors import EvaluationError

    for key in ("html", "json_", "csv_", "markdown", "history"):
        target = options[key]
        if target is None or str(target) == "-":
            continue
        folder = target.parent
        if target.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            why = "it is a folder" if target.is_dir() else f"{folder} is no folder to write in"
            raise EvaluationError(f"{target} cannot be written: {why}.")


def _registry(options: dict[str, Any]) -> ModelRegistry:
    from auto_voice.models.model_registry import ModelRegistry

    return ModelRegistry(
        options["model_dir"],
        config=options["config"],
        offline=options["offline"],
        device=options["device"],
    )


def judges_for(options: dict[str, Any], registry: ModelRegistry | None = None) -> Judges:
    """The judges that the options ask for."""
    from auto_voice.evaluation.judges import load_judges

    models = {"recogniser": options["recogniser"]} if options["recogniser"] else {}
    return load_judges(registry or _registry(options), without=options["without"], models=models)


def deliver(result: Evaluation, options: dict[str, Any]) -> None:
    """Write the results where the options say, and print a summary where a person reads."""
    from auto_voice.evaluation import tables
    from auto_voice.evaluation.results import save_evaluation, write_text

    printed = False
    if (target := options["json_"]) is not None:
        if str(target) == "-":
            click.echo(json.dumps(result.to_json(), ensure_ascii=False, allow_nan=False))
            printed = True
        else:
            save_evaluation(result, target)
    if (target := options["markdown"]) is not None:
        if str(target) == "-":
            click.echo(tables.markdown(result), nl=False)
            printed = True
        else:
            write_text(target, tables.markdown(result))
    if (target := options["csv_"]) is not None:
        write_text(target, tables.pair_rows_csv(result))
    if (target := options["html"]) is not None:
        from auto_voice.evaluation.report import html_report

        text = html_report(result, examples=options["examples"], audio_mb=options["audio_mb"])
        write_text(target, text)
    if (target := options["history"]) is not None:
        from auto_voice.evaluation.history import append_history

        append_history(result, target)
    if options["quiet"] or printed:
        return
    click.echo(f"{result.name}: {len(result.pairs)} conversions")
    header = ["metric", "value", "95 % interval", "pairs"]
    click.echo(tables.plain_table(header, tables.summary_rows(result)))
    for line in tables.verification_lines(result):
        click.echo(line)
    if result.peak_memory_mb is not None:
        click.echo(f"Peak memory {result.peak_memory_mb:.0f} MB.")
    click.echo(f"Judges: {tables.pins_text(result.models)}.")
    for note in result.notes:
        click.echo(f"note: {note}")
