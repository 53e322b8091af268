from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from audio_signals import speech_like, tone
from auto_voice.audio.frames import runs
from auto_voice.audio.quality import (
    MUSIC_SHARE,
    RecordingQuality,
    bandwidth,
    clipping_ratio,
    decay_time,
    measure_quality,
    signal_to_noise,
    tonal_background,
)
from auto_voice.audio.resample import resample

RATE = 16_000


def syllables(x):
    """Where the made-up speech sounds, by its level; the detector of real speech hears little."""
    loud = np.convolve(np.abs(x), np.ones(1600) / 1600, "same") > 0.002
    return [(int(start), int(stop)) for start, stop in runs(loud)]


def active_power(x, spans):
    return float(np.mean(np.concatenate([x[start:end] for start, end in spans]) ** 2))


@pytest.mark.parametrize("snr_db", [0, 5, 10, 20, 30, 40])
@pytest.mark.parametrize("pauses", [True, False])
def test_the_snr_of_a_known_mixture_is_found(snr_db, pauses):
    x = speech_like(8.0)
    clean_spans = syllables(x)
    noise = np.random.default_rng(0).standard_normal(len(x))
    noise *= np.sqrt(active_power(x, clean_spans) / 10 ** (snr_db / 10))
    mixed = (x + noise).astype(np.float32)
    spans = clean_spans if pauses else [(0, len(x))]
    got = signal_to_noise(mixed, RATE, spans)
    if pauses:
        assert got == pytest.approx(snr_db, abs=1.5)
    else:
        assert got == pytest.approx(snr_db, abs=5)


def test_snr_bounds():
    x = speech_like(4.0)
    assert signal_to_noise(x, RATE, syllables(x)) == 80.0
    assert signal_to_noise(x, RATE, []) is None
    assert signal_to_noise(x[:10], RATE, [(0, 10)]) is None
    assert signal_to_noise(np.zeros(RATE, np.float32), RATE, [(0, RATE)]) is None


@pytest.mark.parametrize("gain", [1.0, 0.3])
def test_clipping_is_found_at_any_level(gain):
    x = speech_like(4.0)
    limit = np.quantile(np.abs(x), 0.99)
    clipped = np.clip(x, -limit, limit)
    cut = np.mean(np.abs(x) >= limit)
    got = clipping_ratio(clipped * np.float32(gain))
    assert 0.2 * cut < got <= 1.1 * cut
    assert clipping_ratio(x * np.float32(gain)) == 0.0


def test_smooth_waves_and_silence_are_not_clipped():
    assert clipping_ratio(np.zeros(1000, np.float32)) == 0
    assert clipping_ratio(np.zeros(0, np.float32)) == 0
    assert clipping_ratio(tone(440)) == 0


@pytest.mark.parametrize("original", [8_000, 16_000, 22_050])
def test_bandwidth_shows_what_a_recording_was_before_it_was_resampled(original):
    noise = np.random.default_rng(0).standard_normal(2 * original).astype(np.float32) * 0.1
    got = bandwidth(resample(noise, original, 48_000), 48_000)
    assert got == pytest.approx(original / 2, rel=0.06)
    assert bandwidth(np.zeros(RATE, np.float32), RATE) == 0
    assert bandwidth(noise[:10], RATE) == 0


def in_room(x, decay_seconds, seed=0):
    """``x`` far from the microphone, in a room that decays by 60 dB in ``decay_seconds``."""
    n = round(RATE * decay_seconds)
    tail = np.random.default_rng(seed).standard_normal(n)
    tail *= 10 ** (-3 * np.arange(n) / RATE / decay_seconds)
    tail /= np.sqrt(np.square(tail).sum())
    size = len(x) + n
    wet = np.fft.irfft(np.fft.rfft(x, size) * np.fft.rfft(tail, size), size)
    return wet[: len(x)].astype(np.float32)


def test_decay_grows_with_the_reverberation_of_the_room():
    x = speech_like(10.0)
    heard = [decay_time(in_room(x, seconds), RATE) for seconds in (0.2, 0.4, 0.8)]
    assert None not in heard
    assert heard[0] < heard[1] < heard[2]
    assert heard == pytest.approx([0.2, 0.4, 0.8], rel=0.35)


def test_decay_needs_decays():
    assert decay_time(np.zeros(100, np.float32), RATE) is None
    assert decay_time(tone(1000, 3.0), RATE) is None


def chords(seconds, rms):
    """A chord of three notes with overtones every half second."""
    rng = np.random.default_rng(0)
    t = np.arange(RATE // 2) / RATE
    beats = []
    for _ in range(round(2 * seconds)):
        notes = rng.choice([131, 165, 196, 220, 262, 330, 392, 440], 3, replace=False)
        beat = sum(np.sin(2 * np.pi * f * k * t) / k for f in notes for k in range(1, 5))
        beats.append(beat * np.exp(-2 * t))
    x = np.concatenate(beats)
    return (rms * x / x.std()).astype(np.float32)


def test_music_behind_speech_is_found_and_noise_and_hum_are_not():
    quiet = np.zeros(3 * RATE)
    x = np.concatenate([quiet, speech_like(4.0), quiet]).astype(np.float32)
    spans = [(3 * RATE, 7 * RATE)]
    level = float(x[3 * RATE : 7 * RATE].std())
    t = np.arange(len(x)) / RATE
    hum = sum(np.sin(2 * np.pi * 50 * k * t) / k for k in range(1, 12))
    backgrounds = {
        "silence": np.zeros(len(x)),
        "noise": 0.05 * level * np.random.default_rng(0).standard_normal(len(x)),
        "hum": 0.1 * level * hum,
        "music": chords(10.0, 0.05 * level),
        "inaudible music": chords(10.0, 0.0005 * level),
    }
    found = {
        name: tonal_background((x + other).astype(np.float32), RATE, spans)
        for name, other in backgrounds.items()
    }
    assert found.pop("music") > 0.6
    assert max(found.values()) < 0.1
    assert tonal_background(x, RATE, [(0, len(x))]) is None
    assert tonal_background(x, RATE, []) is None


@pytest.mark.parametrize("below_db", [10, 15, 20])
def test_music_is_found_down_to_20_db_below_the_speech_and_in_short_pauses(below_db):
    part, pause = 3 * RATE, RATE // 2
    x = np.tile(np.concatenate([speech_like(3.0), np.zeros(pause)]), 3).astype(np.float32)
    spans = [(at, at + part) for at in range(0, len(x), part + pause)]
    level = np.sqrt(active_power(x, spans))
    room = 10 ** (-35 / 20) * level * np.random.default_rng(1).standard_normal(len(x))
    music = chords(11.0, 10 ** (-below_db / 20) * level)[: len(x)]
    assert tonal_background((x + room).astype(np.float32), RATE, spans) <= MUSIC_SHARE / 2
    assert tonal_background((x + room + music).astype(np.float32), RATE, spans) > MUSIC_SHARE


def test_the_end_of_a_vowel_is_no_music():
    x = np.concatenate([speech_like(3.0), np.zeros(RATE)]).astype(np.float32)
    x[3 * RATE + 1700 :][:1400] += tone(220, 0.2)[:1400] * np.float32(0.05)
    assert tonal_background(x, RATE, [(0, 3 * RATE)]) <= MUSIC_SHARE / 2


GOOD = RecordingQuality(
    seconds=10.0,
    speech_seconds=8.0,
    speech_ratio=0.8,
    peak=0.5,
    loudness_lufs=-23.0,
    snr_db=40.0,
    clipping_ratio=0.0,
    bandwidth_hz=8000.0,
    decay_seconds=0.2,
)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"speech_seconds": 1.8}, "only 1.8 s of speech"),
        ({"snr_db": 9.0}, "noisy"),
        ({"clipping_ratio": 0.02}, "clipped"),
        ({"decay_seconds": 0.9}, "reverberant"),
        ({"bandwidth_hz": 3800.0}, "narrow band"),
        ({"speech_seconds": 0.0}, "no speech was found"),
    ],
)
def test_a_good_recording_needs_no_advice_and_each_fault_gets_its_own(fault, words):
    assert GOOD.advice() == ()
    (found,) = replace(GOOD, **fault).advice()
    assert words in found


def test_noise_has_no_speech():
    rng = np.random.default_rng(0)
    quality = measure_quality((0.01 * rng.standard_normal(3 * RATE)).astype(np.float32), RATE)
    assert quality.speech_seconds == 0
    assert "no speech was found" in quality.advice()[0]


def test_the_figures_are_plain_json():
    for x in (speech_like(4.0), np.zeros(RATE, np.float32), np.zeros(0, np.float32)):
        quality = measure_quality(x, RATE)
        text = json.dumps(quality.as_dict(), allow_nan=False)
        assert json.loads(text)["seconds"] == len(x) / RATE
        assert 0 <= quality.speech_ratio <= 1
