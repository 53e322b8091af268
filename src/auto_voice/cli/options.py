"""Options that several commands share: which models run, and where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from auto_voice.inference.voice_conversion_pipeline import (
    ADAPTATION_STEPS,
    MOST_ADAPTATION_STEPS,
    PipelineConfig,
    VoiceConversionPipeline,
)

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from auto_voice.inference.controls import Controls

F = TypeVar("F", bound=Callable[..., Any])

adaptation_option = click.option(
    "--adaptation-steps", type=click.IntRange(0, MOST_ADAPTATION_STEPS), metavar="N",
    help="How long --fine-tune takes, up to 2.5 times longer from more than ten seconds of the "
    f"voice [default: {ADAPTATION_STEPS}].",
)  # fmt: skip
fine_tune_option = click.option(
    "--fine-tune", is_flag=True, default=None,
    help="Fine-tune the converter to the voice: closer to it, some seconds or minutes; needs "
    "auto-voice[train].",
)  # fmt: skip

_OPTIONS = (
    click.option(
        "--content-encoder", metavar="MODEL", help="What hears the words: NAME[@VERSION]."
    ),
    click.option("--converter", metavar="MODEL", help="What re-speaks them."),
    click.option("--vocoder", metavar="MODEL", help="What turns spectra into sound."),
    fine_tune_option,
    adaptation_option,
    click.option(
        "--device", metavar="DEVICE",
        help="auto, cpu, cuda, cuda:N, directml, coreml or openvino.",
    ),
    click.option("--config", type=click.Path(path_type=Path), help="YAML of settings and models."),
    click.option("--model-dir", type=click.Path(path_type=Path), help="Where models are kept."),
    click.option("--offline", is_flag=True, default=None, help="Open no network connection."),
    click.option(
        "--fallback",
        type=click.Choice(["none", "compact", "mock"]),
        help="What may stand in for a model that cannot be had.",
    ),
    click.option("--mock", is_flag=True, help="Use mock models: the output is noise, for tests."),
)  # fmt: skip

_REGISTRY_OPTIONS = ("config", "model_dir", "offline", "device", "fallback")


def model_options(command: F) -> F:
    """Add the options; the command takes them as ``**models`` for :func:`make_pipeline`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def make_pipeline(
    mock: bool = False, quiet: bool = False, **models: Any
) -> VoiceConversionPipeline:
    """The pipeline that the options ask for; what was not given keeps its default.

    Args:
        quiet: draw no bar while models are fetched.
    """
    import warnings

    from auto_voice.models import FallbackWarning, ModelRegistry

    # The registry also logs each fallback, and the log reaches the user in our own words.
    warnings.simplefilter("ignore", FallbackWarning)
    where = {name: models.pop(name) for name in _REGISTRY_OPTIONS}
    registry = ModelRegistry(use_mock=mock, progress=False if quiet else None, **where)
    chosen = {name: value for name, value in models.items() if value is not None}
    config = PipelineConfig(use_mock_models=mock, **chosen)
    made = VoiceConversionPipeline(config, model_registry=registry)
    if not quiet:
        made.on_fitting = _say_once()
    return made


def _say_once() -> Callable[[float], None]:
    """Says, when a fitting begins, what the wait is for."""
    last = 1.0

    def tell(done: float) -> None:
        nonlocal last
        if done < last:
            click.echo("fine-tuning the converter to the voice: some seconds, once", err=True)
        last = done

    return tell


_CONTROLS = (
    click.option("--semitones", type=float, default=0.0, help="Transpose further, e.g. -2.5."),
    click.option("--keep-pitch", is_flag=True, help="Do not move the pitch to the voice's."),
    click.option(
        "--singing", is_flag=True, help="Keep pitch classes: move by whole octaves alone."
    ),
    click.option(
        "--pitch-range",
        default="1",
        metavar="FACTOR|voice",
        help="Melody: 0 monotone, 1 as it is, 2 twice as lively; voice: as lively as the voice.",
    ),
    click.option(
        "--formants", type=float, default=0.0, metavar="SEMITONES",
        help="Move the resonances, not the pitch: -3 sounds larger, +3 smaller.",
    ),
    click.option(
        "--strength", type=float, default=1.0, metavar="0..1",
        help="How far towards the voice; 0 is the source's own.",
    ),
    click.option(
        "--energy", type=float, default=1.0, metavar="0..1", show_default=True,
        help="How much of the source's loudness from syllable to syllable is kept.",
    ),
    click.option(
        "--breathiness", type=float, default=0.0, metavar="0..1",
        help="Keep the source's breath noise.",
    ),
    click.option(
        "--loudness", metavar="LUFS|source",
        help="Loudness of the result [default: the source's speech level].",
    ),
    click.option("--denoise", is_flag=True, help="First turn steady noise down by up to 15 dB."),
    click.option("--trim", is_flag=True, help="Leave out silence before and after the speech."),
)  # fmt: skip

_OUTPUT = (
    click.option(
        "--format", "format_", metavar="FORMAT", help="wav, flac, ogg, opus, mp3 or aiff."
    ),
    click.option("--subtype", help="Sample coding, e.g. pcm_24, float, or bits: 16, 24, 32f."),
    click.option("--rate", type=click.IntRange(1000, 384000), help="Samples a second, in Hz."),
)

DENOISE_DB = 15.0

truncation_option = click.option(
    "--allow-truncated", is_flag=True, default=None,
    help="Use what is there of recordings that are cut off, and say so.",
)  # fmt: skip


def control_options(command: F) -> F:
    """Add what shapes a conversion; :func:`control_values` reads it."""
    for option in reversed(_CONTROLS):
        command = option(command)
    return command


def output_options(command: F) -> F:
    """Add ``format_``, ``subtype`` and ``rate``."""
    for option in reversed(_OUTPUT):
        command = option(command)
    return command


def control_values(options: dict[str, Any]) -> Controls:
    """Take the control options out of ``options``.

    Raises:
        ConfigError: a value that cannot be.
    """
    from auto_voice.inference.controls import controls_from

    names = ("semitones", "singing", "pitch_range", "formants", "strength", "energy",
             "breathiness", "trim")  # fmt: skip
    values: dict[str, Any] = {name: options.pop(name) for name in names}
    values["match_pitch"] = not options.pop("keep_pitch")
    values["denoise_db"] = DENOISE_DB if options.pop("denoise") else 0.0
    loudness = options.pop("loudness")
    if loudness is not None:
        values["loudness"] = loudness
    return controls_from(values)


def complete_voice(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Stored voices and files, for the shell."""
    from click.shell_completion import CompletionItem

    from auto_voice.voices.library import VoiceLibrary

    found = [name for name in VoiceLibrary().names() if name.startswith(incomplete)]
    return [*(CompletionItem(name) for name in found), CompletionItem(incomplete, type="file")]
