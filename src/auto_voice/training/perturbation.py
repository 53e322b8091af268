"""Perturbations of recordings before features are computed: pauses, noise floors, other throats.

A converter that never met near-silence draws the lowest mel bands wrong there, so silence and a
noise floor are put around recordings. And a real recording has no aligned partner in another
timbre; a copy that was played faster or slower through another response stands in for one: its
formants lie elsewhere, and its time axis is known.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from auto_voice.audio.resample import resample
from auto_voice.types import FloatArray

SAMPLE_RATE = 16000
# Ranges of playback speed: far enough from 1 to be another throat, near enough to be speech.
SPEED_RANGES = ((0.82, 0.93), (1.08, 1.22))
# Standard deviation of the random response of a perturbed copy, dB.
RESPONSE_DB = 5.0


@dataclass(frozen=True)
class Pauses:
    """Silence around a recording and the noise floor under all of it.

    Attributes:
        lead_seconds, trail_seconds: of silence inserted before and after.
        noise_dbfs: level of the noise floor, speech lying at ``SPEECH_DBFS``; None: no noise.
        tilt_db_per_octave: of the noise's spectrum.
        hum_hz, hum_dbfs: of a mains hum with four harmonics; ``hum_hz`` 0: none.
        seed: of the noise itself.
    """

    lead_seconds: float = 0.0
    trail_seconds: float = 0.0
    noise_dbfs: float | None = None
    tilt_db_per_octave: float = 0.0
    hum_hz: float = 0.0
    hum_dbfs: float = -60.0
    seed: int = 0

    @classmethod
    def draw(cls, rng: np.random.Generator, share: float = 1.0) -> Pauses:
        """Random ones for ``share`` of all recordings, no change for the others."""
        if rng.random() >= share:
            return cls()
        lead, trail = (
            float(rng.uniform(0.1, 0.9)) if rng.random() < 0.8 else 0.0 for _ in range(2)
        )
        noise = float(rng.uniform(-90, -50)) if rng.random() < 0.85 else None
        hum = float(rng.choice([50.0, 60.0])) if rng.random() < 0.15 else 0.0
        return cls(
            lead, trail, noise, float(rng.uniform(-6, 0)), hum,
            float(rng.uniform(-70, -50)), int(rng.integers(2**31)),
        )  # fmt: skip

    def insert(self, samples: FloatArray, sample_rate: int = SAMPLE_RATE) -> FloatArray:
        """``(samples,)`` at the networks' level, with silence around it and noise under it."""
        lead, trail = (round(s * sample_rate) for s in (self.lead_seconds, self.trail_seconds))
        out = np.pad(samples, (lead, trail)).astype(np.float32)
        rng = np.random.default_rng(self.seed)
        if self.noise_dbfs is not None:
            out += _noise(rng, len(out), self.noise_dbfs, self.tilt_db_per_octave)
        if self.hum_hz:
            out += _hum(rng, len(out), sample_rate, self.hum_hz, self.hum_dbfs)
        return out


def _noise(rng: np.random.Generator, samples: int, dbfs: float, tilt: float) -> FloatArray:
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    octave = np.log2(np.maximum(np.arange(len(spectrum)), 1) / max(1, len(spectrum) / 64))
    spectrum *= 10 ** (tilt * np.maximum(octave, -1) / 20)
    noise = np.fft.irfft(spectrum, samples)
    rms = float(np.sqrt(np.mean(noise**2))) or 1.0
    return np.asarray(noise * (10 ** (dbfs / 20) / rms), np.float32)


def _hum(
    rng: np.random.Generator, samples: int, sample_rate: int, hertz: float, dbfs: float
) -> FloatArray:
    time = np.arange(samples) / sample_rate
    out = np.zeros(samples)
    for harmonic in range(1, 6):
        level = 10 ** ((dbfs - rng.uniform(0, 12) * (harmonic > 1)) / 20)
        out += level * np.sin(2 * np.pi * (hertz * harmonic * time + rng.random()))
    return np.asarray(out, np.float32)


def random_response(samples: FloatArray, rng: np.random.Generator, spread_db: float) -> FloatArray:
    """``samples`` through a smooth random response: six cosines over the mel-like log frequency."""
    spectrum = np.fft.rfft(samples)
    place = np.log1p(np.arange(len(spectrum)) / len(spectrum) * 8000 / 700) / np.log1p(8000 / 700)
    order = np.arange(1, 7)[:, None]
    amounts = rng.normal(0, spread_db, (6, 1)) / np.sqrt(order)
    gain_db = (amounts * np.cos(np.pi * order * place)).sum(0)
    return np.asarray(np.fft.irfft(spectrum * 10 ** (gain_db / 20), len(samples)), np.float32)


def perturbed_copy(samples: FloatArray, rng: np.random.Generator) -> tuple[FloatArray, float]:
    """``(samples,)`` through a random response and played at a random speed, and that speed:
    what was at ``t`` seconds is at ``t / speed``."""
    speed = float(rng.uniform(*SPEED_RANGES[int(rng.integers(len(SPEED_RANGES)))]))
    # Reading n samples as if they were n / speed plays them faster and moves formants and F0 up.
    responded = random_response(samples, rng, RESPONSE_DB)
    return resample(responded, round(SAMPLE_RATE * speed), SAMPLE_RATE), speed
