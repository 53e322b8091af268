"""``autovoice convert``, ``clone`` and ``demo``: one pipeline, one voice, one result."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

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
    from auto_voice.inference.result import Account, ConversionResult
    from auto_voice.inference.voice_conversion_pipeline import VoiceConversionPipeline
    from auto_voice.types import Voice, Waveform

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


# Samples of the catalog that `demo` converts: two speakers that are easily told apart.
SOURCE, REFERENCE = "sample_clone_test", "sample_two_cities"


@click.command()
@click.option(
    "-o",
    "--output",
    "folder",
    type=click.Path(path_type=Path),
    default=Path("demo_out"),
    show_default=True,
    help="Folder for the recordings; files of an earlier demo in it are replaced.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the account as JSON.")
@model_options
def demo(folder: Path, as_json: bool, mock: bool, **models: Any) -> None:
    """Convert a sample recording into the voice of another and show what happened.

    The recordings and models are fetched and verified on the first run. Written are source.wav,
    reference.wav, converted.wav and, where matplotlib is installed, spectrograms.png.

    \b
    autovoice demo
    """
    from auto_voice.audio.io import ensure_writable, write_audio

    converted = ensure_writable(folder / "converted.wav", create_parents=True)
    pipeline = make_pipeline(mock, as_json, **models)
    source = cast("Waveform", pipeline.registry.load(SOURCE))
    reference = cast("Waveform", pipeline.registry.load(REFERENCE))
    voice = pipeline.clone(reference, name=REFERENCE)
    result = pipeline.convert(source, voice)
    write_audio(folder / "source.wav", source)
    write_audio(folder / "reference.wav", reference)
    result.save(converted, allow_mock=mock)
    similarity = measure(pipeline, source, voice, result)
    picture = _draw(folder / "spectrograms.png", source, reference, result)
    if as_json:
        about = {
            "output": str(converted),
            "picture": None if picture is None else str(picture),
            "similarity": {name: round(value, 4) for name, value in vars(similarity).items()},
        }
        click.echo(json.dumps(about | result.summary()))
        return
    click.echo(
        f"converted {source.seconds:.1f} s of {SOURCE} into the voice of {REFERENCE} "
        f"({voice.speech_seconds:.0f} s of speech)"
    )
    click.echo(describe(result))
    click.echo(similarity.describe())
    click.echo(f"listen to {converted.resolve()}")
    if picture is not None:
        click.echo(f"look at   {picture.resolve()}")


@dataclass(frozen=True)
class SpeakerSimilarity:
    """Cosines of GE2E speaker embeddings, in [-1, 1]; about 0.85 within a speaker, 0.55 between."""

    source_to_target: float
    result_to_target: float
    result_to_source: float

    def describe(self) -> str:
        return (
            "  similarity to the target voice "
            f"{self.source_to_target:.2f} before, {self.result_to_target:.2f} after; "
            f"to the source voice 1.00 before, {self.result_to_source:.2f} after"
        )


def measure(
    pipeline: VoiceConversionPipeline, source: Waveform, voice: Voice, result: ConversionResult
) -> SpeakerSimilarity:
    """Speaker similarity of the audio to the target and the source, before and after."""
    own = pipeline.clone(source, fine_tune=False)
    return SpeakerSimilarity(
        source_to_target=pipeline.similarity(source, voice),
        result_to_target=pipeline.similarity(result.audio, voice),
        result_to_source=pipeline.similarity(result.audio, own),
    )


def _draw(
    path: Path, source: Waveform, reference: Waveform, result: ConversionResult
) -> Path | None:
    from auto_voice.audio.picture import draw_spectrograms
    from auto_voice.errors import MissingDependencyError

    panels = {"source": source, "reference": reference, "result": result.audio}
    try:
        return draw_spectrograms(panels, path, seconds=source.seconds)
    except MissingDependencyError:
        return None
