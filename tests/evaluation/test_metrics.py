"""Each metric on audio and tracks whose answer is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import pytest

from auto_voice.audio.mel import HIFIGAN_MEL
from auto_voice.audio.pitch import extract_pitch, transpose
from auto_voice.audio.resample import resample
from auto_voice.errors import EvaluationError
from auto_voice.evaluation import metrics
from auto_voice.types import Pitch, Waveform
from evaluation_kit import SpectrumEncoder, sing


def track(cents: Callable[[np.ndarray], np.ndarray], seconds: float = 2.0, rate: float = 62.5):
    """A voiced track around 200 Hz with the given contour in cents over time."""
    t = np.arange(round(seconds * rate)) / rate
    f0 = (200 * 2 ** (cents(t) / 1200)).astype(np.float32)
    return Pitch(f0, np.ones(len(f0), bool), rate)


def melody(t: np.ndarray) -> np.ndarray:
    return 200 * np.sin(2 * np.pi * 0.9 * t) + 60 * t


def similarity(a: Waveform, b: Waveform) -> float:
    """Cosine of the mean spectra, each recording resampled to the encoder's rate."""
    encoder = SpectrumEncoder()
    samples = (metrics.samples_at(x, encoder.sample_rate) for x in (a, b))
    return metrics.cosine(*(encoder.embed_utterance(x) for x in samples))


def test_a_recording_is_its_own_perfect_conversion() -> None:
    voice = sing()
    pitch = extract_pitch(voice.samples, voice.sample_rate)
    agreement = metrics.pitch_agreement(pitch, pitch)
    assert agreement.correlation == pytest.approx(1.0)
    assert agreement.rmse_cents == agreement.shift_cents == agreement.voicing_error == 0.0
    assert similarity(voice, voice) == pytest.approx(1.0)
    assert metrics.mel_cepstral_distance(voice, voice) == pytest.approx(0.0, abs=1e-3)
    assert metrics.mel_cepstral_distance(voice, voice, align=False) == 0.0


@pytest.mark.parametrize("semitones", [-12.0, -3.0, 0.5, 7.0])
def test_transposition_is_measured_as_shift_and_nothing_else(semitones: float) -> None:
    source = track(melody)
    found = metrics.pitch_agreement(source, transpose(source, semitones))
    assert found.shift_cents == pytest.approx(100 * semitones, abs=0.01)
    assert found.rmse_cents == pytest.approx(0.0, abs=0.01)
    assert found.correlation == pytest.approx(1.0)


def test_a_sped_up_recording_is_higher_by_the_known_interval() -> None:
    source = sing(150, seconds=2.0)
    factor = 2 ** (3 / 12)
    faster = resample(source.samples, round(16000 * factor), 16000)
    found = metrics.pitch_agreement(
        extract_pitch(source.samples, 16000), extract_pitch(faster, 16000)
    )
    assert found.stretched
    assert found.shift_cents == pytest.approx(300, abs=15)
    assert found.correlation > 0.97


def test_a_melody_error_of_known_size_gives_its_root_mean_square() -> None:
    wrong = track(lambda t: melody(t) + 50 * np.sin(2 * np.pi * 5 * t))
    found = metrics.pitch_agreement(track(melody), wrong)
    assert found.rmse_cents == pytest.approx(50 / math.sqrt(2), rel=1e-3)


def test_an_inverted_melody_correlates_negatively() -> None:
    found = metrics.pitch_agreement(track(melody), track(lambda t: -melody(t)))
    assert found.correlation == pytest.approx(-1.0)


def test_tracks_of_other_frame_rates_are_read_at_the_same_times() -> None:
    found = metrics.pitch_agreement(track(melody), track(melody, rate=200.0))
    assert not found.stretched
    assert found.correlation > 0.999
    assert found.rmse_cents < 5


def test_voicing_error_is_the_share_of_frames_that_changed() -> None:
    source = track(melody)
    voiced = source.voiced.copy()
    voiced[:25] = False
    changed = Pitch(source.f0_hz, voiced, source.frame_rate)
    assert metrics.pitch_agreement(source, changed).voicing_error == pytest.approx(25 / 125)
    assert metrics.pitch_agreement(changed, source).voicing_error == pytest.approx(25 / 125)


def test_without_common_voice_the_melody_is_unknown_not_zero() -> None:
    source = track(melody)
    whisper = Pitch(source.f0_hz, np.zeros_like(source.voiced), source.frame_rate)
    found = metrics.pitch_agreement(source, whisper)
    assert math.isnan(found.correlation)
    assert math.isnan(found.rmse_cents)
    assert found.voicing_error == 1.0
    assert math.isnan(metrics.register_error_cents(source, whisper))


def test_monotone_speech_has_no_correlation() -> None:
    flat = track(lambda t: 0 * t)
    assert math.isnan(metrics.pitch_agreement(flat, flat).correlation)


def test_register_error_is_the_interval_between_the_means() -> None:
    source = track(melody)
    assert metrics.register_error_cents(source, transpose(source, 5)) == pytest.approx(500, abs=0.1)


def test_octave_errors_of_the_tracker_do_not_move_the_register() -> None:
    source = track(melody)
    f0 = source.f0_hz.copy()
    f0[10:20] /= 2
    wrong = Pitch(f0, source.voiced, source.frame_rate)
    assert metrics.register_error_cents(source, wrong) == pytest.approx(0, abs=25)


def test_an_empty_track_is_refused() -> None:
    empty = Pitch(np.zeros(0, np.float32), np.zeros(0, bool), 62.5)
    with pytest.raises(EvaluationError, match="empty"):
        metrics.pitch_agreement(empty, track(melody))


def test_cepstral_distance_ignores_level_and_falls_with_similarity() -> None:
    voice = sing()
    louder = Waveform((voice.samples * 2).astype(np.float32), voice.sample_rate)
    near, far = sing(formant_hz=800), sing(formant_hz=1900)
    assert metrics.mel_cepstral_distance(voice, louder, align=False) < 1e-3
    distances = [metrics.mel_cepstral_distance(voice, x) for x in (near, far)]
    assert 0.2 < distances[0] < distances[1]


def test_cepstrum_of_a_cosine_over_the_bands_is_that_cosine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    n = np.arange(HIFIGAN_MEL.bands)[:, None]
    tilt = 2.0 + 0.6 * np.cos(np.pi * 3 * (n + 0.5) / HIFIGAN_MEL.bands) * np.ones((1, 5))
    monkeypatch.setattr(metrics, "log_mel", lambda *_: tilt.astype(np.float32))
    cepstrum = metrics.mel_cepstrum(np.zeros(10, np.float32), HIFIGAN_MEL.sample_rate)
    expected = np.zeros((13, 5))
    expected[2] = 0.3  # log_mel = c0 + 2 c3 cos(…)
    np.testing.assert_allclose(cepstrum, expected, atol=1e-6)


def test_warping_undoes_repeated_frames_and_finds_the_cheapest_path() -> None:
    rng = np.random.default_rng(0)
    frames = rng.normal(size=12)
    repeated = np.repeat(frames, rng.integers(1, 4, 12))
    rows, columns = metrics.warping_path(np.abs(frames[:, None] - repeated[None]))
    np.testing.assert_array_equal(frames[rows], repeated[columns])

    cost = rng.uniform(size=(7, 9))
    best = np.full((7, 9), np.inf)
    for i in range(7):
        for j in range(9):
            before = [
                best[a, b] for a, b in ((i - 1, j), (i, j - 1), (i - 1, j - 1)) if min(a, b) >= 0
            ]
            best[i, j] = cost[i, j] + (min(before) if before else 0.0)
    rows, columns = metrics.warping_path(cost)
    assert cost[rows, columns].sum() == pytest.approx(best[-1, -1])
    assert (rows[0], columns[0], rows[-1], columns[-1]) == (0, 0, 6, 8)


def test_more_noise_means_less_similarity_and_more_distance() -> None:
    voice = sing()
    noise = np.random.default_rng(2).normal(size=len(voice.samples)) * voice.samples.std()
    found, distance = [], []
    for snr_db in (40, 20, 0):
        noisy = (voice.samples + noise * 10 ** (-snr_db / 20)).astype(np.float32)
        found.append(similarity(voice, Waveform(noisy, 16000)))
        distance.append(metrics.mel_cepstral_distance(voice, Waveform(noisy, 16000)))
    assert found == sorted(found, reverse=True)
    assert distance == sorted(distance)


def test_clipping_counts_samples_at_full_scale() -> None:
    x = np.zeros(1000)
    x[:30], x[30:50], x[50] = 1.0, -1.0, 0.998
    assert metrics.clipped_share(x) == 0.05
    assert metrics.clipped_share([]) == 0.0


def test_loudness_rises_by_the_gain_in_decibels() -> None:
    voice = sing()
    louder = Waveform((voice.samples * 2).astype(np.float32), voice.sample_rate)
    change = metrics.loudness_lufs(louder) - metrics.loudness_lufs(voice)
    assert change == pytest.approx(20 * math.log10(2), abs=0.01)
    assert math.isnan(metrics.loudness_lufs(Waveform(np.zeros(16000, np.float32), 16000)))


def test_similarity_resamples_to_the_encoder() -> None:
    voice = sing()
    other_rate = Waveform(resample(voice.samples, 16000, 44100), 44100)
    assert similarity(voice, other_rate) > 0.999


def test_cosine_of_nothing_is_zero() -> None:
    assert metrics.cosine([0, 0], [1, 0]) == 0.0
    assert metrics.cosine([1, 1], [-1, -1]) == pytest.approx(-1.0)


@pytest.mark.parametrize("distance", [0.5, 1.0, 3.0])
def test_equal_error_rate_of_two_normals_is_the_known_tail(distance: float) -> None:
    rng = np.random.default_rng(3)
    same, different = rng.normal(distance, 1, 40000), rng.normal(0, 1, 40000)
    found = metrics.equal_error_rate(same, different)
    assert found.rate == pytest.approx(NormalDist().cdf(-distance / 2), abs=0.005)
    assert found.threshold == pytest.approx(distance / 2, abs=0.05)


def test_equal_error_rate_by_hand() -> None:
    assert metrics.equal_error_rate([0.9, 0.8], [0.1, 0.2]).rate == 0.0
    assert metrics.equal_error_rate([0.1, 0.2], [0.9, 0.8]).rate == 1.0
    # One of four on either side is wrong at any threshold between 0.4 and 0.5.
    found = metrics.equal_error_rate([0.9, 0.8, 0.7, 0.3], [0.1, 0.2, 0.25, 0.6])
    assert found.rate == pytest.approx(0.25)
    assert (found.same, found.different) == (4, 4)


def test_shuffled_speakers_cannot_be_told_apart() -> None:
    rng = np.random.default_rng(4)
    speakers = np.repeat(np.eye(8), 6, axis=0) + 0.2 * rng.normal(size=(48, 8))

    def rate(labels: np.ndarray) -> float:
        scores = [
            (labels[i] == labels[j], speakers[i] @ speakers[j]) for i in range(48) for j in range(i)
        ]
        return metrics.equal_error_rate(
            [s for same, s in scores if same], [s for same, s in scores if not same]
        ).rate

    labels = np.repeat(np.arange(8), 6)
    assert rate(labels) < 0.05
    assert rate(rng.permutation(labels)) == pytest.approx(0.5, abs=0.1)


def test_equal_error_rate_agrees_with_the_crossing_of_the_roc() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(5)
    same, different = rng.normal(1, 1, 300), rng.normal(0, 1.4, 500)
    thresholds = np.sort(np.concatenate([same, different]))
    accepted = [(different >= t).mean() for t in thresholds]
    missed = [(same < t).mean() for t in thresholds]
    order = np.argsort(accepted)
    x, y = np.array(accepted)[order], np.array(missed)[order]
    crossing = optimize.brentq(lambda v: np.interp(v, x, y) - v, 0, 1)
    assert metrics.equal_error_rate(same, different).rate == pytest.approx(crossing, abs=0.004)


def test_trials_of_one_kind_are_refused() -> None:
    with pytest.raises(EvaluationError, match="both kinds"):
        metrics.equal_error_rate([0.5], [])
