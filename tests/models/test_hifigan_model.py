"""HiFi-GAN: equal to an independent implementation, whole or in chunks; it copies real speech."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from auto_voice.audio.mel import HIFIGAN_MEL, log_mel
from auto_voice.errors import AudioContentError, ModelLoadError
from auto_voice.models.base import Vocoder
from auto_voice.models.registry.catalog import ModelVersion
from auto_voice.models.runtime.graphs import without_padding
from auto_voice.models.speaker_encoder import SpeakerShape

if TYPE_CHECKING:
    from auto_voice.models import ModelRegistry

torch = pytest.importorskip("torch")

import graph_kit  # noqa: E402
from auto_voice.models import hifigan_model as hifigan  # noqa: E402
from auto_voice.training.networks.generators import HiFiGANNet  # noqa: E402

SMALL = hifigan.HiFiGANShape(channels=32)


def random_net(shape: hifigan.HiFiGANShape = SMALL) -> HiFiGANNet:
    torch.manual_seed(0)
    return HiFiGANNet(shape).eval()


def random_mel(frames: int, rows: int = 1, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, 80, frames)).astype(np.float32)


def vocoder_of(net: HiFiGANNet, **options: int) -> hifigan.HiFiGANModel:
    return hifigan.HiFiGANModel(graph_kit.network("hifigan", SMALL, net), SMALL, **options)


@pytest.fixture(scope="module")
def model() -> hifigan.HiFiGANModel:
    return vocoder_of(random_net())


@pytest.mark.slow
def test_the_network_equals_an_independent_implementation(model: hifigan.HiFiGANModel) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.SpeechT5HifiGanConfig(
        model_in_dim=80,
        upsample_initial_channel=32,
        upsample_rates=[8, 8, 2, 2],
        upsample_kernel_sizes=[16, 16, 4, 4],
        normalize_before=False,
    )
    reference = transformers.SpeechT5HifiGan(config).eval()
    state = {
        key.replace("ups.", "upsampler."): value for key, value in random_net().state_dict().items()
    }
    answer = reference.load_state_dict(state, strict=False)
    assert set(answer.missing_keys) <= {"mean", "scale"}
    assert not answer.unexpected_keys
    mel = random_mel(30)
    with torch.no_grad():
        expected = reference(torch.from_numpy(mel).transpose(1, 2)).numpy()
    np.testing.assert_allclose(model.synthesize(mel), expected, atol=1e-6)


@pytest.mark.parametrize("chunk", [3, 31, 59, 60, 61])
def test_chunks_equal_one_pass(chunk: int) -> None:
    mel = random_mel(60, rows=2)
    whole = vocoder_of(random_net(), chunk_frames=1000)
    parts = vocoder_of(random_net(), chunk_frames=chunk)
    np.testing.assert_allclose(parts.synthesize(mel), whole.synthesize(mel), atol=1e-5)


@pytest.mark.parametrize(
    "shape",
    [
        SMALL,
        hifigan.HiFiGANShape(channels=16, upsample_rates=(5, 4, 3), upsample_kernels=(10, 8, 5)),
        hifigan.HiFiGANShape(channels=16, block_kernels=(3, 5), dilations=(1, 2)),
    ],
)
def test_what_lies_past_the_context_changes_nothing(shape: hifigan.HiFiGANShape) -> None:
    net = random_net(shape).double()
    reach, hop = shape.context_frames, shape.hop_samples
    mel = torch.from_numpy(random_mel(2 * reach + 21)).double()
    other = mel.clone()
    other[:, :, :10] += 1.0
    other[:, :, -10:] += 1.0
    with torch.no_grad():
        before, after = net(mel)[0, 0], net(other)[0, 0]
    middle = slice((10 + reach) * hop, (11 + reach) * hop)
    assert torch.equal(before[middle], after[middle])
    assert not torch.equal(before, after)


def test_a_batch_equals_its_rows(model: hifigan.HiFiGANModel) -> None:
    mel = random_mel(40, rows=3)
    batch = model.synthesize(mel)
    assert batch.shape == (3, 40 * 256)
    assert isinstance(model, Vocoder)
    for row, samples in zip(mel, batch, strict=True):
        np.testing.assert_allclose(model.synthesize(row)[0], samples, atol=1e-6)
        np.testing.assert_allclose(model.synthesize(torch.from_numpy(row))[0], samples, atol=1e-6)


def version(**params: object) -> ModelVersion:
    return ModelVersion("hifigan", "1.0", "vocoder", "hifigan", (), "MIT", params)


def published(path: Path, net: HiFiGANNet) -> Path:
    """``net`` as the authors publish generators: weight-normed, under ``generator``."""
    state: dict[str, Any] = {}
    for name, value in net.state_dict().items():
        if name.endswith(".weight"):
            norm = value.flatten(1).norm(dim=1)[:, None, None]
            state[f"{name}_g"], state[f"{name}_v"] = norm, 3.0 * value
        else:
            state[name] = value
    torch.save({"generator": state}, path, _use_new_zipfile_serialization=False)
    return path


def test_a_published_checkpoint_gives_the_network_back(
    model: hifigan.HiFiGANModel, tmp_path: Path
) -> None:
    path = published(tmp_path / "generator.pth.tar", random_net())
    graph = tmp_path / "generator.onnx"
    graph.write_bytes(graph_kit.graph("hifigan", SMALL))
    params = {"channels": 32, "upsample_rates": [8, 8, 2, 2]}
    files = {"f": path, "generator.onnx": graph}
    loaded = hifigan.build(files, version(**params), "cpu")
    mel = random_mel(20)
    np.testing.assert_allclose(loaded.synthesize(mel), model.synthesize(mel), atol=1e-6)
    with pytest.raises(ModelLoadError, match=r"generator\.pth\.tar .*conv_pre"):
        hifigan.build({"f": path}, version(), "cpu")


@pytest.mark.parametrize(
    "mel", [np.zeros((79, 10)), np.zeros(80), np.zeros((80, 0)), np.full((80, 4), np.nan)]
)
def test_a_wrong_mel_is_refused(mel: np.ndarray, model: hifigan.HiFiGANModel) -> None:
    with pytest.raises(AudioContentError, match="mel"):
        model.synthesize(mel)


@pytest.mark.weights
def test_copy_synthesis_keeps_the_speaker_and_the_quality(weights_registry: ModelRegistry) -> None:
    from auto_voice.audio.io import read_audio
    from auto_voice.audio.resample import resample

    vocoder = weights_registry.load_hifigan()
    speaker = weights_registry.load_speaker_encoder()
    quality = weights_registry.load("quality_dnsmos")
    arrays = weights_registry.path("hifigan_universal")
    assert sum(a.size for a in hifigan.convert_checkpoint(arrays).values()) == 13_926_017
    speech = read_audio(weights_registry.path("sample_clone_test"), sample_rate=22050).samples
    copied = vocoder.synthesize(log_mel(speech, HIFIGAN_MEL))[0]
    assert len(copied) == len(speech) // 256 * 256
    before, after = (resample(samples, 22050, 16000) for samples in (speech, copied))
    similarity = speaker.similarity(speaker.embed_utterance(before), speaker.embed_utterance(after))
    assert similarity >= 0.95
    overall = [quality.score(samples).overall for samples in (before, after)]
    assert abs(overall[0] - overall[1]) <= 0.1


@pytest.fixture(scope="module")
def in_parts() -> tuple[hifigan.HiFiGANModel, hifigan.HiFiGANModel, list[int]]:
    """The same vocoder without and with a network for parts, and how often that was opened."""
    net = random_net()
    weights = graph_kit.export_graphs.weights_of(net)
    edited = without_padding(graph_kit.graph("hifigan", SMALL))
    opened: list[int] = []

    def open_part() -> Any:
        opened.append(1)
        return graph_kit.bound_network(edited, weights, "the network", "test")

    whole = vocoder_of(net)
    return whole, hifigan.HiFiGANModel(whole.network, SMALL, open_part=open_part), opened


@pytest.mark.parametrize(("frames", "start", "stop"), [(40, 14, 20), (60, 20, 21), (50, 15, 36)])
def test_a_part_is_that_of_the_whole(in_parts: Any, frames: int, start: int, stop: int) -> None:
    whole, model, opened = in_parts
    mel = random_mel(frames)[0]
    expected = whole.synthesize(mel)[:, start * 256 : stop * 256]
    for _ in range(2):
        np.testing.assert_allclose(model.synthesize_part(mel, start, stop), expected, atol=1e-6)
    np.testing.assert_allclose(whole.synthesize_part(mel, start, stop), expected, atol=1e-6)
    assert len(opened) == 1


@pytest.mark.parametrize(("start", "stop"), [(0, 7), (15, 20), (0, 20)])
def test_a_part_beside_an_end_sees_more_of_the_first_and_last_frame(
    in_parts: Any, start: int, stop: int
) -> None:
    whole, model, _ = in_parts
    mel, reach = random_mel(20)[0], SMALL.context_frames
    longer = np.pad(mel, ((0, 0), (reach, reach)), mode="edge")
    expected = whole.synthesize(longer)[:, (start + reach) * 256 : (stop + reach) * 256]
    np.testing.assert_allclose(model.synthesize_part(mel, start, stop), expected, atol=1e-6)


def test_a_graph_that_is_no_stack_of_convolutions_keeps_its_padding() -> None:
    with pytest.raises(ValueError, match="no convolution"):
        without_padding(graph_kit.graph("ge2e", SpeakerShape()))
