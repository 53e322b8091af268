"""``autovoice demo``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from auto_voice.cli.convert import describe
from auto_voice.cli.options import make_pipeline, model_options

if TYPE_CHECKING:
    from auto_voice.inference.result import ConversionResult
    from auto_voice.inference.voice_conversion_pipeline import VoiceConversionPipeline
    from auto_voice.types import Voice, Waveform

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
