"""Signals with known physics; everything the audio tests hear is made here."""

from __future__ import annotations

import io

import numpy as np
import soundfile
from numpy.typing import NDArray

Samples = NDArray[np.float32]


def tone(
    hz: float = 440.0, seconds: float = 1.0, rate: int = 16_000, peak: float = 0.5
) -> NDArray[np.float32]:
    return (peak * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(
        np.float32
    )


def encode(
    samples: NDArray[np.float32],
    rate: int = 16_000,
    format: str = "WAV",
    subtype: str | None = None,
) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=format, subtype=subtype)
    return buffer.getvalue()


def speech_like(seconds: float = 4.0, rate: int = 16_000, seed: int = 0) -> NDArray[np.float32]:
    """Voiced syllables with glides and formants, fricative bursts and pauses: 60 % active.

    Made by source and filter, so that tests need no recording: a pulse train through three
    resonances per syllable, 180 ms long, every 250 ms; each fifth slot is a pause.
    """
    rng = np.random.default_rng(seed)
    out = np.zeros(round(seconds * rate))
    slot, active = round(0.25 * rate), round(0.18 * rate)
    for index, start in enumerate(range(0, len(out) - slot, slot)):
        if index % 5 == 4:
            continue
        f0 = np.linspace(110, 140, active) * (1 + 0.1 * rng.standard_normal())
        phase = np.cumsum(f0 / rate)
        excitation = np.diff(np.floor(phase), prepend=0.0) + 0.01 * rng.standard_normal(active)
        if index % 5 == 2:
            excitation = 0.15 * np.diff(rng.standard_normal(active), prepend=0.0)
        syllable = excitation
        spectrum = np.fft.rfft(syllable, 2 * active)
        freqs = np.fft.rfftfreq(2 * active, 1 / rate)
        gain = np.full(len(freqs), 1e-3)
        for centre in rng.uniform((300, 900, 2200), (800, 2000, 3200)):
            gain += 1 / (1 + ((freqs - centre) / 90) ** 2) * 500 / centre
        syllable = np.fft.irfft(spectrum * gain)[:active] * np.hanning(active) ** 0.5
        out[start : start + active] += syllable / (np.abs(syllable).max() + 1e-9)
    return (0.5 * out).astype(np.float32)
