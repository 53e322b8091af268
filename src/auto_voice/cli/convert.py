"""``autovoice convert``."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from auto_voice.cli.options import (
    complete_voice,
    control_options,
    control_values,
    make_pipeline,
    model_options,
    output_options,
    truncation_option,
)

if TYPE_CHECKING:
    from auto_voice.inference.inputs import AudioInput
    from auto_voice.inference.result import Account
    from auto_voice.types import Voice

# Stands for standard input or output in place of a file.
PIPE = Path("-")


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "--voice",
    "voices",
    multiple=True,
    required=True,
    metavar="VOICE",
    shell_complete=complete_voice,
    help="A stored voice, a voice file, or a recording of the wanted voice; several recordings of "
    "one person: repeat it.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Where to write [default: SOURCE_as_VOICE.wav in the current folder]; the suffix "
    "chooses the format; - writes to standard output.",
)
@control_options
@output_options
@truncation_option
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the account as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@model_options
def convert(
    source: Path,
    voices: tuple[str, ...],
    output: Path | None,
    format_: str | None,
    subtype: str | None,
    rate: int | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    mock: bool,
    **options: Any,
) -> None:
    """Re-speak SOURCE in the voice VOICE; - reads SOURCE from standard input.

    The words, the timing and the melody stay; the voice changes. OUTPUT is as long as SOURCE. A
    stopped conversion of a long SOURCE goes on where it was when the same command runs again.

    \b
    autovoice convert talk.wav --voice friend.wav
    autovoice convert talk.mp3 --voice a.wav --voice b.wav -o talk.flac
    autovoice convert song.wav --voice friend --singing --breathiness 1
    autovoice convert talk.wav --voice friend --strength 0.5 --formants -2 --rate 48000 --subtype 24
    sox talk.wav -t wav - | autovoice convert - --voice friend -o - | play -t wav -
    """
    from auto_voice.inference.result import OutputSpec
    from auto_voice.voices.library import resolve_voice

    suffix = f".{format_.lower()}" if format_ else ".wav"
    stem = "stdin" if source == PIPE else source.stem
    chosen = output or Path(f"{stem}_as_{Path(voices[0]).stem}{suffix}")
    to_pipe = chosen == PIPE
    with _pipe_file(suffix, wanted=to_pipe) as file:
        spec = OutputSpec(file or chosen, format_, subtype, rate, overwrite, allow_mock=mock)
        controls = control_values(options)
        found = [resolve_voice(voice) for voice in voices]
        voice = found[0] if len(found) == 1 else _recordings(found)
        pipeline = make_pipeline(mock, quiet or as_json, **options)
        result = pipeline.convert_file(_source(source), voice, spec, controls=controls)
        if to_pipe:
            _to_stdout(result.output)
    shown = "-" if to_pipe else str(result.output)
    if as_json:
        account = {"output": shown, "source": str(source), **result.summary()}
        click.echo(json.dumps(account), err=to_pipe)
    elif not quiet:
        click.echo(f"wrote {shown}: {result.seconds:.2f} s at {result.file_rate} Hz", err=to_pipe)
        click.echo(describe(result), err=to_pipe)


def _source(path: Path) -> AudioInput:
    if path != PIPE:
        return path
    if sys.stdin.isatty():
        raise click.UsageError("standard input is a terminal; send a recording into it")
    return sys.stdin.buffer.read()


@contextmanager
def _pipe_file(suffix: str, *, wanted: bool) -> Iterator[Path | None]:
    """A file for what will go to standard output: most formats are finished at their beginning."""
    if not wanted:
        yield None
        return
    if sys.stdout.isatty():
        raise click.UsageError("standard output is a terminal; send it to a file or a program")
    with tempfile.TemporaryDirectory(prefix="autovoice-") as folder:
        yield Path(folder) / f"stdout{suffix}"


def _to_stdout(path: Path) -> None:
    with path.open("rb") as file:
        shutil.copyfileobj(file, sys.stdout.buffer)
    sys.stdout.buffer.flush()


def _recordings(found: Sequence[Voice | Path]) -> list[Path]:
    """Several recordings of one person; stored voices are one each already."""
    paths = [item for item in found if isinstance(item, Path)]
    if len(paths) < len(found):
        raise click.UsageError(
            "give one stored voice, or several recordings; `autovoice voices blend` mixes voices"
        )
    return paths


def describe(result: Account) -> str:
    """The account of a conversion as indented lines."""
    lines = [f"  {stage:<10} {model}" for stage, model in result.models.items()]
    lines.append(f"  {'pitch':<10} moved by {result.semitones:+.1f} semitones")
    once = sum((result.timings or {}).get(step, 0.0) for step in ("load", "voice"))
    lines.append(
        f"  {'speed':<10} {result.seconds_per_second:.2f} s per second of audio"
        + (f", after {once:.0f} s for loading models and making the voice" if once >= 1 else "")
    )
    if result.mock:
        lines.append(f"  {'mock':<10} these are mock models: the output is noise, not speech")
    lines += [f"  {'note':<10} {note}" for note in result.notes]
    return "\n".join(lines)
