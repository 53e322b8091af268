"""``autovoice convert``."""

from __future__ import annotations

import json
import sys
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
    from collections.abc import Callable

    from auto_voice.inference.result import Account
    from auto_voice.types import Voice


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
    "chooses the format.",
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
    """Re-speak SOURCE in the voice VOICE.

    The words, the timing and the melody stay; the voice changes. OUTPUT is as long as SOURCE. Of a
    long SOURCE, a stopped conversion goes on where it was when the same command runs again.

    \b
    autovoice convert talk.wav --voice friend.wav
    autovoice convert talk.mp3 --voice a.wav --voice b.wav -o talk.flac
    autovoice convert song.wav --voice friend --singing --energy 1 --loudness source
    autovoice convert talk.wav --voice friend --strength 0.5 --formants -2 --rate 48000 --subtype 24
    """
    from auto_voice.audio.io import choose_encoding, ensure_writable
    from auto_voice.inference.file_conversion import convert_to_file
    from auto_voice.voices.library import resolve_voice

    suffix = f".{format_.lower()}" if format_ else ".wav"
    chosen = output or Path(f"{source.stem}_as_{Path(voices[0]).stem}{suffix}")
    target = ensure_writable(chosen, [source, *voices], overwrite=True)
    if target.exists() and not overwrite:
        raise click.UsageError(f"{target} exists already; add --overwrite or name another output.")
    choose_encoding(target, format_, subtype)
    controls = control_values(options)
    found = [resolve_voice(voice) for voice in voices]
    voice = found[0] if len(found) == 1 else _recordings(found)

    pipeline = make_pipeline(mock, quiet or as_json, **options)
    with progress_bar(hidden=quiet or as_json) as progress:
        result = convert_to_file(
            pipeline,
            source,
            voice,
            target,
            controls=controls,
            format=format_,
            subtype=subtype,
            sample_rate=rate,
            overwrite=overwrite,
            allow_mock=mock,
            progress=progress,
        )
    if as_json:
        click.echo(json.dumps({"output": str(target), "source": str(source), **result.summary()}))
    elif not quiet:
        written = rate or result.sample_rate
        click.echo(f"wrote {target}: {result.seconds:.2f} s at {written} Hz")
        click.echo(describe(result))


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


@contextmanager
def progress_bar(hidden: bool) -> Iterator[Callable[[float], None] | None]:
    """A bar on stderr where a person watches, else nothing."""
    if hidden or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # Its thread is of no use here, and decoders are quiet without.
    with tqdm(
        total=100, desc="converting", unit="%", leave=False, bar_format="{l_bar}{bar}|"
    ) as bar:

        def show(done: float) -> None:
            bar.update(round(100 * done) - bar.n)

        yield show
