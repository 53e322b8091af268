"""Content maps: a known linear relation is found, an absent one is admitted, files round-trip."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from auto_voice.audio.loudness import gain_to_speech_level
from auto_voice.audio.mel import CONTENT_MEL, envelope_size, log_mel, with_envelope
from auto_voice.errors import AudioContentError, ConfigError, ModelLoadError
from auto_voice.models.base import ContentEncoder
from auto_voice.models.content_map import ContentMap, MappedEncoder, fit_map
from auto_voice.types import Content, Waveform

RATE = 16000


class BandEncoder:
    """Log energies of ``dims`` bands, 50 a second, times a fixed matrix, plus an offset.

    ``tilt`` adds a constant that depends on the utterance, as a speaker's timbre does.
    """

    sample_rate = RATE
    frame_rate = 50.0

    def __init__(self, name: str, matrix: np.ndarray, *, tilt: float = 0.0, noise: float = 0.0):
        self.name, self.space = f"{name}@1", f"{name}@1"
        self.matrix, self.tilt, self.noise = matrix, tilt, noise
        self.dims = matrix.shape[1]

    def encode(self, samples: np.ndarray) -> Content:
        frames = samples[: len(samples) // 320 * 320].reshape(-1, 320)
        energies = np.abs(np.fft.rfft(frames))[:, 1:].reshape(len(frames), -1, 16).mean(axis=2)
        features = np.log(energies + 1e-3)
        features = features - features.mean(axis=0)
        rng = np.random.default_rng(int(1e6 * abs(float(samples[:100].sum()))))
        features = features @ self.matrix + self.tilt * rng.standard_normal(self.dims)
        features = features + self.noise * rng.standard_normal(features.shape)
        return Content(features.astype(np.float32), self.frame_rate, self.space)

    def extract_features(self, audio: np.ndarray, lengths: np.ndarray | None = None) -> np.ndarray:
        raise AssertionError("not needed")


BANDS = 10


def speech(count: int, seconds: float = 6.0, rate: int = RATE, seed: int = 0) -> list[Waveform]:
    """Noise whose bands swell independently, like syllables."""
    rng = np.random.default_rng(seed)
    waves = []
    for _ in range(count):
        n = round(seconds * rate)
        spectrum = np.fft.rfft(rng.standard_normal(n))
        envelope = np.repeat(rng.uniform(0.05, 1, n // 1600 + 1), 1600)[:n]
        tilt = np.linspace(1, rng.uniform(0.1, 1), len(spectrum))
        waves.append(Waveform((np.fft.irfft(spectrum * tilt, n) * envelope).astype("f4"), rate))
    return waves


@pytest.fixture(scope="module")
def mixing() -> np.ndarray:
    return np.random.default_rng(5).standard_normal((BANDS, 24))


def test_a_linear_relation_is_found(mixing: np.ndarray) -> None:
    source = BandEncoder("source", mixing, tilt=3.0)
    target = BandEncoder("target", np.eye(BANDS))
    content_map = fit_map(source, target, speech(12))
    assert content_map.r2 > 0.99
    assert (content_map.source, content_map.target) == ("source@1", "target@1")
    assert content_map.seconds == pytest.approx(72, abs=1e-6)
    unseen = speech(1, seed=9)[0].samples
    mapped = MappedEncoder(source, content_map).encode(unseen)
    assert mapped.space == "target@1"
    wanted = target.encode(unseen).features
    assert np.abs(mapped.features - wanted).mean() < 0.05 * np.abs(wanted).mean()


def test_an_absent_relation_is_admitted(mixing: np.ndarray) -> None:
    source = BandEncoder("source", np.zeros((BANDS, 24)), noise=1.0)
    target = BandEncoder("target", np.eye(BANDS))
    content_map = fit_map(source, target, speech(12))
    assert content_map.r2 < 0.05
    assert np.isfinite(content_map.matrix).all()


def test_noise_costs_what_it_must(mixing: np.ndarray) -> None:
    clean = fit_map(BandEncoder("s", mixing), BandEncoder("t", np.eye(BANDS)), speech(12))
    noisy = fit_map(
        BandEncoder("s", mixing, noise=1.0), BandEncoder("t", np.eye(BANDS)), speech(12)
    )
    assert 0.0 < noisy.r2 < clean.r2


def test_a_target_with_a_mean_keeps_it(mixing: np.ndarray) -> None:
    class Offset(BandEncoder):
        def encode(self, samples: np.ndarray) -> Content:
            content = super().encode(samples)
            return Content(content.features + np.float32(4.0), 50.0, self.space)

    source, target = BandEncoder("s", mixing), Offset("t", np.eye(BANDS))
    content_map = fit_map(source, target, speech(12))
    np.testing.assert_allclose(content_map.bias, 4.0, atol=0.01)
    assert content_map.r2 > 0.99


def test_long_recordings_of_another_rate_are_cut_and_resampled(mixing: np.ndarray) -> None:
    source, target = BandEncoder("s", mixing), BandEncoder("t", np.eye(BANDS))
    content_map = fit_map(source, target, speech(1, seconds=64.0, rate=22050))
    assert content_map.r2 > 0.95
    assert content_map.seconds == pytest.approx(64.0, abs=0.01)


def test_too_little_speech_is_refused(mixing: np.ndarray) -> None:
    encoder = BandEncoder("s", mixing)
    for waves in ([], speech(1, 5.0), speech(2, 0.2), speech(1, 12.0)):
        with pytest.raises(AudioContentError, match="at least a minute"):
            fit_map(encoder, encoder, waves)


def test_other_frame_rates_are_refused(mixing: np.ndarray) -> None:
    slow = BandEncoder("slow", mixing)
    slow.frame_rate = 25.0
    with pytest.raises(ConfigError, match="equal rates"):
        fit_map(slow, BandEncoder("t", mixing), speech(5))


@pytest.fixture
def content_map() -> ContentMap:
    rng = np.random.default_rng(0)
    return ContentMap(
        matrix=rng.standard_normal((24, BANDS)).astype("f4"),
        bias=rng.standard_normal(BANDS).astype("f4"),
        source="source@1",
        target="target@1",
        frame_rate=50.0,
        r2=0.5,
        seconds=60.0,
    )


def test_a_map_survives_its_file(content_map: ContentMap, tmp_path: Path) -> None:
    path = content_map.save(tmp_path / "new" / "map.safetensors")
    again = ContentMap.load(path)
    np.testing.assert_array_equal(again.matrix, content_map.matrix)
    np.testing.assert_array_equal(again.bias, content_map.bias)
    for name in ("source", "target", "frame_rate", "r2", "seconds"):
        assert getattr(again, name) == getattr(content_map, name)
    content_map.save(path)
    assert [entry.name for entry in path.parent.iterdir()] == ["map.safetensors"]


def test_files_that_are_no_map_are_refused(content_map: ContentMap, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    path = content_map.save(tmp_path / "a.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(ModelLoadError, match=r"a\.safetensors"):
        ContentMap.load(path)
    save_file({"matrix": content_map.matrix, "bias": content_map.bias}, path)
    with pytest.raises(ModelLoadError, match="format"):
        ContentMap.load(path)
    save_file({"other": content_map.matrix}, path)
    with pytest.raises(ModelLoadError, match="models map"):
        ContentMap.load(path)
    with pytest.raises(ModelLoadError, match="absent"):
        ContentMap.load(tmp_path / "absent.safetensors")


def test_a_mapped_encoder_speaks_the_targets_space(
    content_map: ContentMap, mixing: np.ndarray
) -> None:
    source = BandEncoder("source", mixing)
    mapped = MappedEncoder(source, content_map)
    assert isinstance(mapped, ContentEncoder)
    assert (mapped.name, mapped.space, mapped.dims) == ("source@1", "target@1", BANDS)
    wave = speech(1, 1.0)[0].samples
    content = mapped.encode(wave)
    raw = source.encode(wave).features
    by_hand = (raw - raw.mean(axis=0)) @ content_map.matrix + content_map.bias
    np.testing.assert_allclose(content.features, by_hand, atol=1e-5)
    batch = np.zeros((2, 16000), np.float32)
    batch[0], batch[1, :8000] = wave, wave[:8000]
    features = mapped.extract_features(batch, np.array([16000, 8000]))
    np.testing.assert_allclose(features[0], content.features, atol=1e-6)
    np.testing.assert_allclose(features[1, :25], mapped.encode(wave[:8000]).features, atol=1e-6)
    assert not features[1, 25:].any()
    assert mapped.extract_features(wave).shape == (1, 50, BANDS)


def test_what_the_target_space_computes_is_computed_and_not_mapped(mixing: np.ndarray) -> None:
    """A target as the bundled encoders are: learned features, then envelope and cepstra."""

    class Wider(BandEncoder):
        envelope = cepstra = True
        learned = BandEncoder("target", np.eye(BANDS))

        def encode(self, samples: np.ndarray) -> Content:
            level = np.float32(gain_to_speech_level(samples, RATE))
            learned = self.learned.encode(samples).features
            whole = with_envelope(learned, log_mel(samples * level, CONTENT_MEL), True)
            return Content(whole - whole.mean(axis=0), 50.0, self.space)

    dims = BANDS + envelope_size(True, True)
    source, target = BandEncoder("source", mixing), Wider("target", np.eye(dims))
    content_map = fit_map(source, target, speech(12))
    mapped = MappedEncoder(source, content_map)
    assert content_map.matrix.shape == (24, BANDS)
    assert mapped.dims == target.dims
    wave = 0.3 * speech(1, seed=9)[0].samples
    content, wanted = mapped.encode(wave).features, target.encode(wave).features
    np.testing.assert_allclose(content[:, BANDS:], wanted[:, BANDS:], atol=1e-4)
    # A recording that comes in pieces at the level of the whole gives the same.
    level = np.float32(gain_to_speech_level(wave, RATE))
    pieces = [mapped.encode_piece(part * level) for part in np.split(wave, [32000])]
    assert [len(piece) for piece in pieces] == [100, 200]
    tail = np.concatenate(pieces)[:, 24:]
    inner = np.r_[2:98, 102:298]  # the mel of a piece does not see past its ends
    np.testing.assert_allclose((tail - tail.mean(axis=0))[inner], content[inner, BANDS:], atol=0.05)
    assert "explains" in mapped.note
    assert f"{100 * content_map.r2:.0f} %" in mapped.note


def test_a_map_of_another_encoder_is_refused(content_map: ContentMap, mixing: np.ndarray) -> None:
    stranger = BandEncoder("stranger", mixing)
    with pytest.raises(ConfigError, match="models map stranger"):
        MappedEncoder(stranger, content_map)
