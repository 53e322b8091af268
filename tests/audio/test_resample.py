from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audio_signals import tone
from auto_voice.audio.resample import ResampleStream, resample, resampled_length

RATES = [8_000, 11_025, 16_000, 22_050, 24_000, 44_100, 48_000, 96_000, 192_000]
PAIRS = [(a, b) for a in RATES for b in (16_000, 22_050) if a != b]


def rms(x):
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


@pytest.mark.parametrize(("from_hz", "to_hz"), PAIRS)
def test_a_tone_below_both_limits_is_kept_in_place_and_level(from_hz, to_hz):
    hz = 0.35 * min(from_hz, to_hz)
    got = resample(tone(hz, 1.0, from_hz), from_hz, to_hz)
    ideal = tone(hz, 1.0, to_hz)
    inner = slice(to_hz // 10, -to_hz // 10)
    assert rms(got[inner] - ideal[inner]) < 1e-4 * rms(ideal)


@pytest.mark.parametrize(("from_hz", "to_hz"), [p for p in PAIRS if p[0] > p[1]])
def test_a_tone_above_the_new_limit_is_killed(from_hz, to_hz):
    hz = min(0.55 * to_hz + 200, 0.499 * from_hz)
    if hz <= 0.52 * to_hz:
        pytest.skip("no room between the two limits")
    got = resample(tone(hz, 1.0, from_hz), from_hz, to_hz)
    inner = slice(to_hz // 10, -to_hz // 10)
    assert 20 * np.log10(rms(got[inner]) / rms(tone(hz)) + 1e-12) < -100


@pytest.mark.parametrize(("from_hz", "to_hz"), PAIRS)
def test_a_constant_stays(from_hz, to_hz):
    got = resample(np.full(from_hz, 0.5, np.float32), from_hz, to_hz)
    inner = slice(to_hz // 10, -to_hz // 10)
    np.testing.assert_allclose(got[inner], 0.5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    samples=st.integers(0, 3000),
    from_hz=st.sampled_from(RATES),
    to_hz=st.sampled_from(RATES),
)
def test_length_rule(samples, from_hz, to_hz):
    got = resample(np.ones(samples, np.float32), from_hz, to_hz)
    assert got.dtype == np.float32
    assert len(got) == resampled_length(samples, from_hz, to_hz)
    assert abs(len(got) / to_hz - samples / from_hz) <= 0.5 / to_hz + 1e-12


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 5000), max_size=6),
    from_hz=st.sampled_from(RATES),
    to_hz=st.sampled_from(RATES),
    seed=st.integers(0, 99),
)
def test_blocks_equal_the_whole(cuts, from_hz, to_hz, seed):
    x = np.random.default_rng(seed).standard_normal(5000).astype(np.float32)
    stream = ResampleStream(from_hz, to_hz)
    parts = [stream.process(part) for part in np.split(x, sorted(cuts))]
    parts.append(stream.process(np.zeros(0, np.float32), last=True))
    np.testing.assert_allclose(np.concatenate(parts), resample(x, from_hz, to_hz), atol=1e-5)


def test_channels_are_resampled_alone():
    stereo = np.stack([tone(300), tone(900)], 1)
    got = resample(stereo, 16_000, 22_050)
    np.testing.assert_allclose(got[:, 1], resample(tone(900), 16_000, 22_050), atol=1e-6)
    assert got.shape == (22_050, 2)


def test_there_and_back_is_the_same():
    x = tone(1000)
    back = resample(resample(x, 16_000, 48_000), 48_000, 16_000)
    np.testing.assert_allclose(back[500:-500], x[500:-500], atol=1e-4)


@pytest.mark.parametrize("rates", [(0, 16_000), (16_000, -1)])
def test_rates_must_be_positive(rates):
    with pytest.raises(ValueError, match="positive"):
        resample(tone(), *rates)
    with pytest.raises(ValueError, match="positive"):
        ResampleStream(*rates)
