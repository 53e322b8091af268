"""What a converter misses of a voice, learnt from its reference without training."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from auto_voice.audio.frames import stretches
from auto_voice.models import converter_model
from auto_voice.models.correction import estimate, loud
from auto_voice.types import Content, Mel, Pitch
from auto_voice.voices.cloning import build_voice

BANDS = 80


def smooth_mel(rng, frames):
    """Log-mels whose neighbouring bands go together, as in speech."""
    kernel = np.hanning(15)
    noise = rng.standard_normal((frames, BANDS + 14))
    rows = np.stack([np.convolve(row, kernel, mode="valid") for row in noise])
    return (rows / np.sqrt(np.square(kernel).sum()) * 2 - 5.5).astype(np.float32)


def test_a_linear_error_is_found_and_undone_in_speech_that_was_not_seen():
    rng = np.random.default_rng(0)
    drawn, later = smooth_mel(rng, 4000), smooth_mel(rng, 500)
    tilt = np.linspace(0.6, -0.4, BANDS).astype(np.float32)
    blur = np.eye(BANDS, dtype=np.float32) * 1.3 - 0.15 * np.eye(BANDS, k=1, dtype=np.float32)

    def true(mel):
        return (mel + 5.5) @ blur - 5.5 + tilt

    found = estimate(drawn, true(drawn), ridge=1.0)
    assert np.abs(later - true(later)).mean() > 0.3
    assert np.abs(found(later) - true(later)).mean() < 0.02


def test_little_speech_already_helps_and_more_helps_more():
    rng = np.random.default_rng(1)
    drawn, later = smooth_mel(rng, 3000), smooth_mel(rng, 500)

    def true(mel):
        return 1.4 * (mel + 5.5) - 5.0

    def error(frames):
        found = estimate(drawn[:frames], true(drawn[:frames]), 1000.0)
        return float(np.abs(found(later) - true(later)).mean())

    uncorrected = float(np.abs(later - true(later)).mean())
    assert uncorrected > error(40) > error(300) > error(3000)
    assert error(40) < 0.6 * uncorrected
    assert error(3000) < 0.25 * uncorrected


def test_half_of_the_spread_that_least_squares_takes_is_given_back():
    rng = np.random.default_rng(2)
    true = smooth_mel(rng, 5000)
    # Half of what is drawn is not in the speech.
    drawn = (true + smooth_mel(rng, 5000)) / 2
    found = estimate(drawn, true, 1.0)
    speech = loud(true)
    taken = (drawn[speech] - found.centre) @ found.weight
    spread = true[speech].std(0)
    # The share r of a band's spread that regression explains becomes its square root.
    assert 0.7 < np.median(taken.std(0) / spread) < 1


def test_quiet_frames_do_not_count():
    rng = np.random.default_rng(3)
    drawn = smooth_mel(rng, 1000)
    true = drawn.copy()
    true[:250] = -11.5
    found = estimate(drawn, true, 1.0)
    assert np.abs(found(drawn[250:]) - drawn[250:]).max() < 1e-3


@pytest.mark.parametrize(("total", "wanted"), [(10, 10), (7, 1), (1300, 1200), (5000, 1200)])
def test_stretches_are_spread_evenly_and_hold_neighbours_together(total, wanted):
    places = stretches(total, wanted)
    assert len(places) == wanted
    assert places[0] >= 0
    assert places[-1] < total
    steps = np.diff(places)
    assert (steps > 0).all()
    assert (steps > 1).sum() <= -(-wanted // 200)
    assert places.mean() == pytest.approx((total - 1) / 2, abs=1)


@pytest.fixture
def reading(weights_registry):
    """The converter, and a voice made of each half of one reader's recording."""
    recording = weights_registry.load("sample_two_cities")
    half = len(recording.samples) // 2
    converter = weights_registry.load("converter_compact")
    encoders = (
        weights_registry.load("speaker_encoder"),
        weights_registry.load("content_whisper"),
    )
    parts = (recording.samples[:half], recording.samples[half:])
    return converter, [
        build_voice([("the reading", replace(recording, samples=part))], *encoders, "", 12.0)
        for part in parts
    ]


@pytest.mark.weights
def test_later_speech_of_the_reader_comes_nearer_to_the_truth(reading):
    converter, (known, later) = reading
    assert converter.correction > 0
    rate = converter.sample_rate / converter.hop_samples
    frames = later.frames
    voiced = frames["pitch"][:, 1] > 0.5
    f0_hz = np.where(voiced, np.exp(frames["pitch"][:, 0]), 0)
    drawn = converter.convert(
        Content(frames["content"], rate, converter.content_space),
        Pitch(np.repeat(f0_hz, 2), np.repeat(voiced, 2), 2 * rate),
        known,
        len(voiced),
    )
    corrected = converter.corrected(drawn, known)
    true = frames["mel"].T
    speech = loud(true.T)

    def error(mel):
        return float(np.abs(mel.values - true)[:, speech].mean())

    assert error(corrected) < 0.97 * error(drawn)
    assert not np.allclose(converter.corrected(drawn, later).values, corrected.values, atol=0.1)


@pytest.mark.weights
def test_a_map_is_estimated_once_for_a_voice_whatever_pitch_it_is_to_speak_at(reading, monkeypatch):
    converter, (voice, _) = reading
    mel = Mel(voice.frames["mel"].T, converter.sample_rate, converter.hop_samples)
    converter._corrections.clear()
    drawn = []
    convert = converter.convert

    def counted(content, pitch, voice, frames):
        drawn.append(frames)
        return convert(content, pitch, voice, frames)

    monkeypatch.setattr(converter, "convert", counted)
    corrected = converter.corrected(mel, replace(voice, log_f0_mean=None))
    for other in (replace(voice, frames=dict(voice.frames)), replace(voice, log_f0_mean=5.5)):
        assert np.array_equal(converter.corrected(mel, other).values, corrected.values)
    assert drawn == [min(1200, len(voice.frames["mel"]))]
    monkeypatch.setattr(converter_model, "CORRECTIONS_KEPT", 1)
    moved = replace(voice, embedding=-voice.embedding)
    for other in (moved, voice):
        converter.corrected(mel, other)
    assert len(drawn) == 3
    assert len(converter._corrections) == 1


@pytest.mark.weights
def test_a_voice_that_never_had_a_pitch_is_corrected_too(reading):
    converter, (voice, _) = reading
    whispered = dict(voice.frames) | {"pitch": voice.frames["pitch"] * np.float32([1, 0])}
    mel = Mel(voice.frames["mel"].T, converter.sample_rate, converter.hop_samples)
    made = converter.corrected(mel, replace(voice, frames=whispered, log_f0_mean=None))
    assert np.isfinite(made.values).all()
    assert not np.array_equal(made.values, mel.values)


@pytest.mark.weights
def test_what_cannot_be_corrected_stays_as_it_is(reading):
    converter, (voice, _) = reading
    mel = Mel(voice.frames["mel"].T, converter.sample_rate, converter.hop_samples)
    tuned = {"head.bias": np.zeros(160, np.float16)}
    nothing = {name: values[:0] for name, values in voice.frames.items()}
    for changes in ({"frames": {}}, {"frames": nothing}, {"fine_tuning": tuned}):
        assert converter.corrected(mel, replace(voice, **changes)) is mel


def test_half_a_second_of_speech_changes_a_spread_by_little():
    rng = np.random.default_rng(4)
    true = smooth_mel(rng, 43)
    found = estimate(smooth_mel(rng, 43), true, 1000.0)
    assert np.diag(found.weight).min() > 0.8
    assert np.diag(found.weight).max() < 1.25
