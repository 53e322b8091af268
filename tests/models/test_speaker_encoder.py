"""GE2E: a from-scratch LSTM agrees, recorded vectors agree, and people are told apart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from auto_voice.audio.mel import GE2E_MEL, log_mel
from auto_voice.errors import AudioContentError, ModelLoadError
from auto_voice.models.base import SpeakerEncoderStage
from auto_voice.models.registry.catalog import ModelVersion

if TYPE_CHECKING:
    from auto_voice.models import ModelRegistry

torch = pytest.importorskip("torch")

import graph_kit  # noqa: E402
from auto_voice.models import speaker_encoder as ge2e  # noqa: E402
from auto_voice.training.networks.encoders import SpeakerNet  # noqa: E402

VECTORS = np.load(Path(__file__).parent / "data" / "speaker_vectors.npz")
EXCERPTS = sorted(
    key.removesuffix("/prepared") for key in VECTORS.files if key.endswith("/prepared")
)
WINDOWS = sorted(int(key.split("/")[1]) for key in VECTORS.files if key.startswith("windows/"))


@pytest.fixture(scope="module")
def net() -> SpeakerNet:
    torch.manual_seed(0)
    return SpeakerNet().eval()


@pytest.fixture(scope="module")
def encoder(net: SpeakerNet) -> ge2e.SpeakerEncoder:
    return ge2e.SpeakerEncoder(graph_kit.network("ge2e", ge2e.SpeakerShape(), net), name="random")


def noise(seconds: float, level: float = 0.2, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (level * rng.standard_normal(round(seconds * 16000))).astype(np.float32)


def lstm_by_hand(state: dict[str, np.ndarray], mel: np.ndarray) -> np.ndarray:
    """The embedding of ``(frames, 40)`` by the textbook equations, in float64."""

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    sequence = mel.astype(np.float64)
    for layer in range(3):
        w, u = state[f"lstm.weight_ih_l{layer}"], state[f"lstm.weight_hh_l{layer}"]
        b = state[f"lstm.bias_ih_l{layer}"] + state[f"lstm.bias_hh_l{layer}"]
        h = c = np.zeros(256)
        outputs = []
        for x in sequence:
            i, f, g, o = np.split(w @ x + u @ h + b, 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
            outputs.append(h)
        sequence = np.array(outputs)
    raw = np.maximum(state["linear.weight"] @ sequence[-1] + state["linear.bias"], 0)
    return raw / np.linalg.norm(raw)


def test_one_window_equals_the_textbook_lstm(encoder: ge2e.SpeakerEncoder, net: SpeakerNet) -> None:
    audio = noise(1.6)
    state = {key: value.double().numpy() for key, value in net.state_dict().items()}
    expected = lstm_by_hand(state, log_mel(audio, GE2E_MEL).T[:160])
    np.testing.assert_allclose(encoder.embed_utterance(audio), expected, atol=1e-5)


@pytest.mark.parametrize("samples", WINDOWS)
def test_windows_lie_where_the_original_puts_them(samples: int) -> None:
    assert ge2e.window_starts(samples) == VECTORS[f"windows/{samples}"].tolist()


def test_an_utterance_is_the_mean_of_its_windows(
    encoder: ge2e.SpeakerEncoder, net: SpeakerNet
) -> None:
    audio = noise(5.0)
    starts = ge2e.window_starts(len(audio))
    assert len(starts) > 3
    mel = log_mel(np.pad(audio, (0, 16000)), GE2E_MEL).T
    windows = np.stack([mel[start : start + 160] for start in starts])
    with torch.no_grad():
        mean = net(torch.from_numpy(windows)).numpy().mean(axis=0)
    np.testing.assert_allclose(
        encoder.embed_utterance(audio), mean / np.linalg.norm(mean), atol=1e-6
    )


def test_many_windows_are_fed_in_parts(
    encoder: ge2e.SpeakerEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    audio = noise(7.0)
    whole = encoder.embed_utterance(audio)
    monkeypatch.setattr(ge2e, "WINDOWS_AT_ONCE", 2)
    np.testing.assert_allclose(encoder.embed_utterance(audio), whole, atol=1e-6)


@pytest.mark.parametrize("seconds", [0.0001, 0.3, 1.6, 4.0])
def test_embeddings_have_unit_norm(seconds: float, encoder: ge2e.SpeakerEncoder) -> None:
    embedding = encoder.embed_utterance(noise(seconds))
    assert embedding.shape == (256,)
    assert embedding.dtype == np.float32
    assert np.linalg.norm(embedding) == pytest.approx(1.0, abs=1e-6)
    assert isinstance(encoder, SpeakerEncoderStage)


def test_quiet_speech_is_raised_and_loud_speech_left_alone(encoder: ge2e.SpeakerEncoder) -> None:
    quiet = noise(2.0, level=1e-3)
    raised = ge2e.raise_level(quiet)
    assert 10 * np.log10(np.mean(raised.astype(np.float64) ** 2)) == pytest.approx(-30, abs=1e-3)
    loud = noise(2.0)
    assert ge2e.raise_level(loud) is loud
    np.testing.assert_allclose(
        encoder.embed_utterance(quiet), encoder.embed_utterance(10 * quiet), atol=1e-5
    )
    assert not np.allclose(
        encoder.embed_utterance(quiet, level=False), encoder.embed_utterance(quiet), atol=1e-5
    )


def test_similarity_is_the_cosine(encoder: ge2e.SpeakerEncoder) -> None:
    a, b = np.zeros((2, 256), np.float32)
    a[0], b[:2] = 3.0, 2.0
    assert encoder.similarity(a, a) == pytest.approx(1.0)
    assert encoder.similarity(a, -a) == pytest.approx(-1.0)
    assert encoder.similarity(a, b) == pytest.approx(np.sqrt(0.5))
    for bad in (np.zeros(256), np.ones(255)):
        with pytest.raises(AudioContentError):
            encoder.similarity(a, bad.astype(np.float32))


@pytest.mark.parametrize(
    ("audio", "why"),
    [
        (np.zeros(16000), "silent"),
        (np.zeros(0), "empty"),
        (np.full(16000, np.nan), "NaN"),
        (np.ones((2, 16000)), "one channel"),
    ],
)
def test_audio_without_a_voice_is_refused(
    audio: np.ndarray, why: str, encoder: ge2e.SpeakerEncoder
) -> None:
    with pytest.raises(AudioContentError, match=why):
        encoder.embed_utterance(audio.astype(np.float32))


def test_the_stage_takes_batches_and_other_rates(encoder: ge2e.SpeakerEncoder) -> None:
    stage = ge2e.SpeakerEncoderModel(encoder)
    audio = np.stack([noise(2.0, seed=1), noise(2.0, seed=2)])
    batch = stage.extract_embedding(audio)
    assert batch.shape == (2, 256)
    for row, embedding in zip(audio, batch, strict=True):
        np.testing.assert_array_equal(stage.embed_utterance(row), embedding)
        np.testing.assert_array_equal(stage.extract_embedding(torch.from_numpy(row)), embedding)
    t = np.arange(48000 * 2) / 48000
    tones = (0.2 * np.sin(2 * np.pi * 440 * t) + 0.1 * np.sin(2 * np.pi * 900 * t)).astype("f4")
    fast = stage.extract_embedding(tones, sample_rate=48000)
    assert stage.similarity(fast, stage.extract_embedding(tones[::3])) > 0.999
    assert isinstance(stage, SpeakerEncoderStage)


def version() -> ModelVersion:
    return ModelVersion("speaker_encoder", "1.0", "speaker", "ge2e", (), "Apache-2.0")


def test_the_published_layout_loads(
    encoder: ge2e.SpeakerEncoder, net: SpeakerNet, tmp_path: Path
) -> None:
    state = net.state_dict() | {"similarity_weight": torch.ones(1)}
    path = tmp_path / "pretrained.pt"
    torch.save({"step": 7, "model_state": state}, path, _use_new_zipfile_serialization=False)
    loaded = ge2e.build({"f": path}, version(), "cpu")
    audio = noise(2.0)
    np.testing.assert_array_equal(loaded.embed_utterance(audio), encoder.embed_utterance(audio))
    assert loaded.name == "speaker_encoder@1.0"
    torch.save({"model_state": {"lstm.weight_ih_l0": torch.ones(2)}}, path)
    with pytest.raises(ModelLoadError, match=r"pretrained\.pt lacks"):
        ge2e.build({"f": path}, version(), "cpu")


@pytest.mark.weights
@pytest.mark.parametrize("excerpt", EXCERPTS)
def test_embeddings_equal_the_originals(excerpt: str, weights_registry: ModelRegistry) -> None:
    encoder = weights_registry.load_speaker_encoder()
    samples = excerpt_samples(weights_registry, excerpt)
    for expected, level in ((VECTORS[excerpt], False), (VECTORS[f"{excerpt}/prepared"], True)):
        ours = encoder.embed_utterance(samples, level=level)
        assert float(np.dot(ours, expected)) >= 0.9999


@pytest.mark.weights
def test_people_are_told_apart(weights_registry: ModelRegistry) -> None:
    encoder = weights_registry.load_speaker_encoder()
    reader = [
        encoder.embed_utterance(excerpt_samples(weights_registry, f"two_cities/{a}:{a + 8}"))
        for a in (0.0, 9.0, 18.0, 27.0, 36.0)
    ]
    other = encoder.embed_utterance(excerpt_samples(weights_registry, "clone_test/0.0:4.0"))
    same = min(encoder.similarity(a, b) for a in reader for b in reader)
    different = max(encoder.similarity(a, other) for a in reader)
    assert same > 0.85
    assert different < 0.7
    assert same - different > 0.2


def excerpt_samples(registry: ModelRegistry, excerpt: str) -> np.ndarray:
    from auto_voice.audio.io import read_audio

    name, _, seconds = excerpt.partition("/")
    first, last = (round(float(second) * 16000) for second in seconds.split(":"))
    samples = read_audio(registry.path(f"sample_{name}"), sample_rate=16000).samples
    return samples[first:last]
