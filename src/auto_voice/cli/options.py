"""Options that several commands share: the registry, which models run and where, and controls."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from auto_voice.cli.showing import ProgressDisplay, config_option
from auto_voice.errors import UnknownModelError
from auto_voice.inference.controls import CONTROLS, ControlSpec
from auto_voice.inference.result import HIGHEST_OUTPUT_RATE, LOWEST_OUTPUT_RATE
from auto_voice.inference.stages import FINE_TUNE_STEPS, MOST_FINE_TUNE_STEPS, PipelineConfig
from auto_voice.inference.voice_conversion_pipeline import VoiceConversionPipeline

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from auto_voice.batch.ray_executor import RayExecutor
    from auto_voice.inference.controls import Controls
    from auto_voice.models.model_registry import ModelRegistry
    from auto_voice.models.registry.catalog import ModelVersion

F = TypeVar("F", bound=Callable[..., Any])

# Options of every command that uses models.
REGISTRY_OPTIONS = (
    config_option,
    click.option("--model-dir", type=click.Path(path_type=Path), help="Where models are kept."),
    click.option("--offline", is_flag=True, default=None, help="Open no network connection."),
    click.option(
        "--mirror", "mirrors", multiple=True, metavar="URL",
        callback=lambda ctx, param, urls: urls or None,
        help="A server of auto_voice to ask first for models; repeat for more.",
    ),
)  # fmt: skip


def _joined(ctx: click.Context, param: click.Parameter, given: tuple[str, ...]) -> str | None:
    return ",".join(given) or None


# Of commands that run models.
device_option = click.option(
    "--device", metavar="DEVICE", multiple=True, callback=_joined,
    help="auto, cpu, cuda, cuda:N, directml, coreml, openvino or openvino:bf16; vocoder=cuda:1 for "
    "the models of one kind, or one model; may be repeated.",
)  # fmt: skip


def registry_options(command: F) -> F:
    """Options that choose the registry; the command takes them as ``**where``."""
    for option in reversed(REGISTRY_OPTIONS):
        command = option(command)
    return command


def open_registry(**where: Any) -> ModelRegistry:
    """The registry that the options choose."""
    import warnings

    from auto_voice.models.model_registry import ModelRegistry
    from auto_voice.models.registry.loading import FallbackWarning

    warnings.simplefilter("ignore", FallbackWarning)  # The log tells it in our own words.
    return ModelRegistry(**where)


def chosen(registry: ModelRegistry, names: Iterable[str]) -> list[ModelVersion]:
    """The versions that ``names`` mean, or else all that are installed."""
    wanted = list(names)
    if wanted:
        return [registry.version(name) for name in wanted]
    known = {version.key: version for version in registry.catalog.versions()}
    keys = [f"{name}@{version}" for name, version in registry.store.installed()]
    return [known[key] for key in keys if key in known]


def name_and_version(registry: ModelRegistry, name: str) -> tuple[str, str]:
    """What ``name`` means; a version that only the folder knows may be named in full."""
    try:
        version = registry.version(name)
    except UnknownModelError:
        bare, _, number = name.partition("@")
        if (bare, number) not in registry.store.installed():
            raise
        return bare, number
    return version.name, version.version


# The second name of the steps is that of the first release.
fine_tune_options = (
    click.option(
        "--fine-tune", is_flag=True, default=None,
        help="Fine-tune the converter to the voice, which takes some seconds or minutes; needs "
        "auto-voice[train].",
    ),
    click.option(
        "--fine-tune-steps", "--adaptation-steps", "fine_tune_steps",
        type=click.IntRange(0, MOST_FINE_TUNE_STEPS), metavar="N",
        help="Gradient steps of --fine-tune, up to 2.5 times as many from more than ten seconds of "
        f"the voice [default: {FINE_TUNE_STEPS}].",
    ),
)  # fmt: skip

_OPTIONS = (
    click.option(
        "--content-encoder",
        metavar="MODEL",
        help="Model that extracts the content features: NAME[@VERSION].",
    ),
    click.option("--converter", metavar="MODEL", help="Model that gives them the voice."),
    click.option("--vocoder", metavar="MODEL", help="Model that turns spectra into sound."),
    *fine_tune_options,
    device_option,
    *REGISTRY_OPTIONS,
    click.option(
        "--fallback",
        type=click.Choice(["none", "compact", "mock"]),
        help="What may stand in for a model that cannot be had.",
    ),
    click.option(
        "--prefer",
        type=click.Choice(["exact", "fastest", "smallest"]),
        help="Which version of a model runs where there are quantised ones [default: exact].",
    ),
    click.option("--mock", is_flag=True, help="Use mock models: the output is noise, for tests."),
)


def executor_options(workers: str, cores: int = 2) -> Callable[[F], F]:
    """Where jobs run; the command takes them as ``**elsewhere`` for :func:`ray_executor`.

    Args:
        workers: how many there are on this machine if nothing is said, in words.
        cores: of each on a cluster.
    """
    options = (
        click.option(
            "--executor", type=click.Choice(["local", "ray"]), default="local", show_default=True,
            help="Processes on this machine, or a Ray cluster (needs auto-voice[ray]).",
        ),
        click.option(
            "--address", metavar="ADDRESS", envvar="RAY_ADDRESS",
            help="Of the Ray cluster: auto, HOST:PORT or ray://HOST:PORT; local starts one here "
            "for the run [default: auto].",
        ),
        click.option(
            "--workers", "--num-workers", "workers", type=click.IntRange(1), metavar="N",
            help=f"How many [default: {workers}; on a cluster as many as have room].",
        ),
        click.option(
            "--resources", multiple=True, metavar="NAME=AMOUNT",
            help="What each worker on a cluster needs, such as gpu=0.5; memory is in GB; may be "
            f"repeated [default: cpu={cores}, or cpu=1 beside gpu].",
        ),
    )  # fmt: skip

    def add(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def ray_executor(
    executor: str,
    address: str | None,
    workers: int | None,
    resources: tuple[str, ...],
    cores: int = 2,
) -> RayExecutor | None:
    """The executor of ``--executor ray``; None for processes of this machine.

    Raises:
        UsageError: an option is of a cluster, and none was asked for.
    """
    from click.core import ParameterSource

    from auto_voice.batch.ray_executor import RayExecutor, parse_resources

    if executor == "ray":
        return RayExecutor(address or "auto", workers, parse_resources(resources), cores)
    # RAY_ADDRESS may well be set for other programs.
    source = click.get_current_context().get_parameter_source("address")
    if address is not None and source is ParameterSource.COMMANDLINE:
        raise click.UsageError("--address is of a Ray cluster; add --executor ray")
    if resources:
        raise click.UsageError("--resources are of a Ray cluster; add --executor ray")
    return None


def plain(value: Any) -> Any:
    """The value of an option as JSON has it, for workers elsewhere."""
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


# Names of the options that make the registry.
REGISTRY_NAMES = ("config", "model_dir", "offline", "mirrors", "device", "fallback", "prefer")


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
        quiet: show no progress, and no warnings.
    """
    import logging
    import warnings

    from auto_voice.models import FallbackWarning, ModelRegistry

    # The registry also logs each fallback, and the log reaches the user in our own words.
    warnings.simplefilter("ignore", FallbackWarning)
    if quiet:
        logging.getLogger("auto_voice").setLevel(logging.ERROR)
    show = None if quiet else ProgressDisplay()
    where = {name: models.pop(name) for name in REGISTRY_NAMES}
    registry = ModelRegistry(use_mock=mock, progress=show or False, **where)
    chosen = {name: value for name, value in models.items() if value is not None}
    config = PipelineConfig(use_mock_models=mock, **chosen)
    return VoiceConversionPipeline(config, model_registry=registry, progress=show)


def _control_option(name: str, spec: ControlSpec) -> Callable[[F], F]:
    """A control as an option of the command line."""
    if name == "match_pitch":
        return click.option(
            "--keep-pitch", is_flag=True, help="Do not move the pitch to the voice's."
        )
    if name == "denoise_db":
        text = f"First turn steady noise of the source down by up to {DENOISE_DB:g} dB."
        return click.option("--denoise", is_flag=True, help=text)
    option = f"--{name.replace('_', '-')}"
    if spec.low is None:
        return click.option(option, is_flag=True, help=spec.help)
    kind = str if spec.word else float
    shown = f"NUMBER|{spec.word}" if spec.word else "NUMBER"
    return click.option(option, type=kind, default=spec.default, metavar=shown, help=spec.help)


# Of `--denoise`: more makes speech sound hollow.
DENOISE_DB = 15.0

_OUTPUT = (
    click.option(
        "--format", "format_", metavar="FORMAT", help="wav, flac, ogg, opus, mp3 or aiff."
    ),
    click.option("--subtype", help="Sample coding, e.g. pcm_24, float, or bits: 16, 24, 32f."),
    click.option(
        "--rate",
        type=click.IntRange(LOWEST_OUTPUT_RATE, HIGHEST_OUTPUT_RATE),
        help="Samples a second, in Hz.",
    ),
)

truncation_option = click.option(
    "--allow-truncated", is_flag=True, default=None,
    help="Use what is there of truncated recordings, with a note.",
)  # fmt: skip


def control_options(command: F) -> F:
    """Add what shapes a conversion; :func:`control_values` reads it."""
    for name, spec in reversed(list(CONTROLS.items())):
        command = _control_option(name, spec)(command)
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

    chosen = {
        "match_pitch": not options.pop("keep_pitch"),
        "denoise_db": DENOISE_DB if options.pop("denoise") else 0.0,
    }
    chosen |= {name: options.pop(name) for name in CONTROLS if name not in chosen}
    return controls_from({name: value for name, value in chosen.items() if value is not None})


def complete_voice(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Stored voices and files, for the shell."""
    from click.shell_completion import CompletionItem

    from auto_voice.voices.library import VoiceLibrary

    found = [name for name in VoiceLibrary().names() if name.startswith(incomplete)]
    return [*(CompletionItem(name) for name in found), CompletionItem(incomplete, type="file")]
