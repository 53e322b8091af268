"""``autovoice evaluate``: score conversions or a pipeline, follow the figures, gate on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from auto_voice.cli.judging import (
    FAILED,
    FILE,
    GROUP_NAMES,
    INNER,
    F,
    convert_and_score,
    evaluate_elsewhere,
    gate,
    judge_options,
    judges_for,
    registry_for,
    resample_option,
    stage_options,
)
from auto_voice.cli.options import executor_options, ray_executor
from auto_voice.cli.showing import DefaultGroup, shown_progress

if TYPE_CHECKING:
    from auto_voice.evaluation.results import Evaluation


@click.group(cls=DefaultGroup, default="files")
def evaluate() -> None:
    """Measure how good conversions are, of any system.

    \b
    autovoice evaluate conversions/ --html report.html
    autovoice evaluate pairs.csv --json mine.json --csv mine.csv
    autovoice evaluate pipeline speakers/ --limit 12 --history log.jsonl
    autovoice evaluate history log.jsonl
    autovoice evaluate gate

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


@evaluate.command("files")
@click.argument("path", type=FILE)
@judge_options
@output_options
def files(path: Path, **options: Any) -> None:
    """Score the finished conversions that PATH lists or holds.

    \b
    autovoice evaluate conversions/ --html report.html
    """
    from auto_voice.evaluation.pairs import read_pairs
    from auto_voice.evaluation.scoring import evaluate as score

    _check_outputs(options)
    pairs = read_pairs(path)
    with shown_progress(hidden=options["quiet"]):
        result = score(
            pairs,
            judges_for(options),
            name=options["name"] or path.resolve().stem,
            group_by=options["resample"],
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
@executor_options("this process")
@stage_options
@judge_options
@output_options
def pipeline(
    speakers: Path,
    per_speaker: int,
    references: int,
    limit: int | None,
    keep: Path | None,
    executor: str,
    address: str | None,
    workers: int | None,
    resources: tuple[str, ...],
    **options: Any,
) -> None:
    """Convert between all speakers of a folder (one folder each), then score the results.

    Without --workers and --executor all is done in this process, one pair after the other.

    \b
    autovoice evaluate pipeline speakers/ --limit 12
    autovoice evaluate pipeline speakers/ --executor ray --address ray://head:10001
    """
    import tempfile
    from contextlib import nullcontext

    from auto_voice.batch.executors import ProcessExecutor
    from auto_voice.evaluation.pairs import read_test_set

    _check_outputs(options)
    pairs = read_test_set(speakers, per_speaker=per_speaker, references=references, limit=limit)
    name = options["name"] or f"auto_voice on {speakers.resolve().name}"
    elsewhere = ray_executor(executor, address, workers, resources) or (
        ProcessExecutor(workers) if workers else None
    )
    folder = nullcontext(keep) if keep else tempfile.TemporaryDirectory(prefix="autovoice-")
    with folder as place:
        if elsewhere is not None:
            Path(place).mkdir(parents=True, exist_ok=True)
            result = evaluate_elsewhere(pairs, Path(place), name, options, elsewhere)
        else:
            result = convert_and_score(pairs, Path(place), name, options)
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
    from auto_voice.evaluation.pairs import read_trials
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


@evaluate.command("leakage")
@click.argument("folder", type=FILE)
@click.option("--pairs", type=click.IntRange(min=1), default=24, show_default=True)
@stage_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Draw no progress.")
@judge_options
def leakage(folder: Path, pairs: int, as_json: bool, quiet: bool, **options: Any) -> None:
    """What of a source's throat comes through: FOLDER holds aligned parallel speech that
    `autovoice train corpus` made, of sentences and timbres that nothing was trained on.

    The same sentence is converted to a voice from the voice's own recording and from another
    timbre's; durations and F0 are equal, so the difference in speaker similarity is the content's.
    The last line says which share of each part of the content differs between timbres.

    \b
    autovoice evaluate leakage parallel/ --pairs 24
    """
    import tempfile
    from dataclasses import asdict

    from auto_voice.evaluation.leakage import (
        content_parts,
        measure,
        pipeline_parts,
        read_sentences,
        read_trials,
        throat_shares,
    )
    from auto_voice.evaluation.tables import ROLES
    from auto_voice.inference.voice_conversion_pipeline import (
        PipelineConfig,
        VoiceConversionPipeline,
    )

    listed, sentences = read_trials(folder, pairs), read_sentences(folder, pairs)
    registry = registry_for(options)
    chosen = ("content_encoder", "converter", "vocoder", "fine_tune", "fine_tune_steps")
    config = PipelineConfig(**{k: options[k] for k in chosen if options[k] is not None})
    made_by = VoiceConversionPipeline(config, model_registry=registry)
    options["without"] = ("words", "quality", "pitch", "signal")
    judges = judges_for(options, registry)
    with (
        tempfile.TemporaryDirectory(prefix="autovoice-") as scratch,
        shown_progress(hidden=quiet or as_json, without=INNER),
    ):
        shares = throat_shares(sentences, *content_parts(registry.load(config.content_encoder)))
        convert, encoders = pipeline_parts(made_by, judges, Path(scratch))
        found = measure(listed, convert, encoders)
    if as_json:
        figures = {r: {k: asdict(v) for k, v in row.items()} for r, row in found.items()}
        content = {name: asdict(value) for name, value in shares.items()}
        click.echo(
            json.dumps({"models": dict(judges.pins), "leakage": figures, "content": content})
        )
        return
    for role, row in found.items():
        cells = "  ".join(
            f"{k} {v.value:.3f} ({v.low:.3f} to {v.high:.3f})" for k, v in row.items()
        )
        click.echo(f"{ROLES[role]}: {cells}")
    cells = "  ".join(f"{k} {v.value:.1%} ({v.low:.1%} to {v.high:.1%})" for k, v in shares.items())
    click.echo(f"throat in the content: {cells}")


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
    shortfalls, before = h.regressions(entries)
    if html is not None:
        from auto_voice.evaluation.report import history_report

        write_text(html, history_report(series, shortfalls))
    if as_json:
        worse = [{"metric": f.metric, "message": f.message} for f in shortfalls]
        click.echo(json.dumps({"runs": len(series), "regressions": worse}))
        return FAILED if shortfalls else 0
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
    for shortfall in shortfalls:
        click.echo(f"regression since {before.label if before else ''}: {shortfall.message}")
    return FAILED if shortfalls else 0


evaluate.add_command(gate)


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
