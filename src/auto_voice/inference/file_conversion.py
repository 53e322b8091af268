"""From file to file: hours in the memory of half a minute, and resumable.

What is long lies on disk beside the output, in a folder ``<output>.partial``: the source as raw
samples at the content encoder's rate, the result as far as it is, and a line of state that is
replaced after each piece. An interrupted conversion goes on from its last piece when the same
command runs again; the output itself appears only when it is complete.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from auto_voice.audio.encoding import choose_encoding, ensure_writable
from auto_voice.audio.io import AudioWriter, probe
from auto_voice.audio.reading import SILENCE_PEAK, RecordingReader, dbfs
from auto_voice.errors import AudioContentError, AudioOutputError, AutoVoiceError, MockAudioError
from auto_voice.inference.checkpoint import Partial, Progress, fingerprint
from auto_voice.inference.chunking import Joiner
from auto_voice.inference.controls import Controls
from auto_voice.inference.conversion import Job, cleaned, output_level, prepare
from auto_voice.inference.inputs import SHORTEST_SECONDS
from auto_voice.inference.rendering import timed
from auto_voice.inference.result import Account, FileResult
from auto_voice.inference.sample_source import FileTape

if TYPE_CHECKING:
    from auto_voice.inference.voice_conversion_pipeline import Target, VoiceConversionPipeline

log = logging.getLogger(__name__)

# Longer recordings go through the disk.
LONG_SECONDS = 300.0
BLOCK_FRAMES = 1 << 16
# Of the partial, for each second of the source.
BYTES_PER_SECOND = 4 * (16000 + 22050) + 8000


def convert_to_file(
    pipeline: VoiceConversionPipeline,
    source: Path,
    target: Target,
    output: Path,
    *,
    controls: Controls | None = None,
    format: str | None = None,
    subtype: str | None = None,
    sample_rate: int | None = None,
    overwrite: bool = True,
    allow_mock: bool = False,
    progress: Callable[[float], None] | None = None,
) -> Account:
    """``source`` into ``output``, through memory where it is short and through the disk where not.

    Args:
        format, subtype, sample_rate: of the output file, see ``write_audio``.
    """
    output = _ensure_output(source, target, output, overwrite)
    seconds = probe(source).seconds
    if seconds is not None and seconds <= LONG_SECONDS:
        result = pipeline.convert(source, target, controls=controls, progress=progress)
        result.save(
            output,
            format=format,
            subtype=subtype,
            sample_rate=sample_rate,
            overwrite=overwrite,
            allow_mock=allow_mock,
        )
        return result
    return convert_file(
        pipeline,
        source,
        target,
        output,
        controls=controls,
        format=format,
        subtype=subtype,
        sample_rate=sample_rate,
        overwrite=overwrite,
        allow_mock=allow_mock,
        progress=progress,
    )


def convert_file(
    pipeline: VoiceConversionPipeline,
    source: Path,
    target: Target,
    output: Path,
    *,
    controls: Controls | None = None,
    format: str | None = None,
    subtype: str | None = None,
    sample_rate: int | None = None,
    overwrite: bool = True,
    allow_mock: bool = False,
    progress: Callable[[float], None] | None = None,
) -> FileResult:
    """``source`` re-spoken into ``output``, in constant memory however long it is.

    Args:
        controls: see :class:`Controls`.
        allow_mock: write what mock models make.
        progress: called with the fraction done.

    Raises:
        AutoVoiceError: as ``VoiceConversionPipeline.convert`` and ``write_audio``; another process
            is at work on the same output; too little room on the disk.
    """
    controls = controls or Controls()
    output = _ensure_output(source, target, output, overwrite)
    choose_encoding(output, format, subtype)
    timings: dict[str, float] = {}
    with timed(timings, "load"):
        stages = pipeline.stages(controls)
    with timed(timings, "voice"):
        voice = pipeline.voice(target)
    about = pipeline.account((), voice, ())
    if about["mock"] and not allow_mock:
        raise MockAudioError(
            f"{output} was not written because mock models would make noise and not speech; use "
            "real models, or ask for mock audio (--mock, allow_mock=True)."
        )
    key = fingerprint(source, voice, controls, about["models"], pipeline.config.chunk_seconds)
    with _disk_errors(output), Partial(output, key) as partial:
        with timed(timings, "read"):
            rate, truncated = stages.content_encoder.sample_rate, pipeline.config.allow_truncated
            tape = _taped(source, partial, rate, controls, truncated)
        given = (partial.facts.source_samples, partial.facts.source_rate)
        known = partial.load_analysis()
        job = prepare(tape, given, voice, controls, stages, timings, known)
        if known is None:
            partial.save_analysis(job.rendering.analysis)
        resumed = partial.progress is not None
        pieces = _render(job, partial, pipeline.config.chunk_seconds, progress)
        level = output_level(partial.result, job)
        with AudioWriter(
            output,
            stages.vocoder.sample_rate,
            format=format,
            subtype=subtype,
            output_rate=sample_rate,
            overwrite=overwrite,
        ) as writer:
            for block in level.blocks(partial.result):
                writer.write(block)
        notes = (*job.notes, *level.notes, *writer.notes)
        result = FileResult(
            output=output,
            length=job.rendering.samples,
            sample_rate=stages.vocoder.sample_rate,
            voice=job.voice,
            semitones=job.semitones,
            timings=timings,
            chunks=pieces,
            controls=controls,
            resumed=resumed,
            **pipeline.account(partial.facts.notes, voice, notes),
        )
        partial.remove()
    return result


def _ensure_output(source: Path, target: Target, output: Path, overwrite: bool) -> Path:
    inputs = target if isinstance(target, (list, tuple)) else [target]
    return ensure_writable(output, [source, *inputs], overwrite=overwrite)


def _taped(
    source: Path, partial: Partial, rate: int, controls: Controls, allow_truncated: bool
) -> FileTape:
    """The source at ``rate`` on disk; taken as it is where an earlier run finished it."""
    tape = partial.source_tape(rate)
    if partial.facts.complete:
        return tape
    with RecordingReader(source, allow_truncated=allow_truncated) as recording:
        seconds = None if recording.frames is None else recording.frames / recording.sample_rate
        _ensure_room(partial.folder, seconds)
        tape.truncate(0)
        blocks = recording.blocks(BLOCK_FRAMES, rate, None)
        for block in cleaned(blocks, rate, controls):
            tape.append(block)
        if recording.peak < SILENCE_PEAK:
            partial.remove()
            raise AudioContentError(
                f"{source} holds only silence (peak {dbfs(recording.peak)}); check the microphone "
                "or choose another recording."
            )
        frames = recording.frames_read
        if frames < SHORTEST_SECONDS * recording.sample_rate:
            partial.remove()
            raise AudioContentError(
                f"the source {source} holds {frames / recording.sample_rate:.3f} s of audio; at "
                f"least {SHORTEST_SECONDS} s are needed."
            )
        partial.source_is_complete(frames, recording.sample_rate, recording.notes())
    return tape


def _render(
    job: Job,
    partial: Partial,
    chunk_seconds: float,
    report: Callable[[float], None] | None,
) -> int:
    """Render what is missing into ``partial``; the number of pieces in all."""
    rendering = job.rendering
    done = partial.progress
    if done is None:
        chunks = rendering.plan(chunk_seconds)
        mean = rendering.content_mean()
        edges = [chunks[0].start, *(chunk.stop for chunk in chunks)]
        done = Progress(edges, 0, 0, 0, np.zeros(0, np.float32), mean)
        partial.save_progress(done)
    hop = rendering.vocoder.hop_samples
    result = partial.result_tape(rendering.vocoder.sample_rate, done.samples)
    joiner = Joiner(hop, rendering.samples, done.samples, done.pending)
    left = [done.frame, *(edge for edge in done.edges if edge > done.frame)]
    pieces = done.pieces
    for chunk, audio in rendering.render(rendering.between(left), done.mean):
        result.append(joiner.push(chunk, audio))
        pieces += 1
        partial.save_progress(
            Progress(done.edges, chunk.stop, joiner.done, pieces, joiner.pending, done.mean)
        )
        if report is not None:
            report(min(1.0, chunk.stop / rendering.frames))
    return pieces


@contextmanager
def _disk_errors(output: Path) -> Iterator[None]:
    try:
        yield
    except AutoVoiceError:
        raise
    except OSError as error:
        raise AudioOutputError(
            f"{output} cannot be written ({error.strerror or error}); what is done is kept where "
            "there was room for it, and the same command goes on from there."
        ) from error


def _ensure_room(folder: Path, seconds: float | None) -> None:
    needed = BYTES_PER_SECOND * (seconds or 0.0)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise AudioOutputError(
            f"converting {seconds or 0:.0f} s of audio needs {needed / 1e6:.0f} MB beside the "
            f"output, and {folder.parent} has {free / 1e6:.0f} MB; write to another disk."
        )
