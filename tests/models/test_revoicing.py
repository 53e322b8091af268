"""A second pass: the source's cepstra become those of the voice."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from auto_voice.audio.mel import (
    CEPSTRA_SIZE,
    CONTENT_MEL,
    HIFIGAN_MEL,
    cepstra,
    cepstral_change,
    log_mel,
)
from auto_voice.audio.resample import resample
from auto_voice.inference.controls import Controls
from auto_voice.inference.effects import warp_formants
from auto_voice.inference.rendering import mel_in, rehearse
from auto_voice.models.converter_model import ConverterShape
from auto_voice.models.correction import loud
from auto_voice.types import Content, Mel
from auto_voice.voices.cloning import build_voice

RATE = HIFIGAN_MEL.sample_rate / HIFIGAN_MEL.hop_samples


def speech_mels(samples, rate):
    """What the vocoder and the content encoder know of the sound."""
    return (
        log_mel(resample(samples, rate, 22050), HIFIGAN_MEL),
        log_mel(resample(samples, rate, 16000), CONTENT_MEL),
    )


def test_a_filter_moves_the_cepstra_by_what_it_does_to_the_mel():
    rng = np.random.default_rng(0)
    sound = (0.1 * rng.standard_normal(32000)).astype(np.float32)
    spectrum = np.fft.rfft(sound)
    tilt = np.linspace(1.5, -1.0, len(spectrum))
    filtered = np.fft.irfft(spectrum * np.exp(tilt), len(sound)).astype(np.float32)
    (before, known), (after, true) = (speech_mels(x, 16000) for x in (sound, filtered))
    content = Content(np.zeros((known.shape[1] // 2, CEPSTRA_SIZE), np.float32), 50.0, "x")
    found = cepstral_change(2 * (after - before), RATE, content)
    wanted = cepstra(true) - cepstra(known)
    assert found.shape == wanted.shape
    inside = slice(3, -3)
    # The noise differs from window to window; the mean over time is the filter.
    assert np.abs(found[inside].mean(0) - wanted[inside].mean(0)).max() < 0.02
    assert np.abs(wanted[inside].mean(0)).max() > 0.1


def test_both_halves_of_a_frame_lie_where_they_are_heard_at_any_rate():
    """A ramp over time is read at 5 ms before and after the centre of each frame."""
    ramp = np.outer(np.ones(80), np.arange(60) + 0.5).astype(np.float32) / np.float32(RATE)
    for rate in (50.0, RATE):
        content = Content(np.zeros((int(0.5 * rate), CEPSTRA_SIZE), np.float32), rate, "x")
        found = cepstral_change(ramp, RATE, content).reshape(-1, 2, CEPSTRA_SIZE // 2)
        unit = cepstral_change(np.ones((80, 60), np.float32), RATE, content)[0, 0]
        centres = (np.arange(len(found)) + 0.5) / rate
        for half, offset in enumerate((-0.005, 0.005)):
            np.testing.assert_allclose(found[1:, half, 0] / unit, centres[1:] + offset, atol=1e-4)


@pytest.mark.weights
def test_a_longer_vocal_tract_moves_the_cepstra_as_its_sound_would(weights_registry):
    """Moved formants of the mel are moved formants of the cepstra, frame by frame."""
    recording = weights_registry.load("sample_clone_test")
    samples = recording.samples[: 4 * recording.sample_rate]
    mel, known = speech_mels(samples, recording.sample_rate)
    moved = warp_formants(Mel(mel, 22050, 256), 1.15).values
    content = Content(np.zeros((known.shape[1] // 2, CEPSTRA_SIZE), np.float32), 50.0, "x")
    found = cepstral_change(2 * (moved - mel), RATE, content)
    wanted = cepstra(warp_formants(Mel(known, 16000, 160), 1.15).values) - cepstra(known)
    loud = known.mean(0).reshape(-1, 2).mean(1) > np.median(known)
    matching = np.corrcoef(found[loud].ravel(), wanted[loud].ravel())[0, 1]
    assert matching > 0.8


@pytest.fixture
def readers(weights_registry):
    """The converter, and a voice of each of two speakers."""
    converter = weights_registry.load("converter_compact")
    converter._mean_changes.clear()
    encoders = (
        weights_registry.load("speaker_encoder"),
        weights_registry.load("content_whisper"),
    )
    voices = []
    for name in ("sample_two_cities", "sample_clone_test"):
        recording = weights_registry.load(name)
        part = replace(recording, samples=recording.samples[: 5 * recording.sample_rate])
        voices.append(build_voice([(name, part)], *encoders, "", 12.0))
    return converter, *voices


def both_mels(converter, content, pitch, frames, voice, own):
    """Of one content, in the voice and corrected, and in the source's own."""
    theirs = replace(own, log_f0_mean=voice.log_f0_mean)
    mel = converter.convert(content, pitch, voice, frames)
    return (
        converter.corrected(mel, voice),
        converter.convert(content, pitch, theirs, frames),
        theirs,
    )


def own_speech(converter, voice):
    """The reference of a voice as a source."""
    return converter._spoken(voice.frames, len(voice.frames["mel"]))


@pytest.mark.weights
def test_only_the_cepstra_move_and_their_mean_over_speech_stays(readers):
    converter, voice, own = readers
    content, pitch, true, *_ = own_speech(converter, own)
    mel, start, theirs = both_mels(converter, content, pitch, len(true), voice, own)
    after = converter.revoiced(content, mel, start, voice, theirs)
    learned = slice(None, -CEPSTRA_SIZE)
    assert np.array_equal(after.features[:, learned], content.features[:, learned])
    assert after.space == content.space
    moved = (after.features - content.features)[:, -CEPSTRA_SIZE:]
    speech = loud(true)
    spread = np.sqrt(np.square(moved[speech]).mean())
    assert spread > 0.2
    # By much less than they move, though the voices were recorded at other levels.
    assert np.abs(moved[speech].mean(0)).mean() < 0.5 * spread
    louder = converter.revoiced(
        content, replace(mel, values=mel.values + 1), start, voice, theirs
    ).features - after.features  # fmt: skip
    assert louder[:, -CEPSTRA_SIZE].mean() > 0.5
    assert np.abs(louder[:, 1 - CEPSTRA_SIZE : -CEPSTRA_SIZE // 2]).max() < 1e-3


@pytest.mark.weights
def test_the_envelope_comes_nearer_to_the_voice_that_says_the_same(readers, monkeypatch):
    """Said by another speaker, a sentence has cepstra like the voice's own after the second pass:
    converted from there it comes nearer to what the voice's own recording is."""
    converter, voice, own = readers
    # A correction leads from what is drawn to the reference, which the way back does not undo.
    monkeypatch.setattr(converter, "correction", 0.0)
    content, pitch, true, *_ = own_speech(converter, voice)
    # The same sentence in the other's voice, whose cepstra are known from its mel.
    mel, start, theirs = both_mels(converter, content, pitch, len(true), own, voice)
    foreign = converter.revoiced(content, mel, start, own, theirs)
    mel, start, theirs = both_mels(converter, foreign, pitch, len(true), voice, own)
    again = converter.revoiced(foreign, mel, start, voice, theirs)
    speech = loud(true)

    def error(heard):
        return np.square((heard.features - content.features)[speech, -CEPSTRA_SIZE:]).mean()

    assert error(again) < 0.3 * error(foreign)


@pytest.mark.weights
def test_in_its_own_voice_nothing_moves(readers, monkeypatch):
    converter, voice, _ = readers
    monkeypatch.setattr(converter, "correction", 0.0)
    content, pitch, true, *_ = own_speech(converter, voice)
    mel = converter.convert(content, pitch, voice, len(true))
    same = converter.revoiced(content, mel, mel, voice, voice)
    np.testing.assert_allclose(same.features, content.features, atol=1e-5)


@pytest.mark.weights
def test_the_mean_difference_of_two_voices_is_found_once(readers, monkeypatch):
    converter, voice, own = readers
    content, pitch, true, *_ = own_speech(converter, own)
    mel, start, theirs = both_mels(converter, content, pitch, len(true), voice, own)
    first = converter.revoiced(content, mel, start, voice, theirs)
    monkeypatch.setattr(converter, "convert", None)  # Nothing more is drawn.
    again = converter.revoiced(content, mel, start, voice, theirs)
    assert np.array_equal(first.features, again.features)
    monkeypatch.undo()
    # But anew for each pair, and for other speech of the same voice.
    half = {name: values[len(values) // 2 :] for name, values in voice.frames.items()}
    for pair in ((own, voice), (voice, voice), (replace(voice, frames=half), own)):
        converter.revoiced(content, mel, start, *pair)
    means = list(converter._mean_changes.values())
    assert len(means) == 4
    assert all(np.abs(a - b).mean() > 1e-3 for a, b in combinations(means, 2))


@pytest.mark.weights
def test_where_it_cannot_be_told_there_is_no_second_pass(readers, monkeypatch):
    converter, voice, own = readers
    content, pitch, true, *_ = own_speech(converter, own)
    mel, start, _ = both_mels(converter, content, pitch, len(true), voice, own)
    assert converter.second_pass > 0
    for pair in ((voice, replace(own, frames={})), (replace(voice, frames={}), own)):
        assert converter.revoiced(content, mel, start, *pair) is None
    monkeypatch.setattr(converter, "shape", ConverterShape(dims=176))
    assert converter.revoiced(content, mel, start, voice, own) is None


@pytest.mark.weights
def test_a_rehearsal_makes_ready_what_a_conversion_of_the_two_voices_needs(
    readers, weights_registry
):
    converter, voice, own = readers
    converter._corrections.clear()
    rehearse(voice, weights_registry.load("content_whisper"), converter, own)
    known = set(converter._corrections), set(converter._mean_changes)
    assert [len(keys) for keys in known] == [1, 1]
    content, pitch, true, *_ = own_speech(converter, own)
    mel_in(voice, content, pitch, len(true), converter, Controls(), own)
    assert known == (set(converter._corrections), set(converter._mean_changes))
