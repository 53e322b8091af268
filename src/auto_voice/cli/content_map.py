"""``autovoice models map``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from auto_voice.cli.options import registry_options
from auto_voice.errors import AudioError, AudioNotFoundError
from auto_voice.models.model_registry import PIPELINE_MODELS

if TYPE_CHECKING:
    from auto_voice.models.model_registry import ModelRegistry
    from auto_voice.types import Waveform

# Share of the variance explained; with less, words got lost in trials.
GOOD_R2 = 0.5


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
