"""Checkpoints of torch and CTranslate2 as arrays; nothing of them is executed."""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import tarfile
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from auto_voice.errors import ModelLoadError, UnsafeFileError
from auto_voice.types import FloatArray

Array: TypeAlias = NDArray[Any]

# First pickle of the layout that torch wrote before version 1.6, and its second.
OLD_MAGIC, OLD_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
# NumPy has no such type.
BFLOAT16 = "bf16"
# Containers within containers; a pickle that refers to itself has no end.
DEEPEST = 50
# Elements of all tensors over those of all storages; tied weights are counted once.
MOST_VIEWS = 4
_STORAGES = {
    "DoubleStorage": "<f8", "FloatStorage": "<f4", "HalfStorage": "<f2",
    "BFloat16Storage": BFLOAT16,
    "LongStorage": "<i8", "IntStorage": "<i4", "ShortStorage": "<i2", "CharStorage": "i1",
    "ByteStorage": "u1", "BoolStorage": "?",
}  # fmt: skip
# What a pickle does that describes tensors and containers, and nothing else.
_OPCODES = frozenset({
    "PROTO", "FRAME", "STOP", "MARK", "POP", "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT",
    "BININT1", "BININT2", "LONG", "LONG1", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "EMPTY_LIST", "APPEND",
    "APPENDS", "LIST", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_DICT", "DICT",
    "SETITEM", "SETITEMS", "GET", "BINGET", "LONG_BINGET", "PUT", "BINPUT", "LONG_BINPUT",
    "MEMOIZE", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "BINPERSID", "NEWOBJ",
})  # fmt: skip
_MEMO_PUTS = ("PUT", "BINPUT", "LONG_BINPUT")


# Named tuples, because nothing that a pickle can do changes one after it was checked.


class _StorageType(NamedTuple):
    dtype: str


class _Storage(NamedTuple):
    """Raw numbers that a pickle speaks of; they are read once the pickle has ended."""

    key: str
    dtype: str
    length: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _DamageError(Exception):
    """What is wrong, as the middle of a sentence."""


class _ForeignError(Exception):
    """The name that a pickle asked for."""


class _Inert:
    """Stands where a pickle asks for a class of a training program: it keeps and does nothing."""

    __slots__ = ()

    def __new__(cls, *_: Any) -> _Inert:
        return super().__new__(cls)

    def __call__(self, *_: Any) -> _Inert:
        return self

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, _: Any, __: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        pass

    def extend(self, _: Any) -> None:
        pass


def read_torch_checkpoint(path: Path, ignored: Collection[str] = ()) -> Any:
    """What ``torch.save`` wrote to ``path``: containers of numbers, texts and arrays.

    Reads the zip layout and the older one of several pickles. Strided tensors come C-ordered,
    bfloat16 as float32.

    Args:
        ignored: packages, and classes in full, of the program that made the file; what it says of
            them is left out. Nothing of them is imported.

    Raises:
        UnsafeFileError: the file names anything but tensors and plain containers, or has the
            tar layout of before 2018, which cannot be read safely.
        ModelLoadError: it is no checkpoint, or is damaged or cut short.
    """
    try:
        if zipfile.is_zipfile(path):
            return _read_zip(path, ignored)
        if tarfile.is_tarfile(path):
            raise UnsafeFileError(
                f"{path} has the legacy tar layout of PyTorch, which cannot be read without "
                "running code from it; save it again as safetensors."
            )
        with path.open("rb") as file:
            if file.read(2) == b"PK":
                raise _DamageError("it is a zip file without its end")
            file.seek(0)
            return _read_old(file, ignored)
    except _ForeignError as error:
        raise UnsafeFileError(
            f"{path} is a pickle that asks for {error}, so it could run code and was not loaded; "
            "save its tensors as safetensors if you trust it."
        ) from error
    except _DamageError as error:
        raise ModelLoadError(
            f"{path} is not a PyTorch checkpoint or is damaged: {error}; fetch it again."
        ) from error
    except (UnsafeFileError, FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # pickle and zipfile name the same damage in a dozen ways
        raise ModelLoadError(
            f"{path} is not a PyTorch checkpoint or is damaged ({type(error).__name__}); "
            "fetch it again."
        ) from error


def widened(halves: Array) -> Array:
    """The bit patterns of bfloat16 as float32: its upper 16 bits."""
    return (halves.astype(np.uint32) << 16).view(np.float32)


# Both layouts


def _read_zip(path: Path, ignored: Collection[str]) -> Any:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise _DamageError("its members are compressed, which PyTorch's never are")
        if sum(member.file_size for member in members) > path.stat().st_size:
            raise _DamageError("its members overlap")
        (index,) = (m.filename for m in members if m.filename.endswith("/data.pkl"))
        folder = index.removesuffix("data.pkl")
        names = {member.filename for member in members}
        order = f"{folder}byteorder"
        if order in names and archive.read(order).strip() != b"little":
            raise _DamageError("its numbers are big-endian")
        described = _unpickle(io.BytesIO(archive.read(index)), _zip_storage, ignored)
        resolver = _Resolver(lambda storage: archive.read(f"{folder}data/{storage.key}"))
        return resolver.resolve(described)


def _zip_storage(saved: tuple[Any, ...]) -> _Storage:
    kind, storage_type, key, _, count = saved
    return _storage(kind, storage_type, key, count)


def _read_old(file: BinaryIO, ignored: Collection[str]) -> Any:
    if _unpickle(file, _no_storage) != OLD_MAGIC or _unpickle(file, _no_storage) != OLD_PROTOCOL:
        raise _DamageError("it begins otherwise")
    about = _unpickle(file, _no_storage)
    if not isinstance(about, Mapping) or about.get("little_endian") is not True:
        raise _DamageError("its numbers are big-endian")
    known: dict[str, _Storage] = {}

    def storage(saved: tuple[Any, ...]) -> _Storage:
        kind, storage_type, key, _, count, view = saved
        if view is not None:
            raise _DamageError("it holds a view of a storage")
        made = _storage(kind, storage_type, key, count)
        if known.setdefault(made.key, made) != made:
            raise _DamageError("two of its storages have one name")
        return made

    described = _unpickle(file, storage, ignored)
    keys = _unpickle(file, _no_storage)
    named = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not named or sorted(keys) != sorted(known):
        raise _DamageError("its storages are not those that it speaks of")
    data = {}
    for key in keys:
        (count,) = struct.unpack("<q", file.read(8))
        if count != known[key].length:
            raise _DamageError(f"storage {key} has another length than it says")
        data[key] = file.read(count * _itemsize(known[key].dtype))
    return _Resolver(lambda wanted: data[wanted.key]).resolve(described)


def _no_storage(saved: tuple[Any, ...]) -> _Storage:
    raise _DamageError("it speaks of storages where there are none")


def _storage(kind: Any, storage_type: Any, key: Any, count: Any) -> _Storage:
    plain = isinstance(key, str) and type(count) is int and count >= 0
    if kind != "storage" or not isinstance(storage_type, _StorageType) or not plain:
        raise _DamageError("a storage of it is none")
    return _Storage(key, storage_type.dtype, count)


def _itemsize(dtype: str) -> int:
    return 2 if dtype == BFLOAT16 else np.dtype(dtype).itemsize


# The pickle


class _Dict(dict[Any, Any]):
    """A dictionary that looks at a key before it hashes it.

    The hash of a tuple takes time exponential in its depth where it holds another one twice.
    """

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(key, (str, int)):
            raise _DamageError("a key of it is neither a text nor a whole number")
        super().__setitem__(key, value)


class _Rebuild:
    """What the functions of ``torch._utils`` are called with; its methods cannot be changed by a
    pickle, as functions could."""

    __slots__ = ()

    def tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
        numbers = (offset, *shape, *strides)
        if not isinstance(storage, _Storage) or any(type(n) is not int or n < 0 for n in numbers):
            raise _DamageError("a tensor of it has impossible sizes")
        if len(shape) != len(strides) or prod(shape) > storage.length:
            raise _DamageError("a tensor of it is larger than its storage")
        if prod(shape):
            last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
            if last >= storage.length:
                raise _DamageError("a tensor of it reaches beyond its storage")
        return _Tensor(storage, offset, tuple(shape), tuple(strides))

    def parameter(self, data: Any, *_: Any) -> Any:
        return data

    def ordered(self, pairs: Any = ()) -> _Dict:
        made = _Dict()
        for key, value in pairs:
            made[key] = value
        return made


# The closed table of names that a pickle may ask for.
_NAMES: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Rebuild().ordered,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor_v2"): _Rebuild().tensor,
    ("torch._utils", "_rebuild_tensor"): _Rebuild().tensor,
    ("torch._utils", "_rebuild_parameter"): _Rebuild().parameter,
    **{("torch", name): _StorageType(dtype) for name, dtype in _STORAGES.items()},
}


class _Unpickler(pickle._Unpickler):
    """The reader in Python, since the one in C makes dictionaries that hash any key."""

    def __init__(
        self,
        file: BinaryIO,
        storage: Callable[[tuple[Any, ...]], _Storage],
        ignored: Collection[str],
    ) -> None:
        super().__init__(file)
        self._storage = storage
        self._ignored = ignored

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _NAMES:
            return _NAMES[module, name]
        if module.partition(".")[0] in self._ignored or f"{module}.{name}" in self._ignored:
            return _Inert
        raise _ForeignError(f"{module}.{name}")

    def persistent_load(self, saved: Any) -> _Storage:
        if not isinstance(saved, tuple):
            raise _DamageError("a storage of it is none")
        return self._storage(saved)

    def load_empty_dict(self) -> None:
        self.append(_Dict())  # type: ignore[attr-defined]

    def load_dict(self) -> None:
        items = self.pop_mark()  # type: ignore[attr-defined]
        pairs = zip(items[::2], items[1::2], strict=True)
        self.append(_Rebuild().ordered(pairs))  # type: ignore[attr-defined]

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    dispatch[pickle.EMPTY_DICT[0]] = load_empty_dict
    dispatch[pickle.DICT[0]] = load_dict


def _unpickle(
    file: BinaryIO,
    storage: Callable[[tuple[Any, ...]], _Storage],
    ignored: Collection[str] = (),
) -> Any:
    """The next pickle of ``file``, first looked through and then read."""
    start = file.tell()
    for opcode, argument, at in pickletools.genops(file):
        if opcode.name not in _OPCODES:
            raise _ForeignError(f"the operation {opcode.name}")
        # A memo is as long as its largest index, so an index beyond the file would fill the memory.
        if opcode.name in _MEMO_PUTS and cast(int, argument) > cast(int, at):
            raise _DamageError("its memo has holes")
    size = file.tell() - start
    file.seek(start)
    # The reader looks ahead, so it gets this pickle alone.
    return _Unpickler(io.BytesIO(file.read(size)), storage, ignored).load()


# From descriptions to arrays


class _Resolver:
    """Puts arrays where a pickle described tensors; what occurs twice is made once."""

    def __init__(self, read: Callable[[_Storage], bytes]) -> None:
        self._read = read
        self._storages: dict[_Storage, Array] = {}
        self._tensors: dict[_Tensor, Array] = {}
        self._done: dict[int, Any] = {}
        self._made = 0

    def resolve(self, value: Any, depth: int = 0) -> Any:
        if depth > DEEPEST:
            raise _DamageError("it is nested too deeply")
        if isinstance(value, _Tensor):
            return self._array(value)
        if isinstance(value, (_Storage, _StorageType)):
            raise _DamageError("it holds a storage by itself")
        if not isinstance(value, (Mapping, list, tuple)):
            return value
        if id(value) not in self._done:
            self._done[id(value)] = self._container(value, depth + 1)
        return self._done[id(value)]

    def _container(self, value: Any, depth: int) -> Any:
        if isinstance(value, Mapping):
            return {key: self.resolve(item, depth) for key, item in value.items()}
        return type(value)(self.resolve(item, depth) for item in value)

    def _numbers(self, storage: _Storage) -> Array:
        if storage not in self._storages:
            data = self._read(storage)
            if len(data) != storage.length * _itemsize(storage.dtype):
                raise _DamageError(f"storage {storage.key} is cut short")
            halves = storage.dtype == BFLOAT16
            numbers: Array = np.frombuffer(data, "<u2" if halves else storage.dtype)
            self._storages[storage] = widened(numbers) if halves else numbers
        return self._storages[storage]

    def _array(self, tensor: _Tensor) -> Array:
        if tensor not in self._tensors:
            numbers = self._numbers(tensor.storage)
            self._made += prod(tensor.shape)
            # Few views of many bytes could ask for more memory than there is.
            if self._made > MOST_VIEWS * sum(map(len, self._storages.values())):
                raise _DamageError("its tensors are many times larger than its storages")
            strides = [step * numbers.itemsize for step in tensor.strides]
            view = np.lib.stride_tricks.as_strided(
                numbers[tensor.offset :], tensor.shape, strides, writeable=False
            )
            self._tensors[tensor] = np.array(view, order="C")
        return self._tensors[tensor]


_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


def read_ctranslate2(path: Path) -> Iterator[tuple[str, FloatArray]]:
    """Named float arrays of a CTranslate2 model file (format version 6), halves widened."""
    data = memoryview(path.read_bytes())
    at = 0

    def take(layout: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from(layout, data, at)
        at += struct.calcsize(layout)
        return int(value)

    def text() -> str:
        nonlocal at
        length = take("<H")
        value = bytes(data[at : at + length]).rstrip(b"\0").decode()
        at += length
        return value

    try:
        take("<I")
        text()
        take("<I")
        for _ in range(take("<I")):
            name, rank = text(), take("<B")
            shape = tuple(take("<I") for _ in range(rank))
            dtype, size = _DTYPES[take("<B")], take("<I")
            array = np.frombuffer(data[at : at + size], dtype=dtype).reshape(shape)
            at += size
            if array.dtype.kind == "f":
                yield name, array.astype(np.float32)
    except (struct.error, KeyError, UnicodeDecodeError, ValueError) as error:
        raise ModelLoadError(f"{path} is not a CTranslate2 model file: {error}.") from error
