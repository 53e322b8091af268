"""What the controls change on the way from the source to the result: melody, shape, breath, level.

*Melody*: the pitch is moved to the voice, widened or narrowed. *Shape*: resonances move, pauses
keep the source's own spectrum, and the loudness contour follows the source's. *Breath*: how noisy a
voiced sound is shows in how little one period is like the next. That share of noise is measured in
the source and in the result, and what the result lacks is made by scattering the phases of its
upper spectrum: the envelope stays, the harmonics lose energy to the noise between them. *Level*:
the result is as loud as the source or as asked for, with its peaks below a ceiling.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from auto_voice.audio.loudness import (
    CEILING_DBTP,
    LIMITER_REACH_SAMPLES,
    LoudnessMeter,
    limited,
    speech_loudness,
    without_rumble,
)
from auto_voice.audio.mel import HIFIGAN_MEL, log_mel, mel_filters
from auto_voice.audio.pitch import (
    F_MAX_HZ,
    F_MIN_HZ,
    OCTAVE,
    align_pitch,
    corrected,
    log_f0_statistics,
)
from auto_voice.audio.resample import resample
from auto_voice.inference.controls import VOICE, Controls
from auto_voice.inference.inputs import SampleSource
from auto_voice.types import FloatArray, Mel, Pitch, Voice

# Frames that are interpolated at once.
FILLED_AT_ONCE = 100_000
# Semitones between source and voice from which on a note says that it may sound wrong.
FAR_SEMITONES = 20.0
# Of ln(F0): a narrower melody is a monotone, whose width says nothing.
LEAST_SPREAD = 0.02
# Share of the voiced frames beyond the pitch range that is worth a note.
BEYOND_SHARE = 0.05
# Mel frames of the window over which a level is taken: half as wide in effect, 52 ms, so that
# syllables count and the beat of single periods does not.
CONTOUR_FRAMES = 9
# dB by which a frame is turned up or down at most: a phrase far from the microphone is up to 40 dB
# softer, and a converter speaks breaths and the ends of words up to 20 dB too softly.
MOST_DOWN_DB, MOST_UP_DB = 60.0, 24.0
MOST_UP_IN_PAUSES_DB = 3.0
# Of a frame's power that counts as speech at least, however loud the noise around it is: -4.6 dB,
# so that the result stays near the source's noise between the words, too.
LEAST_SPEECH_SHARE = 0.35
# Times that the level is measured and corrected: where it changes fast, one gain is not enough.
LEVEL_ROUNDS = 2
# Power that counts as silence, -130 dBFS at the level of the networks.
SILENCE_POWER = 1e-13
# Hz; below it the voice drowns its breath.
BREATH_HZ = 1500.0
# Samples of a frame of the short-time spectrum in which phases are scattered.
BREATH_FRAME = 1024
# Hz over which its envelope is smoothed, so that harmonics leave no trace.
SMOOTH_HZ = 400.0
# Periods that are compared with those after them.
PERIODS = 3
# Seconds that are measured at once, and samples that are scaled at once.
METER_SECONDS = 20.0
LEVEL_SAMPLES = 1 << 19
# dB by which peaks are turned down where the loudness needs it: more is heard as distortion.
MOST_LIMITING_DB = 6.0
# A limiter takes loudness, which is given back in so many rounds, or until less than the first of
# these LU is missing; more than the second is worth a note.
LIMITING_ROUNDS = 4
NEAR_LU, FAR_LU = 0.1, 0.5


def moved(
    pitch: Pitch,
    voice: Voice,
    controls: Controls,
    statistics: tuple[float, float] | None = None,
) -> tuple[Pitch, float, list[str]]:
    """The melody that is to be spoken, by how many semitones its mean moved, and what to say of it.

    Mean and spread are those of the voice without its creak, and leave out frames far from the
    median, so a creaky recording is moved as far as one that is not.

    Args:
        statistics: mean and spread of ln(F0) of who speaks, where ``pitch`` is too short to tell.
    """
    level = without_creak(pitch, controls)
    statistics = statistics or log_f0_statistics(level)
    if statistics is None:
        wanted = voice.log_f0_mean is not None and controls.match_pitch
        notes = ["No pitch was found in the source, so none was moved."] if wanted else []
        return pitch, controls.semitones, notes
    mean, spread = statistics
    automatic = 0.0
    notes = []
    if controls.match_pitch and voice.log_f0_mean is not None:
        automatic = 12.0 * (voice.log_f0_mean - mean) / OCTAVE
        if controls.singing:
            automatic = 12.0 * round(automatic / 12.0)
        elif abs(automatic) > FAR_SEMITONES:
            notes.append(
                f"The voices lie {abs(automatic):.0f} semitones apart; if that sounds wrong, keep "
                "the pitch or set semitones yourself."
            )
    factor = _range_factor(controls, voice, spread)
    semitones = automatic + controls.semitones
    log_f0, plain = (
        np.log(np.maximum(track.f0_hz.astype(np.float64), 1e-3)) for track in (pitch, level)
    )
    # A creak lies an octave below the voice however wide that ranges, but not in a monotone.
    leaps = log_f0 - plain if factor else 0.0
    out = np.exp(mean + factor * (plain - mean) + leaps + semitones * OCTAVE / 12)
    notes += _beyond(out[pitch.voiced])
    return Pitch(out.astype(np.float32), pitch.voiced, pitch.frame_rate), semitones, notes


def _beyond(f0_hz: NDArray[np.float64]) -> list[str]:
    """What there is to say of a melody, ``(voiced,)``, that leaves the range of voices."""
    notes = []
    for share, where in (
        (np.mean(f0_hz > F_MAX_HZ), f"above {F_MAX_HZ:.0f} Hz"),
        (np.mean(f0_hz < F_MIN_HZ), f"below {F_MIN_HZ:.0f} Hz"),
    ):
        if share > BEYOND_SHARE:
            notes.append(
                f"{100 * share:.0f} % of the melody lie {where}, beyond the range of the models, "
                "and will not come out at their pitch; transpose less."
            )
    return notes


def without_creak(pitch: Pitch, controls: Controls) -> Pitch:
    """The track whose mean and spread are a voice's own; a song's leaps are a part of it."""
    return pitch if controls.singing else corrected(pitch)


def _range_factor(controls: Controls, voice: Voice, spread: float) -> float:
    if controls.pitch_range != VOICE:
        return float(controls.pitch_range)
    if voice.log_f0_std is None:
        return 1.0
    return float(np.clip(voice.log_f0_std / max(spread, LEAST_SPREAD), 0.25, 4.0))


def cut(pitch: Pitch, log_f0: FloatArray | None, start: int, stop: int) -> Pitch:
    """Frames ``[start, stop)`` that interpolate over unvoiced frames as the whole does.

    Args:
        log_f0: of the whole, from :func:`filled`; None if nothing is voiced.
    """
    f0, voiced = pitch.f0_hz[start:stop].copy(), pitch.voiced[start:stop].copy()
    if log_f0 is not None and len(voiced):
        # A cut inside an unvoiced stretch would have only one neighbour to hold on to. It lies
        # deep in the context, so that it counts as voiced is heard nowhere.
        inner = [0] if start > 0 else []
        inner += [-1] if stop < len(pitch.voiced) else []
        for edge in inner:
            f0[edge] = f0[edge] if voiced[edge] else np.exp(log_f0[start:stop][edge])
            voiced[edge] = True
    return Pitch(f0, voiced, pitch.frame_rate)


def filled(pitch: Pitch) -> FloatArray | None:
    """``(frames,)`` ln(Hz), linear over unvoiced stretches and held at the ends."""
    known = np.flatnonzero(pitch.voiced)
    if len(known) == 0:
        return None
    log_f0 = np.log(pitch.f0_hz[known])
    out = np.empty(len(pitch.voiced), np.float32)
    for start in range(0, len(out), FILLED_AT_ONCE):
        frames = np.arange(start, min(start + FILLED_AT_ONCE, len(out)))
        out[frames] = np.interp(frames, known, log_f0)
    return out


def warp_formants(mel: Mel, ratio: float) -> Mel:
    """Everything in the spectrum ``ratio`` times as high: formants and harmonics alike.

    The converter was given a melody that is lower by as much, so the pitch comes out where it
    should and only the resonances have moved, as in a shorter or longer vocal tract.
    """
    if ratio == 1.0:
        return mel
    centres = band_centres()
    wanted = centres / ratio
    rows = np.interp(wanted, centres, np.arange(len(centres)))
    below = np.floor(rows).astype(np.int64)
    above = np.minimum(below + 1, len(centres) - 1)
    share = (rows - below)[:, None].astype(np.float32)
    values = mel.values[below] * (1 - share) + mel.values[above] * share
    beyond = wanted > centres[-1]
    values[beyond] = np.minimum(values[beyond], np.log(HIFIGAN_MEL.log_floor or 1e-5) / 2)
    return Mel(values.astype(np.float32), mel.sample_rate, mel.hop_samples)


@lru_cache(maxsize=1)
def band_centres() -> NDArray[np.float64]:
    """Centre of each HiFi-GAN mel band, Hz."""
    bank = mel_filters(HIFIGAN_MEL).astype(np.float64)
    hz = np.linspace(0, HIFIGAN_MEL.sample_rate / 2, bank.shape[1])
    return np.asarray((bank @ hz) / bank.sum(axis=1))


@dataclass(frozen=True, eq=False)
class SourceShape:
    """What a result takes from its source besides words and melody, in mel frames.

    Attributes:
        mel: ``(80, frames)`` log mel of the source itself.
        level_db: ``(frames,)``, see :func:`frame_levels`.
        speech_db: ``(frames,)`` the same of the speech alone, without the noise it stands in.
        pause: ``(frames,)`` 0 in speech to 1 in pauses, see
            :func:`auto_voice.inference.analysis.pauses`.
    """

    mel: FloatArray
    level_db: FloatArray
    speech_db: FloatArray
    pause: FloatArray

    def part(self, start: int, stop: int) -> SourceShape:
        """Frames ``[start, stop)``."""
        part = slice(start, stop)
        return SourceShape(
            self.mel[:, part], self.level_db[part], self.speech_db[part], self.pause[part]
        )


def source_shape(
    speech: FloatArray, sample_rate: int, pause: FloatArray, noise: FloatArray
) -> SourceShape:
    """The shape of ``speech``, ``(samples,)`` at the networks' level.

    Args:
        pause: ``(frames,)`` of the mel frames, the first of which ``speech`` starts with.
        noise: ``(frames,)`` power of the noise that the speech stands in.
    """
    frames = len(pause)
    at_rate = resample(speech, sample_rate, HIFIGAN_MEL.sample_rate)
    own = log_mel(at_rate, HIFIGAN_MEL)
    own = np.pad(own, ((0, 0), (0, max(0, frames - own.shape[1]))), mode="edge")[:, :frames]
    plain = without_rumble(at_rate, HIFIGAN_MEL.sample_rate)
    level_db = frame_levels(plain, HIFIGAN_MEL.hop_samples, frames)
    power = 10 ** (level_db / 10)
    speech_db = 10 * np.log10(np.maximum(power - noise, LEAST_SPEECH_SHARE * power))
    return SourceShape(own, level_db, speech_db.astype(np.float32), pause)


def fill_pauses(mel: Mel, source: SourceShape) -> Mel:
    """``mel`` with the source's own spectrum where nobody speaks.

    A converter has nothing to say in a pause. What it draws there may be loud below 40 Hz, and it
    is the same from frame to frame, which a vocoder makes a hum at the frame rate of; the room
    noise of the source is neither. A frame that is taken for a pause and holds the end of a word
    or a breath keeps it, too soft for anyone to tell whose it is.
    """
    values = mel.values * (1 - source.pause) + source.mel * source.pause
    return Mel(values.astype(np.float32), mel.sample_rate, mel.hop_samples)


def follow_level(
    samples: FloatArray, hop_samples: int, source: SourceShape, amount: float
) -> FloatArray:
    """``(frames * hop_samples,)`` made as loud as the source in every frame.

    In speech that is as loud as the source's speech is without its noise, which a converter leaves
    out: a soft syllable that the noise covers is not turned up to the noise.

    Args:
        samples: without rumble.
        amount: share of the source's contour that is taken in speech: 0 leaves it as it is spoken.
            In pauses the result is always as quiet as the source.
    """
    frames = len(source.pause)
    if frames == 0:
        return samples
    made_db = frame_levels(samples, hop_samples, frames)
    speech = amount * np.clip(source.speech_db - made_db, -MOST_DOWN_DB, MOST_UP_DB)
    pause = np.clip(source.level_db - made_db, -MOST_DOWN_DB, MOST_UP_IN_PAUSES_DB)
    wanted_db = made_db + speech * (1 - source.pause) + pause * source.pause
    at = (np.arange(len(samples)) + 0.5) / hop_samples - 0.5
    followed: FloatArray = samples
    for _ in range(LEVEL_ROUNDS):
        gain_db = wanted_db - frame_levels(followed, hop_samples, frames)
        gain = 10 ** (np.interp(at, np.arange(frames), gain_db) / 20)
        followed = (followed * gain).astype(np.float32)
    return followed


def frame_levels(samples: FloatArray, hop_samples: int, frames: int) -> FloatArray:
    """``(frames,)`` power in dB, smoothed; frame ``i`` is centred at ``(i + 0.5) * hop_samples``.

    What is missing at the end counts as silence.
    """
    if frames == 0:
        return np.zeros(0, np.float32)
    held = samples[: frames * hop_samples]
    held = np.pad(held, (0, frames * hop_samples - len(held)))
    power = np.square(held, dtype=np.float64).reshape(frames, hop_samples).mean(axis=1)
    window = np.hanning(CONTOUR_FRAMES + 2)[1:-1]
    # At an end the window holds fewer frames and weighs those alone.
    smooth, weight = (_smoothed(values, window) for values in (power, np.ones(frames)))
    return np.asarray(10 * np.log10(smooth / weight + SILENCE_POWER), np.float32)


def _smoothed(values: NDArray[np.float64], window: NDArray[np.float64]) -> NDArray[np.float64]:
    reach = len(window) // 2
    return np.convolve(values, window)[reach : reach + len(values)]


def aperiodicity(samples: FloatArray, sample_rate: int, pitch: Pitch, frame_rate: float,
                 frames: int) -> FloatArray:  # fmt: skip
    """``(frames,)`` share of noise, 0 to 1, in the sound above 1.5 kHz; 0 where unvoiced.

    One less the highest normalised correlation at a lag near the period.
    """
    log_f0, voiced = align_pitch(pitch, frame_rate, frames)
    high = _high_passed(np.asarray(samples, np.float32), sample_rate)
    out = np.zeros(frames, np.float32)
    for frame in np.flatnonzero(voiced):
        period = sample_rate / float(np.exp(log_f0[frame]))
        lags = np.arange(int(0.94 * period), int(np.ceil(1.06 * period)) + 1)
        length = int(PERIODS * period)
        start = int((frame + 0.5) / frame_rate * sample_rate - (length + lags[-1]) / 2)
        if start < 0 or start + length + lags[-1] > len(high):
            continue
        here = high[start : start + length]
        later = np.lib.stride_tricks.sliding_window_view(
            high[start + lags[0] : start + lags[-1] + length], length
        )
        power = float(here @ here) * np.einsum("ij,ij->i", later, later)
        similarity = float(np.max(later @ here / np.sqrt(power + 1e-20)))
        out[frame] = 1 - np.clip(similarity, 0, 1)
    return out


def scatter(samples: FloatArray, share: FloatArray, sample_rate: int, hop_samples: int,
            first_frame: int) -> FloatArray:  # fmt: skip
    """``samples`` with ``share`` ``(frames,)`` of their energy above 1.5 kHz turned into noise.

    Args:
        first_frame: position of the piece in the whole, which seeds the noise, so that a piece
            gets the same noise as the whole would give it.
    """
    if not np.any(share > 0):
        return samples
    half = BREATH_FRAME // 2
    padded = np.pad(samples, half)
    window = np.sqrt(np.hanning(BREATH_FRAME + 1)[:-1]).astype(np.float32)
    low = int(BREATH_HZ * BREATH_FRAME / sample_rate)
    out = np.zeros(len(padded) + BREATH_FRAME, np.float32)
    for frame in range(len(share) + 1):
        at = frame * hop_samples
        piece = padded[at : at + BREATH_FRAME]
        if len(piece) < BREATH_FRAME:
            piece = np.pad(piece, (0, BREATH_FRAME - len(piece)))
        spectrum = np.fft.rfft(piece * window)
        amount = float(share[min(frame, len(share) - 1)])
        if amount > 0:
            rng = np.random.default_rng(first_frame + frame)
            phase = rng.uniform(0, 2 * np.pi, len(spectrum) - low)
            noise = envelope(spectrum, sample_rate)[low:] * np.exp(1j * phase)
            # Frames of noise add up in power, not in amplitude: with four of them overlapping, a
            # Hann window in all leaves a quarter of it.
            spectrum[low:] = np.sqrt(1 - amount) * spectrum[low:] + 2 * np.sqrt(amount) * noise
        out[at : at + BREATH_FRAME] += np.fft.irfft(spectrum, BREATH_FRAME) * window
    scale = np.float32(2 * hop_samples / BREATH_FRAME)
    scaled: FloatArray = (out[half : half + len(samples)] * scale).astype(np.float32)
    return scaled


def envelope(spectrum: NDArray[np.complexfloating], sample_rate: int) -> NDArray[np.float64]:
    """``(bins,)`` magnitudes smoothed in power over 400 Hz, so that harmonics leave no trace."""
    width = max(1, round(SMOOTH_HZ * BREATH_FRAME / sample_rate)) // 2 * 2 + 1
    power = np.pad(np.square(np.abs(spectrum)), width // 2, mode="edge")
    total = np.concatenate(([0.0], np.cumsum(power)))
    mean = np.maximum(total[width:] - total[:-width], 0) / width
    return np.asarray(np.sqrt(mean))


def _high_passed(samples: FloatArray, sample_rate: int) -> FloatArray:
    """What lies above 1.5 kHz, by a symmetric filter of 8 ms: no delay, no ringing beyond it."""
    reach = round(0.004 * sample_rate)
    n = np.arange(-reach, reach + 1)
    cutoff = 2 * BREATH_HZ / sample_rate
    low = cutoff * np.sinc(cutoff * n) * np.hanning(len(n) + 2)[1:-1]
    low /= low.sum()
    kernel = -low
    kernel[reach] += 1
    return np.convolve(samples, kernel.astype(np.float32), mode="same").astype(np.float32)


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

    def blocks(self, recording: SampleSource) -> Iterator[FloatArray]:
        """``(samples,)`` blocks of ``recording``, finished."""
        reach = LIMITER_REACH_SAMPLES if self.limiting else 0
        for start in range(0, len(recording), LEVEL_SAMPLES):
            low = max(0, start - reach)
            block = recording.read(low, start + LEVEL_SAMPLES + reach) * np.float32(self.factor)
            if self.limiting:
                block = limited(block, recording.sample_rate, low)
            yield block[start - low : start - low + LEVEL_SAMPLES]


def metered(blocks: Iterable[FloatArray], sample_rate: int, peaks: bool = True) -> LoudnessMeter:
    """Loudness and peaks of the joined ``blocks``."""
    meter = LoudnessMeter(sample_rate, peaks)
    for block in blocks:
        meter.add(block)
    return meter


def output_level(
    recording: SampleSource, gain: float, controls: Controls, source: LoudnessMeter | None
) -> OutputLevel:
    """What brings ``recording``, the rendered samples at the networks' level, to its loudness.

    It is that of the source's speech, over the same time, or what the controls say. Peaks above
    the ceiling are turned down by some decibels; where that does not suffice, the whole is.

    Args:
        gain: that brought the source to that level, which a recording without loudness gets back.
        controls: say the loudness, where ``source`` is None.
        source: the source, measured, where the result shall be as loud.
    """
    rate = recording.sample_rate
    meter = metered(blocks_of(recording), rate)
    wanted, found = _loudness(meter, controls, source)
    if not (math.isfinite(wanted) and math.isfinite(found)):
        note = "The loudness was not matched: the recording is too quiet to have one."
        return OutputLevel(1 / gain, notes=(note,))
    room = CEILING_DBTP - meter.true_peak_db
    more = wanted - found
    if more <= room + NEAR_LU / 2:  # Less than the meter tells.
        return OutputLevel(10 ** (min(more, room) / 20))
    for _ in range(LIMITING_ROUNDS):
        more = min(more, room + MOST_LIMITING_DB)
        level = OutputLevel(10 ** (more / 20), limiting=True)
        now = metered(level.blocks(recording), rate, peaks=False)
        short = wanted - _loudness(now, controls, source)[1]
        if short < NEAR_LU or more >= room + MOST_LIMITING_DB:
            break
        more += short
    notes = [
        f"Peaks were turned down by up to {more - room:.1f} dB, so that the rest has its loudness "
        f"and they stay below {CEILING_DBTP:g} dBTP."
    ]
    if short > FAR_LU:
        goal = "the source" if source else f"{wanted:.1f} LUFS"
        notes.append(
            f"The result is {short:.1f} dB quieter than {goal}, because its peaks leave no room."
        )
    return replace(level, notes=tuple(notes))


def _loudness(
    meter: LoudnessMeter, controls: Controls, source: LoudnessMeter | None
) -> tuple[float, float]:
    """LUFS that the result shall have, and that it has."""
    if source is not None:
        return speech_loudness(source, meter)
    assert controls.loudness is not None
    return float(controls.loudness), meter.loudness_lufs


def blocks_of(recording: SampleSource) -> Iterator[FloatArray]:
    """``(samples,)`` blocks of a recording that are measured one after the other."""
    size = round(METER_SECONDS * recording.sample_rate)
    for start in range(0, len(recording), size):
        yield recording.read(start, start + size)
