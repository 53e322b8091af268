"""What a result sounds like, by its physics: pauses, loudness, dynamics, peaks."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from audio_signals import speech_like as syllables
from auto_voice.audio.loudness import (
    LIMITER_REACH_SAMPLES,
    LoudnessMeter,
    integrated_loudness,
    limited,
    rumble_reach,
    speech_loudness,
    true_peak,
    without_rumble,
)
from auto_voice.audio.mel import HIFIGAN_MEL, log_mel
from auto_voice.audio.resample import resample
from auto_voice.inference import PipelineConfig
from auto_voice.inference.analysis import (
    background_notes,
    gain_of_energies,
    high_notes,
    noise_floor,
    pauses,
)
from auto_voice.inference.chunking import Chunk, hop_energies
from auto_voice.inference.controls import Controls
from auto_voice.inference.effects import (
    blocks_of,
    fill_pauses,
    metered,
    output_level,
    source_shape,
)
from auto_voice.inference.inputs import MemorySamples
from auto_voice.inference.rendering import Rendering
from auto_voice.types import Mel, Waveform
from hand_made_stages import LocalConverter, speech_like

RATE = 22050
HOP = 256
PAUSE = (4.3, 8.7)


class FlatConverter(LocalConverter):
    """Speaks everything at one level, and in pauses draws the thump that the compact one draws."""

    def convert(self, content, pitch, voice, frames):
        mel = super().convert(content, pitch, voice, frames)
        quiet = mel.values[2] < 0.004
        values = np.full((80, frames), -4.0, np.float32)
        values[:, quiet] = -9.0
        values[0, quiet] = 2.0
        return Mel(values, self.sample_rate, self.hop_samples)


class ToneBank:
    """A vocoder that does what its mel says: a tone in every band, whole periods in a frame.

    The lowest band sounds at 0 Hz, as an offset.
    """

    name, sample_rate, hop_samples, bands = "tones@1", RATE, HOP, 80

    def __init__(self) -> None:
        within = np.arange(HOP) / HOP
        cycles = np.maximum(1, np.round(np.linspace(1, 60, 80)))
        self.tones = np.sin(2 * np.pi * (np.outer(cycles, within) + cycles[:, None] ** 2 / 80))
        self.tones[0] = 1.0
        heard = log_mel(np.tile(self.tones[1:].sum(0), 40).astype(np.float32), HIFIGAN_MEL)
        self.scale = 1 / np.exp(heard[:, 20]).mean()

    def synthesize(self, mel):
        amplitudes = self.scale * np.exp(mel.astype(np.float64))
        return (amplitudes.T @ self.tones).reshape(1, -1).astype(np.float32)


def level_db(samples, start, stop, rate=RATE):
    part = samples[int(start * rate) : int(stop * rate)].astype(np.float64)
    return 10 * np.log10(np.mean(np.square(part)) + 1e-20)


def below(samples, hz, rate=RATE):
    """Power below ``hz``, dB."""
    power = np.square(np.abs(np.fft.rfft(samples * np.hanning(len(samples)))))
    frequencies = np.fft.rfftfreq(len(samples), 1 / rate)
    scale = 2 / len(samples) / np.square(np.hanning(len(samples))).sum()
    return 10 * np.log10(power[frequencies < hz].sum() * scale + 1e-20)


def noise(seconds, db, rate=16000, seed=0):
    samples = np.random.default_rng(seed).standard_normal(int(seconds * rate)) * 10 ** (db / 20)
    return samples.astype(np.float32)


@pytest.fixture(scope="module")
def paused():
    """Four seconds of speech, five of room noise at -62 dBFS, and the speech 12 dB softer."""
    speech = speech_like(4.0, 120.0)
    speech = np.concatenate([speech, noise(5, -300), 0.25 * speech])
    return Waveform(speech + noise(13, -62), 16000)


@pytest.fixture
def converted(hand_made, paused, reference):
    def convert(source=paused, config=None, **controls):
        pipeline, _ = hand_made(
            config, converter_compact=FlatConverter(), hifigan_universal=ToneBank()
        )
        return pipeline.convert(source, reference, controls=Controls(**controls))

    return convert


@pytest.mark.slow
def test_a_pause_in_the_source_is_a_pause_in_the_result(converted, paused):
    result = converted()
    own = resample(paused.samples, 16000, RATE)
    assert level_db(result.samples, *PAUSE) == pytest.approx(level_db(own, *PAUSE), abs=6)
    middle = result.samples[int(PAUSE[0] * RATE) : int(PAUSE[1] * RATE)]
    assert below(middle, 40) < level_db(own, *PAUSE) - 20
    assert below(result.samples, 40) < level_db(own, 0, 4) - 60
    # However little of the contour is asked for.
    free = converted(energy=0.0)
    assert level_db(free.samples, *PAUSE) < level_db(own, *PAUSE) + 6


def test_digital_silence_stays_silent(converted):
    speech = speech_like(3.0, 120.0)
    source = Waveform(np.concatenate([np.zeros(5 * 16000, np.float32), speech]), 16000)
    result = converted(source)
    assert level_db(result.samples, 0, 4.5) < -90
    assert level_db(result.samples, 5, 8) == pytest.approx(level_db(speech, 0, 3, 16000), abs=4)


@pytest.mark.slow
def test_a_softer_phrase_comes_out_as_much_softer(converted):
    result = converted()
    step = level_db(result.samples, 0, 4) - level_db(result.samples, 9, 13)
    assert step == pytest.approx(12, abs=1)
    flat = converted(energy=0.0)
    step = level_db(flat.samples, 0, 4) - level_db(flat.samples, 9, 13)
    assert step < 6
    half = converted(energy=0.5)
    assert level_db(half.samples, 0, 4) - level_db(half.samples, 9, 13) == pytest.approx(
        (12 + step) / 2, abs=1.5
    )


def test_the_contour_of_the_source_is_kept_syllable_by_syllable(converted, paused):
    result = converted()
    own = without_rumble(resample(paused.samples, 16000, RATE), RATE)
    size = RATE // 10
    count = min(len(own), len(result.samples)) // size
    levels = [
        10 * np.log10(np.square(x[: count * size]).reshape(count, size).mean(1) + 1e-12)
        for x in (own, result.samples)
    ]
    spoken = levels[0] > np.percentile(levels[0], 99) - 25
    difference = (levels[1] - levels[0])[spoken]
    assert np.percentile(np.abs(difference - np.median(difference)), 90) < 2


def contour_error(found, wanted, spoken):
    difference = (found - wanted)[spoken]
    return np.percentile(np.abs(difference - np.median(difference)), 90)


@pytest.mark.parametrize("snr_db", [20, 12, 6])
def test_the_contour_of_the_speech_is_kept_in_noise_and_the_noise_does_not_pump(converted, snr_db):
    """Measured against the speech without its noise, where it stands above that."""
    clean = np.concatenate([speech_like(4.0, 120.0), noise(2, -300), 0.5 * speech_like(4.0, 120.0)])
    hiss = noise(10, level_db(clean, 0, 4, 16000) - snr_db)
    result = converted(Waveform(clean + hiss, 16000))
    size = RATE // 20
    levels = []
    for samples in (resample(clean, 16000, RATE), resample(hiss, 16000, RATE), result.samples):
        plain = without_rumble(samples, RATE)
        count = min(len(plain), 10 * RATE) // size
        power = np.square(plain[: count * size]).reshape(count, size).mean(1)
        levels.append(10 * np.log10(power + 1e-12))
    own, floor, made = (values[: min(map(len, levels))] for values in levels)
    spoken = (own > floor.mean()) & (own > np.percentile(own, 99) - 25)
    assert contour_error(made, own, spoken) < 2
    between = slice(4 * 20 + 5, 6 * 20 - 5)
    assert made[between].std() < floor[between].std() + 1
    assert made[between].mean() == pytest.approx(floor[between].mean(), abs=6)


def test_the_noise_floor_is_that_of_the_quietest_seconds_around():
    rate, quiet = 16000, noise(3, -50)
    loud = noise(2, -20, seed=1) + noise(2, -50, seed=2)
    energies = hop_energies(np.concatenate([quiet, loud, quiet]), rate)
    found = 10 * np.log10(noise_floor(energies, 160, 1.0))
    np.testing.assert_allclose(found, -50, atol=2)
    # A gain to the networks' level applies to it, too; and what is always loud is no noise.
    np.testing.assert_allclose(
        10 * np.log10(noise_floor(energies, 160, 2.0)), found + 6.02, atol=0.1
    )
    held = 10 * np.log10(noise_floor(hop_energies(noise(8, -26), rate), 160, 1.0))
    assert held.max() < -31
    assert len(noise_floor(np.zeros(0), 160, 1.0)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("gain", [0.05, 1.0])
@pytest.mark.parametrize("noise_db", [-80, -40])
def test_the_speech_is_as_loud_as_in_the_source(converted, gain, noise_db):
    speech = speech_like(4.0, 120.0)
    padded = np.concatenate([noise(3, -300), speech, noise(3, -300)])
    source = Waveform(np.float32(gain) * (padded + noise(10, noise_db)), 16000)
    result = converted(source)
    pair = []
    for samples, rate in ((source.samples, 16000), (result.samples, RATE)):
        meter = LoudnessMeter(rate)
        meter.add(samples)
        pair.append(meter)
    own, made = speech_loudness(*pair)
    assert made == pytest.approx(own, abs=0.3)
    spoken = [integrated_loudness(x[3 * r : 7 * r], r) for x, r in
              ((source.samples, 16000), (result.samples, RATE))]  # fmt: skip
    assert spoken[1] == pytest.approx(spoken[0], abs=0.5)


@pytest.mark.slow
def test_pieces_give_what_the_whole_gives(converted):
    whole = converted().samples
    pieces = converted(config=PipelineConfig(chunk_seconds=6.0))
    assert pieces.chunks > 1
    assert len(pieces.samples) == len(whole)
    assert np.abs(pieces.samples - whole).max() < 1e-3 * np.abs(whole).max()


def test_breaths_and_ends_of_words_are_not_cut_off():
    """Neither a burst of noise 25 dB below the speech nor a slow decay counts as a pause."""
    rate = 16000
    speech = 0.1 * np.random.default_rng(1).standard_normal(2 * rate)
    breath = noise(0.4, -20 - 25)
    decay = 0.1 * np.random.default_rng(2).standard_normal(rate) * 10 ** (-np.arange(rate) / rate)
    quiet = noise(2, -75)
    parts = [speech, quiet, breath, quiet, speech, decay, quiet]
    edges = np.cumsum([0, *(len(part) for part in parts)]) // 160
    samples = np.concatenate(parts).astype(np.float32)
    energies = hop_energies(samples, rate)
    found = pauses(energies, 160, gain_of_energies(energies, 160))
    inside = [found[a + 5 : b - 5].mean() for a, b in pairwise(edges)]
    np.testing.assert_allclose(inside, [0, 1, 0, 1, 0, 0, 1], atol=0.05)


@pytest.mark.parametrize(("snr_db", "expected"), [(50, 1), (30, 1), (18, 1), (8, 0)])
def test_pauses_are_found_in_noise_that_lies_clearly_below_the_speech(snr_db, expected):
    rate = 16000
    parts = [noise(2, -20, seed=1), noise(3, -300), noise(2, -20, seed=2)]
    samples = np.concatenate(parts) + noise(7, -20 - snr_db, seed=3)
    energies = hop_energies(samples, rate)
    found = pauses(energies, 160, gain_of_energies(energies, 160))
    assert found[210:490].mean() == pytest.approx(expected, abs=0.25)
    assert found[:190].max() == 0


def test_a_pause_gets_the_spectrum_of_the_source():
    """What is the same from frame to frame would hum; room noise is not."""
    frames = 60
    pause = np.zeros(frames, np.float32)
    pause[20:40] = 1
    source = source_shape(noise(1, -70, RATE), RATE, pause, np.zeros(frames, np.float32))
    filled = fill_pauses(Mel(np.full((80, frames), -3.0, np.float32), RATE, HOP), source).values
    np.testing.assert_array_equal(filled[:, 20:40], source.mel[:, 20:40])
    np.testing.assert_array_equal(filled[:, :20], -3.0)
    assert filled[:, 20:40].std(axis=1).min() > 0.05


@pytest.mark.parametrize("rate", [16000, 22050, 48000])
def test_what_lies_below_40_hz_goes_and_a_voice_stays(rate):
    t = np.arange(2 * rate) / rate
    middle = slice(rate // 2, 3 * rate // 2)

    def gain_db(hz):
        tone = np.sin(2 * np.pi * hz * t).astype(np.float32)
        out = without_rumble(tone, rate)[middle]
        return 10 * np.log10(np.mean(np.square(out)) / 0.5)

    assert max(gain_db(hz) for hz in (10.0, 25.0, 39.5)) < -45
    assert all(abs(gain_db(hz)) < 0.1 for hz in (60.5, 80.0, 1000.0, 0.45 * rate))
    offset = without_rumble(np.ones(rate, np.float32), rate)
    assert np.abs(offset[rate // 4 : -rate // 4]).max() < 0.005


def test_rumble_is_taken_from_a_piece_as_from_the_whole():
    x = noise(8, -20, RATE)
    whole = without_rumble(x, RATE)
    reach = rumble_reach(RATE)
    low, high = 50_000, 90_000
    piece = without_rumble(x[low - reach : high + reach], RATE)[reach:-reach]
    np.testing.assert_allclose(piece, whole[low:high], atol=1e-6)


def peaky(seconds=4.0):
    """Noise with a click ten times as high every quarter of a second."""
    x = noise(seconds, -20, RATE)
    x[RATE // 8 :: RATE // 4] = 1.0
    return x


def test_a_limiter_holds_true_peaks_and_leaves_the_rest_alone():
    x = peaky()
    out = limited(x, RATE, ceiling_dbtp=-6.0)
    assert true_peak(out, RATE) < -5.8
    far = np.ones(len(x), bool)
    for at in range(RATE // 8, len(x), RATE // 4):
        far[max(0, at - LIMITER_REACH_SAMPLES) : at + LIMITER_REACH_SAMPLES] = False
    np.testing.assert_array_equal(out[far], x[far])
    low, high = 30_007, 60_001
    piece = limited(
        x[low - LIMITER_REACH_SAMPLES : high + LIMITER_REACH_SAMPLES],
        RATE,
        low - LIMITER_REACH_SAMPLES,
        -6.0,
    )
    np.testing.assert_allclose(
        piece[LIMITER_REACH_SAMPLES:-LIMITER_REACH_SAMPLES], out[low:high], atol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize(("above_db", "reached"), [(3.0, True), (15.0, False)])
def test_peaks_are_limited_for_the_loudness_up_to_a_limit(converted, above_db, reached):
    speech = speech_like(4.0, 120.0)
    quiet = Waveform(speech * np.float32(0.01), 16000)
    room = -1 - true_peak(converted(quiet).samples, RATE)
    source = Waveform(quiet.samples * np.float32(10 ** ((room + above_db) / 20)), 16000)
    result = converted(source)
    assert true_peak(result.samples, RATE) == pytest.approx(-1, abs=0.2)
    assert any("Peaks were turned down" in note for note in result.notes)
    short = integrated_loudness(source.samples, 16000) - integrated_loudness(result.samples, RATE)
    assert (abs(short) < 0.5) == reached
    assert any("quieter than the source" in note for note in result.notes) != reached


def test_less_than_the_meter_tells_is_no_limiting():
    recording = MemorySamples(peaky(), RATE)
    meter = metered(blocks_of(recording), RATE)
    room = -1 - meter.true_peak_db
    for more, limited_ in ((room - 0.02, False), (room + 0.02, False), (room + 0.3, True)):
        controls = Controls(loudness=meter.loudness_lufs + more)
        level = output_level(recording, 1.0, controls, None)
        assert (level.limiting, bool(level.notes)) == (limited_, limited_)
        out = np.concatenate(list(level.blocks(recording)))
        assert true_peak(out, RATE) <= -0.99 + 0.2 * limited_


def test_the_levels_of_a_piece_are_those_of_the_whole():
    hops = np.random.default_rng(0).random(3000).astype(np.float32)
    rate = Fraction(22050, 256)
    at = (np.arange(2700) + 0.5) / (float(rate) * 0.01) - 0.5
    whole = np.interp(at, np.arange(3000), hops)
    # The last pieces lie behind the last hop.
    for start, stop in ((0, 1), (0, 2700), (1000, 1200), (2400, 2700), (2690, 2700)):
        chunk = Chunk(start, stop, start, stop)
        found = Rendering._by_frame(SimpleNamespace(_frame_rate=rate), hops, chunk)
        np.testing.assert_allclose(found, whole[start:stop], rtol=1e-6)
    assert at[-1] > 3000


def test_the_same_time_is_measured_in_both():
    """What a result adds in the pauses of its source does not count."""
    speech, quiet = noise(2, -20), noise(4, -70)
    meters = []
    for pause in (quiet, noise(4, -15, seed=1)):
        meter = LoudnessMeter(16000, peaks=False)
        meter.add(np.concatenate([speech, pause, speech]))
        meters.append(meter)
    own, made = speech_loudness(*meters)
    assert own == pytest.approx(integrated_loudness(speech, 16000), abs=0.7)
    assert made - own < 2
    empty = LoudnessMeter(16000)
    assert speech_loudness(empty, empty) == (-np.inf, -np.inf)


def sung(f0_hz, seconds=1.5, rate=16000):
    """A note with vibrato and overtones."""
    t = np.arange(int(seconds * rate)) / rate
    phase = 2 * np.pi * f0_hz * t + f0_hz * 0.01 / 5 * np.sin(2 * np.pi * 5 * t)
    return (0.2 * sum(np.sin(k * phase) / k**2 for k in (1, 2, 3))).astype(np.float32)


def test_notes_above_the_range_are_told_and_speech_and_hiss_are_not():
    assert high_notes(sung(1400.0), 16000) > 1.2
    assert high_notes(sung(900.0), 16000) == 0
    assert high_notes(speech_like(4.0, 300.0), 16000) == 0
    assert high_notes(noise(2, -20), 16000) == 0
    hiss = np.diff(noise(2, -20), n=2).astype(np.float32)
    assert high_notes(hiss, 16000) == 0
    song = np.concatenate([speech_like(3.0, 220.0), sung(1400.0)])
    assert any(
        "sings above 1100 Hz" in note for note in background_notes(MemorySamples(song, 16000))
    )


@pytest.mark.parametrize(("semitones", "told"), [(0.0, False), (36.0, True)])
def test_a_melody_that_leaves_the_range_is_told(hand_made, source, reference, semitones, told):
    pipeline, _ = hand_made()
    result = pipeline.convert(source, reference, controls=Controls(semitones=semitones))
    assert any("beyond the range of the models" in note for note in result.notes) == told


@pytest.mark.slow
def test_reverberation_of_the_source_is_told(hand_made, reference):
    pipeline, _ = hand_made()
    speech = syllables(8.0)
    rng = np.random.default_rng(0)
    tail = rng.standard_normal(16000) * 10 ** (-3 * np.arange(16000) / 16000 / 1.0)
    wet = np.convolve(speech, tail)[: len(speech)]
    for samples, told in ((speech, False), (wet / np.abs(wet).max() / 2, True)):
        result = pipeline.convert(Waveform(samples.astype(np.float32), 16000), reference)
        assert any("reverberant" in note for note in result.notes) == told
