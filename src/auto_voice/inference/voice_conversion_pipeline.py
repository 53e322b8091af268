"""The pipeline: source and voice in, the same words in that voice out."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import ArrayLike

from auto_voice import events
from auto_voice.audio.resample import resample
from auto_voice.errors import ConfigError, MockAudioError
from auto_voice.inference.checkpoint import Workspace
from auto_voice.inference.controls import Controls
from auto_voice.inference.conversion import LONG_SECONDS, ConversionSetup, convert_into, run
from auto_voice.inference.inputs import (
    AudioInput,
    Source,
    Target,
    as_waveform,
    is_several,
    listed,
)
from auto_voice.inference.rendering import timed
from auto_voice.inference.result import ConversionResult, FileResult, Output, OutputSpec
from auto_voice.inference.stages import PipelineConfig, PipelineStages
from auto_voice.inference.streaming import BLOCK_MS, LOOKAHEAD_MS, LiveStream, StreamSetup
from auto_voice.progress import ProgressCallback
from auto_voice.types import (
    EMBEDDING_DIMS,
    Voice,
    Waveform,
)
from auto_voice.voices.cloning import (
    FineTunedVoices,
    bare_voice,
    build_voice,
    of_encoders,
)
from auto_voice.voices.inspection import check_references
from auto_voice.voices.voice_file import SUFFIX, check_consent, load_voice

if TYPE_CHECKING:
    from auto_voice.models.model_registry import ModelRegistry

__all__ = ["PipelineConfig", "VoiceConversionPipeline", "clone", "convert", "pipeline"]


class VoiceConversionPipeline(PipelineStages):
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
        super().__init__(config or PipelineConfig(), model_registry, progress)
        self._fine_tunings = FineTunedVoices()
        if self.config.enable_model_warmup:
            self.warmup()

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
            ConfigError: not one label for each recording, or voices among the recordings.
            VoiceError: the consent is longer than a voice file holds.
        """
        if isinstance(references, Voice):
            return references
        check_consent(consent)
        items = listed(references)
        if any(isinstance(item, Voice) for item in items):
            raise ConfigError(
                "a list of references holds recordings of one person, not voices; give one voice, "
                "or blend several with auto_voice.voices.blending.blend_voices."
            )
        if labels and len(labels) != len(items):
            raise ConfigError(
                f"there are {len(labels)} labels for {len(items)} recordings; give one for each, "
                "or none."
            )
        paths = [Path(item) if isinstance(item, (str, PathLike)) else None for item in items]
        # The notes travel with the voice, and the folder of a file is nobody's business.
        known = labels or [path.name if path is not None else "the reference" for path in paths]
        with self._telling(progress):
            recordings = [
                (label, self._waveform(item, sample_rate, "the reference"))
                for label, item in zip(known, items, strict=True)
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
        with self._telling(progress), events.span(events.Conversion()) as converting:
            conversion = self._conversion(source_audio, target, sample_rate, controls)
            rendered = run(conversion, Workspace())
            samples = np.concatenate(list(rendered.blocks()))
            audio = Waveform(samples, rendered.samples.sample_rate)
            result = ConversionResult(audio=audio, **rendered.account)
            converting.complete(**_facts(result))
        return result

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
        checked = spec.check([source, *listed(target)])
        with self._telling(progress), events.span(events.Conversion()) as converting:
            conversion = self._conversion(
                source, target, sample_rate, controls or Controls(), memory_seconds, checked
            )
            result = convert_into(conversion, checked)
            converting.complete(**_facts(result), resumed=result.resumed)
        return result

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

        ``vocoder_compact`` makes them, in its fastest version, unless the configuration names
        another vocoder, or a pin or the setting ``prefer`` another version.

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
        specs = self.config.live_models
        specs = specs | {"vocoder": self.registry.quickest(specs["vocoder"])}
        stages = self.stages(vocoder=specs["vocoder"])
        mock = any(self.registry.is_mock(spec) for spec in specs.values())
        if mock and not self.config.use_mock_models:
            raise MockAudioError(
                "mock models would make noise; fetch the real ones with `autovoice models pull`."
            )
        own = None
        if own_voice is not None:
            # Only what the recording tells of the speaker is needed, not a fine-tuned converter.
            own = own_voice if isinstance(own_voice, Voice) else self.clone(
                own_voice, sample_rate=sample_rate, fine_tune=False
            )  # fmt: skip
        voice = self.voice(target, sample_rate)
        models = {stage: self.registry.resolved(spec) for stage, spec in specs.items()}
        notes = (
            *(note for note in [getattr(stages.content_encoder, "note", "")] if note),
            *voice.notes,
            *(f"{stage}: {text}" for stage, text in models.items() if "fallback" in text),
        )
        return LiveStream(
            StreamSetup(
                content_encoder=stages.content_encoder,
                converter=stages.converter,
                vocoder=stages.vocoder,
                voice=voice,
                own_voice=own,
                controls=controls,
                sample_rate=sample_rate,
                output_rate=output_rate or sample_rate,
                block_ms=block_ms,
                lookahead_ms=lookahead_ms,
            ),
            models,
            notes,
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
            models={kind: self.registry.resolved(name) for kind, name in specs.items()},
            mock=mock,
            timings=timings,
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
            # Half a second: everything runs, and nobody waits for more of the vocoder than that.
            noise = 0.1 * np.sin(np.arange(8000, dtype=np.float32) * 0.05).astype(np.float32)
            embedding = self.speaker_encoder.embed_utterance(noise)
        # Without its notes: nobody asked for this conversion, so nobody needs advice on it.
        voice = replace(bare_voice(embedding), notes=())
        result = self.convert(Waveform(noise, 16000), voice)
        return timings | {k: v for k, v in (result.timings or {}).items() if k not in timings}

    def _waveform(self, audio: AudioInput, sample_rate: float | None, what: str) -> Waveform:
        allow = self.config.allow_truncated
        return as_waveform(audio, sample_rate, what, allow_truncated=allow)

    def voice(self, target: Target, sample_rate: float | None = None) -> Voice:
        """``target`` as a voice of this pipeline's encoders.

        Raises:
            VoiceError: a voice of other encoders that kept no recording to encode again.
        """
        if isinstance(target, (str, PathLike)) and Path(target).suffix == SUFFIX:
            # As recordings are found; a ~ without a home stays as it is.
            target = load_voice(os.path.expanduser(target))  # noqa: PTH111
        if isinstance(target, Voice):
            fitting = of_encoders(
                target,
                self.registry.resolved(self.config.speaker_encoder).partition(" ")[0],
                self.content_encoder,
                self.converter.content_space,
                lambda: self.speaker_encoder,
            )
            return self._fine_tuned(fitting)
        if isinstance(target, (str, PathLike, bytes, Waveform)) or hasattr(target, "read"):
            return self.clone(target)
        if is_several(target):
            return self.clone(target, sample_rate=sample_rate)
        if np.size(cast(ArrayLike, target)) > EMBEDDING_DIMS:
            return self.clone(target, sample_rate=sample_rate)
        return bare_voice(np.asarray(target, np.float32))

    def _fine_tuned(self, voice: Voice) -> Voice:
        """``voice`` with the converter fine-tuned to it, where that is asked for and not done."""
        steps = self.config.fine_tune_steps if self.config.fine_tune else 0
        with self._telling():
            return self._fine_tunings.fine_tuned(self.converter, voice, steps)

    def _with_gain_note(self, voice: Voice) -> Voice:
        """``voice`` with a note on what fine-tuning gains, where it could be done and is not."""
        gain = getattr(self.converter, "fine_tuning_gain", "")
        if not gain or voice.fine_tuning or voice.speech is None:
            return voice
        note = f"The voice was cloned without --fine-tune: {gain}."
        return replace(voice, notes=(*voice.notes, note))


def _facts(account: ConversionResult | FileResult) -> dict[str, Any]:
    """What an event says of a conversion that is done."""
    return {
        "audio_seconds": account.seconds,
        "models": dict(account.models),
        "timings": dict(account.timings or {}),
        "seconds_per_second": account.seconds_per_second,
    }


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
        output = spec.check([source, *listed(voice)])
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
