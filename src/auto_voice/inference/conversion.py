"""The steps that every conversion shares, whether its source lies in memory or on disk."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from auto_voice.audio.loudness import CEILING_DBTP, LIMITER_REACH_SAMPLES, limited
from auto_voice.audio.meter import LoudnessMeter, speech_loudness
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
from auto_voice.inference.controls import SOURCE, Controls
from auto_voice.inference.melody import moved, without_creak
from auto_voice.inference.rendering import Rendering, timed
from auto_voice.inference.sample_source import Section, Tape
from auto_voice.models.base import ContentEncoder, Converter, SpeakerEncoderStage, Vocoder
from auto_voice.types import FloatArray, Pitch, Voice, Waveform
from auto_voice.voices.blending import blend_voices
from auto_voice.voices.cloning import build_voice

# Seconds that are measured at once, and samples that are scaled at once.
METER_SECONDS = 20.0
LEVEL_SAMPLES = 1 << 19
# dB by which peaks are turned down where the loudness needs it: more is heard as distortion.
MOST_LIMITING_DB = 6.0
# A limiter takes loudness, which is given back in so many rounds, or until less than the first of
# these LU is missing; more than the second is worth a note.
LIMITING_ROUNDS = 4
NEAR_LU, FAR_LU = 0.1, 0.5
# Of the source that are searched for speech where its own voice is needed, and of that speech.
OWN_VOICE_SECONDS, OWN_SPEECH_SECONDS = 120.0, 30.0


@dataclass(frozen=True)
class Stages:
    """The models of one conversion."""

    content_encoder: ContentEncoder
    converter: Converter
    vocoder: Vocoder
    speaker_encoder: SpeakerEncoderStage | None = None


@dataclass(frozen=True, eq=False)
class Job:
    """A conversion that is ready to be rendered.

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


@dataclass(frozen=True)
class OutputLevel:
    """What brings rendered samples to the level that they shall have.

    Attributes:
        factor: that they are multiplied with.
        limiting: whether peaks are then turned down to the ceiling.
        notes: what there is to say about it.
    """

    factor: float
    limiting: bool = False
    notes: tuple[str, ...] = ()

    def blocks(self, tape: Tape) -> Iterator[FloatArray]:
        """``(samples,)`` blocks of ``tape``, finished."""
        reach = LIMITER_REACH_SAMPLES if self.limiting else 0
        for start in range(0, len(tape), LEVEL_SAMPLES):
            low = max(0, start - reach)
            block = tape.read(low, start + LEVEL_SAMPLES + reach) * np.float32(self.factor)
            if self.limiting:
                block = limited(block, tape.sample_rate, low)
            yield block[start - low : start - low + LEVEL_SAMPLES]


def cleaned(
    blocks: Iterable[FloatArray], sample_rate: int, controls: Controls
) -> Iterator[FloatArray]:
    """The source's blocks as they shall be converted."""
    if controls.denoise_db == 0:
        yield from blocks
    else:
        yield from denoised(blocks, sample_rate, controls.denoise_db)


def prepare(
    tape: Tape,
    source_length: tuple[int, int],
    voice: Voice,
    controls: Controls,
    stages: Stages,
    timings: dict[str, float],
    known: Analysis | None = None,
) -> Job:
    """Everything that must be known before the first piece is rendered.

    Args:
        tape: the source at the content encoder's rate.
        source_length: samples and rate of the source as it was given.
        known: the analysis, where an earlier run made it.

    Raises:
        AudioContentError: no speech where the controls need some.
    """
    notes: list[str] = []
    length = resampled_length(*source_length, stages.vocoder.sample_rate)
    if controls.trim:
        tape, note = _trimmed(tape)
        length = resampled_length(len(tape), tape.sample_rate, stages.vocoder.sample_rate)
        notes.append(note)
    with timed(timings, "pitch"):
        analysis = known or analyse(tape)
    notes += background_notes(tape)
    if controls.strength < 1:
        with timed(timings, "voice"):
            voice = _towards(voice, tape, controls.strength, stages)
    melody = analysis.pitch if controls.singing else analysis.melody
    pitch, semitones, pitch_notes = moved(melody, voice, controls)
    notes += pitch_notes
    source_meter = None
    if controls.loudness in (None, SOURCE):
        source_meter = metered(_blocks(tape), tape.sample_rate, peaks=False)
    rendering = Rendering(
        content_encoder=stages.content_encoder,
        converter=stages.converter,
        vocoder=stages.vocoder,
        voice=_with_pitch(voice, pitch, controls),
        tape=tape,
        analysis=analysis,
        pitch=pitch,
        controls=controls,
        samples=length,
        timings=timings,
    )
    return Job(rendering, voice, semitones, tuple(notes), source_meter)


def metered(blocks: Iterable[FloatArray], sample_rate: int, peaks: bool = True) -> LoudnessMeter:
    """Loudness and peaks of the joined ``blocks``."""
    meter = LoudnessMeter(sample_rate, peaks)
    for block in blocks:
        meter.add(block)
    return meter


def output_level(tape: Tape, job: Job) -> OutputLevel:
    """What brings ``tape``, the rendered samples at the networks' level, to its loudness.

    It is that of the source's speech, over the same time, or what the controls say. Peaks above
    the ceiling are turned down by some decibels; where that does not suffice, the whole is.
    """
    rate = tape.sample_rate
    meter = metered(_blocks(tape), rate)
    wanted, found = _loudness(meter, job)
    if not (math.isfinite(wanted) and math.isfinite(found)):
        note = "The loudness was not matched: the recording is too quiet to have one."
        return OutputLevel(1 / job.rendering.analysis.gain, notes=(note,))
    room = CEILING_DBTP - meter.true_peak_db
    gain = wanted - found
    if gain <= room:
        return OutputLevel(10 ** (gain / 20))
    for _ in range(LIMITING_ROUNDS):
        gain = min(gain, room + MOST_LIMITING_DB)
        level = OutputLevel(10 ** (gain / 20), limiting=True)
        short = wanted - _loudness(metered(level.blocks(tape), rate, peaks=False), job)[1]
        if short < NEAR_LU or gain >= room + MOST_LIMITING_DB:
            break
        gain += short
    notes = [
        f"Peaks were turned down by up to {gain - room:.1f} dB, so that the rest has its loudness "
        f"and they stay below {CEILING_DBTP:g} dBTP."
    ]
    if short > FAR_LU:
        goal = "the source" if job.source_meter else f"{wanted:.1f} LUFS"
        notes.append(
            f"The result is {short:.1f} dB quieter than {goal}, because its peaks leave no room."
        )
    return replace(level, notes=tuple(notes))


def _loudness(meter: LoudnessMeter, job: Job) -> tuple[float, float]:
    """LUFS that the result shall have, and that it has."""
    if job.source_meter is not None:
        return speech_loudness(job.source_meter, meter)
    assert job.rendering.controls.loudness is not None
    return float(job.rendering.controls.loudness), meter.loudness_lufs


def _blocks(tape: Tape) -> Iterator[FloatArray]:
    size = round(METER_SECONDS * tape.sample_rate)
    for start in range(0, len(tape), size):
        yield tape.read(start, start + size)


def _trimmed(tape: Tape) -> tuple[Tape, str]:
    bounds = speech_bounds(tape)
    if bounds is None:
        raise AudioContentError("the source holds no speech to trim to; leave trimming out.")
    start, stop = bounds
    rate = tape.sample_rate
    note = (
        f"Trimmed: {start / rate:.2f} s before the first speech and "
        f"{(len(tape) - stop) / rate:.2f} s after the last were left out."
    )
    return Section(tape, start, stop), note


def _towards(voice: Voice, tape: Tape, strength: float, stages: Stages) -> Voice:
    """Between the source's own voice and ``voice``."""
    assert stages.speaker_encoder is not None
    head = tape.read(0, round(OWN_VOICE_SECONDS * tape.sample_rate))
    own = build_voice(
        [("the source", Waveform(head, tape.sample_rate))],
        stages.speaker_encoder,
        stages.content_encoder,
        "the source",
        OWN_SPEECH_SECONDS,
    )
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
