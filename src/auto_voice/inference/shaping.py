"""Changes to a conversion on its way to sound: resonances, pauses and loudness contour."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from auto_voice.audio.loudness import without_rumble
from auto_voice.audio.mel import HIFIGAN_MEL, log_mel, mel_filters
from auto_voice.audio.resample import resample
from auto_voice.types import FloatArray, Mel

# Mel frames of the window over which a level is taken: half as wide in effect, 52 ms, so that
# syllables count and the beat of single periods does not.
CONTOUR_FRAMES = 9
# dB by which a frame is turned up or down at most: a phrase far from the microphone is up to 40 dB
# softer, while little that is turned up further than this was meant to sound.
MOST_DOWN_DB, MOST_UP_DB = 60.0, 12.0
MOST_UP_IN_PAUSES_DB = 3.0
# Power that counts as silence, -130 dBFS at the level of the networks.
SILENCE_POWER = 1e-13


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
        pause: ``(frames,)`` 0 in speech to 1 in pauses, see
            :func:`auto_voice.inference.analysis.pauses`.
    """

    mel: FloatArray
    level_db: FloatArray
    pause: FloatArray

    def part(self, start: int, stop: int) -> SourceShape:
        """Frames ``[start, stop)``."""
        part = slice(start, stop)
        return SourceShape(self.mel[:, part], self.level_db[part], self.pause[part])


def source_shape(speech: FloatArray, sample_rate: int, pause: FloatArray) -> SourceShape:
    """The shape of ``speech``, ``(samples,)`` at the networks' level.

    Args:
        pause: ``(frames,)`` of the mel frames, the first of which ``speech`` starts with.
    """
    frames = len(pause)
    at_rate = resample(speech, sample_rate, HIFIGAN_MEL.sample_rate)
    own = log_mel(at_rate, HIFIGAN_MEL)
    own = np.pad(own, ((0, 0), (0, max(0, frames - own.shape[1]))), mode="edge")[:, :frames]
    plain = without_rumble(at_rate, HIFIGAN_MEL.sample_rate)
    return SourceShape(own, frame_levels(plain, HIFIGAN_MEL.hop_samples, frames), pause)


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

    Args:
        samples: without rumble.
        amount: share of the source's contour that is taken in speech: 0 leaves it as it is spoken.
            In pauses the result is always as quiet as the source.
    """
    frames = len(source.pause)
    difference = source.level_db - frame_levels(samples, hop_samples, frames)
    speech = amount * np.clip(difference, -MOST_DOWN_DB, MOST_UP_DB)
    pause = np.clip(difference, -MOST_DOWN_DB, MOST_UP_IN_PAUSES_DB)
    gain_db = speech * (1 - source.pause) + pause * source.pause
    at = (np.arange(len(samples)) + 0.5) / hop_samples - 0.5
    gain = 10 ** (np.interp(at, np.arange(frames), gain_db) / 20)
    followed: FloatArray = (samples * gain).astype(np.float32)
    return followed


def frame_levels(samples: FloatArray, hop_samples: int, frames: int) -> FloatArray:
    """``(frames,)`` power in dB, smoothed; frame ``i`` is centred at ``(i + 0.5) * hop_samples``.

    What is missing at the end counts as silence.
    """
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
