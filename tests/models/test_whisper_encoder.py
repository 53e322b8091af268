"""The teacher equals PyTorch's own transformer layers, and its subspace is white."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

import graph_kit
from auto_voice.audio.mel import CEPSTRA_SIZE, CONTENT_MEL, ENVELOPE_SIZE, band_envelope, log_mel
from auto_voice.errors import ModelLoadError, TrainingError
from auto_voice.models import ModelRegistry
from auto_voice.models.runtime.checkpoints import read_ctranslate2
from auto_voice.models.runtime.graphs import STEP
from auto_voice.models.whisper_encoder import (
    POSITIONS,
    ContentSpace,
    WhisperContentEncoder,
    WhisperEncoder,
    as_stored,
    convert_checkpoint,
    encoder_arrays,
    log_energies,
    read_arrays,
    scaled,
    sinusoids,
)
from auto_voice.training.networks.loading import content_net, whisper_net

WIDTH = 128


def load(path: Path, layers: int) -> WhisperEncoder:
    return WhisperEncoder.load(
        path,
        layers,
        graph=lambda shape: graph_kit.graph("whisper_content", shape),
        live=lambda shape: graph_kit.graph("whisper_live", shape),
    )


def stage_of(folder: Path, layers: int) -> WhisperContentEncoder:
    """A content encoder of random weights with a space of six dimensions."""
    torch.manual_seed(0)
    _write_ctranslate2(folder / "model.bin", _Reference(layers).arrays())
    projection = np.random.default_rng(0).normal(size=(WIDTH, 6)).astype("f4")
    subspace = ContentSpace(np.zeros(WIDTH, "f4"), np.ones(WIDTH, "f4"), projection)
    encoder = load(folder / "model.bin", layers)
    return WhisperContentEncoder(encoder, subspace, "t@1", "space", envelope=True)


def in_blocks(
    stage: WhisperContentEncoder, samples: np.ndarray, block: int, ahead: int
) -> list[tuple[int, int, np.ndarray]]:
    """Place, end of the look-ahead and features of each block of a stream."""
    stream, found = stage.stream(), []
    assert stream is not None
    for start in range(0, len(samples) // 320 - ahead, block):
        end = min(start + block + ahead, len(samples) // 320)
        skipped = min(stream.context_frames, start)
        part = samples[320 * (start - skipped) : 320 * end]
        found.append((start, end, stream.encode(part, skipped, start, start + block)))
    return found


def noise(seconds: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.normal(size=round(16000 * seconds)) * 0.05).astype(np.float32)


def _text(value: str) -> bytes:
    data = value.encode() + b"\0"
    return struct.pack("<H", len(data)) + data


def _write_ctranslate2(path: Path, arrays: dict[str, np.ndarray]) -> None:
    out = struct.pack("<I", 6) + _text("WhisperSpec") + struct.pack("<II", 3, len(arrays))
    for name, array in arrays.items():
        code = {"float32": 0, "float16": 4, "int32": 3}[array.dtype.name]
        out += _text(name) + struct.pack("<B", array.ndim)
        out += b"".join(struct.pack("<I", size) for size in array.shape)
        out += struct.pack("<BI", code, array.nbytes) + array.tobytes()
    path.write_bytes(out)


class _Reference(nn.Module):
    """The same encoder out of PyTorch's own parts."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(80, WIDTH, 3, padding=1)
        self.conv2 = nn.Conv1d(WIDTH, WIDTH, 3, stride=2, padding=1)
        self.positions = nn.Parameter(0.1 * torch.randn(1500, WIDTH))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                WIDTH, WIDTH // 64, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        x = nn.functional.gelu(self.conv1(mel))
        x = nn.functional.gelu(self.conv2(x)).transpose(1, 2)
        x = x + self.positions[: x.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return x

    def arrays(self) -> dict[str, np.ndarray]:
        out = {
            "encoder/num_heads": np.int32([2]),
            "decoder/embeddings/weight": np.zeros((2, 2), "f4"),
        }
        for name in ("conv1", "conv2"):
            for part in ("weight", "bias"):
                out[f"encoder/{name}/{part}"] = getattr(getattr(self, name), part).detach().numpy()
        out["encoder/position_encodings/encodings"] = self.positions.detach().numpy()
        for i, layer in enumerate(self.layers):
            names = {
                "self_attention/layer_norm/gamma": layer.norm1.weight,
                "self_attention/layer_norm/beta": layer.norm1.bias,
                "self_attention/linear_0/weight": layer.self_attn.in_proj_weight,
                "self_attention/linear_0/bias": layer.self_attn.in_proj_bias,
                "self_attention/linear_1/weight": layer.self_attn.out_proj.weight,
                "self_attention/linear_1/bias": layer.self_attn.out_proj.bias,
                "ffn/layer_norm/gamma": layer.norm2.weight,
                "ffn/layer_norm/beta": layer.norm2.bias,
                "ffn/linear_0/weight": layer.linear1.weight,
                "ffn/linear_0/bias": layer.linear1.bias,
                "ffn/linear_1/weight": layer.linear2.weight,
                "ffn/linear_1/bias": layer.linear2.bias,
            }
            for name, value in names.items():
                out[f"encoder/layer_{i}/{name}"] = value.detach().numpy()
        return out


def test_the_encoder_equals_pytorchs_own_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    reference = _Reference(3).eval()
    for parameter in reference.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    _write_ctranslate2(tmp_path / "model.bin", reference.arrays())
    mel = torch.randn(1, 80, 100)
    with torch.no_grad():
        expected = reference(mel)
    path = tmp_path / "model.bin"
    found = load(path, layers=3).network(mel.numpy())
    assert np.abs(found - expected.numpy()).max() < 1e-4
    assert (whisper_net(path, layers=3)(mel) - expected).abs().max() < 1e-4


def test_features_come_fifty_times_a_second(tmp_path: Path) -> None:
    _write_ctranslate2(tmp_path / "model.bin", _Reference(1).arrays())
    teacher = load(tmp_path / "model.bin", layers=1)
    noise = np.random.default_rng(0).normal(size=16000).astype(np.float32) * 0.1
    assert teacher.features(noise).shape == (50, WIDTH)


def test_halves_are_widened_and_integers_left_out(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    _write_ctranslate2(path, {"a": np.float16([[1, 2.5]]), "n": np.int32([3])})
    arrays = dict(read_ctranslate2(path))
    assert set(arrays) == {"a"}
    assert arrays["a"].dtype == np.float32
    assert arrays["a"].tolist() == [[1.0, 2.5]]


@pytest.mark.parametrize("content", [b"", b"\x06\0\0\0", b"PK\x03\x04" + b"x" * 99])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    with pytest.raises(ModelLoadError, match="not a CTranslate2 model"):
        dict(read_ctranslate2(path))


def test_a_model_without_an_encoder_is_refused(tmp_path: Path) -> None:
    _write_ctranslate2(tmp_path / "model.bin", {"x": np.zeros((1, 1), "f4")})
    with pytest.raises(ModelLoadError, match="lacks 'conv1/weight'"):
        load(tmp_path / "model.bin", layers=4)


def test_log_mel_spans_two_units_below_its_peak() -> None:
    # Whisper clamps to 80 dB under the loudest value and scales by a quarter: 8 / 4.
    rng = np.random.default_rng(0)
    energies = log_energies(np.concatenate([rng.normal(size=8000), np.zeros(8000)]).astype("f4"))
    mel = scaled(energies, energies.max())
    assert mel.shape == (80, 100)
    assert np.ptp(mel) == pytest.approx(2.0)


def test_the_subspace_is_white_and_deaf_to_outliers() -> None:
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(12, 12))
    clean = (rng.normal(size=(4000, 12)) @ mixing + rng.normal(size=12)).astype(np.float32)
    space = ContentSpace.fit([clean], 6)
    y = space.project(clean)
    assert np.allclose(np.cov(y, rowvar=False), np.eye(6), atol=0.05)
    wild = clean.copy()
    wild[10, 3] = 1e4
    assert np.abs(space.project(wild)[11:] - y[11:]).max() < 0.05


def test_the_stage_gives_centred_content_of_any_length(tmp_path: Path) -> None:
    torch.manual_seed(0)
    _write_ctranslate2(tmp_path / "model.bin", _Reference(2).arrays())
    encoder = load(tmp_path / "model.bin", layers=2)
    rng = np.random.default_rng(0)
    subspace = ContentSpace(
        np.zeros(WIDTH, "f4"), np.ones(WIDTH, "f4"), rng.normal(size=(WIDTH, 6)).astype("f4")
    )
    stage = WhisperContentEncoder(encoder, subspace, "content_whisper@1.0", "space")
    samples = (rng.normal(size=16000 * 40) * 0.05).astype(np.float32)
    content = stage.encode(samples)
    assert content.features.shape == (2000, 6)
    assert np.abs(content.features.mean(0)).max() < 1e-4
    assert (content.features.std(0) > 0).all()
    assert stage.encode(samples[:100]).features.shape == (0, 6)


def test_the_envelope_follows_the_features_in_every_encoder_of_a_space(tmp_path: Path) -> None:
    torch.manual_seed(0)
    _write_ctranslate2(tmp_path / "model.bin", _Reference(1).arrays())
    encoder = load(tmp_path / "model.bin", layers=1)
    subspace = ContentSpace(*(np.ones(s, "f4") for s in (WIDTH, WIDTH, (WIDTH, 6))))
    teacher = WhisperContentEncoder(encoder, subspace, "teacher@1", "space", envelope=True)
    student = graph_kit.content_encoder(
        graph_kit.content_net(6), "student@1", "space", envelope=True
    )
    samples = (np.random.default_rng(0).normal(size=16100) * 0.05).astype(np.float32)
    heard, learnt = teacher.encode_piece(samples), student.encode_piece(samples)
    assert teacher.dims == student.dims == 6 + ENVELOPE_SIZE
    assert heard.shape == learnt.shape == (50, 6 + ENVELOPE_SIZE)
    assert np.array_equal(heard[:, 6:], learnt[:, 6:])
    assert np.array_equal(heard[:, 6:], band_envelope(log_mel(samples, CONTENT_MEL)[:, :100]))
    shaped = WhisperContentEncoder(encoder, subspace, "t@2", "space", envelope=True, cepstra=True)
    both = shaped.encode_piece(samples)
    assert shaped.dims == both.shape[1] == 6 + ENVELOPE_SIZE + CEPSTRA_SIZE
    assert np.array_equal(both[:, : 6 + ENVELOPE_SIZE], heard)


def test_conversion_keeps_the_encoder_and_nothing_else(tmp_path: Path) -> None:
    reference = _Reference(1)
    _write_ctranslate2(tmp_path / "model.bin", reference.arrays())
    arrays = convert_checkpoint(tmp_path / "model.bin")
    assert {array.dtype.name for array in arrays.values()} == {"float16"}
    assert "layer_0/ffn/linear_1/bias" in arrays
    assert not any("decoder" in name for name in arrays)
    assert np.abs(arrays["conv1/weight"] - reference.conv1.weight.detach().numpy()).max() < 1e-3


def test_a_stream_that_comes_at_once_has_the_features_of_the_whole(tmp_path: Path) -> None:
    stage = stage_of(tmp_path, layers=2)
    samples = noise(2.0)
    ((_, _, found),) = in_blocks(stage, samples, block=100, ahead=0)
    np.testing.assert_allclose(found, stage.encode_piece(samples), atol=1e-4)


def test_a_stream_remembers_all_that_one_layer_sees(tmp_path: Path) -> None:
    """What one layer attends to is not changed by what follows, so nothing is lost in parts."""
    stage = stage_of(tmp_path, layers=1)
    samples = noise(3.0)
    samples[:320] *= 4  # The loudest value, which scales all others, is known from the start on.
    for start, end, found in in_blocks(stage, samples, block=7, ahead=3):
        whole = stage.encode_piece(samples[: 320 * end])
        np.testing.assert_allclose(found[:7], whole[start : start + 7], atol=2e-3)


def test_a_stream_without_end_stays_within_the_positions_and_in_constant_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("auto_voice.models.whisper_encoder.RUN_FRAMES", 60)
    monkeypatch.setattr("auto_voice.models.whisper_encoder.SETTLED_FRAMES", 30)
    monkeypatch.setattr("auto_voice.models.whisper_encoder.REMEMBERED_FRAMES", 40)
    stage, places, sizes = stage_of(tmp_path, layers=2), [], []
    live = stage.encoder.live
    assert live is not None

    class Watched:
        outputs, ports = live.outputs, live.ports

        def outputs_of(self, wanted, mel, skip, start, memory):  # type: ignore[no-untyped-def]
            places.append(int(start[0]))
            sizes.append(memory.shape[4])
            return live.outputs_of(wanted, mel, skip, start, memory)

    monkeypatch.setattr(stage.encoder, "_live", Watched())
    samples = noise(8.0)
    found = in_blocks(stage, samples, block=10, ahead=5)
    assert max(places) < 60 + 30
    assert max(sizes) == 40
    assert len(places) > len(found)  # Two runs side by side, from time to time.
    assert all(np.isfinite(features).all() for _, _, features in found)
    whole = stage.encode_piece(samples)
    start, _, last = found[-1]
    error = np.square(last[:5, :6] - whole[start : start + 5, :6]).mean()
    assert error < 0.5 * whole[:, :6].var()


def test_an_encoder_whose_sizes_have_no_graph_for_streams_has_none(tmp_path: Path) -> None:
    _write_ctranslate2(tmp_path / "model.bin", _Reference(1).arrays())
    encoder = WhisperEncoder.load(
        tmp_path / "model.bin", 1, graph=lambda shape: graph_kit.graph("whisper_content", shape)
    )
    subspace = ContentSpace(*(np.ones(s, "f4") for s in (WIDTH, WIDTH, (WIDTH, 6))))
    assert WhisperContentEncoder(encoder, subspace, "t@1", "space").stream() is None


def test_hidden_values_that_do_nothing_can_be_left_out(tmp_path: Path) -> None:
    reference, frames = _Reference(2), 40
    for layer in reference.layers:
        with torch.no_grad():
            # Half of them, in no order, reach nothing or hear nothing.
            layer.linear2.weight[:, ::4] = 0
            layer.linear1.weight[2::4] = 0
            layer.linear1.bias[2::4] = 0
    _write_ctranslate2(tmp_path / "model.bin", reference.arrays())
    net = content_net(tmp_path / "model.bin", 6, layers=2, hidden=2 * WIDTH)
    mel = torch.randn(1, 80, 2 * frames)
    with torch.no_grad():
        expected = reference.eval()(mel)
        assert net.shape.hidden == 2 * WIDTH
        torch.testing.assert_close(net.states(mel), expected, atol=1e-4, rtol=1e-4)
        fewer = content_net(tmp_path / "model.bin", 6, layers=2, hidden=WIDTH).states(mel)
    assert 0.01 < (fewer - expected).square().mean() < expected.var()
    for wrong in ({"hidden": 4 * WIDTH + 1}, {"hidden": 0}, {"layers": 3}):
        with pytest.raises(TrainingError, match=r"content\.net asks for"):
            content_net(tmp_path / "model.bin", 6, **{"layers": 2, "hidden": WIDTH, **wrong})


def test_a_file_of_whole_numbers_is_a_quarter_as_large_and_computes_nearly_the_same(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    reference = _Reference(2)
    with torch.no_grad():
        reference.positions.copy_(torch.from_numpy(sinusoids(1500, WIDTH)))
    _write_ctranslate2(tmp_path / "model.bin", reference.arrays())
    arrays = encoder_arrays(read_arrays(tmp_path / "model.bin"), 2)
    small = as_stored(arrays)
    assert POSITIONS not in small
    save_file(small, tmp_path / "small.safetensors")
    found = read_arrays(tmp_path / "small.safetensors")
    assert found.keys() == arrays.keys()
    np.testing.assert_allclose(found[POSITIONS], arrays[POSITIONS], atol=1e-6)
    for name, values in arrays.items():
        if values.ndim > 1 and name != POSITIONS:
            largest = np.abs(values).reshape(len(values), -1).max(axis=1)
            error = np.abs(found[name] - values).reshape(len(values), -1).max(axis=1)
            assert (error <= largest / 250).all()
    matrices = sum(v.nbytes for n, v in arrays.items() if v.ndim > 1 and n != POSITIONS)
    assert (tmp_path / "small.safetensors").stat().st_size < 0.27 * matrices
    samples = noise(1.0)
    whole, nearly = (
        load(tmp_path / name, layers=2).features(samples)
        for name in ("model.bin", "small.safetensors")
    )
    assert np.square(whole - nearly).mean() < 1e-3 * whole.var()


def test_whole_numbers_without_fitting_steps_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    _write_ctranslate2(tmp_path / "model.bin", _Reference(1).arrays())
    small = as_stored(encoder_arrays(read_arrays(tmp_path / "model.bin"), 1))
    name = "layer_0/ffn/linear_0/weight"
    for steps in (None, np.ones(3, np.float32)):
        damaged = {key: values for key, values in small.items() if key != f"{name}{STEP}"}
        if steps is not None:
            damaged[f"{name}{STEP}"] = steps
        save_file(damaged, tmp_path / "damaged.safetensors")
        with pytest.raises(ModelLoadError, match="steps that do not fit"):
            read_arrays(tmp_path / "damaged.safetensors")


@pytest.mark.weights
def test_the_positions_of_whisper_can_be_computed(weights_registry: ModelRegistry) -> None:
    arrays = read_arrays(weights_registry.path("recogniser_base", file="model.bin"))
    np.testing.assert_allclose(sinusoids(1500, 512), arrays[POSITIONS], atol=5e-4)
