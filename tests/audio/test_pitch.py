from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_voice.audio.pitch import (
    DETECTOR_FRAMES,
    FRAME_RATE,
    NEUTRAL_LOG_F0,
    PitchStream,
    align_pitch,
    extract_pitch,
    log_f0_statistics,
    transpose,
)
from auto_voice.types import Pitch


def voice(f0_hz, rate=16_000, peak=0.5):
    """Harmonics up to 4 kHz that fall by 6 dB an octave, at the given F0 of every sample."""
    f0 = np.asarray(f0_hz, np.float64)
    phase = 2 * np.pi * np.cumsum(f0) / rate
    x = np.zeros(len(f0))
    for harmonic in range(1, 40):
        x += np.where(harmonic * f0 < 4000, np.sin(harmonic * phase) / harmonic, 0.0)
    return (peak * x / np.abs(x).max()).astype(np.float32)


def cents(a, b):
    return 1200 * np.log2(np.asarray(a) / np.asarray(b))


@pytest.mark.parametrize("f0", [80.0, 120.0, 220.0, 350.0, 600.0])
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_a_steady_voice_is_found_within_20_cents(f0, rate):
    got = extract_pitch(voice(np.full(rate, f0), rate), rate)
    inner = slice(5, -5)
    assert got.frame_rate == FRAME_RATE
    assert got.voiced[inner].mean() > 0.95
    found = got.f0_hz[inner][got.voiced[inner]]
    assert np.abs(cents(np.median(found), f0)) < 20
    assert np.quantile(np.abs(cents(found, f0)), 0.9) < 30


def test_a_glide_is_followed_in_time():
    time = np.arange(3 * 16_000) / 16_000
    f0 = 110 * 2 ** (time / 3)
    got = extract_pitch(voice(f0), 16_000)
    at = np.arange(len(got.f0_hz)) / got.frame_rate
    error = cents(got.f0_hz, 110 * 2 ** (at / 3))
    inner = slice(10, -10)
    assert got.voiced[inner].mean() > 0.95
    # One frame too early or late would be a bias of 6 cents on this slope of 400 a second.
    assert np.abs(np.median(error[inner])) < 10
    assert np.quantile(np.abs(error[inner]), 0.95) < 40


def test_a_jump_is_heard_when_it_happens():
    f0 = np.where(np.arange(32_000) < 16_000, 130.0, 200.0)
    got = extract_pitch(voice(f0), 16_000)
    low = np.flatnonzero(np.abs(cents(got.f0_hz, 130.0)) < 100)
    high = np.flatnonzero(np.abs(cents(got.f0_hz, 200.0)) < 100)
    inner_low, inner_high = low[low > 5], high[high < len(got.f0_hz) - 5]
    assert (inner_low.max() + inner_high.min()) / 2 / FRAME_RATE == pytest.approx(1.0, abs=0.032)


def test_an_octave_is_an_octave():
    low, high = (
        np.median(extract_pitch(voice(np.full(16_000, f0)), 16_000).f0_hz[5:-5])
        for f0 in (140, 280)
    )
    assert high / low == pytest.approx(2.0, rel=0.01)


@pytest.mark.parametrize("peak", [0.01, 0.9])
def test_level_does_not_move_the_pitch(peak):
    got = extract_pitch(voice(np.full(16_000, 180.0), peak=peak), 16_000)
    assert np.abs(cents(np.median(got.f0_hz[5:-5]), 180.0)) < 20


@pytest.mark.parametrize("line", [49.8, 50.0, 60.0])
def test_mains_hum_in_the_pauses_is_no_voice(line):
    rate, second = 16_000, np.arange(16_000) / 16_000
    hum = sum(np.sin(2 * np.pi * line * h * second) / h for h in (1, 2, 3)).astype(np.float32)
    pause = 0.05 * hum
    speech = voice(np.full(rate, 140.0)) + pause
    found = extract_pitch(np.concatenate([pause, speech, pause]), rate)
    inside = np.arange(len(found.voiced)) / FRAME_RATE
    spoken = (inside > 1.05) & (inside < 1.95)
    assert found.voiced[spoken].mean() > 0.95
    assert not found.voiced[(inside < 0.95) | (inside > 2.05)].any()
    assert np.abs(cents(found.f0_hz[spoken], 140.0)).max() < 30


def test_hum_in_noise_is_no_voice_either():
    second = np.arange(48_000) / 16_000
    hum = sum(np.sin(2 * np.pi * 60 * h * second) / h for h in (1, 2, 3))
    hiss = np.random.default_rng(0).standard_normal(len(second))
    found = extract_pitch((0.05 * hum + 0.01 * hiss).astype(np.float32), 16_000)
    assert (np.abs(found.f0_hz - 60.0) < 1.0).mean() > 0.5
    assert found.voiced.mean() < 0.05


@pytest.mark.parametrize("line", [50.0, 60.0])
@pytest.mark.parametrize("around", ["silence", "another note", "nothing"])
def test_a_note_that_is_held_on_a_mains_line_is_a_voice(line, around):
    rate = 16_000
    note = voice(np.full(2 * rate, line))
    beside = {"silence": np.zeros(rate), "another note": voice(np.full(rate, 90.0))}
    beside["nothing"] = np.zeros(0)
    parts = [beside[around], note, beside[around]]
    found = extract_pitch(np.concatenate(parts).astype(np.float32), rate)
    start = len(parts[0]) / rate
    inside = np.arange(len(found.voiced)) / FRAME_RATE
    held = (inside > start + 0.2) & (inside < start + 1.8)
    assert found.voiced[held].mean() > 0.9
    assert np.abs(cents(found.f0_hz[held], line)).max() < 30


@pytest.mark.parametrize("f0", [52.5, 57.0, 63.0])
def test_a_low_voice_beside_a_mains_line_is_heard(f0):
    found = extract_pitch(voice(np.full(32_000, f0)), 16_000)
    assert found.voiced[10:-10].mean() > 0.9


@pytest.mark.parametrize(("high", "low", "seconds"), [(100.0, 50.0, 0.5), (65.0, 55.0, 0.5)])
def test_creak_that_passes_a_mains_line_is_heard(high, low, seconds):
    time = np.linspace(0.0, 1.0, round(16_000 * seconds))
    found = extract_pitch(voice(high * (low / high) ** time), 16_000)
    near = np.abs(found.f0_hz - 60.0) < 1.0
    assert near.any()
    assert found.voiced[near].all()


def test_silence_and_hiss_have_no_pitch():
    rng = np.random.default_rng(0)
    assert extract_pitch(np.zeros(16_000, np.float32), 16_000).voiced.mean() == 0
    hiss = 0.1 * rng.standard_normal(32_000).astype(np.float32)
    assert extract_pitch(hiss, 16_000).voiced.mean() < 0.05


@pytest.mark.parametrize("samples", [0, 1, 100, 256, 1000])
def test_short_input_gives_a_short_track(samples):
    got = extract_pitch(np.zeros(samples, np.float32), 16_000)
    assert len(got.f0_hz) == len(got.voiced)
    assert abs(len(got.f0_hz) - samples / 256) <= 1


def track(f0, voiced=None, rate=FRAME_RATE):
    f0 = np.asarray(f0, np.float32)
    flags = np.ones(len(f0), np.bool_) if voiced is None else np.asarray(voiced, np.bool_)
    return Pitch(f0, flags, rate)


def test_alignment_is_linear_in_log_and_bridges_what_is_unvoiced():
    log_f0 = np.linspace(np.log(100), np.log(200), 63)
    voiced = np.ones(63, np.bool_)
    voiced[20:40] = False
    f0 = np.where(voiced, np.exp(log_f0), 999.0)
    got, flags = align_pitch(track(f0, voiced), 100.0, 98)
    centre = (np.arange(98) + 0.5) / 100.0
    np.testing.assert_allclose(got, np.log(100) + np.log(2) * centre * 62.5 / 62, atol=1e-4)
    np.testing.assert_array_equal(flags, voiced[np.round(centre * 62.5).astype(int)])


def test_alignment_holds_the_ends_and_is_neutral_without_voice():
    got, flags = align_pitch(track([100, 100]), 50.0, 10)
    np.testing.assert_allclose(got, np.log(100), atol=1e-6)
    assert len(flags) == 10
    got, flags = align_pitch(track([0, 0], [False, False]), 50.0, 10)
    np.testing.assert_allclose(got, NEUTRAL_LOG_F0, atol=1e-6)
    assert not flags.any()


@settings(max_examples=50)
@given(semitones=st.floats(-24, 24), f0=st.floats(60, 500))
def test_transposing_moves_the_mean_and_nothing_else(semitones, f0):
    before = track(f0 * np.linspace(0.9, 1.1, 30))
    after = transpose(before, semitones)
    mean, spread = log_f0_statistics(before)
    moved, still = log_f0_statistics(after)
    assert moved - mean == pytest.approx(semitones * np.log(2) / 12, abs=1e-4)
    assert still == pytest.approx(spread, abs=1e-4)
    np.testing.assert_allclose(transpose(after, -semitones).f0_hz, before.f0_hz, rtol=1e-5)


def test_statistics_ignore_octave_errors_and_unvoiced_frames():
    rng = np.random.default_rng(0)
    log_f0 = np.log(120) + 0.1 * rng.standard_normal(500)
    f0 = np.exp(log_f0)
    f0[::12] *= 2
    f0[5::12] /= 2
    voiced = np.ones(500, np.bool_)
    voiced[100:200] = False
    f0[100:200] = 900
    mean, spread = log_f0_statistics(track(f0, voiced))
    assert mean == pytest.approx(np.log(120), abs=0.02)
    assert spread == pytest.approx(0.1, abs=0.015)
    assert log_f0_statistics(track([100], [False])) is None


@pytest.mark.parametrize("rate_of_blocks", [5, 13])
def test_the_track_of_a_stream_is_that_of_the_whole(rate_of_blocks: int) -> None:
    """Away from the end of what is known, which the detector sees less of."""
    time = np.arange(2 * 16000) / 16000
    glide = np.cumsum(120 * 2 ** (time / 2)) / 16000
    samples = sum(np.sin(2 * np.pi * n * glide) / n for n in range(1, 9)).astype(np.float32)
    samples[8000:12000] = 0
    whole = extract_pitch(0.1 * samples, 16000)
    stream, ahead = PitchStream(), DETECTOR_FRAMES
    for stop in range(rate_of_blocks, 110, rate_of_blocks):
        first = max(0, stop - 40)
        part = 0.1 * samples[256 * first : 256 * (stop + ahead)]
        found = stream.extract(part, first, stop)
        known = slice(0, stop - first)
        expected = slice(first, stop)
        assert np.array_equal(found.voiced[known], whole.voiced[expected])
        both = found.voiced[known]
        np.testing.assert_allclose(found.f0_hz[known][both], whole.f0_hz[expected][both], rtol=1e-3)
