"""The pipeline: source and voice in, the same words in that voice out."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache
from numbers import Number
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union, cast

import numpy as np
from numpy.typing import ArrayLike

from auto_voice.audio.resample import resample
from auto_voice.errors import ConfigError, ModelLoadError, VoiceError
from auto_voice.inference.checkpoint import Workspace
from auto_voice.inference.controls import Controls
from auto_voice.inference.conversion import LONG_SECONDS, ConversionSetup, Stages, convert_into, run
from auto_voice.inference.inputs import AudioInput, Source, as_waveform
from auto_voice.inference.rendering import timed
from auto_voice.inference.result import ConversionResult, FileResult, Output, OutputSpec
from auto_voice.inference.streaming import BLOCK_MS, LOOKAHEAD_MS, LiveStream, StreamSetup
from auto_voice.models.base import (
    AdaptiveConverter,
    ContentEncoder,
    Converter,
    SpeakerEncoderStage,
    Vocoder,
)
from auto_voice.models.calibration import into_space_of
from auto_voice.models.model_registry import PIPELINE_MODELS
from auto_voice.types import (
    EMBEDDING_DIMS,
    SPEECH_RATE,
    Progress,
    ProgressCallback,
    Voice,
    Waveform,
)
from auto_voice.voices.cloning import FineTunedVoices, bare_voice, build_voice
from auto_voice.voices.inspection import check_references
from auto_voice.voices.voice_file import SUFFIX, check_consent, load_voice

if TYPE_CHECKING:
    from auto_voice.models.model_registry import ModelRegistry

log = logging.getLogger(__name__)

# A voice, a voice file, one or several recordings, or a bare 256-d embedding.
Target: TypeAlias = Union[Voice, AudioInput, "Sequence[AudioInput | Voice]"]

# Gradient steps of fine-tuning unless told otherwise: 7 s on two cores.
FINE_TUNE_STEPS = 40
# More steps forget words.
MOST_FINE_TUNE_STEPS = 2000

# Who is told of the progress of the call that this thread is in.
_LISTENER: ContextVar[ProgressCallback | None] = ContextVar("progress", default=None)


@dataclass(frozen=True)
class PipelineConfig:
    """What a pipeline is built from; the registry's own defaults stand wherever this says None.

    Attributes:
        use_mock_models: numpy stand-ins that give noise; for tests of what surrounds them.
        model_dir: where models are kept.
        config: a YAML of settings and further models.
        enable_model_warmup: load every stage and run it once when the pipeline is made.
        content_encoder, converter, vocoder, speaker_encoder: ``name`` or ``name@version``.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``, ``directml``, ``coreml`` or ``openvino``;
            also for single models, see ``ModelRegistry``.
        offline: open no connection.
        fallback: ``none``, ``compact`` or ``mock``.
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
    vocoder: str = PIPELINE_MODELS["vocoder"]
    speaker_encoder: str = PIPELINE_MODELS["speaker"]
    device: str | Mapping[str, str] | None = None
    offline: bool | None = None
    fallback: str | None = None
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
            "vocoder": self.vocoder,
        }


class VoiceConversionPipeline:
    """Clones and converts; one object serves many threads.

    Models are loaded when first needed, through the properties, by the registry, which gives the
    same object to every thread.

    Args:
        config: defaults to ``PipelineConfig()``.
        model_registry: used instead of one that is made from ``config``.
        progress: told the progress of every stage of each call that has no ``progress`` of its own.
    """

    def __init__(
        self,
        config: PipelineConfig | None = None,
        *,
        model_registry: ModelRegistry | None = None,
        progress: ProgressCallback | None = None,
    ) -> None:
        self.config = config or PipelineConfig()
        self.progress = progress
        self._registry = model_registry
        self._lock = threading.Lock()
        self._fine_tunings = FineTunedVoices()
        if self.config.enable_model_warmup:
            self.warmup()

    @property
    def registry(self) -> ModelRegistry:
        with self._lock:
            if self._registry is None:
                from auto_voice.models.model_registry import ModelRegistry

                def downloaded(label: str, done: int, total: int) -> None:
                    self._tell(Progress("download", done, total, label))

                self._registry = ModelRegistry(
                    self.config.model_dir,
                    self.config.use_mock_models,
                    config=self.config.config,
                    offline=self.config.offline,
                    device=self.config.device,
                    fallback=self.config.fallback,
                    progress=None if self.progress is None else downloaded,
                )
            return self._registry

    @property
    def content_encoder(self) -> ContentEncoder:
        """The content encoder, through its adapter where the converter was trained on another."""
        encoder = cast(ContentEncoder, self._load("content", self.config.content_encoder))
        return into_space_of(self.converter, encoder, self.registry, self.config.content_encoder)

    @property
    def converter(self) -> Converter:
        return cast(Converter, self._load("converter", self.config.converter))

    @property
    def vocoder(self) -> Vocoder:
        return cast(Vocoder, self._load("vocoder", self.config.vocoder))

    @property
    def speaker_encoder(self) -> SpeakerEncoderStage:
        return cast(SpeakerEncoderStage, self._load("speaker", self.config.speaker_encoder))

    def clone(
        self,
        references: Target,
        *,
        name: str = "",
        sample_rate: float | None = None,
        labels: Sequence[str] = (),
        consent: str = "",
        keep_recording: bool = True,
        fine_tune: bool = True,
        progress: ProgressCallback | None = None,
    ) -> Voice:
        """The voice of one or several recordings, with warnings on what is wrong with them.

        Args:
            references: a recording in any form that ``convert`` takes, or a list of files and
                waveforms of the same person.
            name: what to call the voice; the first file's name if empty.
            sample_rate: Hz, of bare arrays.
            labels: what the notes of the voice call each recording; file names if empty.
            consent: what the owner of the voice agreed to, in words of your own.
            keep_recording: keep the speech in the voice, so that it can be encoded again when
                models change.
            fine_tune: fine-tune the converter to the voice, where the configuration says so.
            progress: told of models that are loaded and of the fine-tuning.

        Raises:
            AudioError: a recording cannot be read, or holds less than half a second of speech.
            VoiceError: the consent is longer than a voice file holds.
        """
        if isinstance(references, Voice):
            return references
        check_consent(consent)
        listed = _listed(references)
        paths = [Path(item) if isinstance(item, (str, PathLike)) else None for item in listed]
        # The notes travel with the voice, and the folder of a file is nobody's business.
        known = labels or [path.name if path is not None else "the reference" for path in paths]
        with self._telling(progress):
            recordings = [
                (label, self._waveform(item, sample_rate, "the reference"))
                for label, item in zip(known, listed, strict=True)
            ]
            name = name or next((path.stem for path in paths if path is not None), "")
            voice = build_voice(recordings, self.speaker_encoder, self.content_encoder, name)
            found = check_references(recordings, self.speaker_encoder)
            notes = tuple(dict.fromkeys((*voice.notes, *found.notes)))
            voice = replace(voice, notes=notes, quality=found.figures, consent=consent)
            voice = self._fine_tuned(voice) if fine_tune else voice
        return voice if keep_recording else replace(voice, speech=None)

    def convert(
        self,
        source_audio: AudioInput,
        target: Target,
        *,
        sample_rate: float | None = None,
        semitones: float = 0.0,
        match_pitch: bool = True,
        controls: Controls | None = None,
        progress: ProgressCallback | None = None,
    ) -> ConversionResult:
        """``source_audio`` re-spoken in the voice of ``target``, in memory.

        Args:
            source_audio: a file by its path, its bytes or an open binary stream; a waveform; or an
                array or tensor ``(samples,)``, ``(channels, samples)`` or ``(samples, channels)``
                at ``sample_rate``.
            target: a voice, a recording or several, a voice file, or an embedding ``(256,)``.
            sample_rate: Hz, of bare arrays, which carry none of their own.
            semitones: further transposition.
            match_pitch: first move the mean log-F0 of the source to the voice's.
            controls: everything that can be chosen, the two above included; used in their place.
            progress: told of models that are loaded, of fine-tuning and of the conversion.

        Raises:
            AudioError: a recording that cannot be used.
            ConfigError: an array without a sample rate, or of a shape that is no recording.
            ModelError: a model that cannot be had or does not fit the others.
        """
        controls = controls or Controls(semitones=semitones, match_pitch=match_pitch)
        with self._telling(progress):
            conversion = self._conversion(source_audio, target, sample_rate, controls)
            rendered = run(conversion, Workspace())
        samples = np.concatenate(list(rendered.blocks()))
        audio = Waveform(samples, rendered.samples.sample_rate)
        return ConversionResult(audio=audio, **rendered.account)

    def convert_file(
        self,
        source: AudioInput,
        target: Target,
        output: str | PathLike[str] | OutputSpec,
        *,
        sample_rate: float | None = None,
        controls: Controls | None = None,
        memory_seconds: float = LONG_SECONDS,
        progress: ProgressCallback | None = None,
    ) -> FileResult:
        """``source`` re-spoken in the voice of ``target`` and written to ``output``.

        What is long goes through the disk beside the output: its memory is constant, and a stopped
        conversion goes on where it was when the same call is made again.

        Args:
            source, target, sample_rate, controls, progress: as for :meth:`convert`.
            output: where, and as what.
            memory_seconds: longer sources go through the disk.

        Raises:
            AutoVoiceError: as for :meth:`convert`; the output cannot be written; another process
                is at work on it; mock models would make it and that was not allowed.
        """
        spec = output if isinstance(output, OutputSpec) else OutputSpec(output)
        checked = spec.check([source, *_listed(target)])
        with self._telling(progress):
            conversion = self._conversion(
                source, target, sample_rate, controls or Controls(), memory_seconds, checked
            )
            return convert_into(conversion, checked)

    def stream(
        self,
        target: Target,
        controls: Controls | None = None,
        *,
        sample_rate: int,
        output_rate: int | None = None,
        own_voice: Target | None = None,
        block_ms: float = BLOCK_MS,
        lookahead_ms: float = LOOKAHEAD_MS,
    ) -> LiveStream:
        """A live conversion to ``target``: samples in, converted samples out.

        Args:
            target: as for :meth:`convert`.
            controls: those that do not need the whole recording.
            sample_rate: of what will be pushed, Hz.
            output_rate: of what comes out, Hz; the same by default.
            own_voice: a recording or a voice of who will speak. The level, the mean of the content
                and the pitch are otherwise learnt in the first seconds.
            block_ms: how much is converted at once, to the nearest mel frame.
            lookahead_ms: how far beyond a block the source is known when it is converted. Both
                count in the latency; less of the second costs quality.

        Raises:
            AutoVoiceError: as for :meth:`convert`, or something is asked that no live conversion
                can do.
        """
        controls = controls or Controls()
        stages = self.stages()
        own = None
        if own_voice is not None:
            own = own_voice if isinstance(own_voice, Voice) else self.clone(
                own_voice, sample_rate=sample_rate, fine_tune=False
            )  # fmt: skip
        return LiveStream(
            StreamSetup(
                content_encoder=stages.content_encoder,
                converter=stages.converter,
                vocoder=stages.vocoder,
                voice=self.voice(target, sample_rate),
                own_voice=own,
                controls=controls,
                sample_rate=sample_rate,
                output_rate=output_rate or sample_rate,
                block_ms=block_ms,
                lookahead_ms=lookahead_ms,
            )
        )

    def _conversion(
        self,
        source: AudioInput,
        target: Target,
        sample_rate: float | None,
        controls: Controls,
        memory_seconds: float = float("inf"),
        output: Output | None = None,
    ) -> ConversionSetup:
        """Everything that a conversion needs, loaded and made."""
        timings: dict[str, float] = {}
        with timed(timings, "read"):
            recording = Source(
                source,
                sample_rate,
                allow_truncated=self.config.allow_truncated,
                memory_seconds=memory_seconds,
            )
        with timed(timings, "load"):
            stages = self.stages(controls)
        specs = self.config.models
        mock = any(self.registry.is_mock(spec) for spec in specs.values())
        if output is not None:
            output.refuse_mock(mock)
        with timed(timings, "voice"):
            voice = self._with_gain_note(self.voice(target, sample_rate))
        return ConversionSetup(
            source=recording,
            voice=voice,
            stages=stages,
            controls=controls,
            chunk_seconds=self.config.chunk_seconds,
            models={stage: self.registry.resolved(spec) for stage, spec in specs.items()},
            mock=mock,
            timings=timings,
            progress=self._tell,
        )

    def similarity(
        self, audio: AudioInput, voice: Voice, *, sample_rate: float | None = None
    ) -> float:
        """Speaker similarity: the cosine between the embeddings of ``audio`` and ``voice``."""
        waveform = self._waveform(audio, sample_rate, "the recording")
        encoder = self.speaker_encoder
        samples = resample(waveform.samples, waveform.sample_rate, encoder.sample_rate)
        return encoder.similarity(encoder.embed_utterance(samples), voice.embedding)

    def warmup(self) -> dict[str, float]:
        """Load every stage and run it once; seconds by stage."""
        timings: dict[str, float] = {}
        with timed(timings, "load"):
            self.registry.load_installed(self.config.models.values())
            self.stages()
        with timed(timings, "speaker"):
            # A second: everything runs, and nobody waits for more of the vocoder than that.
            noise = 0.1 * np.sin(np.arange(16000, dtype=np.float32) * 0.05).astype(np.float32)
            embedding = self.speaker_encoder.embed_utterance(noise)
        # Without its notes: nobody asked for this conversion, so nobody needs advice on it.
        voice = replace(bare_voice(embedding), notes=())
        result = self.convert(Waveform(noise, 16000), voice)
        return timings | {k: v for k, v in (result.timings or {}).items() if k not in timings}

    def _waveform(self, audio: AudioInput, sample_rate: float | None, what: str) -> Waveform:
        allow = self.config.allow_truncated
        return as_waveform(audio, sample_rate, what, allow_truncated=allow)

    def _load(self, kind: str, name: str) -> object:
        version = self.registry.version(name)
        if version.kind != kind:
            models = self.registry.catalog.models.values()
            fitting = [entry.name for entry in models if entry.kind == kind]
            raise ConfigError(
                f"{name} is a {version.kind} model, not a {kind} model; choose one of "
                f"{', '.join(fitting)}."
            )
        self._tell(Progress("load", 0, 1, name))
        model: object = self.registry.load(name)
        self._tell(Progress("load", 1, 1, name))
        return model

    def _tell(self, progress: Progress) -> None:
        told = _LISTENER.get() or self.progress
        if told is not None:
            told(progress)

    @contextmanager
    def _telling(self, progress: ProgressCallback | None) -> Iterator[None]:
        """Progress of what is done inside, in this thread, is told to ``progress`` if given."""
        token = _LISTENER.set(progress or _LISTENER.get())
        try:
            yield
        finally:
            _LISTENER.reset(token)

    def stages(self, controls: Controls | None = None) -> Stages:
        """The models that a conversion with ``controls`` needs, loaded.

        Raises:
            ModelError: one cannot be had, or does not fit the others.
        """
        own_voice = controls is not None and controls.strength < 1
        kinds = ("content", "converter", "vocoder", *["speaker"] * own_voice)
        self.registry.load_installed(self.config.models[kind] for kind in kinds)
        converter, vocoder = self.converter, self.vocoder
        same = (converter.sample_rate, converter.hop_samples)
        if same != (vocoder.sample_rate, vocoder.hop_samples):
            raise ModelLoadError(
                f"{converter.name} gives mel frames of {same[1]} samples at {same[0]} Hz, but "
                f"{vocoder.name} takes {vocoder.hop_samples} at {vocoder.sample_rate} Hz; choose "
                "a vocoder with the converter's mel."
            )
        speaker = self.speaker_encoder if own_voice else None
        return Stages(self.content_encoder, converter, vocoder, speaker)

    def voice(self, target: Target, sample_rate: float | None = None) -> Voice:
        """``target`` as a voice of this pipeline's encoders.

        Raises:
            VoiceError: a voice of other encoders that kept no recording to encode again.
        """
        if isinstance(target, (str, PathLike)) and Path(target).suffix == SUFFIX:
            # As recordings are found; a ~ without a home stays as it is.
            target = load_voice(os.path.expanduser(target))  # noqa: PTH111
        if isinstance(target, Voice):
            return self._fine_tuned(self._of_this_encoder(target))
        if isinstance(target, (str, PathLike, bytes, Waveform)) or hasattr(target, "read"):
            return self.clone(target)
        if _is_several(target):
            return self.clone(target, sample_rate=sample_rate)
        if np.size(cast(ArrayLike, target)) > EMBEDDING_DIMS:
            return self.clone(target, sample_rate=sample_rate)
        return bare_voice(np.asarray(target, np.float32))

    def _fine_tuned(self, voice: Voice) -> Voice:
        """``voice`` with the converter fine-tuned to it, where that is asked for and not done."""
        converter = self.converter
        steps = self.config.fine_tune_steps if self.config.fine_tune else 0
        if voice.adaptation and voice.adapted_to == converter.name:
            return voice
        # A voice without its recording is a blend or was stored so: nothing to learn from.
        if not steps or not isinstance(converter, AdaptiveConverter) or voice.speech is None:
            return _without_fine_tuning(voice, converter.name)
        return self._fine_tunings.fine_tuned(converter, voice, steps, self._tell)

    def _with_gain_note(self, voice: Voice) -> Voice:
        """``voice`` with a note on what fine-tuning gains, where it could be done and is not."""
        gain = getattr(self.converter, "fine_tuning_gain", "")
        if not gain or voice.adaptation or voice.speech is None:
            return voice
        note = f"The voice was cloned without --fine-tune: {gain}."
        return replace(voice, notes=(*voice.notes, note))

    def _of_this_encoder(self, voice: Voice) -> Voice:
        encoder = self.registry.resolved(self.config.speaker_encoder).partition(" ")[0]
        made_with = voice.encoder
        if (not made_with or made_with == encoder) and voice.content_space and voice.frames:
            space = self.converter.content_space
            if voice.content_space != space:
                encoder, made_with = space, voice.content_space
        if not made_with or made_with == encoder:
            content = voice.frames.get("content")
            if content is not None and content.shape[1] != self.content_encoder.dims:
                raise VoiceError(
                    f"the voice {voice.name or '(unnamed)'} holds content of {content.shape[1]} "
                    f"numbers a frame, and this pipeline has {self.content_encoder.dims}; clone it "
                    "again from its recordings."
                )
            return voice
        if voice.speech is None:
            raise VoiceError(
                f"the voice {voice.name or '(unnamed)'} was made with {made_with}, and this "
                f"pipeline uses {encoder}; clone it again from its recordings."
            )
        speech = Waveform(voice.speech.astype(np.float32) / np.float32(32768), SPEECH_RATE)
        again = build_voice(
            [("the reference", speech)], self.speaker_encoder, self.content_encoder, voice.name
        )
        note = f"The voice was made with {made_with} and encoded again with {encoder}."
        log.info(note)
        return replace(
            again,
            notes=(*again.notes, note),
            consent=voice.consent,
            quality=voice.quality,
        )


def convert(
    source: AudioInput,
    voice: Target,
    out: str | PathLike[str] | OutputSpec | None = None,
    *,
    config: PipelineConfig | None = None,
    **options: Any,
) -> ConversionResult:
    """``source`` re-spoken in the voice of ``voice``; also written to ``out`` if given.

    Args:
        source: see :meth:`VoiceConversionPipeline.convert`.
        voice: what :func:`clone` returned, a recording or several, a voice file, an embedding.
        out: a path, whose suffix chooses the format, or an :class:`OutputSpec`.
        config: which models run, and where.
        options: see :meth:`VoiceConversionPipeline.convert`.

    Raises:
        AutoVoiceError: one sentence that says what to do.
    """
    config = config or PipelineConfig()
    output: Output | None = None
    if out is not None:
        mock = config.use_mock_models
        spec = out if isinstance(out, OutputSpec) else OutputSpec(out, allow_mock=mock)
        output = spec.check([source, *_listed(voice)])
        output.refuse_mock(mock)
    result = pipeline(config).convert(source, voice, **options)
    if output is not None:
        output.refuse_mock(result.mock)
        notes = output.write([result.samples], result.sample_rate)
        result = replace(result, notes=(*result.notes, *notes))
    return result


def clone(references: Target, *, config: PipelineConfig | None = None, **options: Any) -> Voice:
    """The voice of one or several recordings; see :meth:`VoiceConversionPipeline.clone`."""
    return pipeline(config or PipelineConfig()).clone(references, **options)


_MAKING = threading.Lock()


def pipeline(config: PipelineConfig) -> VoiceConversionPipeline:
    """The one pipeline of this process with this configuration."""
    with _MAKING:
        return _pipeline(config)


@lru_cache(maxsize=4)
def _pipeline(config: PipelineConfig) -> VoiceConversionPipeline:
    return VoiceConversionPipeline(config)


def _without_fine_tuning(voice: Voice, converter: str) -> Voice:
    """``voice`` with a note where another converter was fine-tuned to it."""
    if not voice.adaptation:
        return voice
    note = (
        f"The voice was fine-tuned with {voice.adapted_to} and is spoken by {converter} without "
        "that; clone it again from its recordings to come closer."
    )
    return replace(voice, adaptation={}, adapted_to="", notes=(*voice.notes, note))


def _listed(target: Target) -> list[Any]:
    """The recordings of ``target``, or what else it is."""
    return list(cast("Sequence[Any]", target)) if _is_several(target) else [target]


def _is_several(target: Target) -> bool:
    """Whether it is a list of recordings rather than one recording or a list of numbers."""
    return isinstance(target, (list, tuple)) and not any(
        isinstance(item, (list, tuple, Number)) for item in target
    )
