"""The pipeline: source and voice in, the same words in that voice out."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np
from numpy.typing import ArrayLike

from auto_voice.audio.level import gain_to_speech_level
from auto_voice.audio.pitch import extract_pitch, log_f0_statistics, transpose
from auto_voice.audio.resample import resample, resampled_length
from auto_voice.errors import ConfigError, ModelLoadError, VoiceError
from auto_voice.inference.adapting import into_space_of
from auto_voice.inference.chunking import Chunk, join
from auto_voice.inference.cloning import EMBEDDING_DIMS, bare_voice, build_voice
from auto_voice.inference.inputs import AudioInput, as_waveform
from auto_voice.inference.rendering import Rendering, timed
from auto_voice.inference.result import ConversionResult
from auto_voice.inference.voice_file import SUFFIX, load_voice
from auto_voice.models.base import ContentEncoder, Converter, SpeakerEncoderStage, Vocoder
from auto_voice.types import FloatArray, Pitch, Voice, Waveform

if TYPE_CHECKING:
    from auto_voice.models.model_registry import ModelRegistry

log = logging.getLogger(__name__)

Target: TypeAlias = Voice | AudioInput | Sequence[str | PathLike[str] | Waveform]
"""A voice, a voice file, one or several recordings, or a bare 256-d embedding."""

MOST_SEMITONES = 36.0
CEILING = 0.99


@dataclass(frozen=True)
class PipelineConfig:
    """What a pipeline is built from; the registry's own defaults stand wherever this says None.

    Attributes:
        use_mock_models: numpy stand-ins that give noise; for tests of what surrounds them.
        model_dir: where models are kept.
        config: a YAML of settings and further models.
        enable_model_warmup: load every stage and run it once when the pipeline is made.
        content_encoder, converter, vocoder, speaker_encoder: ``name`` or ``name@version``.
        device: ``cpu``, ``cuda``, ``mps`` or ``auto``.
        offline: open no connection.
        fallback: ``none``, ``compact`` or ``mock``.
        chunk_seconds: longest piece that is processed at once; bounds the memory.
    """

    use_mock_models: bool = False
    model_dir: str | Path | None = None
    config: str | Path | None = None
    enable_model_warmup: bool = False
    content_encoder: str = "content_compact"
    converter: str = "converter_compact"
    vocoder: str = "hifigan_universal"
    speaker_encoder: str = "speaker_encoder"
    device: str | None = None
    offline: bool | None = None
    fallback: str | None = None
    chunk_seconds: float = 30.0

    def __post_init__(self) -> None:
        if not self.chunk_seconds >= 2.0:
            raise ConfigError(f"chunk_seconds must be at least 2, not {self.chunk_seconds}.")


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

    def clone(self, references: Target, *, name: str = "", sample_rate: int = 16000) -> Voice:
        """The voice heard in one or several recordings.

        Args:
            references: a file, a waveform, ``(samples,)`` at ``sample_rate``, or a list of files
                and waveforms of the same person.
            name: what to call the voice; the first file's name if empty.

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
            pairs.append((what, as_waveform(item, sample_rate, "the reference")))
            name = name or (Path(path).stem if path is not None else "")
        return build_voice(pairs, self.speaker_encoder, self.content_encoder, name)

    def convert(
        self,
        source_audio: AudioInput,
        target: Target,
        *,
        sample_rate: int = 16000,
        semitones: float = 0.0,
        match_pitch: bool = True,
        progress: Callable[[float], None] | None = None,
    ) -> ConversionResult:
        """``source_audio`` re-spoken in the voice of ``target``.

        Args:
            source_audio: a file, a waveform, or ``(samples,)`` at ``sample_rate``.
            target: a voice, a recording or several, a voice file, or an embedding ``(256,)``.
            semitones: further transposition.
            match_pitch: first move the mean log-F0 of the source to the voice's.
            progress: called with the fraction done, from 0 to 1.

        Raises:
            AudioError: a recording that cannot be used.
            ModelError: a model that cannot be had or does not fit the others.
        """
        if not abs(semitones) <= MOST_SEMITONES:
            raise ConfigError(f"semitones must lie within ±{MOST_SEMITONES:g}, not {semitones}.")
        timings: dict[str, float] = {}
        with timed(timings, "read"):
            source = as_waveform(source_audio, sample_rate, "the source")
        with timed(timings, "load"):
            content_encoder, converter, vocoder = self._stages()
        with timed(timings, "voice"):
            voice = self._voice(target, sample_rate)
        speech = resample(source.samples, source.sample_rate, content_encoder.sample_rate)
        gain = gain_to_speech_level(speech, content_encoder.sample_rate)
        speech = (speech * gain).astype(np.float32)
        with timed(timings, "pitch"):
            pitch = extract_pitch(speech, content_encoder.sample_rate)
            moved, pitch_notes = _semitones(pitch, voice, semitones, match_pitch)
            pitch = transpose(pitch, moved)
            conditioned = _with_pitch(voice, pitch)

        job = Rendering(content_encoder, converter, vocoder, conditioned, speech, pitch, timings)
        length = resampled_length(len(source.samples), source.sample_rate, vocoder.sample_rate)
        chunks = job.plan(length, self.config.chunk_seconds)
        rendered = _reporting(job.render(chunks), len(chunks), progress)
        samples = join(rendered, vocoder.hop_samples, length)
        samples, level_notes = _restore_level(samples, gain)
        models, mock = self._account()
        notes = (
            *(f"source: {note}" for note in source.notes),
            *voice.notes,
            *pitch_notes,
            *level_notes,
            *(f"{stage}: {text}" for stage, text in models.items() if "fallback" in text),
        )
        for note in notes:
            log.info(note)
        return ConversionResult(
            audio=Waveform(samples, vocoder.sample_rate),
            models=models,
            voice=voice,
            semitones=moved,
            notes=notes,
            timings=timings,
            mock=mock,
            chunks=len(chunks),
        )

    def similarity(self, audio: AudioInput, voice: Voice, *, sample_rate: int = 16000) -> float:
        """Cosine between the speaker embeddings of ``audio`` and ``voice``."""
        heard = as_waveform(audio, sample_rate, "the recording")
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
            self._stages()
        result = self.convert(Waveform(noise, 16000), bare_voice(embedding))
        return timings | {k: v for k, v in (result.timings or {}).items() if k not in timings}

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

    def _stages(self) -> tuple[ContentEncoder, Converter, Vocoder]:
        converter, vocoder = self.converter, self.vocoder
        same = (converter.sample_rate, converter.hop_samples)
        if same != (vocoder.sample_rate, vocoder.hop_samples):
            raise ModelLoadError(
                f"{converter.name} gives mel frames of {same[1]} samples at {same[0]} Hz, but "
                f"{vocoder.name} takes {vocoder.hop_samples} at {vocoder.sample_rate} Hz; choose "
                "a vocoder with the converter's mel."
            )
        return self.content_encoder, converter, vocoder

    def _voice(self, target: Target, sample_rate: int) -> Voice:
        if isinstance(target, Voice):
            return self._of_this_encoder(target)
        if isinstance(target, (str, PathLike)) and Path(target).suffix == SUFFIX:
            return self._of_this_encoder(load_voice(target))
        if isinstance(target, (str, PathLike, Waveform)) or _is_several(target):
            return self.clone(target)
        values = np.asarray(cast(ArrayLike, target))
        if values.size > EMBEDDING_DIMS:
            return self.clone(target, sample_rate=sample_rate)
        return bare_voice(values)

    def _of_this_encoder(self, voice: Voice) -> Voice:
        encoder = self.registry.resolved(self.config.speaker_encoder).partition(" ")[0]
        if voice.encoder and voice.encoder != encoder:
            raise VoiceError(
                f"the voice {voice.name or '(unnamed)'} was made with {voice.encoder}, and this "
                f"pipeline uses {encoder}; clone it again from its recordings."
            )
        return voice

    def _account(self) -> tuple[dict[str, str], bool]:
        specs = {
            "content": self.config.content_encoder,
            "speaker": self.config.speaker_encoder,
            "converter": self.config.converter,
            "vocoder": self.config.vocoder,
        }
        models = {stage: self.registry.resolved(spec) for stage, spec in specs.items()}
        return models, any(self.registry.is_mock(spec) for spec in specs.values())


def _is_several(target: Target) -> bool:
    """Whether it is a list of recordings rather than one recording or a list of numbers."""
    return isinstance(target, (list, tuple)) and all(
        isinstance(item, (str, PathLike, Waveform)) for item in target
    )


def _semitones(
    pitch: Pitch, voice: Voice, further: float, match_pitch: bool
) -> tuple[float, list[str]]:
    """How far to move ``pitch``, and what there is to say about it.

    The means leave out frames far from the median, so that a tracker's octave errors in either
    recording do not move the result.
    """
    if not match_pitch or voice.log_f0_mean is None:
        return further, []
    statistics = log_f0_statistics(pitch)
    if statistics is None:
        return further, ["No pitch was found in the source, so none was moved."]
    return 12.0 * (voice.log_f0_mean - statistics[0]) / float(np.log(2.0)) + further, []


def _with_pitch(voice: Voice, pitch: Pitch) -> Voice:
    """``voice`` with the pitch it will speak at, where it has none of its own.

    A converter would otherwise take the mean of each piece of the source, and pieces would differ.
    """
    statistics = log_f0_statistics(pitch)
    if voice.log_f0_mean is not None or statistics is None:
        return voice
    return replace(voice, log_f0_mean=statistics[0], log_f0_std=statistics[1])


def _restore_level(samples: FloatArray, gain: float) -> tuple[FloatArray, list[str]]:
    peak = float(np.max(np.abs(samples)))
    if peak <= CEILING * gain:
        return samples / np.float32(gain), []
    decibels = 20 * np.log10(peak / gain / CEILING)
    note = f"The result was turned down by {decibels:.1f} dB so as not to clip."
    return samples * np.float32(CEILING / peak), [note]


def _reporting(
    pieces: Iterator[tuple[Chunk, FloatArray]], total: int, progress: Callable[[float], None] | None
) -> Iterator[tuple[Chunk, FloatArray]]:
    for done, piece in enumerate(pieces, 1):
        yield piece
        if progress is not None:
            progress(done / total)
