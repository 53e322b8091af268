"""CTranslate2 model files: a flat list of named arrays."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from auto_voice.errors import ModelLoadError
from auto_voice.types import FloatArray

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
