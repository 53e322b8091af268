"""Options that several commands share: which models run, and where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from auto_voice.inference.voice_conversion_pipeline import PipelineConfig, VoiceConversionPipeline

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    click.option(
        "--content-encoder", metavar="MODEL", help="What hears the words: NAME[@VERSION]."
    ),
    click.option("--converter", metavar="MODEL", help="What re-speaks them."),
    click.option("--vocoder", metavar="MODEL", help="What turns spectra into sound."),
    click.option("--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps."),
    click.option("--config", type=click.Path(path_type=Path), help="YAML of settings and models."),
    click.option("--model-dir", type=click.Path(path_type=Path), help="Where models are kept."),
    click.option("--offline", is_flag=True, default=None, help="Open no network connection."),
    click.option(
        "--fallback",
        type=click.Choice(["none", "compact", "mock"]),
        help="What may stand in for a model that cannot be had.",
    ),
    click.option("--mock", is_flag=True, help="Use mock models: the output is noise, for tests."),
)

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
    return VoiceConversionPipeline(config, model_registry=registry)
