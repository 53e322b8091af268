"""Which models a pipeline is made of: their names in, loaded stages that fit each other out."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from auto_voice.errors import ConfigError, ModelError, ModelLoadError
from auto_voice.inference.controls import Controls
from auto_voice.models.base import ContentEncoder, Converter, SpeakerEncoderStage, Vocoder
from auto_voice.models.content_map import into_space_of
from auto_voice.models.model_registry import LIVE_VOCODER, PIPELINE_MODELS
from auto_voice.progress import ProgressCallback, listener, told_to

if TYPE_CHECKING:
    from auto_voice.models.model_registry import ModelRegistry

# Gradient steps of fine-tuning unless told otherwise: 7 s on two cores.
FINE_TUNE_STEPS = 40
# More steps forget words.
MOST_FINE_TUNE_STEPS = 2000


@dataclass(frozen=True)
class PipelineConfig:
    """What a pipeline is built from; the registry's own defaults stand wherever this says None.

    Attributes:
        use_mock_models: numpy stand-ins that give noise; for tests of what surrounds them.
        model_dir: where models are kept.
        config: a YAML of settings and further models.
        enable_model_warmup: load every stage and run it once when the pipeline is made.
        content_encoder, converter, vocoder, speaker_encoder: ``name`` or ``name@version``. Without
            a vocoder, recordings get the best one and live conversions a faster one.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``, ``directml``, ``coreml``, ``openvino``;
            also for single models, see ``ModelRegistry``.
        offline: open no connection.
        fallback: ``none``, ``compact`` or ``mock``.
        prefer: ``exact``, ``fastest`` or ``smallest``: which version a model's bare name means.
        chunk_seconds: longest piece that is processed at once; bounds the memory.
        allow_truncated: take what is there of truncated recordings, with a note.
        fine_tune: fine-tune the converter to each voice when it is cloned or converted to, which
            needs the extra ``train``. Without it cloning is instant; a voice that was stored
            fine-tuned is used so either way.
        fine_tune_steps: gradient steps of that, a sixth of a second each on two cores, and up to
            two and a half times as many where the reference holds more than ten seconds.
    """

    use_mock_models: bool = False
    model_dir: str | Path | None = None
    config: str | Path | None = None
    enable_model_warmup: bool = False
    content_encoder: str = PIPELINE_MODELS["content"]
    converter: str = PIPELINE_MODELS["converter"]
    vocoder: str | None = None
    speaker_encoder: str = PIPELINE_MODELS["speaker"]
    device: str | Mapping[str, str] | None = None
    offline: bool | None = None
    fallback: str | None = None
    prefer: str | None = None
    chunk_seconds: float = 30.0
    allow_truncated: bool = False
    fine_tune: bool = False
    fine_tune_steps: int = FINE_TUNE_STEPS

    def __post_init__(self) -> None:
        if not self.chunk_seconds >= 2.0:
            raise ConfigError(f"chunk_seconds must be at least 2, not {self.chunk_seconds}.")
        if not 0 <= self.fine_tune_steps <= MOST_FINE_TUNE_STEPS:
            raise ConfigError(
                f"fine_tune_steps must lie between 0 and {MOST_FINE_TUNE_STEPS}, not "
                f"{self.fine_tune_steps}."
            )

    @property
    def models(self) -> dict[str, str]:
        """The model of each stage, by its kind."""
        return {
            "content": self.content_encoder,
            "speaker": self.speaker_encoder,
            "converter": self.converter,
            "vocoder": self.vocoder or PIPELINE_MODELS["vocoder"],
        }

    @property
    def live_models(self) -> dict[str, str]:
        """The models of a live conversion, by their kinds."""
        return self.models | {"vocoder": self.vocoder or LIVE_VOCODER}


@dataclass(frozen=True)
class Stages:
    """The models of one conversion.

    Raises:
        ModelLoadError: the vocoder takes other mels than the converter gives.
    """

    content_encoder: ContentEncoder
    converter: Converter
    vocoder: Vocoder
    speaker_encoder: SpeakerEncoderStage | None = None

    def __post_init__(self) -> None:
        converter, vocoder = self.converter, self.vocoder
        given = (converter.sample_rate, converter.hop_samples)
        if given != (vocoder.sample_rate, vocoder.hop_samples):
            raise ModelLoadError(
                f"{converter.name} gives mel frames of {given[1]} samples at {given[0]} Hz, but "
                f"{vocoder.name} takes {vocoder.hop_samples} at {vocoder.sample_rate} Hz; choose "
                "a vocoder with the converter's mel."
            )


class PipelineStages:
    """The models that a configuration names, loaded by a registry when they are first needed.

    Args:
        config: which models.
        model_registry: used instead of one that is made from ``config``.
        progress: told the progress of what is done without a listener of the call's own.
    """

    def __init__(
        self,
        config: PipelineConfig,
        model_registry: ModelRegistry | None,
        progress: ProgressCallback | None,
    ) -> None:
        self.config = config
        self.progress = progress
        self._registry = model_registry
        self._lock = threading.Lock()

    @property
    def registry(self) -> ModelRegistry:
        with self._lock:
            if self._registry is None:
                from auto_voice.models.model_registry import ModelRegistry

                self._registry = ModelRegistry(
                    self.config.model_dir,
                    self.config.use_mock_models,
                    config=self.config.config,
                    offline=self.config.offline,
                    device=self.config.device,
                    fallback=self.config.fallback,
                    prefer=self.config.prefer,
                    progress=self.progress,
                )
            return self._registry

    @property
    def content_encoder(self) -> ContentEncoder:
        """The content encoder, mapped where the converter was trained on another."""
        encoder = cast(ContentEncoder, self._load("content", self.config.content_encoder))
        return into_space_of(self.converter, encoder, self.registry, self.config.content_encoder)

    @property
    def converter(self) -> Converter:
        return cast(Converter, self._load("converter", self.config.converter))

    @property
    def vocoder(self) -> Vocoder:
        return cast(Vocoder, self._load("vocoder", self.config.models["vocoder"]))

    @property
    def speaker_encoder(self) -> SpeakerEncoderStage:
        return cast(SpeakerEncoderStage, self._load("speaker", self.config.speaker_encoder))

    def _load(self, kind: str, name: str) -> object:
        version = self.registry.version(name)
        if version.kind != kind:
            models = self.registry.catalog.models.values()
            fitting = [entry.name for entry in models if entry.kind == kind]
            raise ConfigError(
                f"{name} is a {version.kind} model, not a {kind} model; choose one of "
                f"{', '.join(fitting)}."
            )
        with self._telling():
            model: object = self.registry.load(name)
        return model

    def _telling(self, progress: ProgressCallback | None = None) -> AbstractContextManager[None]:
        """What is done inside is told to whom the call names, or else to the pipeline's own."""
        return told_to(progress or listener() or self.progress)

    def stages(self, controls: Controls | None = None, vocoder: str = "") -> Stages:
        """The models that a conversion with ``controls`` needs, loaded.

        Args:
            vocoder: in place of the one that is configured.

        Raises:
            ModelError: one cannot be had, or does not fit the others.
        """
        names = self.config.models | ({"vocoder": vocoder} if vocoder else {})
        needed = controls is not None and controls.strength != 1
        # The source's own voice makes results better with some converters, and none depends on it.
        useful = controls is not None and bool(
            self.registry.version(names["converter"]).params.get("guidance")
        )
        kinds = ("content", "converter", "vocoder", *["speaker"] * (needed or useful))
        self.registry.load_installed(names[kind] for kind in kinds)
        speaker = None
        if needed or useful:
            try:
                speaker = self.speaker_encoder
            except ModelError:
                if needed:
                    raise
        vocodes = cast(Vocoder, self._load("vocoder", names["vocoder"]))
        return Stages(self.content_encoder, self.converter, vocodes, speaker)
