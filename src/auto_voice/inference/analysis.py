"""What has to be known of a whole recording before a piece of it can be converted.

Level, pauses and pitch of the whole make each piece come out as it would in the whole. All of it
is gathered block by block; what is kept is a few numbers per hundredth of a second.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from auto_voice.audio.frames import sustained
from auto_voice.audio.loudness import SPEECH_DBFS, active_level, rumble_reach, without_rumble
from auto_voice.audio.pitch import (
    DETECTOR_FRAMES,
    F_MAX_HZ,
    FRAME_RATE,
    corrected_by_sound,
    extract_pitch,
)
from auto_voice.audio.quality import (
    LONG_DECAY_SECONDS,
    MUSIC_SHARE,
    decay_time,
    denoise,
    tonal_background,
)
from auto_voice.audio.resample import resample
from auto_voice.audio.vad import speech_segments
from auto_voice.inference.chunking import hop_energies, hop_size
from auto_voice.inference.inputs import SampleSource
from auto_voice.types import SPEECH_RATE, FloatArray, Pitch

# 10 s, margins included. All blocks are equally long: the detector's runtime keeps memory for
# each length that it meets.
PITCH_BLOCK_FRAMES = 624
# Twice what the detector's network looks to either side.
PITCH_MARGIN_FRAMES = 2 * DETECTOR_FRAMES
DENOISE_SECONDS = 60.0
DENOISE_FADE_SECONDS = 1.0
TRIM_BLOCK_SECONDS = 60.0
ENERGY_BLOCK_HOPS = 1000
# Seconds at the start that are searched for what sounds besides the voice, and the seconds of notes
# beyond the range that are worth a note.
BACKGROUND_SECONDS = 60.0
HIGH_NOTES_SECONDS = 0.3
# dB below the speech level: what lies under the first is a pause; what lies under the second may
# be one, if the recording is nowhere quieter for some seconds.
PAUSE_DB, NOISY_PAUSE_DB = 36.0, 12.0
# dB above the quietest of the seconds around, up to where a frame counts as no louder.
FLOOR_MARGIN_DB = 5.0
# dB between what is wholly a pause and what is wholly speech.
PAUSE_RANGE_DB = 6.0
# Hops over which levels are smoothed, of frames and of the floor, and those searched for it.
LEVEL_HOPS, FLOOR_HOPS, FLOOR_REACH_HOPS = 5, 20, 200
SILENCE_POWER = 1e-13
# Hops searched for the noise that speech stands in: nobody speaks for eight seconds without a gap.
NOISE_REACH_HOPS = 400
# dB by which the mean of the noise lies above its quietest fifth of a second, and below the speech
# at least: what is steady and louder is the sound of a voice.
NOISE_ABOVE_QUIETEST_DB, NOISE_BELOW_SPEECH_DB = 1.0, 6.0


@dataclass(frozen=True, eq=False)
class Analysis:
    """Attributes:
    samples: of the source at the content encoder's rate.
    gain: factor that brings it to the level that the networks know.
    energies: ``(hops,)``, see :func:`auto_voice.inference.chunking.hop_energies`.
    pitch: of the levelled source, as the detector found it.
    melody: the same without octave errors of the detector, see
        :func:`auto_voice.audio.pitch.corrected_by_sound`.
    """

    samples: int
    gain: float
    energies: FloatArray
    pitch: Pitch
    melody: Pitch


def analyse(recording: SampleSource) -> Analysis:
    """Level, energies and pitch of ``recording``."""
    hop = hop_size(recording.sample_rate)
    size = ENERGY_BLOCK_HOPS * hop
    energies = [
        hop_energies(_plain(recording, start, start + size), recording.sample_rate)
        for start in range(0, len(recording), size)
    ]
    joined = np.concatenate(energies) if energies else np.zeros(0)
    gain = gain_of_energies(joined, hop)
    pitch = pitch_of(recording, gain)
    melody = corrected_by_sound(pitch, recording.read, recording.sample_rate)
    return Analysis(len(recording), gain, joined.astype(np.float32), pitch, melody)


def gain_of_energies(energies: NDArray[np.float64], hop_samples: int) -> float:
    """Factor to the networks' level, from pairs of hops: frames of 20 ms. 1 for silence."""
    if len(energies) < 2:
        return 1.0
    pairs = energies[: len(energies) // 2 * 2].reshape(-1, 2).sum(axis=1) / (2 * hop_samples)
    level = active_level(pairs)
    return float(10 ** ((SPEECH_DBFS - level) / 20)) if np.isfinite(level) else 1.0


def pauses(energies: NDArray[np.floating], hop_samples: int, gain: float) -> FloatArray:
    """``(hops,)``: 0 where somebody speaks to 1 where nobody does.

    A pause lies far below the speech. Where noise hides that, it lies near the quietest of the
    seconds around it and still clearly below the speech.

    Args:
        energies: see :func:`auto_voice.inference.chunking.hop_energies`.
        gain: that brings the recording to the networks' level.
    """
    if len(energies) == 0:
        return np.zeros(0, np.float32)
    speech = SPEECH_DBFS - 20 * np.log10(gain)
    level, floor = (
        10 * np.log10(_mean_around(energies / hop_samples, hops) + SILENCE_POWER)
        for hops in (LEVEL_HOPS, FLOOR_HOPS)
    )
    lowest = _lowest_around(floor, FLOOR_REACH_HOPS)
    highest = np.minimum(lowest + FLOOR_MARGIN_DB, speech - NOISY_PAUSE_DB)
    share = (np.maximum(highest, speech - PAUSE_DB) - level) / PAUSE_RANGE_DB + 0.5
    return np.asarray(np.clip(share, 0, 1), np.float32)


def noise_floor(energies: NDArray[np.floating], hop_samples: int, gain: float) -> FloatArray:
    """``(hops,)`` power of the noise that the speech stands in, at the networks' level.

    It is that of the quietest of the seconds around.

    Args:
        energies: see :func:`auto_voice.inference.chunking.hop_energies`.
        gain: that brings the recording to the networks' level.
    """
    if len(energies) == 0:
        return np.zeros(0, np.float32)
    quietest = _lowest_around(_mean_around(energies / hop_samples, FLOOR_HOPS), NOISE_REACH_HOPS)
    noise = quietest * gain**2 * 10 ** (NOISE_ABOVE_QUIETEST_DB / 10)
    highest = 10 ** ((SPEECH_DBFS - NOISE_BELOW_SPEECH_DB) / 10)
    return np.minimum(noise, highest).astype(np.float32)


def _mean_around(values: NDArray[np.floating], width: int) -> NDArray[np.float64]:
    """Means over ``width`` neighbours, of those that are there at the ends."""
    before = width // 2
    total = np.concatenate(([0.0], np.cumsum(values, dtype=np.float64)))
    low = np.maximum(np.arange(len(values)) - before, 0)
    high = np.minimum(low + width, len(values))
    return np.asarray(np.maximum(total[high] - total[low], 0) / (high - low))


def _lowest_around(values: NDArray[np.float64], reach: int) -> NDArray[np.float64]:
    """The least of the ``2 * reach + 1`` neighbours of each."""
    padded = np.pad(values, reach, mode="edge")
    return np.asarray(np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1).min(axis=1))


def _plain(recording: SampleSource, start: int, stop: int) -> FloatArray:
    """Samples ``[start, stop)`` without rumble, as the whole would have them."""
    reach = rumble_reach(recording.sample_rate)
    low = max(0, start - reach)
    samples = without_rumble(recording.read(low, stop + reach), recording.sample_rate)
    return samples[start - low : stop - low]


def pitch_of(recording: SampleSource, gain: float) -> Pitch:
    """:func:`extract_pitch` of ``gain * recording``, in blocks whose margins are thrown away."""
    rate = recording.sample_rate
    samples_per_frame = rate / FRAME_RATE
    frames_in_all = len(recording) / samples_per_frame
    f0: list[FloatArray] = []
    voiced: list[NDArray[np.bool_]] = []
    core = max(1, PITCH_BLOCK_FRAMES - 2 * PITCH_MARGIN_FRAMES)
    start = 0
    while start == 0 or start < frames_in_all:
        last = start + core + PITCH_MARGIN_FRAMES >= frames_in_all
        high = start + core + PITCH_MARGIN_FRAMES
        if last:
            high = math.ceil(frames_in_all)
        low = max(0, min(start - PITCH_MARGIN_FRAMES, high - PITCH_BLOCK_FRAMES))
        if low == 0 and not last:
            high = min(math.floor(frames_in_all), PITCH_BLOCK_FRAMES)
        stop = len(recording) if last else round(high * samples_per_frame)
        block = recording.read(round(low * samples_per_frame), stop) * np.float32(gain)
        found = extract_pitch(resample(block, rate, SPEECH_RATE), SPEECH_RATE)
        kept = slice(start - low, None if last else start + core - low)
        f0.append(found.f0_hz[kept])
        voiced.append(found.voiced[kept])
        if last:
            break
        start += core
    return Pitch(np.concatenate(f0), np.concatenate(voiced), FRAME_RATE)


def denoised(
    blocks: Iterable[FloatArray], sample_rate: int, reduction_db: float
) -> Iterator[FloatArray]:
    """``blocks`` with steady noise turned down, a minute at a time.

    Each minute has a noise spectrum of its own and fades into the next over a second, so a fan that
    is switched off half-way does not colour the rest.
    """
    size = round(DENOISE_SECONDS * sample_rate)
    fade = round(DENOISE_FADE_SECONDS * sample_rate)
    ramp = (np.arange(fade, dtype=np.float32) + 0.5) / fade
    tail = np.zeros(0, np.float32)
    for piece, last in _overlapping(blocks, size, fade):
        clean = denoise(piece, sample_rate, reduction_db=reduction_db)
        if len(tail):
            clean[:fade] = tail * ramp[::-1] + clean[:fade] * ramp
        yield clean if last else clean[: len(clean) - fade]
        tail = clean[len(clean) - fade :]


def _overlapping(
    blocks: Iterable[FloatArray], size: int, overlap: int
) -> Iterator[tuple[FloatArray, bool]]:
    """Pieces of ``size`` that share ``overlap`` samples; the last has up to twice that length."""
    held = np.zeros(0, np.float32)
    for block in blocks:
        held = np.concatenate([held, block])
        while len(held) >= 2 * size:
            yield held[:size], False
            held = held[size - overlap :]
    yield held, True


def background_notes(recording: SampleSource) -> list[str]:
    """What sounds in the first minute of ``recording`` besides one near voice, a sentence each.

    It comes into the result, where a clean recording would not bring it.
    """
    head = recording.read(0, round(BACKGROUND_SECONDS * recording.sample_rate))
    notes = []
    spans = speech_segments(head, recording.sample_rate, padding_seconds=0.0)
    tonal = tonal_background(head, recording.sample_rate, spans)
    if tonal is not None and tonal > MUSIC_SHARE:
        notes.append(
            "Music or other voices sound behind the speech of the source and disturb the result; "
            "convert the voice alone."
        )
    decay = decay_time(head, recording.sample_rate)
    if decay is not None and decay > LONG_DECAY_SECONDS:
        notes.append(
            f"The source is reverberant (the room rings for about {decay:.1f} s), which blurs the "
            "result; record nearer to the microphone."
        )
    if high_notes(head, recording.sample_rate) > HIGH_NOTES_SECONDS:
        notes.append(
            f"The source sings above {F_MAX_HZ:.0f} Hz, beyond the range of the models; such notes "
            "do not come out at their pitch."
        )
    return notes


def high_notes(samples: FloatArray, sample_rate: int) -> float:
    """Seconds of ``(samples,)`` that sing above the pitch detector's range.

    Nearly all sound of such a note lies in one narrow peak above the range or in its harmonics,
    and nothing lies below it, which holds of no vowel that is spoken and of no hiss.
    """
    at_16k = resample(samples, sample_rate, SPEECH_RATE)
    size, hop = 1024, 512
    if len(at_16k) < size:
        return 0.0
    frames = np.lib.stride_tricks.sliding_window_view(at_16k, size)[::hop]
    power = np.square(np.abs(np.fft.rfft(frames * np.hanning(size))))
    total = power.sum(axis=1)
    bin_hz = SPEECH_RATE / size
    first = power[:, : round(0.9 * F_MAX_HZ / bin_hz)].sum(axis=1)
    low, high = round(F_MAX_HZ / bin_hz) - 1, round(2.5 * F_MAX_HZ / bin_hz)
    peak = power[:, low:high].argmax(axis=1) + low
    near = np.stack([power[np.arange(len(peak)), peak + d] for d in range(-3, 4)]).sum(axis=0)
    loud = total > 1e-3 * np.percentile(total, 99)
    found = loud & (first < 0.01 * total) & (near > 0.4 * total)
    return float(sustained(found, 3).sum()) * hop / SPEECH_RATE


def speech_bounds(recording: SampleSource) -> tuple[int, int] | None:
    """First and last sample of speech in ``recording``; None if it holds none."""
    size = round(TRIM_BLOCK_SECONDS * recording.sample_rate)
    first = last = None
    for start in range(0, len(recording), size):
        for low, high in speech_segments(
            recording.read(start, start + size), recording.sample_rate
        ):
            first = start + low if first is None else first
            last = start + high
    return None if first is None or last is None else (first, last)
