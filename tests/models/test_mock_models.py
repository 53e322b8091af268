"""One interface, mock and real: what a stage promises holds for both."""

from __future__ import annotations

import numpy as np
import pytest

from auto_voice.errors import AudioContentError
from auto_voice.models import ModelRegistry, load_catalog
from auto_voice.models.base import ContentEncoder, Converter, SpeakerEncoderStage, Vocoder
from auto_voice.models.mock_models import MockConverter, build_mock
from auto_voice.types import Content, Pitch, Voice, Waveform

RATE = 16000


def speech_like(seconds: float = 1.0, hz: float = 150.0, seed: int = 0) -> np.ndarray:
    time_s = np.arange(int(seconds * RATE)) / RATE
    voice = sum(np.sin(2 * np.pi * hz * k * time_s) / k for k in range(1, 12))
    noise = np.random.default_rng(seed).standard_normal(len(time_s))
    return (0.1 * voice * (1 + np.sin(2 * np.pi * 3 * time_s)) + 0.01 * noise).astype(np.float32)


@pytest.fixture(params=["mock", pytest.param("real", marks=pytest.mark.weights)])
def registry(request: pytest.FixtureRequest) -> ModelRegistry:
    if request.param == "real":
        return request.getfixturevalue("weights_registry")
    return ModelRegistry(use_mock=True)


def content_encoders(registry: ModelRegistry) -> list[ContentEncoder]:
    """HuBERT's weights cannot be expected everywhere; the bundled encoder's can."""
    names = ["hubert_base", "content_compact"] if registry.use_mock else ["content_compact"]
    return [registry.load(name) for name in names if name in registry.catalog.models]


def test_content_encoders(registry: ModelRegistry) -> None:
    audio = speech_like()
    for encoder in content_encoders(registry):
        assert isinstance(encoder, ContentEncoder)
        features = encoder.extract_features(audio)
        assert features.dtype == np.float32
        assert features.ndim == 3
        assert features.shape[0] == 1
        assert features.shape[2] == encoder.dims
        # 50 a second, less at most the frame that does not fit whole.
        assert 49 <= features.shape[1] <= 50
        assert np.isfinite(features).all()
        assert features.std() > 0
        content = encoder.encode(audio)
        assert content.features.shape == (len(audio) // 320, encoder.dims)
        assert (content.frame_rate, content.space) == (50.0, encoder.space)


def test_a_padded_batch_gives_what_each_row_gives_alone(registry: ModelRegistry) -> None:
    long, short = speech_like(1.0), speech_like(0.6, hz=220, seed=1)
    batch = np.stack([long, np.pad(short, (0, len(long) - len(short)))])
    for encoder in content_encoders(registry):
        together = encoder.extract_features(batch, np.array([len(long), len(short)]))
        for row, alone in zip(together, (long, short), strict=True):
            expected = encoder.extract_features(alone)[0]
            np.testing.assert_allclose(row[: len(expected)], expected, atol=2e-4)
            assert not row[len(expected) :].any()


def test_speaker_encoders(registry: ModelRegistry) -> None:
    encoder = registry.load_speaker_encoder()
    assert isinstance(encoder, SpeakerEncoderStage)
    a, b = encoder.embed_utterance(speech_like()), encoder.embed_utterance(speech_like(hz=300))
    for embedding in (a, b):
        assert embedding.shape == (256,)
        assert embedding.dtype == np.float32
        assert np.linalg.norm(embedding) == pytest.approx(1, abs=1e-5)
    assert encoder.similarity(a, a) == pytest.approx(1, abs=1e-5)
    assert -1 <= encoder.similarity(a, b) < 1
    np.testing.assert_array_equal(a, encoder.embed_utterance(speech_like()))


def test_vocoders(registry: ModelRegistry) -> None:
    for name in ("hifigan_universal", "griffin_lim"):
        vocoder = registry.load(name)
        assert isinstance(vocoder, Vocoder)
        assert (vocoder.sample_rate, vocoder.hop_samples, vocoder.bands) == (22050, 256, 80)
        mel = np.random.default_rng(0).uniform(-8, 0, (80, 12)).astype(np.float32)
        single = vocoder.synthesize(mel)
        assert single.shape == (1, 12 * 256)
        assert single.dtype == np.float32
        assert np.abs(single).max() <= 1.01
        batch = vocoder.synthesize(np.stack([mel, mel]))
        assert batch.shape == (2, 12 * 256)


def test_louder_mel_gives_louder_audio(registry: ModelRegistry) -> None:
    quiet = np.random.default_rng(0).uniform(-9, -5, (80, 40)).astype(np.float32)
    vocoder = registry.load_hifigan()
    levels = [np.sqrt(np.mean(vocoder.synthesize(mel) ** 2)) for mel in (quiet, quiet + 2)]
    assert levels[1] > 1.5 * levels[0]


def test_converters(registry: ModelRegistry) -> None:
    if "converter_compact" in registry.catalog.models:
        converter, encoder = registry.load("converter_compact"), registry.load("content_whisper")
    elif registry.use_mock:
        converter, encoder = MockConverter(), registry.load_hubert()
    else:
        pytest.skip("the catalog has no converter")
    assert isinstance(converter, Converter)
    content = encoder.encode(speech_like())
    assert content.space == converter.content_space
    pitch = Pitch(np.full(63, 150, np.float32), np.ones(63, bool), 62.5)
    embedding = registry.load_speaker_encoder().embed_utterance(speech_like(hz=220))
    mel = converter.convert(content, pitch, Voice(embedding, 5.0, 0.2), 86)
    assert mel.values.shape == (80, 86)
    assert mel.values.dtype == np.float32
    assert mel.values.min() >= np.log(1e-5) - 5
    assert mel.values.max() < 5


@pytest.mark.parametrize("bad", [np.zeros(0), np.full(16000, np.nan), np.zeros((2, 3, 4))])
def test_bad_audio_is_refused(registry: ModelRegistry, bad: np.ndarray) -> None:
    with pytest.raises((AudioContentError, ValueError)):
        registry.load_speaker_encoder().embed_utterance(bad)


def test_every_kind_of_the_catalog_has_a_mock_with_its_dimensions() -> None:
    for version in load_catalog().versions():
        model = build_mock(version)
        assert isinstance(model, Waveform) or model.mock is True
        if "dims" in version.params:
            assert model.dims == version.params["dims"]


def test_mocks_are_deterministic_across_instances_and_react_to_their_input() -> None:
    first, second = ModelRegistry(use_mock=True), ModelRegistry(use_mock=True)
    audio = speech_like()
    a, b = (r.load_hubert().extract_features(audio) for r in (first, second))
    np.testing.assert_array_equal(a, b)
    assert not np.allclose(a, first.load_hubert().extract_features(speech_like(hz=300)))


def test_hubert_shapes_of_the_mock_are_the_published_ones() -> None:
    hubert = ModelRegistry(use_mock=True).load_hubert()
    assert hubert.extract_features(np.ones((1, 16000))).shape == (1, 49, 768)
    assert hubert.extract_features(np.ones((3, 400))).shape == (3, 1, 768)


def test_mock_judges_and_samples() -> None:
    registry = ModelRegistry(use_mock=True)
    assert registry.load("recogniser_tiny_en").transcribe(np.zeros(32000)) == "mock mock"
    assert 1 <= registry.load("quality_dnsmos").score(np.zeros(16000)).overall <= 5
    sample = registry.load("sample_beckett")
    assert sample.sample_rate == 16000
    assert "mock" in sample.notes[0]


def test_the_mock_vocoder_says_what_shape_it_wants() -> None:
    with pytest.raises(ValueError, match=r"mel must be \(batch, 80, frames\)"):
        ModelRegistry(use_mock=True).load_hifigan().synthesize(np.zeros((40, 10)))


def test_the_mock_converter_keeps_the_frame_count_even_for_empty_content() -> None:
    content = Content(np.zeros((0, 8), np.float32), 50.0, "mock")
    pitch = Pitch(np.zeros(0, np.float32), np.zeros(0, bool), 62.5)
    mel = MockConverter().convert(content, pitch, Voice(np.full(256, 1 / 16, np.float32)), 7)
    assert mel.values.shape == (80, 7)
