"""``autovoice compare``: systems side by side on the same pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from auto_voice.cli.judging import FILE, GROUP_NAMES, judge_options, judges_for, resample_option
from auto_voice.cli.showing import quiet_progress

if TYPE_CHECKING:
    from auto_voice.evaluation.judges import Judges
    from auto_voice.evaluation.results import Evaluation


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
        with quiet_progress(f"judging {path.name}", hidden=False) as progress:
            loaded.append(evaluate(pairs, judges, name=path.resolve().stem, progress=progress))
    return loaded
