"""What a training publishes is what a registry loads and converts with."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from auto_voice.errors import ModelLoadError, VoiceError
from auto_voice.models import ModelRegistry
from auto_voice.models.converter_model import REFERENCE_FRAMES, thin
from auto_voice.training.networks.generators import ConverterNet
from auto_voice.training.publish import publish
from auto_voice.training.recipes import Recipe, StageRecipe
from auto_voice.training.trainer import Schedule
from auto_voice.types import Content, Pitch, Voice
from graph_kit import content_encoder, content_net

DIMS = 8


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    net = content_net(DIMS)
    content = content_encoder(net, "content_compact@test", "content_space@test")
    converter = ConverterNet(DIMS, width=24, blocks=2).eval()
    recipe = Recipe("test", "a test", content=StageRecipe(Schedule(1)))
    folder = tmp_path_factory.mktemp("published")
    return publish(
        recipe, folder, content, converter, content_net=net,
        figures={"content.r2": 0.5}, speakers=3, hours=0.1,
        drawing={"guidance": 0.25, "second_pass": 1.0},
    )  # fmt: skip


@pytest.fixture
def registry(catalog: Path, tmp_path: Path) -> ModelRegistry:
    return ModelRegistry(tmp_path / "models", config=catalog, offline=True, device="cpu")


def test_a_published_folder_can_be_moved(catalog: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(catalog.parent, tmp_path / "elsewhere")
    registry = ModelRegistry(tmp_path / "models", config=moved / "models.yaml", offline=True)
    assert str(catalog.parent) not in (moved / "models.yaml").read_text()
    assert registry.path("converter_compact", "test").is_file()
    assert registry.load("content_compact", "test").encode(_speech()).features.shape == (50, DIMS)


def _speech(seconds: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.normal(size=int(16000 * seconds)) * 0.05).astype(np.float32)


def _voice(frames: int, space: str = "content_space@test") -> Voice:
    rng = np.random.default_rng(1)
    embedding = np.eye(256, dtype=np.float32)[3]
    reference = {
        "mel": rng.normal(-5, 2, (frames, 80)).astype(np.float32),
        "content": rng.normal(size=(frames, DIMS)).astype(np.float32),
    }
    return Voice(embedding, 5.0, 0.2, reference if frames else {}, content_space=space)


def _pitch(seconds: float) -> Pitch:
    frames = int(seconds * 62.5)
    return Pitch(np.full(frames, 150, np.float32), np.ones(frames, np.bool_), 62.5)


def test_content_has_the_advertised_rate_and_no_mean(registry: ModelRegistry) -> None:
    encoder = registry.load("content_compact", "test")
    content = encoder.encode(_speech(1.01))
    assert content.features.shape == (50, DIMS)
    assert content.frame_rate == 50
    assert content.space == encoder.space
    assert np.abs(content.features.mean(0)).max() < 1e-5


def test_content_does_not_depend_on_the_level(registry: ModelRegistry) -> None:
    encoder = registry.load("content_compact", "test")
    loud, quiet = (encoder.encode(_speech() * gain).features for gain in (1.0, 0.02))
    assert np.abs(loud - quiet).max() < 1e-3


def test_rows_of_a_batch_equal_those_alone(registry: ModelRegistry) -> None:
    encoder = registry.load("content_compact", "test")
    batch = np.zeros((2, 16000), np.float32)
    batch[0], batch[1, :9000] = _speech(), _speech()[:9000]
    features = encoder.extract_features(batch, np.array([16000, 9000]))
    assert np.abs(features[1, :28] - encoder.extract_features(batch[1, :9000])[0]).max() < 1e-6
    assert (features[1, 28:] == 0).all()


def test_a_published_encoder_of_any_size_serves_streams(registry: ModelRegistry) -> None:
    encoder = registry.load("content_compact", "test")
    stream, speech = encoder.stream(), _speech(1.0)
    found = stream.encode(speech, 0, 0, 50)
    np.testing.assert_allclose(found, encoder.encode_piece(speech), atol=1e-4)


def test_nothing_in_is_nothing_out(registry: ModelRegistry) -> None:
    encoder = registry.load("content_compact", "test")
    assert encoder.encode(np.zeros(100, np.float32)).features.shape == (0, DIMS)


@pytest.mark.parametrize("reference", [0, 1, 300, 3 * REFERENCE_FRAMES])
def test_a_mel_has_the_frames_that_were_asked_for(registry: ModelRegistry, reference: int) -> None:
    encoder = registry.load("content_compact", "test")
    converter = registry.load("converter_compact", "test")
    mel = converter.convert(encoder.encode(_speech()), _pitch(1.0), _voice(reference), 87)
    assert mel.values.shape == (80, 87)
    assert np.isfinite(mel.values).all()
    assert mel.frame_rate == pytest.approx(86.13, abs=0.01)


def test_the_order_of_reference_frames_does_not_matter(registry: ModelRegistry) -> None:
    converter = registry.load("converter_compact", "test")
    content = registry.load("content_compact", "test").encode(_speech())
    voice = _voice(200)
    order = np.random.default_rng(0).permutation(200)
    shuffled = Voice(
        voice.embedding, 5.0, 0.2, {k: v[order] for k, v in voice.frames.items()},
        content_space=voice.content_space,
    )  # fmt: skip
    one, other = (converter.convert(content, _pitch(1), v, 87).values for v in (voice, shuffled))
    assert np.abs(one - other).max() < 1e-3


def test_another_voice_and_another_pitch_give_another_mel(registry: ModelRegistry) -> None:
    converter = registry.load("converter_compact", "test")
    content = registry.load("content_compact", "test").encode(_speech())
    base = converter.convert(content, _pitch(1), _voice(200), 87).values
    bare = converter.convert(content, _pitch(1), _voice(0), 87).values
    higher = Pitch(_pitch(1).f0_hz * 2, _pitch(1).voiced, 62.5)
    assert np.abs(base - bare).max() > 1e-3
    assert np.abs(base - converter.convert(content, higher, _voice(200), 87).values).max() > 1e-3


def test_content_of_another_space_is_refused(registry: ModelRegistry) -> None:
    converter = registry.load("converter_compact", "test")
    foreign = Content(np.zeros((50, DIMS), np.float32), 50.0, "hubert_base@1.0")
    with pytest.raises(ModelLoadError, match="content_space@test, not hubert_base"):
        converter.convert(foreign, _pitch(1), _voice(0), 87)
    own = registry.load("content_compact", "test").encode(_speech())
    with pytest.raises(VoiceError, match="enrol it again"):
        converter.convert(own, _pitch(1), _voice(10, "elsewhere"), 87)


def test_the_card_and_the_catalog_say_what_was_made(catalog: Path) -> None:
    card = (catalog.parent / "card.md").read_text()
    assert "3 speakers" in card
    assert "content.r2" in card
    assert "whisper_content" in catalog.read_text()


def test_a_converter_draws_as_the_one_that_it_comes_from(registry: ModelRegistry) -> None:
    converter = registry.load("converter_compact", "test")
    drawing = converter.guidance, converter.correction, converter.second_pass
    assert drawing == (0.25, 0.0, 1.0)


def test_thinning_spreads_over_the_whole_reference() -> None:
    for frames in (10, REFERENCE_FRAMES, REFERENCE_FRAMES + 1, 5 * REFERENCE_FRAMES + 3):
        kept = np.arange(frames)[thin(frames)]
        assert len(kept) <= REFERENCE_FRAMES
        assert len(kept) > min(frames, REFERENCE_FRAMES) // 3
        assert kept[0] == 0
