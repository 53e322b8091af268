"""``autovoice models map`` and ``quantize``: what is made here of models that are here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from auto_voice.cli.options import open_registry, registry_options
from auto_voice.cli.showing import print_json, print_table, shown_progress, sized
from auto_voice.errors import AudioError, AudioNotFoundError, MissingDependencyError
from auto_voice.models.model_registry import PIPELINE_MODELS
from auto_voice.models.registry.catalog_schema import PRECISIONS

if TYPE_CHECKING:
    from auto_voice.evaluation.results import Evaluation
    from auto_voice.models.model_registry import ModelRegistry
    from auto_voice.models.registry.catalog import ModelVersion
    from auto_voice.types import Waveform

# Share of the variance explained; with less, words got lost in trials.
GOOD_R2 = 0.5
# Kind of a model to the option of a conversion that names it.
STAGES = {"content": "content_encoder", "converter": "converter", "vocoder": "vocoder"}
# Figures of a parity report.
COMPARED = ("secs", "secs2", "wer", "dnsmos", "f0_correlation")


@click.command("map")
@click.argument("name")
@click.option(
    "--speech",
    multiple=True,
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="A folder of recordings, or one of them; repeat for more "
    "[default: the samples of the catalog].",
)
@click.option(
    "--converter", default=PIPELINE_MODELS["converter"], show_default=True, metavar="MODEL"
)
@click.option(
    "--own-encoder",
    default=PIPELINE_MODELS["content"],
    show_default=True,
    metavar="MODEL",
    help="The content encoder that the converter was trained on.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@registry_options
def map_content(
    name: str,
    speech: tuple[Path, ...],
    converter: str,
    own_encoder: str,
    as_json: bool,
    **where: Any,
) -> None:
    """Map the content encoder NAME to a converter that was trained on another.

    A minute of speech is enough to start, ten speakers are better; no transcript is needed.
    Afterwards `convert --content-encoder NAME` works.

    \b
    autovoice models map hubert_base --speech recordings/
    """
    from auto_voice.models import ModelRegistry
    from auto_voice.models.content_map import map_encoder

    registry = ModelRegistry(**where)
    waveforms = _recordings(speech) if speech else _samples(registry)
    found, path = map_encoder(
        registry, name, waveforms, converter=converter, own_encoder=own_encoder
    )
    if as_json:
        about = {"map": str(path), "r2": round(found.r2, 4), "seconds": found.seconds}
        click.echo(json.dumps(about | {"source": found.source, "target": found.target}))
        return
    click.echo(
        f"mapped {found.source} to {found.target} on {found.seconds:.0f} s of speech: "
        f"it explains {100 * found.r2:.0f} % of the converter's learned content features"
    )
    if found.r2 < GOOD_R2:
        click.echo("  note       words may get lost; give more speech, of more speakers")
    click.echo(f"  kept in    {path}")


def _recordings(paths: tuple[Path, ...]) -> Iterator[Waveform]:
    from auto_voice.audio.formats import list_folder
    from auto_voice.audio.io import read_audio

    for path in paths:
        found = list_folder(path).recordings if path.is_dir() else ()
        if path.is_dir() and not found:
            raise AudioNotFoundError(f"{path} holds no recordings.")
        for file in found if path.is_dir() else [path]:
            try:
                yield read_audio(file)
            except AudioError as error:
                if not path.is_dir():
                    raise
                click.echo(f"autovoice: left out: {error}", err=True)


def _samples(registry: ModelRegistry) -> Iterator[Waveform]:
    for entry in registry.catalog.models.values():
        if entry.kind == "sample":
            yield registry.load(entry.name)


@click.command()
@click.argument("name")
@click.option(
    "--to", type=click.Choice(PRECISIONS), required=True, help="Precision of the new one."
)
@click.option(
    "--calibrate",
    "speech",
    multiple=True,
    metavar="SPEECH",
    type=click.Path(path_type=Path),
    help="A folder of recordings, or one of them, that int8 takes its ranges from; repeat for more "
    "[default: the samples of the catalog].",
)
@click.option("--as", "number", metavar="VERSION", help="Its version [default: 1.0-int8 of 1.0].")
@click.option(
    "--no-report", is_flag=True, help="Do not compare conversions by it with those of the original."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@registry_options
def quantize(
    name: str,
    to: str,
    speech: tuple[Path, ...],
    number: str | None,
    no_report: bool,
    as_json: bool,
    **where: Any,
) -> None:
    """Make a version of NAME[@VERSION] in another precision.

    int8 makes a vocoder nearly twice as fast on a CPU; it, fp16 and bf16 halve the file, and the
    latter two run as fast as before. The report converts six recordings by both and judges them.
    Afterwards `--prefer fastest` or `--prefer smallest` chooses it, or its name does.

    \b
    autovoice models quantize my_vocoder --to int8 --calibrate recordings/
    """
    from auto_voice.models.runtime import quantise

    registry = open_registry(**where)
    version = quantise.published(registry, name)
    quantise.check_request(registry, version, to, number or f"{version.version}-{to}")
    recordings = (_recordings(speech) if speech else _samples(registry)) if to == "int8" else ()
    with shown_progress(hidden=as_json):
        made = quantise.quantise(registry, version.key, to, speech=recordings, number=number)
    rows: dict[str, dict[str, float | None]] = {}
    note = ""
    if not no_report:
        try:
            rows, note = _parity(version, made, where, quiet=as_json)
        except BaseException:
            quantise.forget(registry.store, made)  # Nobody has seen what it is worth.
            raise
    known = made.quantised
    assert known is not None
    facts = {
        "version": made.key,
        "of": version.key,
        "to": to,
        "folder": str(registry.store.folder(made.name, made.version)),
        "speed": known.speed,
        "bytes": {version.key: version.bytes, made.key: made.bytes},
        "ram_mb": {version.key: version.needs.ram_mb, made.key: made.needs.ram_mb},
        "parity": rows,
        "note": note or None,
    }
    if as_json:
        print_json(facts)
        return
    table = [("", version.key, made.key)]
    table.append(("size", sized(version.bytes), sized(made.bytes)))
    table.append(("memory", f"{version.needs.ram_mb} MB", f"{made.needs.ram_mb} MB"))
    table.append(("speed on a CPU", "1.00 x", f"{known.speed:.2f} x"))
    for key, row in rows.items():
        table.append((key, _told(row[version.key]), _told(row[made.key])))
    print_table(table)
    click.echo(f"  kept in    {facts['folder']}")
    if note:
        click.echo(f"  note       {note}")


def _told(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _parity(
    version: ModelVersion, made: ModelVersion, where: dict[str, Any], quiet: bool
) -> tuple[dict[str, dict[str, float | None]], str]:
    """Figures of the same six conversions by both versions, and what could not be judged."""
    import tempfile

    from auto_voice.cli.judging import convert_and_score
    from auto_voice.evaluation.gate import sample_pairs

    registry = open_registry(**where)  # Its catalog knows the new version.
    options: dict[str, Any] = {
        "content_encoder": None, "converter": None, "vocoder": None, "fine_tune": None,
        "fine_tune_steps": None, "recogniser": None, "without": (), "resample": "pair",
        "quiet": quiet,
    }  # fmt: skip
    note = ""
    try:
        registry.load("recogniser_base")
    except MissingDependencyError as error:
        options["without"], note = ("words",), f"words were not judged: {error}"
    found: dict[str, Evaluation] = {}
    with tempfile.TemporaryDirectory(prefix="autovoice-") as folder:
        pairs = sample_pairs(registry, Path(folder) / "samples")
        for one in (version, made):
            chosen = options | {STAGES[one.kind]: one.key}
            place = Path(folder) / one.version
            found[one.key] = convert_and_score(pairs, place, one.key, chosen, registry)
    rows = {
        key: {
            name: evaluation.estimates[key].value if key in evaluation.estimates else None
            for name, evaluation in found.items()
        }
        for key in COMPARED
    }
    return rows, note
