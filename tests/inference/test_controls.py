from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_voice.audio.loudness import LoudnessMeter, integrated_loudness, true_peak
from auto_voice.audio.mel import HIFIGAN_MEL, log_mel
from auto_voice.audio.pitch import align_pitch, corrected, extract_pitch, log_f0_statistics
from auto_voice.audio.quality import denoise
from auto_voice.errors import AudioContentError, ConfigError, ModelUnavailableError
from auto_voice.inference import conversion
from auto_voice.inference.analysis import denoised
from auto_voice.inference.controls import Controls, controls_from
from auto_voice.inference.effects import (
    aperiodicity,
    cut,
    filled,
    follow_level,
    frame_levels,
    moved,
    scatter,
    source_shape,
    warp_formants,
)
from auto_voice.inference.rendering import beyond, guidance
from auto_voice.types import Mel, Pitch, Voice, Waveform
from hand_made_stages import LocalConverter, LocalVocoder

RATE = 22050


class ToneVocoder(LocalVocoder):
    """Sings the melody that the hand-made converter writes into the first band."""

    def synthesize(self, mel):
        f0 = np.repeat(np.exp(mel[0].astype(np.float64)), 256)
        phase = 2 * np.pi * np.cumsum(f0) / RATE
        tone = sum(np.sin(k * phase) / k for k in range(1, 9))
        envelope = np.repeat(np.minimum(1, mel[2] * 20), 256)
        return (0.2 * tone * envelope)[None].astype(np.float32)


@pytest.fixture
def heard(hand_made, source):
    """Median F0 and spread of the result, measured in its sound."""
    pipeline, _ = hand_made(hifigan_universal=ToneVocoder())
    voice = pipeline.clone(Waveform(_speech(5.0, 200.0), 16000))

    def measure(**controls):
        result = pipeline.convert(source, voice, controls=Controls(**controls))
        pitch = extract_pitch(result.samples, result.sample_rate)
        # In pauses the mel is the source's own, which tells this vocoder nothing of the melody.
        level = frame_levels(result.samples, round(RATE / pitch.frame_rate), len(pitch.voiced))
        log_f0 = np.log(pitch.f0_hz[pitch.voiced & (level > level.max() - 25)])
        return float(np.exp(np.median(log_f0))), float(log_f0.std()), voice

    return measure


def _speech(seconds, f0_hz, seed=1):
    from hand_made_stages import speech_like

    return speech_like(seconds, f0_hz, seed=seed)


def harmonics(f0_hz, peak_hz, seconds=0.6, width=150.0):
    """A buzz with one formant."""
    t = np.arange(int(seconds * RATE)) / RATE
    out = np.zeros_like(t)
    for k in range(1, int(7000 / f0_hz)):
        out += np.sin(2 * np.pi * k * f0_hz * t + k) / (1 + ((k * f0_hz - peak_hz) / width) ** 2)
    return (0.1 * out / np.abs(out).max()).astype(np.float32)


def test_twelve_semitones_double_the_pitch_that_is_heard(heard):
    plain, _, voice = heard()
    up, _, _ = heard(semitones=12.0)
    assert plain == pytest.approx(np.exp(voice.log_f0_mean), rel=0.03)
    assert up / plain == pytest.approx(2.0, rel=0.01)


def test_pitch_range_scales_the_melody_and_keeps_its_height(heard):
    height, spread, _ = heard()
    wide_height, wide, _ = heard(pitch_range=2.0)
    _, flat, _ = heard(pitch_range=0.0)
    assert wide / spread == pytest.approx(2.0, rel=0.1)
    assert wide_height == pytest.approx(height, rel=0.03)
    assert flat < 0.1 * spread


@pytest.mark.parametrize("singing", [False, True])
def test_octave_errors_are_corrected_in_speech_and_songs_are_left_as_they_were_found(
    heard, monkeypatch, singing
):
    def flat(pitch, read, sample_rate):
        assert len(read(0, 400)) == 400
        assert sample_rate == 16000
        return Pitch(np.full_like(pitch.f0_hz, 120.0), pitch.voiced, pitch.frame_rate)

    monkeypatch.setattr("auto_voice.inference.analysis.corrected_by_sound", flat)
    _, spread, _ = heard(singing=singing)
    assert (spread > 0.02) == singing


def test_singing_keeps_pitch_classes(heard, source):
    own = np.median(log_f0 := _log_f0(source))
    height, _, voice = heard(singing=True)
    octaves = (np.log(height) - own) / np.log(2)
    assert abs(voice.log_f0_mean - log_f0.mean()) > 0.3  # the automatic move would not
    assert octaves == pytest.approx(round(octaves), abs=0.02)


def _log_f0(waveform):
    pitch = extract_pitch(waveform.samples, waveform.sample_rate)
    return np.log(pitch.f0_hz[pitch.voiced])


def melody(seed=0, seconds=8.0):
    rng = np.random.default_rng(seed)
    frames = int(seconds * 62.5)
    walk = np.cumsum(rng.standard_normal(frames)) * 0.01
    walk += 0.15 * np.sin(np.arange(frames) / 20)
    voiced = np.sin(np.arange(frames) / 9) > -0.6
    f0 = 120 * np.exp(walk - walk.mean())
    return Pitch(f0.astype(np.float32), voiced, 62.5)


@pytest.mark.parametrize("factor", [0.5, 2.0])
@pytest.mark.parametrize("share", [0.1, 0.35])
def test_octave_errors_are_folded_back(factor, share):
    true = melody()
    rng = np.random.default_rng(1)
    wrong = rng.random(len(true.f0_hz)) < share
    slipped = Pitch(np.where(wrong, factor * true.f0_hz, true.f0_hz), true.voiced, 62.5)
    fixed = corrected(slipped)
    off = np.abs(np.log(fixed.f0_hz / true.f0_hz))[true.voiced] > 0.1
    assert off.mean() < 0.01
    target = Voice(np.ones(256, np.float32) / 16, log_f0_mean=np.log(200.0), log_f0_std=0.2)
    assert moved(slipped, target, Controls())[1] == pytest.approx(
        moved(true, target, Controls())[1], abs=0.1
    )


def test_a_melody_without_errors_is_left_alone():
    true = melody(3)
    np.testing.assert_array_equal(corrected(true).f0_hz[true.voiced], true.f0_hz[true.voiced])
    silent = Pitch(true.f0_hz, np.zeros_like(true.voiced), 62.5)
    assert corrected(silent) is silent


def test_the_range_of_the_voice_can_be_taken():
    pitch = corrected(melody())
    target = Voice(np.ones(256, np.float32) / 16, log_f0_mean=5.0, log_f0_std=0.05)
    out, _, _ = moved(pitch, target, Controls(pitch_range="voice"))
    mean, spread = log_f0_statistics(out)
    assert mean == pytest.approx(5.0, abs=0.03)
    assert spread == pytest.approx(0.05, rel=0.15)


@pytest.mark.parametrize("pitch_range", [0.5, 2, 4, "voice"])
def test_a_creak_stays_an_octave_below_however_wide_the_melody_is(pitch_range):
    plain = melody()
    creak = slice(104, 128)
    f0 = plain.f0_hz.copy()
    f0[creak] /= 2
    target = Voice(np.ones(256, np.float32) / 16, log_f0_mean=5.0, log_f0_std=0.3)
    controls = Controls(pitch_range=pitch_range)
    expected, _, _ = moved(plain, target, controls)
    found, _, _ = moved(Pitch(f0, plain.voiced, 62.5), target, controls)
    octaves = np.log2(found.f0_hz / expected.f0_hz)[plain.voiced]
    inside = np.zeros(len(f0), bool)
    inside[creak] = True
    np.testing.assert_allclose(octaves, -1.0 * inside[plain.voiced], atol=1e-4)
    monotone, _, _ = moved(Pitch(f0, plain.voiced, 62.5), target, Controls(pitch_range=0))
    assert np.ptp(monotone.f0_hz[plain.voiced]) < 1e-3


@pytest.mark.parametrize(("start", "stop"), [(0, 200), (112, 334), (250, 500), (0, 500)])
def test_a_piece_of_a_melody_interpolates_as_the_whole_does(start, stop):
    whole = melody()
    part = cut(whole, filled(whole), start, stop)
    rate, frames = 62.5, len(whole.voiced)
    expected, voiced = align_pitch(whole, rate, frames)
    found, also = align_pitch(part, rate, stop - start)
    # Only at a cut may a frame differ or count as voiced where it is not.
    inner = slice(2 if start else 0, -2 if stop < frames else None)
    np.testing.assert_allclose(found[inner], expected[start:stop][inner], atol=1e-5)
    np.testing.assert_array_equal(also[inner], voiced[start:stop][inner])


def test_voices_far_apart_are_mentioned():
    target = Voice(np.ones(256, np.float32) / 16, log_f0_mean=np.log(600.0))
    assert "semitones apart" in moved(melody(), target, Controls())[2][0]


@pytest.mark.parametrize("semitones", [-4.0, 3.0, 6.0])
def test_formants_move_and_the_pitch_stays(semitones):
    ratio = 2 ** (semitones / 12)
    f0, peak = 220.0, 1200.0
    # What the converter is given: a melody that is lower by the ratio.
    lower = Mel(log_mel(harmonics(f0 / ratio, peak), HIFIGAN_MEL), RATE, 256)
    wanted = log_mel(harmonics(f0, peak * ratio, width=150 * ratio), HIFIGAN_MEL)
    warped = warp_formants(lower, ratio).values
    middle = slice(10, -10)

    def difference(a):
        shapes = [x[:, middle].mean(1) - x[:, middle].mean() for x in (a, wanted)]
        loud = shapes[1] > shapes[1].max() - 5
        return np.abs(shapes[0] - shapes[1])[loud].mean()

    assert difference(warped) < 0.7
    assert difference(warped) < 0.4 * difference(lower.values)
    assert warp_formants(lower, 1.0) is lower


def test_the_converter_gets_the_melody_that_formants_leave_room_for(hand_made, source, reference):
    pipeline, registry = hand_made()
    voice = pipeline.clone(reference)
    calls = registry.stages["converter_compact"].calls
    for formants in (0.0, 12.0):
        pipeline.convert(source, voice, controls=Controls(formants=formants))
    voiced = calls[0].pitch.voiced
    np.testing.assert_allclose(
        calls[0].pitch.f0_hz[voiced], 2 * calls[1].pitch.f0_hz[voiced], rtol=1e-5
    )


@pytest.mark.slow
def test_strength_goes_from_the_own_voice_to_the_other(hand_made, source, reference):
    pipeline, _ = hand_made()
    target, own = pipeline.clone(reference), pipeline.clone(source)
    results = [
        pipeline.convert(source, target, controls=Controls(strength=s)) for s in (0.0, 0.5, 1.0)
    ]
    likeness = [float(r.voice.embedding @ target.embedding) for r in results]
    assert likeness == sorted(likeness)
    assert float(results[0].voice.embedding @ own.embedding) == pytest.approx(1, abs=1e-3)
    half = (own.log_f0_mean + target.log_f0_mean) / 2
    assert results[1].voice.log_f0_mean == pytest.approx(half, abs=0.01)
    assert results[0].semitones == pytest.approx(0, abs=0.2)
    assert results[1].semitones == pytest.approx(results[2].semitones / 2, abs=0.2)
    assert len(results[1].voice.frames["mel"]) == len(results[1].voice.frames["content"])


class VoiceConverter(LocalConverter):
    """As loud as the first number of the voice's embedding tells."""

    def convert(self, content, pitch, voice, frames):
        mel = super().convert(content, pitch, voice, frames)
        mel.values[2:4] *= np.float32(1 + voice.embedding[:40].sum())
        return mel


def test_a_strength_above_one_goes_on_past_the_voice_away_from_the_sources_own(
    hand_made, source, reference
):
    converter = VoiceConverter()
    pipeline, _ = hand_made(converter_compact=converter)
    target, own = pipeline.clone(reference), pipeline.clone(source)

    def made(strength):
        converter.calls.clear()
        # The level of the source would hide how loud the converter spoke.
        controls = Controls(strength=strength, energy=0.0)
        return pipeline.convert(source, target, controls=controls), list(converter.calls)

    plain, calls = made(1.0)
    assert all(call.voice is calls[0].voice for call in calls)
    further, calls = made(1.2)
    assert further.semitones == plain.semitones
    assert further.summary()["controls"] == {"strength": 1.2, "energy": 0.0}
    for call, beside in zip(calls[::2], calls[1::2], strict=True):
        assert np.array_equal(call.voice.embedding, target.embedding)
        assert float(beside.voice.embedding @ own.embedding) == pytest.approx(1, abs=1e-3)
        assert beside.voice.log_f0_mean == call.voice.log_f0_mean
        assert beside.content is call.content
        assert np.array_equal(beside.pitch.f0_hz, call.pitch.f0_hz)
    assert not np.allclose(further.samples, plain.samples)


def test_a_converter_whose_record_asks_for_guidance_gets_it(hand_made, source, reference):
    guided, plain = VoiceConverter(), VoiceConverter()
    guided.guidance = 0.2
    pipeline, _ = hand_made(converter_compact=guided)
    unguided, _ = hand_made(converter_compact=plain)
    target = pipeline.clone(reference)

    def made(pipeline, voice, strength=1.0):
        controls = Controls(strength=strength, energy=0.0)
        return pipeline.convert(source, voice, controls=controls)

    result = made(pipeline, target)
    assert np.array_equal(result.samples, made(unguided, target, 1.2).samples)
    assert not np.allclose(result.samples, made(unguided, target).samples)
    # What was learnt of one voice tells nothing of the other.
    tuned = replace(target, fine_tuning={"x": np.zeros(1, np.float16)})
    assert guidance(guided, tuned, Controls()) == 0
    assert guidance(guided, target, Controls()) == 0.2
    # Both are known equally well.
    guided.calls.clear()
    made(pipeline, target.embedding)
    assert len({len(call.voice.frames) for call in guided.calls}) == 1


class Correcting(VoiceConverter):
    """Remembers what it was to correct."""

    def corrected(self, mel, voice):
        self.to_correct = (mel, voice)
        return replace(mel, values=mel.values * np.float32(0.5))


def test_what_is_drawn_of_a_voice_is_corrected_after_guidance(hand_made, source, reference):
    correcting, plain = Correcting(), VoiceConverter()
    target, controls = None, Controls(strength=1.2, energy=0.0)
    results = []
    for converter in (correcting, plain):
        pipeline, _ = hand_made(converter_compact=converter)
        target = target or pipeline.clone(reference)
        results.append(pipeline.convert(source, target, controls=controls))
    mel, voice = correcting.to_correct
    assert np.array_equal(voice.embedding, target.embedding)
    ahead, start = (
        correcting.convert(c.content, c.pitch, c.voice, c.frames) for c in correcting.calls[:2]
    )
    assert np.allclose(mel.values, beyond(ahead, start, 0.2).values, atol=1e-6)
    assert not np.allclose(results[0].samples, results[1].samples)


class Revoicing(VoiceConverter):
    """Moves the content by one, and remembers what it was told."""

    told, second_pass = None, 1.0

    def revoiced(self, content, mel, start, voice, own):
        self.told = mel, start, voice, own
        return replace(content, features=content.features + np.float32(1))


def test_the_mel_is_drawn_again_from_revoiced_content_and_led_away_from_the_same_start(
    hand_made, source, reference
):
    revoicing = Revoicing()
    revoicing.guidance = 0.1
    pipeline, _ = hand_made(converter_compact=revoicing)
    target = pipeline.clone(reference)
    result = pipeline.convert(source, target, controls=Controls(strength=1.2, energy=0.0))
    first, own, again = revoicing.calls
    assert np.allclose(again.content.features, first.content.features + 1)
    assert np.array_equal(again.voice.embedding, target.embedding)
    ahead, start = (revoicing.convert(c.content, c.pitch, c.voice, c.frames) for c in (first, own))
    mel, before, voice, theirs = revoicing.told
    # By what the record asks for: a strength above 1 goes beyond the voice once.
    assert np.allclose(mel.values, beyond(ahead, start, 0.1).values, atol=1e-6)
    assert np.array_equal(before.values, start.values)
    assert np.array_equal(voice.embedding, target.embedding)
    assert np.array_equal(theirs.embedding, own.voice.embedding)
    plain = VoiceConverter()
    plain.guidance = 0.1
    once, _ = hand_made(converter_compact=plain)
    single = once.convert(source, target, controls=Controls(strength=1.2, energy=0.0))
    assert not np.allclose(result.samples, single.samples)
    # Where nothing leads away from the source's voice, it is not known either.
    revoicing.calls.clear()
    revoicing.guidance = 0.0
    pipeline.convert(source, target)
    assert len(revoicing.calls) == 1
    # Nor where the record asks for none, or for no guidance, which it was measured with.
    for guided, passes in ((0.1, 0.0), (0.0, 1.0)):
        revoicing.calls.clear()
        revoicing.guidance, revoicing.second_pass = guided, passes
        pipeline.convert(source, target, controls=Controls(strength=1.2))
        assert len(revoicing.calls) == 2
    revoicing.calls.clear()
    revoicing.guidance, revoicing.second_pass = 0.1, 1.0
    tuned = replace(
        target, fine_tuning={"x": np.zeros(1, np.float16)}, fine_tuned_converter=revoicing.name
    )
    pipeline.convert(source, tuned, controls=Controls(strength=1.2))
    assert len(revoicing.calls) == 2


def test_what_a_converter_keeps_for_two_voices_is_made_beside_the_analysis(
    hand_made, source, reference, monkeypatch
):
    threads = []

    class Remembering(Revoicing):
        def revoiced(self, *told):
            threads.append(threading.current_thread())
            return super().revoiced(*told)

    remembering = Remembering()
    remembering.guidance = 0.1
    pipeline, _ = hand_made(converter_compact=remembering)
    target = pipeline.clone(reference)
    result = pipeline.convert(source, target)
    here = threading.current_thread()
    assert [thread is here for thread in threads] == [False, True]
    monkeypatch.setattr(conversion, "rehearse", lambda *_: None)
    again = pipeline.convert(source, target)
    assert len(threads) == 3
    assert np.array_equal(result.samples, again.samples)


def test_guidance_is_left_out_with_a_note_where_the_sources_voice_cannot_be_known(
    hand_made, source, reference
):
    converter = VoiceConverter()
    converter.guidance = 0.2
    pipeline, registry = hand_made(converter_compact=converter)
    target = pipeline.clone(reference)
    hiss = 0.001 * np.random.default_rng(0).standard_normal(RATE).astype(np.float32)
    result = pipeline.convert(Waveform(hiss, RATE), target)
    assert any("too little speech to know its own voice" in note for note in result.notes)
    for strength in (0.5, 1.3):
        with pytest.raises(AudioContentError, match="leave the strength at 1"):
            pipeline.convert(Waveform(hiss, RATE), target, controls=Controls(strength=strength))

    def gone(name, version=None):
        if name == "speaker_encoder":
            raise ModelUnavailableError("it is away.")
        return registry.stages[name]

    registry.load = gone
    result = pipeline.convert(source, target)
    assert any("speaker encoder cannot be had" in note for note in result.notes)
    with pytest.raises(ModelUnavailableError):
        pipeline.convert(source, target, controls=Controls(strength=1.2))


def test_beyond_is_a_line_through_both_mels():
    mel, start = (Mel(np.full((80, 3), v, np.float32), RATE, 256) for v in (2.0, 1.0))
    assert np.allclose(beyond(mel, start, 0.0).values, 2.0)
    assert np.allclose(beyond(mel, start, 0.25).values, 2.25)
    assert beyond(mel, start, 0.25).values.dtype == np.float32


def test_energy_follows_the_source():
    rng = np.random.default_rng(0)
    swell = 0.02 + 0.2 * np.repeat(rng.random(10), RATE // 5)
    frames = len(swell) // 256
    speech, flat = (
        (level * rng.standard_normal(len(swell))).astype(np.float32) for level in (swell / 4, 0.02)
    )
    source = source_shape(speech, RATE, *np.zeros((2, frames), np.float32))
    flat = flat[: frames * 256]
    own = source.level_db
    for amount, expected in ((0.0, 0.0), (0.5, 0.5), (1.0, 1.0)):
        change = frame_levels(follow_level(flat, 256, source, amount), 256, frames) - frame_levels(
            flat, 256, frames
        )
        wanted = expected * (own - frame_levels(flat, 256, frames))
        # Between two steps of the level, the middle of each is where it is known exactly.
        assert np.abs(change - wanted).mean() < 0.5


def constant(f0_hz, seconds=1.0):
    frames = int(seconds * 62.5)
    return Pitch(np.full(frames, f0_hz, np.float32), np.ones(frames, np.bool_), 62.5)


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_breath_turns_a_share_of_the_upper_spectrum_into_noise(share):
    buzz = harmonics(150.0, 3000.0, seconds=1.0, width=2000)
    frames = len(buzz) // 256
    rate = RATE / 256
    pitch = constant(150.0)
    before = aperiodicity(buzz, RATE, pitch, rate, frames)[8:-8]
    breathy = scatter(buzz, np.full(frames, share, np.float32), RATE, 256, 0)
    after = aperiodicity(breathy, RATE, pitch, rate, frames)[8:-8]
    assert before.max() < 0.05
    assert after.mean() == pytest.approx(share, abs=0.2)
    middle = slice(4096, -4096)
    powers = [float(np.square(x[middle]).mean()) for x in (buzz, breathy)]
    assert 10 * np.log10(powers[1] / powers[0]) == pytest.approx(0, abs=1.5)
    # The noise belongs to the place in the whole, not to the piece.
    again = scatter(buzz[2560:], np.full(frames - 10, share, np.float32), RATE, 256, 10)
    np.testing.assert_allclose(again[2048:8192], breathy[2560:][2048:8192], atol=1e-5)


def test_breathiness_makes_a_clear_tone_as_noisy_as_the_source(hand_made, source, reference):
    pipeline, _ = hand_made(hifigan_universal=ToneVocoder())
    voice = pipeline.clone(reference)
    plain = pipeline.convert(source, voice)
    breathy = pipeline.convert(source, voice, controls=Controls(breathiness=1.0))
    difference = breathy.samples - plain.samples
    spectrum = np.abs(np.fft.rfft(difference)) ** 2
    low = int(1300 * len(difference) / RATE)
    assert 0 < spectrum[:low].sum() < 0.1 * spectrum.sum()


@pytest.mark.slow
def test_loudness_is_that_which_was_asked_for(hand_made, source, reference):
    pipeline, _ = hand_made(hifigan_universal=ToneVocoder())
    voice = pipeline.clone(reference)
    quiet = Waveform(source.samples * 0.3, 16000)
    for wanted in (-30.0, "source"):
        result = pipeline.convert(quiet, voice, controls=Controls(loudness=wanted))
        lufs = integrated_loudness(quiet.samples, 16000) if wanted == "source" else wanted
        # Where it is the source's, the same time counts in both, whatever each one's gate says.
        near = 0.3 if wanted == "source" else 0.1
        assert integrated_loudness(result.samples, RATE) == pytest.approx(lufs, abs=near)
    loud = pipeline.convert(source, voice, controls=Controls(loudness=-5.0))
    assert true_peak(loud.samples, RATE) == pytest.approx(-1.0, abs=0.1)
    assert any("quieter than -5.0 LUFS" in note for note in loud.notes)


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(sizes=st.lists(st.integers(1, 9000), min_size=1, max_size=9), seed=st.integers(0, 9))
def test_a_meter_agrees_with_the_whole(sizes, seed):
    rng = np.random.default_rng(seed)
    blocks = [0.2 * rng.random() * rng.standard_normal(n).astype(np.float32) for n in sizes]
    blocks = [block.astype(np.float32) for block in blocks]
    meter = LoudnessMeter(16000)
    for block in blocks:
        meter.add(block)
    whole = np.concatenate(blocks)
    assert meter.loudness_lufs == pytest.approx(integrated_loudness(whole, 16000), abs=0.02)
    assert meter.true_peak_db == pytest.approx(true_peak(whole, 16000), abs=0.3)
    assert meter.peak == np.abs(whole).max()


def test_a_meter_of_nothing_says_so():
    meter = LoudnessMeter(16000)
    assert (meter.loudness_lufs, meter.true_peak_db) == (-np.inf, -np.inf)
    meter.add(np.zeros(16000, np.float32))
    assert meter.loudness_lufs == -np.inf


def test_noise_is_turned_down_in_blocks_as_in_the_whole(monkeypatch):
    rng = np.random.default_rng(0)
    noise = 0.01 * rng.standard_normal(16000 * 12).astype(np.float32)
    short = noise[: 16000 * 3]
    parts = [short[i : i + 5000] for i in range(0, len(short), 5000)]
    whole = np.concatenate(list(denoised(parts, 16000, 15.0)))
    np.testing.assert_allclose(whole, denoise(short, 16000, reduction_db=15.0), atol=1e-6)
    monkeypatch.setattr("auto_voice.inference.analysis.DENOISE_SECONDS", 3.0)
    parts = [noise[i : i + 5000] for i in range(0, len(noise), 5000)]
    cleaned = np.concatenate(list(denoised(parts, 16000, 15.0)))
    assert len(cleaned) == len(noise)
    levels = [20 * np.log10(cleaned[i : i + 8000].std() / 0.01) for i in range(8000, 180000, 8000)]
    assert max(levels) < -9


def test_denoise_helps_the_source_before_it_is_converted(hand_made, source, reference):
    rng = np.random.default_rng(0)
    noisy = source.samples + 0.01 * rng.standard_normal(len(source.samples)).astype(np.float32)
    pipeline, registry = hand_made()
    voice = pipeline.clone(reference)
    contents = []
    for db in (0.0, 20.0):
        pipeline.convert(Waveform(noisy, 16000), voice, controls=Controls(denoise_db=db))
        contents.append(registry.stages["converter_compact"].calls[-1].content.features[:, 0])
    # The first dimension is the level: pauses are quieter, speech is not.
    quiet = np.argsort(contents[0])[:10]
    assert contents[1][quiet].mean() < 0.6 * contents[0][quiet].mean()
    assert contents[1].max() == pytest.approx(contents[0].max(), rel=0.2)


def test_trimming_needs_speech(hand_made, reference):
    pipeline, _ = hand_made()
    noise = 0.01 * np.random.default_rng(0).standard_normal(32000).astype(np.float32)
    with pytest.raises(AudioContentError, match="no speech to trim to"):
        pipeline.convert(Waveform(noise, 16000), reference, controls=Controls(trim=True))


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"semitones": 40}, "semitones must lie within ±36, not 40"),
        ({"strength": 1.6}, "strength must lie between 0 and 1.5, not 1.6"),
        ({"pitch_range": "much"}, "pitch_range must be a number, not 'much'"),
        ({"loudness": "0"}, "loudness must lie between -70 and -5 LUFS"),
        ({"formants": float("nan")}, "formants must lie within ±12, not nan"),
        ({"trim": "maybe"}, "trim must be true or false, not 'maybe'"),
        ({"volume": 1}, "there is no control volume; known: semitones"),
    ],
)
def test_controls_that_cannot_be_are_one_sentence(values, match):
    with pytest.raises(ConfigError, match=match):
        controls_from(values)


def test_controls_are_read_from_text_and_account_for_what_differs():
    controls = controls_from({"semitones": "-2", "trim": "yes", "pitch_range": "voice"})
    assert controls.account() == {"semitones": -2.0, "trim": True, "pitch_range": "voice"}
    assert Controls(loudness="source", formants=12).formant_ratio == 2.0


def test_hand_made_converter_is_untouched_by_default(hand_made, source, reference):
    pipeline, registry = hand_made()
    result = pipeline.convert(source, reference)
    assert isinstance(registry.stages["converter_compact"], LocalConverter)
    assert result.summary()["controls"] == {}


def test_a_wide_glide_is_no_octave_error():
    """From 150 Hz up by 14 semitones and back: nothing leaps, so nothing is folded."""
    rise = np.concatenate([np.zeros(60), np.linspace(0, 14, 40), np.linspace(14, 0, 40)])
    f0 = (150 * 2 ** (rise / 12)).astype(np.float32)
    track = Pitch(f0, np.ones(len(f0), bool), 62.5)
    np.testing.assert_allclose(corrected(track).f0_hz, f0, rtol=1e-5)
    # The same height reached by a leap for some frames is one.
    slipped = np.full(140, 150.0, np.float32)
    slipped[60:66] = 300.0
    track = Pitch(slipped, np.ones(140, bool), 62.5)
    np.testing.assert_allclose(corrected(track).f0_hz, 150.0, rtol=1e-5)


def test_numbers_of_numpy_are_numbers_and_switches_are_switches():
    assert Controls(semitones=np.float32(2), strength=np.float64(0.5)).semitones == 2
    with pytest.raises(ConfigError, match="match_pitch is true or false, not 'no'"):
        Controls(match_pitch="no")
