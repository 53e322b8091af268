"""The pipeline: source and voice in, the same words in that voice out."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
from numpy.typing import ArrayLike

from auto_voice.audio.resample import resample
from auto_voice.errors import ConfigError, ModelLoadError, VoiceError
from auto_voice.inference.adapting import into_space_of
from auto_voice.inference.chunking import Chunk, join
from auto_voice.inference.controls import Controls
from auto_voice.inference.conversion import Stages, cleaned, output_level, prepare
from auto_voice.inference.fitting import FittedVoices
from auto_voice.inference.inputs import AudioInput, as_waveform
from auto_voice.inference.rendering import timed
from auto_voice.inference.result import ConversionResult, FileResult
from auto_voice.inference.sample_source import MemoryTape
from auto_voice.models.base import (
    AdaptiveConverter,
    ContentEncoder,
    Converter,
    SpeakerEncoderStage,
    Vocoder,
)
from auto_voice.types import EMBEDDING_DIMS, FloatArray, Voice, Waveform
from auto_voice.voices.cloning import SAMPLE_RATE, bare_voice, build_voice
from auto_voice.voices.voice_file import SUFFIX, load_voice

if TYPE_CHECKING:
    from auto_voice.models.model_registry import ModelRegistry

log = logging.getLogger(__name__)

# A voice, a voice file, one or several recordings, or a bare 256-d embedding.
Target: TypeAlias = Voice | AudioInput | Sequence[str | PathLike[str] | Waveform]


ADAPTATION_STEPS = 40
MOST_ADAPTATION_STEPS = 2000


@dataclass(frozen=True)
class PipelineConfig:
    """What a pipeline is built from; the registry's own defaults stand wherever this says None.

    Attributes:
        use_mock_models: numpy stand-ins that give noise; for tests of what surrounds them.
        model_dir: where models are kept.
        config: a YAML of settings and further models.
        enable_model_warmup: load every stage and run it once when the pipeline is made.
        content_encoder, converter, vocoder, speaker_encoder: ``name`` or ``name@version``.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``, ``directml``, ``coreml`` or ``openvino``.
        offline: open no connection.
        fallback: ``none``, ``compact`` or ``mock``.
        chunk_seconds: longest piece that is processed at once; bounds the memory.
        allow_truncated: take what is there of truncated recordings, with a note.
        fine_tune: fine-tune the converter to each voice when it is cloned, which needs the extra
            ``train``. Without it cloning is instant; a voice that was stored fine-tuned is used so
            either way.
        adaptation_steps: gradient steps of that, a sixth of a second each on two cores, and up to
            two and a half times as many where the reference holds more than ten seconds.
    """

    use_mock_models: bool = False
    model_dir: str | Path | None = None
    config: str | Path | None = None
    enable_model_warmup: bool = False
    content_encoder: str = "content_whisper"
    converter: str = "converter_compact"
    vocoder: str = "hifigan_universal"
    speaker_encoder: str = "speaker_encoder"
    device: str | None = None
    offline: bool | None = None
    fallback: str | None = None
    chunk_seconds: float = 30.0
    allow_truncated: bool = False
    fine_tune: bool = False
    adaptation_steps: int = ADAPTATION_STEPS

    def __post_init__(self) -> None:
        if not self.chunk_seconds >= 2.0:
            raise ConfigError(f"chunk_seconds must be at least 2, not {self.chunk_seconds}.")
        if not 0 <= self.adaptation_steps <= MOST_ADAPTATION_STEPS:
            raise ConfigError(
                f"adaptation_steps must lie between 0 and {MOST_ADAPTATION_STEPS}, not "
                f"{self.adaptation_steps}."
            )


class VoiceConversionPipeline:
    """Clones and converts; one object serves many threads.

    Models are loaded when first needed, through the properties, by the registry, which gives the
    same object to every thread.

    Args:
        config: defaults to ``PipelineConfig()``.
        model_registry: used instead of one that is made from ``config``.
    """

    def __init__(
        self,
        config: PipelineConfig | None = None,
        *,
        model_registry: ModelRegistry | None = None,
    ) -> None:
        self.config = config or PipelineConfig()
        self._registry = model_registry
        self._lock = threading.Lock()
        self._fittings = FittedVoices()
        self.on_fitting: Callable[[float], None] | None = None
        """Told the fraction of a fitting that is done, where the call has no ``progress``."""
        if self.config.enable_model_warmup:
            self.warmup()

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
        sample_rate: int = 16000,
        adapt: bool = True,
        progress: Callable[[float], None] | None = None,
    ) -> Voice:
        """The voice heard in one or several recordings.

        Args:
            references: a file, a waveform, ``(samples,)`` at ``sample_rate``, or a list of files
                and waveforms of the same person.
            name: what to call the voice; the first file's name if empty.
            adapt: fine-tune the converter to it, where the configuration says so.
            progress: called with the fraction of that fitting that is done, from 0 to 1.

        Raises:
            AudioError: a recording cannot be read, or holds less than a second of speech.
        """
        if isinstance(references, Voice):
            return references
        listed = cast(
            "Sequence[AudioInput]", references if _is_several(references) else [references]
        )
        pairs = []
        for item in listed:
            path = item if isinstance(item, (str, PathLike)) else None
            what = f"the reference {path}" if path is not None else "the reference"
            pairs.append((what, self._waveform(item, sample_rate, "the reference")))
            name = name or (Path(path).stem if path is not None else "")
        voice = build_voice(pairs, self.speaker_encoder, self.content_encoder, name)
        return self._fitted(voice, progress) if adapt else voice

    def convert(
        self,
        source_audio: AudioInput,
        target: Target,
        *,
        sample_rate: int = 16000,
        semitones: float = 0.0,
        match_pitch: bool = True,
        controls: Controls | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> ConversionResult:
        """``source_audio`` re-spoken in the voice of ``target``.

        Args:
            source_audio: a file, a waveform, or ``(samples,)`` at ``sample_rate``.
            target: a voice, a recording or several, a voice file, or an embedding ``(256,)``.
            semitones: further transposition.
            match_pitch: first move the mean log-F0 of the source to the voice's.
            controls: everything that can be chosen, the two above included; used in their place.
            progress: called with the fraction done, from 0 to 1.

        Raises:
            AudioError: a recording that cannot be used.
            ModelError: a model that cannot be had or does not fit the others.
        """
        controls = controls or Controls(semitones=semitones, match_pitch=match_pitch)
        timings: dict[str, float] = {}
        with timed(timings, "read"):
            source = self._waveform(source_audio, sample_rate, "the source")
        with timed(timings, "load"):
            stages = self.stages(controls)
        with timed(timings, "voice"):
            voice = self.voice(target, sample_rate)
        rate = stages.content_encoder.sample_rate
        blocks = [resample(source.samples, source.sample_rate, rate)]
        tape = MemoryTape(np.concatenate(list(cleaned(blocks, rate, controls))), rate)
        given = (len(source.samples), source.sample_rate)
        job = prepare(tape, given, voice, controls, stages, timings)
        chunks = job.rendering.plan(self.config.chunk_seconds)
        rendered = job.rendering.render(chunks, job.rendering.content_mean())
        hop, length = stages.vocoder.hop_samples, job.rendering.samples
        samples = join(_reporting(rendered, job.rendering.frames, progress), hop, length)
        rendered_tape = MemoryTape(samples, stages.vocoder.sample_rate)
        level = output_level(rendered_tape, job)
        finished = np.concatenate(list(level.blocks(rendered_tape)))
        return ConversionResult(
            audio=Waveform(finished, stages.vocoder.sample_rate),
            voice=job.voice,
            semitones=job.semitones,
            timings=timings,
            chunks=len(chunks),
            controls=controls,
            **self.account(source.notes, voice, (*job.notes, *level.notes)),
        )

    def convert_file(
        self,
        source: str | PathLike[str],
        target: Target,
        output: str | PathLike[str],
        **options: Any,
    ) -> FileResult:
        """From file to file in constant memory, resumable; see :func:`long_audio.convert_file`."""
        from auto_voice.inference.file_conversion import convert_file

        return convert_file(self, Path(source), target, Path(output), **options)

    def similarity(self, audio: AudioInput, voice: Voice, *, sample_rate: int = 16000) -> float:
        """Cosine between the speaker embeddings of ``audio`` and ``voice``."""
        heard = self._waveform(audio, sample_rate, "the recording")
        encoder = self.speaker_encoder
        samples = resample(heard.samples, heard.sample_rate, encoder.sample_rate)
        return encoder.similarity(encoder.embed_utterance(samples), voice.embedding)

    def warmup(self) -> dict[str, float]:
        """Load every stage and run it once; seconds by stage."""
        timings: dict[str, float] = {}
        with timed(timings, "speaker"):
            noise = 0.1 * np.sin(np.arange(32000, dtype=np.float32) * 0.05).astype(np.float32)
            embedding = self.speaker_encoder.embed_utterance(noise)
        with timed(timings, "load"):
            self.stages()
        # Without its notes: nobody asked for this conversion, so nobody needs advice on it.
        voice = replace(bare_voice(embedding), notes=())
        result = self.convert(Waveform(noise, 16000), voice)
        return timings | {k: v for k, v in (result.timings or {}).items() if k not in timings}

    def _waveform(self, audio: AudioInput, sample_rate: int, what: str) -> Waveform:
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
        return self.registry.load(name)

    def stages(self, controls: Controls | None = None) -> Stages:
        """The models that a conversion with ``controls`` needs, loaded.

        Raises:
            ModelError: one cannot be had, or does not fit the others.
        """
        converter, vocoder = self.converter, self.vocoder
        same = (converter.sample_rate, converter.hop_samples)
        if same != (vocoder.sample_rate, vocoder.hop_samples):
            raise ModelLoadError(
                f"{converter.name} gives mel frames of {same[1]} samples at {same[0]} Hz, but "
                f"{vocoder.name} takes {vocoder.hop_samples} at {vocoder.sample_rate} Hz; choose "
                "a vocoder with the converter's mel."
            )
        own_voice = controls is not None and controls.strength < 1
        speaker = self.speaker_encoder if own_voice else None
        return Stages(self.content_encoder, converter, vocoder, speaker)

    def voice(self, target: Target, sample_rate: int = 16000) -> Voice:
        """``target`` as a voice of this pipeline's encoders.

        Raises:
            VoiceError: a voice of other encoders that kept no recording to encode again.
        """
        if isinstance(target, (str, PathLike)) and Path(target).suffix == SUFFIX:
            target = load_voice(target)
        if isinstance(target, Voice):
            return self._fitted(self._of_this_encoder(target))
        if isinstance(target, (str, PathLike, Waveform)) or _is_several(target):
            return self.clone(target)
        values = np.asarray(cast(ArrayLike, target))
        if values.size > EMBEDDING_DIMS:
            return self.clone(target, sample_rate=sample_rate)
        return bare_voice(values)

    def _fitted(self, voice: Voice, progress: Callable[[float], None] | None = None) -> Voice:
        """``voice`` with the converter fitted to it, where that can be done and is not yet."""
        converter = self.converter
        steps = self.config.adaptation_steps if self.config.fine_tune else 0
        if voice.adaptation and voice.adapted_to == converter.name:
            return voice
        # A voice without its recording is a blend or was stored so: nothing to learn from.
        if not steps or not isinstance(converter, AdaptiveConverter) or voice.speech is None:
            return _without_fitting(voice, converter.name)
        return self._fittings.fitted(converter, voice, steps, progress or self.on_fitting)

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
        heard = Waveform(voice.speech.astype(np.float32) / np.float32(32768), SAMPLE_RATE)
        again = self.clone(heard, name=voice.name, adapt=False)
        note = f"The voice was made with {made_with} and encoded again with {encoder}."
        log.info(note)
        return replace(
            again, notes=(*again.notes, note), consent=voice.consent, quality=voice.quality
        )

    def account(
        self, source_notes: Sequence[str], voice: Voice, notes: Sequence[str]
    ) -> dict[str, Any]:
        """``models``, ``notes`` and ``mock`` of a result, and the notes in the log."""
        specs = {
            "content": self.config.content_encoder,
            "speaker": self.config.speaker_encoder,
            "converter": self.config.converter,
            "vocoder": self.config.vocoder,
        }
        models = {stage: self.registry.resolved(spec) for stage, spec in specs.items()}
        said = (
            *(f"source: {note}" for note in source_notes),
            *(note for note in [getattr(self.content_encoder, "note", "")] if note),
            *voice.notes,
            *notes,
            *(f"{stage}: {text}" for stage, text in models.items() if "fallback" in text),
        )
        for note in said:
            log.info(note)
        mock = any(self.registry.is_mock(spec) for spec in specs.values())
        return {"models": models, "notes": said, "mock": mock}


def _without_fitting(voice: Voice, converter: str) -> Voice:
    """``voice`` with a note where it holds what another converter learnt of it."""
    if not voice.adaptation:
        return voice
    note = (
        f"The voice was fitted to {voice.adapted_to} and is spoken by {converter} without that; "
        "clone it again from its recordings to come closer."
    )
    return replace(voice, adaptation={}, adapted_to="", notes=(*voice.notes, note))


def _is_several(target: Target) -> bool:
    """Whether it is a list of recordings rather than one recording or a list of numbers."""
    return isinstance(target, (list, tuple)) and all(
        isinstance(item, (str, PathLike, Waveform)) for item in target
    )


def _reporting(
    pieces: Iterator[tuple[Chunk, FloatArray]],
    frames: int,
    progress: Callable[[float], None] | None,
) -> Iterator[tuple[Chunk, FloatArray]]:
    for chunk, audio in pieces:
        yield chunk, audio
        if progress is not None:
            progress(min(1.0, chunk.stop / frames))
