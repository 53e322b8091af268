"""The steps that every conversion shares, whether its source lies in memory or on disk."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from auto_voice.audio.loudness import CEILING_DBTP
from auto_voice.audio.meter import LoudnessMeter
from auto_voice.audio.pitch import log_f0_statistics
from auto_voice.audio.resample import resampled_length
from auto_voice.errors import AudioContentError
from auto_voice.inference.analysis import Analysis, analyse, denoised, speech_bounds
from auto_voice.inference.controls import SOURCE, Controls
from auto_voice.inference.melody import moved, without_creak
from auto_voice.inference.rendering import Rendering, timed
from auto_voice.inference.sample_source import Section, Tape
from auto_voice.models.base import ContentEncoder, Converter, SpeakerEncoderStage, Vocoder
from auto_voice.types import FloatArray, Pitch, Voice, Waveform
from auto_voice.voices.blending import blend_voices
from auto_voice.voices.cloning import build_voice

CEILING = 0.99
METER_SECONDS = 20.0
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
        source_lufs: loudness of the source, where the result shall have it.
    """

    rendering: Rendering
    voice: Voice
    semitones: float
    notes: tuple[str, ...]
    source_lufs: float | None


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
    if controls.strength < 1:
        with timed(timings, "voice"):
            voice = _towards(voice, tape, controls.strength, stages)
    melody = analysis.pitch if controls.singing else analysis.melody
    pitch, semitones, pitch_notes = moved(melody, voice, controls)
    notes += pitch_notes
    lufs = None
    if controls.loudness == SOURCE:
        lufs = metered(tape).loudness_lufs
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
    return Job(rendering, voice, semitones, tuple(notes), lufs)


def metered(tape: Tape) -> LoudnessMeter:
    """Loudness and peaks of ``tape``."""
    meter = LoudnessMeter(tape.sample_rate)
    size = round(METER_SECONDS * tape.sample_rate)
    for start in range(0, len(tape), size):
        meter.add(tape.read(start, start + size))
    return meter


def output_factor(meter: LoudnessMeter, job: Job) -> tuple[float, list[str]]:
    """What the rendered samples are multiplied with, and what there is to say about it.

    Args:
        meter: of the rendered samples, which are at the networks' level.
    """
    controls = job.rendering.controls
    wanted = job.source_lufs if controls.loudness == SOURCE else controls.loudness
    if wanted is None:
        factor = 1 / job.rendering.analysis.gain
        ceiling, unit, peak = 20 * math.log10(CEILING), "dB", 20 * math.log10(meter.peak or 1e-9)
    else:
        loudness = meter.loudness_lufs
        if not (math.isfinite(loudness) and math.isfinite(float(wanted))):
            note = "The loudness was not matched: the recording is too quiet to have one."
            return 1 / job.rendering.analysis.gain, [note]
        factor = 10 ** ((float(wanted) - loudness) / 20)
        ceiling, unit, peak = CEILING_DBTP, "dBTP", meter.true_peak_db
    above = peak + 20 * math.log10(factor) - ceiling
    if above <= 0:
        return factor, []
    note = f"The result was turned down by {above:.1f} dB so as not to clip."
    if wanted is not None:
        note = (
            f"The result is {above:.1f} dB quieter than {float(wanted):.1f} LUFS, so that peaks "
            f"stay below {ceiling:g} {unit}."
        )
    return factor * 10 ** (-above / 20), [note]


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
