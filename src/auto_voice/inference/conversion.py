"""The one way that every conversion takes: prepare, render, and bring to a level.

Short and long sources, files and arrays, the command line, a batch and the server all pass
:func:`run`; they differ in the :class:`~auto_voice.inference.checkpoint.Workspace` that keeps the
samples (memory, or a folder on disk) and in where the finished samples go. From file to file, hours
take the memory of half a minute, and an interrupted conversion goes on; the output itself appears
only when it is complete.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from auto_voice.audio.loudness import LoudnessMeter
from auto_voice.audio.pitch import log_f0_statistics
from auto_voice.audio.resample import resampled_length
from auto_voice.errors import AudioContentError
from auto_voice.inference.analysis import (
    Analysis,
    analyse,
    background_notes,
    denoised,
    speech_bounds,
)
from auto_voice.inference.checkpoint import Checkpoint, Position, Workspace, fingerprint
from auto_voice.inference.chunking import Joiner
from auto_voice.inference.controls import SOURCE, Controls
from auto_voice.inference.effects import (
    OutputLevel,
    blocks_of,
    metered,
    moved,
    output_level,
    without_creak,
)
from auto_voice.inference.inputs import SampleSource, Section, Source, SourceFacts
from auto_voice.inference.rendering import Rendering, guidance, rehearse, timed
from auto_voice.inference.result import FileResult, Output
from auto_voice.inference.stages import Stages
from auto_voice.models.base import DRAWING, RevoicingConverter
from auto_voice.models.runtime.sessions import moves_noted, trim_heap
from auto_voice.progress import tell
from auto_voice.types import FloatArray, Pitch, Voice, Waveform
from auto_voice.voices.blending import blend_voices
from auto_voice.voices.cloning import build_voice

log = logging.getLogger(__name__)

# Seconds of the source that are searched for speech where its own voice is needed, and seconds of
# that speech that are used.
OWN_VOICE_SECONDS, OWN_SPEECH_SECONDS = 120.0, 15.0
# Seconds; longer recordings go through the disk, shorter ones take 20 MB of memory at most.
LONG_SECONDS = 300.0
_KEEPS_MORE = "the result is not led away from it and keeps more of it"


@dataclass(frozen=True, eq=False)
class ConversionSetup:
    """One conversion that is about to begin.

    Attributes:
        source: the recording.
        voice: the target.
        stages: the loaded models.
        chunk_seconds: longest piece that is rendered at once.
        models: stage to the exact ``name@version`` that runs, with the reason where it stands in
            for another.
        mock: whether any stage is a mock.
        timings: seconds by step; grows.
    """

    source: Source
    voice: Voice
    stages: Stages
    controls: Controls
    chunk_seconds: float
    models: Mapping[str, str]
    mock: bool = False
    timings: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A source that is ready to be rendered.

    Attributes:
        voice: the target, blended with the source's own where that was asked for.
        semitones: how far the pitch was moved in all.
        source_meter: of the source, where the result shall be as loud.
    """

    rendering: Rendering
    voice: Voice
    semitones: float
    notes: tuple[str, ...]
    source_meter: LoudnessMeter | None


@dataclass(frozen=True, eq=False)
class Rendered:
    """A result, complete but for its level.

    Attributes:
        samples: of the result, at the level of the networks.
        level: brings them to the level that they shall have.
        account: keyword arguments of :class:`~auto_voice.inference.result.Account`.
    """

    samples: SampleSource
    level: OutputLevel
    account: dict[str, Any]

    def blocks(self) -> Iterator[FloatArray]:
        """``(samples,)`` blocks of the result, ready to be heard or written."""
        return self.level.blocks(self.samples)


def run(conversion: ConversionSetup, workspace: Workspace) -> Rendered:
    """Convert into ``workspace``, from where an earlier run with it stopped.

    Raises:
        AudioError: the source cannot be used.
        ModelError: a model or the memory fails.
    """
    timings, stages = conversion.timings, conversion.stages
    with timed(timings, "read"):
        source = _read(conversion, workspace)
    assert workspace.facts is not None
    known = workspace.load_analysis()
    prepared = prepare(
        source,
        workspace.facts,
        conversion.voice,
        conversion.controls,
        stages,
        timings,
        known,
    )
    if prepared.rendering.analysis is not known:
        workspace.save_analysis(prepared.rendering.analysis)
    with moves_noted() as moves:
        samples, pieces = _render(conversion, prepared.rendering, workspace)
    analysis, controls = prepared.rendering.analysis, conversion.controls
    level = output_level(samples, analysis.gain, controls, prepared.source_meter)
    notes = (
        *(f"source: {note}" for note in workspace.facts.notes),
        *(note for note in [getattr(stages.content_encoder, "note", "")] if note),
        *conversion.voice.notes,
        *prepared.notes,
        *level.notes,
        *moves,
        *(f"{stage}: {text}" for stage, text in conversion.models.items() if _noteworthy(text)),
    )
    for note in notes:
        log.info(note)
    account = {
        "models": conversion.models,
        "voice": prepared.voice,
        "semitones": prepared.semitones,
        "notes": notes,
        "timings": timings,
        "mock": conversion.mock,
        "chunks": pieces,
        "controls": conversion.controls,
    }
    return Rendered(samples, level, account)


def _noteworthy(model: str) -> bool:
    """Whether another model than the wanted one, or another device, did the work of a stage."""
    return "fallback" in model or "on the CPU" in model


def _read(conversion: ConversionSetup, workspace: Workspace) -> SampleSource:
    """The source at the content encoder's rate; taken as it is where an earlier run read it."""
    rate = conversion.stages.content_encoder.sample_rate
    source = workspace.source(rate)
    if workspace.facts is None:
        workspace.make_room(conversion.source.seconds)
        for block in cleaned(conversion.source.blocks(rate), rate, conversion.controls):
            source.append(block)
        assert conversion.source.facts is not None
        workspace.source_is_complete(conversion.source.facts)
    return source


def _render(
    conversion: ConversionSetup, rendering: Rendering, workspace: Workspace
) -> tuple[SampleSource, int]:
    """The result, of which the pieces that are missing are rendered, and the count of pieces."""
    at = workspace.position
    if at is None:
        chunks = rendering.plan(conversion.chunk_seconds)
        edges = [chunks[0].start, *(chunk.stop for chunk in chunks)]
        at = Position(edges, 0, 0, 0, np.zeros(0, np.float32), rendering.content_mean())
        workspace.save_position(at)
    samples = workspace.result(rendering.vocoder.sample_rate, at.samples)
    joiner = Joiner(rendering.vocoder.hop_samples, rendering.samples, at.samples, at.pending)
    left = [at.frame, *(edge for edge in at.edges if edge > at.frame)]
    pieces = at.pieces
    for chunk, audio in rendering.render(rendering.between(left), at.mean):
        samples.append(joiner.push(chunk, audio))
        pieces += 1
        workspace.save_position(
            Position(at.edges, chunk.stop, joiner.done, pieces, joiner.pending, at.mean)
        )
        tell("convert", min(chunk.stop, rendering.frames), rendering.frames)
    return samples, pieces


def cleaned(
    blocks: Iterable[FloatArray], sample_rate: int, controls: Controls
) -> Iterator[FloatArray]:
    """The source's blocks as they shall be converted."""
    if controls.denoise_db == 0:
        yield from blocks
    else:
        yield from denoised(blocks, sample_rate, controls.denoise_db)


def prepare(
    recording: SampleSource,
    facts: SourceFacts,
    voice: Voice,
    controls: Controls,
    stages: Stages,
    timings: dict[str, float],
    known: Analysis | None = None,
) -> Prepared:
    """Everything that must be known before the first piece is rendered.

    Args:
        recording: the source at the content encoder's rate.
        facts: of the source as it was given.
        known: the analysis, where an earlier run made it.

    Raises:
        AudioContentError: no speech where the controls need some.
    """
    notes: list[str] = []
    length = resampled_length(facts.samples, facts.sample_rate, stages.vocoder.sample_rate)
    if controls.trim:
        recording, note = _trimmed(recording)
        length = resampled_length(len(recording), recording.sample_rate, stages.vocoder.sample_rate)
        notes.append(note)
    needed, cloning = controls.strength != 1, None
    trim_heap()  # Two steps at once come on top of what cloning and reading left free.
    # Neither step keeps all cores busy, so one runs beside the other.
    with ThreadPoolExecutor(1) as beside:
        if needed or guidance(stages.converter, voice, controls):
            head = recording.read(0, round(OWN_VOICE_SECONDS * recording.sample_rate))
            run_here = copy_context().run
            cloning = beside.submit(run_here, _own_voice, head, stages, voice, needed=needed)
        with timed(timings, "pitch"):
            fits = known is not None and known.samples == len(recording)
            analysis = known if known is not None and fits else analyse(recording)
        notes += background_notes(recording)
        own = None
        if cloning is not None:
            with timed(timings, "voice"):
                own, own_notes = cloning.result()
            notes += own_notes
    if own is not None and controls.strength < 1:
        voice = _between(own, voice, controls.strength)
    melody = analysis.pitch if controls.singing else analysis.melody
    pitch, semitones, pitch_notes = moved(melody, voice, controls)
    notes += pitch_notes
    source_meter = None
    if controls.loudness in (None, SOURCE):
        source_meter = metered(blocks_of(recording), recording.sample_rate, peaks=False)
    rendering = Rendering(
        content_encoder=stages.content_encoder,
        converter=stages.converter,
        vocoder=stages.vocoder,
        voice=_with_pitch(voice, pitch, controls),
        recording=recording,
        analysis=analysis,
        pitch=pitch,
        controls=controls,
        samples=length,
        timings=timings,
        own_voice=own,
    )
    return Prepared(rendering, voice, semitones, tuple(notes), source_meter)


def _trimmed(recording: SampleSource) -> tuple[SampleSource, str]:
    bounds = speech_bounds(recording)
    if bounds is None:
        raise AudioContentError("the source holds no speech to trim to; leave trimming out.")
    start, stop = bounds
    rate = recording.sample_rate
    note = (
        f"Trimmed: {start / rate:.2f} s before the first speech and "
        f"{(len(recording) - stop) / rate:.2f} s after the last were left out."
    )
    return Section(recording, start, stop), note


def _own_voice(
    head: FloatArray, stages: Stages, target: Voice, *, needed: bool
) -> tuple[Voice | None, list[str]]:
    """The voice that speaks in the first of the source, and a note where it cannot be had and need
    not be.

    Where it need not be, a converter that keeps something for two voices makes it ready.
    """
    assert stages.speaker_encoder is not None or not needed
    if stages.speaker_encoder is None:
        return None, [f"The speaker encoder cannot be had, so {_KEEPS_MORE}."]
    try:
        voice = build_voice(
            [("the source", Waveform(head, stages.content_encoder.sample_rate))],
            stages.speaker_encoder,
            stages.content_encoder,
            "the source",
            OWN_SPEECH_SECONDS,
        )
    except AudioContentError as error:
        if needed:
            raise AudioContentError(
                "The source holds too little speech to know its own voice, which a strength other "
                "than 1 needs; leave the strength at 1."
            ) from error
        return None, [
            f"The source holds too little speech to know its own voice, so {_KEEPS_MORE}."
        ]
    if not needed and isinstance(stages.converter, RevoicingConverter):
        rehearse(target, stages.content_encoder, stages.converter, voice)
    return voice, []


def _between(own: Voice, voice: Voice, strength: float) -> Voice:
    """Between the source's own voice and ``voice``."""
    blended = blend_voices([(voice, strength), (own, 1 - strength)], name=voice.name)
    return replace(blended, notes=voice.notes)


def _with_pitch(voice: Voice, pitch: Pitch, controls: Controls) -> Voice:
    """``voice`` with the pitch it will speak at, where it has none of its own.

    A converter would otherwise take the mean of each piece of the source, and pieces would differ.
    """
    if voice.log_f0_mean is not None:
        return voice
    statistics = log_f0_statistics(without_creak(pitch, controls))
    if statistics is None:
        return voice
    return replace(voice, log_f0_mean=statistics[0], log_f0_std=statistics[1])


def convert_into(conversion: ConversionSetup, output: Output) -> FileResult:
    """Write the result of ``conversion`` to ``output``.

    Raises:
        AutoVoiceError: the source cannot be used, or another process is at work on the same
            output, or there is too little room on the disk.
    """
    with _workspace(conversion, output.path) as workspace:
        resumed = workspace.position is not None
        rendered = run(conversion, workspace)
        rate = rendered.samples.sample_rate
        notes = output.write(rendered.blocks(), rate)
        workspace.finish()
    account = rendered.account
    account["notes"] = (*account["notes"], *notes)
    return FileResult(
        output=output.path,
        file_rate=output.file_rate(rate),
        length=len(rendered.samples),
        sample_rate=rate,
        resumed=resumed,
        **account,
    )


def _workspace(conversion: ConversionSetup, output: Path) -> Workspace:
    """Memory for a source that is decoded already, else a checkpoint beside the output."""
    if conversion.source.in_memory:
        return Workspace()
    stages = conversion.stages
    converter = stages.converter
    # Without a speaker encoder the source's own voice is not known, and nothing leads away.
    share = guidance(converter, conversion.voice, conversion.controls)
    share *= stages.speaker_encoder is not None
    key = fingerprint(
        conversion.source.identity(output.parent),
        conversion.voice,
        conversion.controls,
        conversion.models,
        conversion.chunk_seconds,
        (share, *(getattr(converter, what, 0.0) for what in DRAWING)),
    )
    return Checkpoint(output, key)
