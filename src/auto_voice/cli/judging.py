"""What several commands share to judge conversions: their options and the judges they name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from auto_voice.cli.options import REGISTRY_OPTIONS, device_option, fine_tune_options
from auto_voice.cli.showing import quiet_progress

if TYPE_CHECKING:
    from auto_voice.evaluation.judges import Judges
    from auto_voice.evaluation.pairs import Pair
    from auto_voice.evaluation.results import Evaluation
    from auto_voice.models.model_registry import ModelRegistry

F = TypeVar("F", bound=Callable[..., Any])
FILE = click.Path(path_type=Path)
GROUP_NAMES = ("similarity", "words", "quality", "pitch", "signal")
# Exit code of a gate or a history that found something worse; 2 is left to errors.
FAILED = 1

resample_option = click.option(
    "--resample",
    type=click.Choice(["pair", "source", "target"]),
    default="pair",
    show_default=True,
    help="What intervals are drawn over: conversions, or whole speakers.",
)


def judge_options(command: F) -> F:
    """Which models judge, and where models are kept."""
    options = (
        click.option("--recogniser", metavar="MODEL", help="NAME[@VERSION] [recogniser_base]."),
        *REGISTRY_OPTIONS,
        device_option,
    )
    for option in reversed(options):
        command = option(command)
    return command


def stage_options(command: F) -> F:
    """Which models convert."""
    options = (
        click.option("--content-encoder", metavar="MODEL", help="NAME[@VERSION]."),
        click.option("--converter", metavar="MODEL", help="NAME[@VERSION]."),
        *fine_tune_options,
        click.option("--vocoder", metavar="MODEL", help="NAME[@VERSION]."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def registry_for(options: dict[str, Any]) -> ModelRegistry:
    """The registry that the options ask for."""
    from auto_voice.models.model_registry import ModelRegistry

    return ModelRegistry(
        options["model_dir"],
        config=options["config"],
        offline=options["offline"],
        mirrors=options["mirrors"],
        device=options["device"],
    )


def judges_for(options: dict[str, Any], registry: ModelRegistry | None = None) -> Judges:
    """The judges that the options ask for."""
    from auto_voice.evaluation.judges import load_judges

    models = {"recogniser": options["recogniser"]} if options["recogniser"] else {}
    return load_judges(registry or registry_for(options), without=options["without"], models=models)


def convert_and_score(
    pairs: Sequence[Pair],
    folder: Path,
    name: str,
    options: dict[str, Any],
    registry: ModelRegistry | None = None,
) -> Evaluation:
    """Convert the pairs into ``folder`` with the stages that the options ask for, and score them.

    Args:
        name: of the system, for tables.
        options: of ``stage_options`` and ``judge_options``, and ``without``, ``resample`` and
            ``quiet``.
        registry: None makes one from the options.
    """
    from auto_voice.evaluation.pairs import convert_all
    from auto_voice.evaluation.scoring import evaluate
    from auto_voice.inference.voice_conversion_pipeline import (
        PipelineConfig,
        VoiceConversionPipeline,
    )

    chosen = ("content_encoder", "converter", "vocoder", "fine_tune", "fine_tune_steps")
    config = PipelineConfig(**{k: options[k] for k in chosen if options[k] is not None})
    registry = registry or registry_for(options)
    pipeline = VoiceConversionPipeline(config, model_registry=registry)
    with quiet_progress("converting", hidden=options["quiet"]) as progress:
        made = convert_all(pipeline, pairs, folder, progress=progress)
    with quiet_progress("judging", hidden=options["quiet"]) as progress:
        return evaluate(
            made.pairs,
            judges_for(options, registry),
            name=name,
            group_by=options["resample"],
            extra=made.extra,
            system=made.system,
            peak_memory_mb=made.peak_memory_mb,
            notes=made.notes,
            progress=progress,
        )
