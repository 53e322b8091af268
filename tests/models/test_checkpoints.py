"""The strict reader of torch's checkpoints: equal to torch on real files, deaf to forged ones."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from auto_voice.errors import ModelLoadError, UnsafeFileError
from auto_voice.models.runtime.checkpoints import OLD_MAGIC, OLD_PROTOCOL, read_torch_checkpoint

torch = pytest.importorskip("torch")


def states() -> dict[str, Any]:
    torch.manual_seed(0)
    lstm = torch.nn.LSTM(3, 4, 2)
    tied = torch.nn.Parameter(torch.randn(2, 3))
    base = torch.randn(40)
    return {
        "module": torch.nn.BatchNorm1d(3).state_dict(),
        "lstm": lstm.state_dict(),
        "parameters": {"a": tied, "b": tied},
        "views": {"a": base[3:9], "b": base.view(5, 8)[:, ::2], "c": base.view(5, 8).T},
        "types": {
            str(kind): torch.ones(3).to(kind)
            for kind in (torch.float64, torch.float16, torch.int64, torch.int32, torch.int16,
                         torch.int8, torch.uint8, torch.bool)
        },
        "scalars": {"zero": torch.tensor(3.5), "empty": torch.zeros(0, 4), "step": 7, "lr": 1e-3},
        "nested": {"list": [torch.ones(2), (1, "two", None)], "deep": {"x": {"y": torch.ones(1)}}},
        "ordered": OrderedDict(b=torch.ones(1), a=torch.zeros(1)),
    }  # fmt: skip


def equal(found: Any, expected: Any) -> None:
    if torch.is_tensor(expected):
        assert found.flags.c_contiguous
        np.testing.assert_array_equal(found, expected.detach().numpy())
        assert found.dtype == expected.detach().numpy().dtype
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            equal(found[key], value)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            equal(one, other)
    else:
        assert found == expected


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", states())
def test_a_checkpoint_reads_as_torch_reads_it(name: str, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save(states()[name], path, _use_new_zipfile_serialization=zipped)
    equal(read_torch_checkpoint(path), torch.load(path, weights_only=True))


class Forged:
    """Writes what it is made of as a pickle would, whatever that is."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.answer = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.answer


class Storage(tuple):
    """What a pickle says of a storage."""


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return tuple(value) if isinstance(value, Storage) else None


def rebuilt(offset: Any, size: Any, stride: Any, count: Any = 4, key: str = "0") -> Forged:
    saved = Storage(("storage", torch.FloatStorage, key, "cpu", count))
    return Forged(
        torch._utils._rebuild_tensor_v2, saved, offset, size, stride, False, OrderedDict()
    )


def pickled(value: Any) -> bytes:
    file = io.BytesIO()
    _Pickler(file, 2).dump(value)
    return file.getvalue()


def archive(path: Path, value: Any, data: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", how) as file:
        file.writestr("x/data.pkl", pickled(value))
        for key, numbers in data.items():
            file.writestr(f"x/data/{key}", numbers)
    return path


FOUR = {"0": np.arange(4, dtype="<f4").tobytes()}


def test_a_hand_made_archive_is_read(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.pt", {"w": rebuilt(0, (2, 2), (1, 2))}, FOUR)
    np.testing.assert_array_equal(read_torch_checkpoint(path)["w"], [[0, 2], [1, 3]])


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (rebuilt(0, (5,), (1,)), "larger than its storage"),
        (rebuilt(1, (4,), (1,)), "reaches beyond"),
        (rebuilt(0, (2, 2), (3, 1)), "reaches beyond"),
        (rebuilt(0, (2,), (-1,)), "impossible sizes"),
        (rebuilt(-1, (2,), (1,)), "impossible sizes"),
        (rebuilt(0, (2,), (1, 1)), "larger than its storage"),
        (rebuilt(0, (10**9, 10**9), (0, 0)), "larger than its storage"),
        (rebuilt(0, (2.0,), (1,)), "impossible sizes"),
        (rebuilt(0, (True,), (1,)), "impossible sizes"),
        (rebuilt(0, (4,), (1,), count=9), "cut short"),
        (rebuilt(0, (4,), (1,), count=2**62), "cut short"),
        (rebuilt(0, (4,), (1,), count=-4), "a storage of it is none"),
        (rebuilt(0, (4,), (1,), key="7"), "KeyError"),
        (Storage(("storage", torch.FloatStorage, "0", "cpu", 4)), "storage by itself"),
    ],
)
def test_a_tensor_that_its_storage_does_not_hold_is_refused(
    tensor: Any, why: str, tmp_path: Path
) -> None:
    path = archive(tmp_path / "forged.pt", {"w": tensor}, FOUR)
    with pytest.raises(ModelLoadError, match=rf"forged\.pt.*{why}"):
        read_torch_checkpoint(path)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Forged(eval, "1"), "eval"),
        (Forged(getattr, 1, "real"), "getattr"),
        (Forged(torch.load, "x"), "load"),
        (Forged(np.zeros, 3), "zeros"),
        (torch.nn.Linear(1, 1), "Linear"),
        (Path("x"), "Path"),
        (Forged(io.BytesIO, b"x"), "BytesIO"),
    ],
)
def test_any_other_name_is_refused_and_told(value: Any, name: str, tmp_path: Path) -> None:
    with pytest.raises(UnsafeFileError, match=name):
        read_torch_checkpoint(archive(tmp_path / "x.pt", {"w": value}, {}))


@pytest.mark.parametrize(
    "state",
    [{"dtype": "O"}, (None, {"dtype": "O"}), {"shape": (10**6,)}, (None, {"__defaults__": (1,)})],
)
def test_a_pickle_cannot_change_what_was_checked(state: Any, tmp_path: Path) -> None:
    """BUILD may set attributes: neither of a storage type nor of a tensor that is described."""
    for change in (
        rebuilt(0, (4,), (1,)),
        Forged(torch._utils._rebuild_parameter, rebuilt(0, (4,), (1,)), False, OrderedDict()),
    ):
        change.answer = (*change.answer, state)
        path = archive(tmp_path / "x.pt", {"w": change}, FOUR)
        with pytest.raises((ModelLoadError, UnsafeFileError)):
            read_torch_checkpoint(path)
    again = archive(tmp_path / "y.pt", {"w": rebuilt(0, (4,), (1,))}, FOUR)
    np.testing.assert_array_equal(read_torch_checkpoint(again)["w"], np.arange(4))


def test_compressed_and_overlapping_members_are_refused(tmp_path: Path) -> None:
    value = {"w": rebuilt(0, (4,), (1,))}
    packed = archive(tmp_path / "packed.pt", value, FOUR, zipfile.ZIP_DEFLATED)
    with pytest.raises(ModelLoadError, match="compressed"):
        read_torch_checkpoint(packed)
    large = archive(tmp_path / "large.pt", value, {"0": bytes(4000)})
    data = bytearray(large.read_bytes())
    entry = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 1)
    # A second name in the directory for the same bytes.
    end = data.index(b"PK\x05\x06")
    twice = bytes(data[entry:end]).replace(b"data/0", b"data/1")
    data[end:end] = twice
    end += len(twice)
    count, size = struct.unpack_from("<HI", data, end + 10)
    struct.pack_into("<HHI", data, end + 8, count + 1, count + 1, size + len(twice))
    large.write_bytes(data)
    with pytest.raises(ModelLoadError, match="overlap"):
        read_torch_checkpoint(large)


def old(value: Any, keys: Any, data: bytes, about: Any = None) -> bytes:
    parts = [OLD_MAGIC, OLD_PROTOCOL, about or {"little_endian": True}, value, keys]
    return b"".join(map(pickled, parts)) + data


def old_tensor(count: int = 4, view: Any = None) -> Forged:
    saved = Storage(("storage", torch.FloatStorage, "0", "cpu", count, view))
    return Forged(torch._utils._rebuild_tensor_v2, saved, 0, (4,), (1,), False, OrderedDict())


NUMBERS = struct.pack("<q", 4) + FOUR["0"]


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: old(old_tensor(), ["0"], NUMBERS[:-1]), "cut short"),
        (lambda: old(old_tensor(), ["0"], struct.pack("<q", 5) + FOUR["0"]), "another length"),
        (lambda: old(old_tensor(), ["1"], NUMBERS), "not those"),
        (lambda: old(old_tensor(), [], b""), "not those"),
        (lambda: old(old_tensor(view=("1", 0, 4)), ["0"], NUMBERS), "view of a storage"),
        (lambda: old(old_tensor(), ["0"], NUMBERS, {"little_endian": False}), "big-endian"),
        (lambda: old([old_tensor(), old_tensor(8)], ["0"], NUMBERS), "one name"),
        (lambda: pickled(3) + pickled(4), "begins otherwise"),
        (lambda: old(old_tensor(), ["0"], b""), "error"),
    ],
)
def test_a_forged_file_of_the_old_layout_is_refused(
    make: Callable[[], bytes], why: str, tmp_path: Path
) -> None:
    path = tmp_path / "forged.pt"
    path.write_bytes(make())
    with pytest.raises(ModelLoadError, match=rf"forged\.pt.*{why}"):
        read_torch_checkpoint(path)


def test_a_hand_made_file_of_the_old_layout_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(old({"w": old_tensor()}, ["0"], NUMBERS))
    np.testing.assert_array_equal(read_torch_checkpoint(path)["w"], np.arange(4))


def nested(levels: int) -> list[Any]:
    value: list[Any] = [1]
    for _ in range(levels):
        value = [value, value]
    return value


def test_a_pickle_that_would_grow_without_end_is_refused(tmp_path: Path) -> None:
    endless: list[Any] = []
    endless.append(endless)
    for value in (endless, nested(200)):
        with pytest.raises(ModelLoadError, match="nested"):
            read_torch_checkpoint(archive(tmp_path / "x.pt", value, {}))
    assert read_torch_checkpoint(archive(tmp_path / "x.pt", nested(40), {})) is not None
    # A memo index beyond the file would be an allocation of as many pointers.
    with zipfile.ZipFile(tmp_path / "memo.pt", "w") as file:
        file.writestr("x/data.pkl", b"\x80\x02}r" + struct.pack("<I", 2**31) + b".")
    with pytest.raises(ModelLoadError, match="memo"):
        read_torch_checkpoint(tmp_path / "memo.pt")
    # Each differs in a stride that one row never takes.
    many = [rebuilt(0, (4, 1), (1, i)) for i in range(99)]
    with pytest.raises(ModelLoadError, match="times larger"):
        read_torch_checkpoint(archive(tmp_path / "views.pt", many, FOUR))


# Tuples of the same tuple twice: 2**60 to hash or to compare.
DOUBLED = b"K\x01\x85q\x01" + b"".join(b"h%c\x86q%c" % (i, i + 1) for i in range(1, 61))


@pytest.mark.parametrize(
    "body",
    [
        b"}" + DOUBLED + b"K\x01s.",
        b"}(" + DOUBLED + b"K\x01u.",
        b"(" + DOUBLED + b"K\x01d.",
        b"ccollections\nOrderedDict\n)R" + DOUBLED + b"K\x01s.",
        b"ccollections\nOrderedDict\n]" + DOUBLED + b"K\x01\x86a\x85R.",
    ],
    ids=["item", "items", "dict", "ordered", "pairs"],
)
def test_a_key_that_would_be_hashed_without_end_is_refused(body: bytes, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as file:
        file.writestr("x/data.pkl", b"\x80\x02" + body)
    with pytest.raises(ModelLoadError, match=r"x\.pt.*a key of it is neither"):
        read_torch_checkpoint(tmp_path / "x.pt")


def test_names_of_storages_are_texts(tmp_path: Path) -> None:
    twice = b"\x80\x02(" + DOUBLED + DOUBLED + b"l."
    parts = [OLD_MAGIC, OLD_PROTOCOL, {"little_endian": True}, old_tensor()]
    path = tmp_path / "x.pt"
    path.write_bytes(b"".join(map(pickled, parts)) + twice)
    with pytest.raises(ModelLoadError, match="not those"):
        read_torch_checkpoint(path)


def test_big_endian_numbers_are_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.pt", {"w": rebuilt(0, (4,), (1,))}, FOUR)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("x/byteorder", b"big")
    with pytest.raises(ModelLoadError, match="big-endian"):
        read_torch_checkpoint(path)


def test_reading_needs_no_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    torch.save({"a": torch.ones(2)}, tmp_path / "x.pt")
    code = (
        "import sys\nsys.modules['torch'] = None\nfrom pathlib import Path\n"
        "from auto_voice.models.runtime.weights import checkpoint_arrays\n"
        "print(checkpoint_arrays(Path(sys.argv[1]))['a'])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "x.pt")]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[1. 1.]"
