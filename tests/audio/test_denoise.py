from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audio_signals import speech_like, tone
from auto_voice.audio.quality import denoise


def db(signal, error):
    return 10 * np.log10(np.mean(signal**2) / (np.mean(error**2) + 1e-20))


@pytest.mark.parametrize("rate", [16_000, 44_100])
@pytest.mark.parametrize(("snr_db", "gain_db"), [(0, 6), (5, 5), (10, 3)])
def test_noisy_speech_comes_nearer_to_clean(rate, snr_db, gain_db):
    clean = speech_like(6.0, rate)
    noise = np.random.default_rng(0).standard_normal(len(clean)).astype(np.float32)
    noise *= np.sqrt(np.mean(clean**2) / 10 ** (snr_db / 10))
    got = denoise(clean + noise, rate)
    assert db(clean, got - clean) > snr_db + gain_db


def test_clean_speech_hardly_changes():
    clean = speech_like(6.0) + 1e-4 * np.random.default_rng(0).standard_normal(96_000).astype(
        np.float32
    )
    assert db(clean, denoise(clean, 16_000) - clean) > 30


@pytest.mark.parametrize("reduction_db", [6, 12, 20])
def test_noise_alone_falls_by_what_was_asked(reduction_db):
    noise = 0.1 * np.random.default_rng(0).standard_normal(96_000).astype(np.float32)
    got = denoise(noise, 16_000, reduction_db=reduction_db)
    inner = slice(8000, -8000)
    assert db(noise[inner], got[inner]) == pytest.approx(reduction_db, abs=2.5)


def test_hum_is_removed_and_speech_stays():
    clean = speech_like(6.0)
    hum = tone(100, 6.0, peak=0.1) + tone(300, 6.0, peak=0.05)
    got = denoise(clean + hum, 16_000, reduction_db=20)
    assert db(clean, got - clean) > db(clean, hum) + 4


@settings(max_examples=30, deadline=None)
@given(length=st.integers(0, 9000), rate=st.sampled_from([8_000, 16_000, 48_000]))
def test_the_length_is_kept_and_the_result_finite(length, rate):
    x = np.random.default_rng(length).standard_normal(length).astype(np.float32)
    got = denoise(x, rate)
    assert got.dtype == np.float32
    assert len(got) == length
    assert np.isfinite(got).all()


def test_zero_reduction_and_silence_change_nothing():
    x = speech_like(2.0)
    np.testing.assert_array_equal(denoise(x, 16_000, reduction_db=0), x)
    np.testing.assert_array_equal(denoise(np.zeros(32_000, np.float32), 16_000), 0)
    with pytest.raises(ValueError, match="0 or more"):
        denoise(x, 16_000, reduction_db=-3)


def test_a_tiny_reduction_is_nearly_the_identity():
    x = speech_like(2.0)
    assert db(x, denoise(x, 16_000, reduction_db=0.1) - x) > 35
