"""Real speech: one reader for 44 s, as the registry's sample."""

from __future__ import annotations

import numpy as np
import pytest

from auto_voice.audio.quality import denoise, measure_quality
from auto_voice.audio.vad import speech_seconds, speech_segments, trim_silence

pytestmark = pytest.mark.weights


@pytest.fixture(scope="module")
def speech(weights_registry):
    return weights_registry.load("sample_two_cities")


@pytest.mark.parametrize("snr_db", [60, 10])
def test_speech_is_found_and_the_silence_around_it_is_not(speech, snr_db):
    x, rate = speech.samples, speech.sample_rate
    quiet = np.zeros(3 * rate, np.float32)
    noise = np.random.default_rng(0).standard_normal(len(x) + 6 * rate) * x.std()
    mixed = np.concatenate([quiet, x, quiet]) + noise * 10 ** (-snr_db / 20)
    segments = speech_segments(mixed.astype(np.float32), rate)
    assert segments[0][0] > 2.5 * rate
    assert segments[-1][1] < len(mixed) - 2.5 * rate
    assert sum(end - start for start, end in segments) > 0.6 * len(x)


@pytest.mark.parametrize("gain", [1e-3, 0.03, 1.5])
def test_level_does_not_matter(speech, gain):
    x, rate = speech.samples[: 10 * speech.sample_rate], speech.sample_rate
    np.testing.assert_allclose(
        speech_segments(x * np.float32(gain), rate), speech_segments(x, rate), atol=0.04 * rate
    )


def test_trimming_keeps_the_inside_and_shortens_pauses_on_request(speech):
    rate = speech.sample_rate
    x, quiet = speech.samples[: 10 * rate], np.zeros(3 * rate, np.float32)
    x = np.concatenate([quiet, x, quiet, x, quiet])
    inside = trim_silence(x, rate)
    at = speech_segments(x, rate)[0][0]
    np.testing.assert_array_equal(inside, x[at : at + len(inside)])
    assert len(inside) / rate == pytest.approx(23, abs=1.5)
    short = trim_silence(x, rate, max_pause_seconds=0.5)
    assert (len(inside) - len(short)) / rate > 2.4
    assert speech_seconds(short, rate) == pytest.approx(speech_seconds(x, rate), rel=0.05)


def test_a_good_recording_is_called_good(speech):
    quality = measure_quality(speech.samples, speech.sample_rate)
    assert quality.advice() == ()
    assert quality.speech_ratio > 0.7
    assert quality.snr_db > 20


def test_noise_is_removed_from_real_speech(speech):
    x = speech.samples[: 10 * speech.sample_rate]
    noise = np.random.default_rng(0).standard_normal(len(x)).astype(np.float32) * x.std()
    noise *= np.float32(10 ** (-5 / 20))
    error = denoise(x + noise, speech.sample_rate) - x
    assert 10 * np.log10(np.mean(x**2) / np.mean(error**2)) > 8
    assert speech_seconds(x, speech.sample_rate) > 5
