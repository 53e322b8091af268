"""Changes to a converted mel before it becomes sound: resonances and loudness contour."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from auto_voice.audio.mel import HIFIGAN_MEL, log_mel, mel_filters
from auto_voice.audio.resample import resample
from auto_voice.types import FloatArray, Mel

# The contour is smoothed over 58 ms: syllables count, the beat of single periods does not.
CONTOUR_FRAMES = 5
# 12 dB: the most that a frame is turned up or down.
MOST_NEPERS = 1.4
# Frames 40 dB below the loudest keep their level: there is only noise to match.
QUIET_NEPERS = 4.6


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


def keep_energy(mel: Mel, speech: FloatArray, sample_rate: int, amount: float) -> Mel:
    """``mel`` with its loudness contour moved towards that of ``speech``, ``(samples,)``.

    Args:
        speech: what was converted, at the networks' level, which starts with the first frame.
        amount: 0 leaves the contour, 1 takes the source's.
    """
    if amount == 0:
        return mel
    frames = mel.values.shape[1]
    at_rate = resample(speech, sample_rate, mel.sample_rate)
    own = contour(log_mel(at_rate, HIFIGAN_MEL))
    own = np.pad(own, (0, max(0, frames - len(own))), mode="edge")[:frames]
    made = contour(mel.values)
    change = np.clip(amount * (own - made), -MOST_NEPERS, MOST_NEPERS)
    # Levels are those of the networks on both sides, so the floor may be an absolute one.
    loud = np.log(80 * 0.1)
    share = np.clip((own - (loud - QUIET_NEPERS)) / 1.0, 0, 1)
    values = mel.values + (change * share)[None]
    return Mel(values.astype(np.float32), mel.sample_rate, mel.hop_samples)


def contour(log_mel_values: FloatArray) -> FloatArray:
    """``(frames,)`` log of the summed amplitude, smoothed."""
    level = np.log(np.exp(log_mel_values).sum(axis=0))
    padded = np.pad(level, CONTOUR_FRAMES // 2, mode="edge")
    smooth = np.convolve(padded, np.ones(CONTOUR_FRAMES) / CONTOUR_FRAMES, mode="valid")
    return smooth.astype(np.float32)
