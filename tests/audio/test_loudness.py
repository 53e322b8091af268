from __future__ import annotations

import math

import numpy as np
import pytest

from audio_signals import speech_like, tone
from auto_voice.audio.loudness import (
    _k_response,
    integrated_loudness,
    k_weighted,
    true_peak,
)


def sine(dbfs: float, seconds: float, rate: int = 48_000, hz: float = 1000.0):
    return tone(hz, seconds, rate, peak=10 ** (dbfs / 20))


def stereo(*parts):
    x = np.concatenate(parts)
    return np.stack([x, x], 1)


def test_the_filters_are_those_of_the_standard_at_48_khz():
    # ITU-R BS.1770-4, tables 1 and 2.
    cycles = np.linspace(0.0001, 0.5, 999)
    z = np.exp(-2j * np.pi * cycles)
    shelf = (1.53512485958697 - 2.69169618940638 * z + 1.19839281085285 * z * z) / (
        1 - 1.69065929318241 * z + 0.73248077421585 * z * z
    )
    high_pass = (1 - 2 * z + z * z) / (1 - 1.99004745483398 * z + 0.99007225036621 * z * z)
    np.testing.assert_allclose(_k_response(cycles, 48_000), shelf * high_pass, rtol=1e-9)


def test_the_filter_equals_its_recursion():
    x = np.random.default_rng(0).standard_normal(5000)
    shelf = [1.53512485958697, -2.69169618940638, 1.19839281085285]
    for numerator, feedback in (
        (shelf, [-1.69065929318241, 0.73248077421585]),
        ([1.0, -2.0, 1.0], [-1.99004745483398, 0.99007225036621]),
    ):
        y = np.zeros_like(x)
        for n in range(len(x)):
            y[n] = sum(numerator[i] * x[n - i] for i in range(3) if n >= i)
            y[n] -= sum(feedback[i - 1] * y[n - i] for i in (1, 2) if n >= i)
        x = y
    np.testing.assert_allclose(
        k_weighted(np.random.default_rng(0).standard_normal(5000), 48_000), x, atol=1e-8
    )


@pytest.mark.parametrize("rate", [48_000, 44_100, 22_050, 16_000, 96_000])
def test_997_hz_at_full_scale_is_minus_3_01(rate):
    assert integrated_loudness(sine(0, 5, rate, 997), rate) == pytest.approx(
        -3.01, abs=0.02 if rate > 40_000 else 0.05
    )


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ([(-23, 20)], -23),
        ([(-33, 20)], -33),
        ([(-36, 10), (-23, 60), (-36, 10)], -23),
        ([(-72, 10), (-36, 10), (-23, 60), (-36, 10), (-72, 10)], -23),
        ([(-26, 20), (-20, 20.1), (-26, 20)], -23),
    ],
)
def test_ebu_tech_3341_cases_1_to_5(levels, expected):
    x = stereo(*(sine(dbfs, seconds) for dbfs, seconds in levels))
    assert integrated_loudness(x, 48_000) == pytest.approx(expected, abs=0.1)


def test_long_audio_is_filtered_in_pieces_without_seams():
    x = speech_like(20.0)
    whole = integrated_loudness(np.tile(x, 3), 16_000)
    assert whole == pytest.approx(integrated_loudness(x, 16_000), abs=0.1)
    steady = sine(-20, 14)
    weighted = k_weighted(steady.astype(np.float64), 48_000)[48_000:-48_000]
    power = np.square(weighted[: 48 * (len(weighted) // 48)]).reshape(-1, 48).mean(axis=1)
    assert power.max() / power.min() < 1 + 1e-4


def test_edges():
    assert integrated_loudness(np.zeros(48_000, np.float32), 48_000) == -math.inf
    assert integrated_loudness(np.zeros(0, np.float32), 48_000) == -math.inf
    assert integrated_loudness(sine(-80, 2), 48_000) == -math.inf
    assert integrated_loudness(sine(-23, 0.2), 48_000) == pytest.approx(-26, abs=0.3)
    with pytest.raises(ValueError, match="mix them down"):
        integrated_loudness(np.zeros((99, 6), np.float32), 48_000)


def test_true_peak_finds_what_lies_between_the_samples():
    # A quarter of the rate, 45 degrees off: no sample is above 0.707 of the wave.
    n = np.arange(48_000)
    x = np.sin(np.pi / 2 * n + np.pi / 4).astype(np.float32) * np.hanning(48_000).astype(np.float32)
    assert 20 * np.log10(np.abs(x).max()) < -3
    assert true_peak(x, 48_000) == pytest.approx(0.0, abs=0.1)
    assert true_peak(np.zeros(10, np.float32), 48_000) == -math.inf
    assert true_peak(np.zeros(0, np.float32), 48_000) == -math.inf


def test_true_peak_in_pieces_has_no_false_peaks():
    long = tone(100, 20.0, 48_000, peak=0.5)
    assert true_peak(long, 48_000) == pytest.approx(20 * np.log10(0.5), abs=0.1)
    assert true_peak(tone(100, 2, 192_000), 192_000) == pytest.approx(-6.02, abs=0.01)
