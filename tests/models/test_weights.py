"""Checkpoints: nothing in them runs, nothing is lost on the way, and every misfit is named."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from auto_voice.errors import AudioContentError, ModelLoadError, UnsafeFileError

torch = pytest.importorskip("torch")

from auto_voice.models.runtime import graphs, weights  # noqa: E402


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, fuse: Path) -> None:
        self.fuse = fuse

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, (str(self.fuse),))


def bombs(folder: Path) -> dict[str, Path]:
    payload = {"generator": Bomb(folder / "exploded")}
    files = {f"raw{protocol}": folder / f"raw{protocol}.pt" for protocol in (0, 2, 4, 5)}
    for name, path in files.items():
        path.write_bytes(pickle.dumps(payload, int(name[-1])))
    for name, zipped in (("zip", True), ("legacy", False)):
        files[name] = folder / f"{name}.pt"
        torch.save(payload, files[name], _use_new_zipfile_serialization=zipped)
    files["tar"] = folder / "tar.pt"
    with tarfile.open(files["tar"], "w") as tar:
        member = tarfile.TarInfo("pickle")
        data = pickle.dumps(payload, 2)
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    return files


@pytest.mark.parametrize("kind", ["raw0", "raw2", "raw4", "raw5", "zip", "legacy", "tar"])
def test_a_pickle_bomb_is_refused_and_does_not_go_off(kind: str, tmp_path: Path) -> None:
    path = bombs(tmp_path)[kind]
    with pytest.raises(UnsafeFileError, match=path.name):
        weights.checkpoint_arrays(path, under="generator")
    assert not (tmp_path / "exploded").exists()


def test_the_refusal_names_what_the_pickle_wanted(tmp_path: Path) -> None:
    with pytest.raises(UnsafeFileError, match="mkdir"):
        weights.checkpoint_arrays(bombs(tmp_path)["zip"])


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.9])
def test_a_checkpoint_cut_short_is_refused(zipped: bool, keep: float, tmp_path: Path) -> None:
    path = tmp_path / "cut.pt"
    torch.save({"a": torch.ones(1000)}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises((ModelLoadError, UnsafeFileError), match=r"cut\.pt"):
        weights.checkpoint_arrays(path)


@pytest.mark.parametrize("data", [b"not a model at all", b"RIFF\0\0\0\0WAVE", bytes(64)])
def test_a_file_of_another_kind_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    path.write_bytes(data)
    with pytest.raises((ModelLoadError, UnsafeFileError), match=r"other\.pt"):
        weights.checkpoint_arrays(path)


@pytest.mark.parametrize("state", [[1, 2], {"a": 1}, {"generator": {"step": 3}}])
def test_a_checkpoint_without_tensors_is_refused(state: object, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ModelLoadError, match="tensors"):
        weights.checkpoint_arrays(tmp_path / "x.pt", under="generator")


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_survive_the_reading(zipped: bool, tmp_path: Path) -> None:
    state = {
        "a": torch.randn(3, 4).T,
        "half": torch.randn(5).bfloat16(),
        "count": torch.arange(3),
        "note": "text",
    }
    torch.save({"model": state}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    arrays = weights.checkpoint_arrays(tmp_path / "x.pt", under="model")
    assert sorted(arrays) == ["a", "count", "half"]
    assert arrays["a"].flags.c_contiguous
    np.testing.assert_array_equal(arrays["a"], state["a"].numpy())
    np.testing.assert_array_equal(arrays["half"], state["half"].float().numpy())


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("kind", ["Conv1d", "ConvTranspose1d"])
def test_folded_weight_norm_equals_pytorchs(dim: int, kind: str) -> None:
    torch.manual_seed(dim)
    layer = getattr(torch.nn, kind)(6, 8, 5)
    normed = torch.nn.utils.parametrizations.weight_norm(layer, dim=dim)
    with torch.no_grad():
        normed.parametrizations.weight.original0.mul_(torch.rand(1) + 0.5)
    new_names = {f"up.{key}": value.numpy() for key, value in normed.state_dict().items()}
    old_names = {
        key.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): value
        for key, value in new_names.items()
    }
    for arrays in (new_names, old_names):
        folded = weights.fold_weight_norm(arrays)
        assert sorted(folded) == ["up.bias", "up.weight"]
        assert folded["up.weight"].dtype == np.float32
        np.testing.assert_allclose(
            folded["up.weight"], normed.weight.detach().numpy(), rtol=2e-6, atol=1e-8
        )


def saved(path: Path, **arrays: np.ndarray) -> Path:
    save_file(arrays, path)
    return path


GOOD = {"weight": np.ones((2, 3), np.float32), "bias": np.arange(2, dtype=np.float32)}
SHAPES = {"weight": (2, 3), "bias": (2,)}


def test_safetensors_are_mapped_and_equal_what_the_library_reads(tmp_path: Path) -> None:
    arrays = GOOD | {
        "half": np.float16([1.5]), "whole": np.arange(3), "flag": np.array([True, False]),
        "empty": np.zeros((0, 4), np.float32),
    }  # fmt: skip
    path = saved(tmp_path / "m.safetensors", **arrays)
    found = weights.map_safetensors(path)
    expected = load_file(path)
    assert sorted(found) == sorted(expected)
    for name, values in expected.items():
        assert found[name].dtype == values.dtype
        np.testing.assert_array_equal(found[name], values)
    if Path("/proc/self/maps").exists():
        assert str(path) in Path("/proc/self/maps").read_text()


def test_bfloat16_is_widened(tmp_path: Path) -> None:
    from safetensors.torch import save_file as save_tensors

    values = torch.randn(5, 3).bfloat16()
    save_tensors({"a": values}, tmp_path / "m.safetensors")
    found = weights.map_safetensors(tmp_path / "m.safetensors")["a"]
    np.testing.assert_array_equal(found, values.float().numpy())


@pytest.mark.parametrize(
    ("arrays", "key"),
    [
        ({"weight": GOOD["weight"]}, "bias"),
        (GOOD | {"extra.weight": GOOD["bias"]}, "extra.weight"),
        (GOOD | {"weight": np.ones((3, 2), np.float32)}, "weight"),
        ({f"k{i}": GOOD["bias"] for i in range(9)}, "weight"),
    ],
)
def test_a_misfit_names_file_and_key(arrays: dict[str, np.ndarray], key: str) -> None:
    with pytest.raises(ModelLoadError, match=rf"misfit\.safetensors .*'{key}'"):
        graphs.check_fit(SHAPES, arrays, "misfit.safetensors")


def test_damaged_and_absent_safetensors_are_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.safetensors", **GOOD)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ModelLoadError, match=r"m\.safetensors"):
        weights.read_weights(path)
    with pytest.raises(ModelLoadError, match="does not exist"):
        weights.read_weights(tmp_path / "absent.safetensors")


def test_the_published_file_itself_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "published.bin"
    torch.save({key: torch.from_numpy(value) for key, value in GOOD.items()}, path)
    found = weights.read_weights(path, convert=weights.checkpoint_arrays, select={"bias": "b"}.get)
    assert list(found) == ["b"]
    np.testing.assert_array_equal(found["b"], GOOD["bias"])


@pytest.mark.parametrize(
    "values", [np.zeros((0, 5)), np.zeros((1, 1, 1, 1)), [np.nan, 1.0], [np.inf]]
)
def test_input_that_no_network_should_see(values: object) -> None:
    with pytest.raises(AudioContentError, match="audio"):
        weights.as_batch(values, 2, "audio")
