"""``autovoice convert``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from auto_voice.cli.options import make_pipeline, model_options

if TYPE_CHECKING:
    from collections.abc import Callable

    from auto_voice.inference.result import ConversionResult


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "--voice",
    "voices",
    multiple=True,
    required=True,
    metavar="REFERENCE",
    type=click.Path(path_type=Path),
    help="A recording of the wanted voice, or a voice file; several recordings of one person: "
    "repeat it.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Where to write [default: SOURCE_as_VOICE.wav in the current folder]; the suffix "
    "chooses the format.",
)
@click.option("--semitones", type=float, default=0.0, help="Transpose further, e.g. -2.5.")
@click.option("--keep-pitch", is_flag=True, help="Do not move the pitch to the voice's.")
@click.option("--format", "format_", metavar="FORMAT", help="wav, flac, ogg, opus, mp3 or aiff.")
@click.option("--subtype", help="Sample coding, e.g. pcm_24, float, or bits: 16, 24, 32f.")
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the account as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@model_options
def convert(
    source: Path,
    voices: tuple[Path, ...],
    output: Path | None,
    semitones: float,
    keep_pitch: bool,
    format_: str | None,
    subtype: str | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    mock: bool,
    **models: Any,
) -> None:
    """Re-speak SOURCE in the voice of REFERENCE.

    The words, the timing and the melody stay; the voice changes. OUTPUT is as long as SOURCE.

    \b
    autovoice convert talk.wav --voice friend.wav
    autovoice convert talk.mp3 --voice a.wav --voice b.wav -o talk.flac
    autovoice convert song.wav --voice friend.safetensors --keep-pitch --semitones -12
    """
    from auto_voice.audio.io import choose_encoding, ensure_writable

    suffix = f".{format_.lower()}" if format_ else ".wav"
    chosen = output or Path(f"{source.stem}_as_{voices[0].stem}{suffix}")
    target = ensure_writable(chosen, [source, *voices], overwrite=True)
    if target.exists() and not overwrite:
        raise click.UsageError(f"{target} exists already; add --overwrite or name another output.")
    choose_encoding(target, format_, subtype)

    pipeline = make_pipeline(mock, quiet or as_json, **models)
    voice = voices[0] if len(voices) == 1 else list(voices)
    with progress_bar(hidden=quiet or as_json) as progress:
        result = pipeline.convert(
            source,
            voice,
            semitones=semitones,
            match_pitch=not keep_pitch,
            progress=progress,
        )
    written = result.save(
        target, format=format_, subtype=subtype, overwrite=overwrite, allow_mock=mock
    )
    if as_json:
        click.echo(json.dumps({"output": str(written), "source": str(source), **result.summary()}))
    elif not quiet:
        click.echo(f"wrote {written}: {result.seconds:.2f} s at {result.sample_rate} Hz")
        click.echo(describe(result))


def describe(result: ConversionResult) -> str:
    """The account of a conversion as indented lines."""
    lines = [f"  {stage:<10} {model}" for stage, model in result.models.items()]
    lines.append(f"  {'pitch':<10} moved by {result.semitones:+.1f} semitones")
    lines.append(f"  {'speed':<10} {result.seconds_per_second:.2f} s per second of audio")
    if result.mock:
        lines.append(f"  {'mock':<10} these are mock models: the output is noise, not speech")
    lines += [f"  {'note':<10} {note}" for note in result.notes]
    return "\n".join(lines)


@contextmanager
def progress_bar(hidden: bool) -> Iterator[Callable[[float], None] | None]:
    """A bar on stderr where a person watches, else nothing."""
    if hidden or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(
        total=100, desc="converting", unit="%", leave=False, bar_format="{l_bar}{bar}|"
    ) as bar:

        def show(done: float) -> None:
            bar.update(round(100 * done) - bar.n)

        yield show
