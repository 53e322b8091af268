"""The template is what a real harmonic tone measures."""

from __future__ import annotations

import numpy as np
import pytest

from auto_voice.audio.mel import HIFIGAN_MEL, harmonic_template, log_mel

RATE = HIFIGAN_MEL.sample_rate


def _harmonic_tone(f0_hz: float) -> np.ndarray:
    time = np.arange(RATE) / RATE
    partials = np.arange(1, int(8000 / f0_hz) + 1)
    tone = np.cos(2 * np.pi * np.outer(partials * f0_hz, time) + (partials**2)[:, None]).sum(0)
    return (tone / tone.std()).astype(np.float32)


@pytest.mark.parametrize("f0_hz", [75.0, 100.0, 180.0, 260.0, 400.0])
def test_it_agrees_with_a_measured_tone_over_measured_noise(f0_hz: float) -> None:
    noise = np.random.default_rng(0).normal(size=RATE).astype(np.float32)
    tone_mel = log_mel(_harmonic_tone(f0_hz), HIFIGAN_MEL)[:, 10:-10].mean(1)
    measured = tone_mel - log_mel(noise, HIFIGAN_MEL).mean(1)
    template = harmonic_template(np.log([f0_hz]), np.ones(1))[0]
    # Far between two lines the real window falls below the template's floor; elsewhere they agree.
    shown = (measured > -3.5)[:70] if f0_hz > 70 else slice(70)
    assert np.corrcoef(measured[:70][shown], template[:70][shown])[0, 1] > 0.9
    assert np.abs(measured[:70][shown] - template[:70][shown]).mean() < 0.6


def test_the_lowest_line_of_a_high_voice_stands_in_its_band() -> None:
    template = harmonic_template(np.log([300.0]), np.ones(1))[0]
    tone = np.sin(2 * np.pi * 300 * np.arange(RATE) / RATE).astype(np.float32)
    peak = int(np.argmax(log_mel(tone, HIFIGAN_MEL).mean(1)))
    assert abs(int(np.argmax(template[:12])) - peak) <= 1


def test_without_voice_there_is_nothing() -> None:
    log_f0 = np.log(np.linspace(60, 900, 40))
    assert (harmonic_template(log_f0, np.zeros(40)) == 0).all()
    half = harmonic_template(log_f0, np.full(40, 0.5))
    assert np.allclose(half, harmonic_template(log_f0, np.ones(40)) / 2)


def test_pitches_out_of_range_are_held_at_the_ends() -> None:
    low, lowest = (harmonic_template(np.log([hz]), np.ones(1)) for hz in (5.0, 50.0))
    assert (low == lowest).all()
    assert np.isfinite(harmonic_template(np.log([9000.0]), np.ones(1))).all()
