"""``autovoice clone``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from auto_voice.cli.options import make_pipeline, model_options, truncation_option


@click.command()
@click.argument("references", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Where to write [default: the first reference's name with .safetensors].",
)
@click.option("--name", default="", help="What to call the voice.")
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT if it exists.")
@truncation_option
@click.option("--json", "as_json", is_flag=True, help="Print the account as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@model_options
def clone(
    references: tuple[Path, ...],
    output: Path | None,
    name: str,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    mock: bool,
    **models: Any,
) -> None:
    """Save the voice of the recordings REFERENCES as one file that `convert --voice` takes.

    All recordings must be of one person; 5 to 30 seconds of clean speech are enough.

    \b
    autovoice clone friend.wav
    autovoice clone friend1.wav friend2.wav -o friend.safetensors --name Friend
    """
    from auto_voice.audio.io import ensure_writable
    from auto_voice.voices.voice_file import SUFFIX, save_voice

    chosen = output or Path(references[0].stem + SUFFIX)
    target = ensure_writable(chosen, references, overwrite=overwrite)
    if target.suffix != SUFFIX:
        raise click.UsageError(f"a voice file's name ends in {SUFFIX}, and {target} does not.")
    voice = make_pipeline(mock, quiet or as_json, **models).clone(list(references), name=name)
    save_voice(target, voice)
    pitch_hz = None if voice.log_f0_mean is None else 2.718281828459045**voice.log_f0_mean
    if as_json:
        about = {
            "output": str(target),
            "name": voice.name,
            "speech_seconds": round(voice.speech_seconds, 3),
            "pitch_hz": pitch_hz and round(pitch_hz, 1),
            "encoder": voice.encoder,
            "content_space": voice.content_space,
            "notes": list(voice.notes),
        }
        click.echo(json.dumps(about))
    elif not quiet:
        pitch = "no pitch" if pitch_hz is None else f"mean pitch {pitch_hz:.0f} Hz"
        click.echo(
            f"wrote {target}: voice {voice.name!r}, {voice.speech_seconds:.1f} s of speech, {pitch}"
        )
        for note in voice.notes:
            click.echo(f"  note       {note}")
