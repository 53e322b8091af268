"""Graphs of the networks: exported from their definitions, committed without weights.

A graph belongs to an architecture and to sizes, so one serves all weights of that shape. A model
of other sizes brings its graph as one of its files, as published trainings do.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from auto_voice.errors import ModelLoadError
from auto_voice.models.runtime.sessions import Network, float32, open_network
from auto_voice.models.runtime.weights import Array, read_weights

FOLDER = Path(__file__).parents[2] / "graphs"
SUFFIX = ".onnx"
# Note of an array that a network has and no operation of its graph reads.
UNUSED = "unused"
# What follows the name of an array that is handed over in half precision.
HALF = ":half"
# ``TensorProto.DataType``.
FLOAT, FLOAT16 = 1, 10
# Names that an error message lists before it says how many more there are.
NAMES_SHOWN = 3

ShapeT = TypeVar("ShapeT")


def graph_name(architecture: str, shape: Any) -> str:
    """``hifigan``, ``mel_converter-dims176-width192``: the architecture and every size that is
    not the default of the dataclass ``shape``; a field with ``metadata={"graph": False}`` does not
    change the graph."""
    parts = [architecture]
    for field in fields(shape):
        value = getattr(shape, field.name)
        if field.metadata.get("graph", True) and (
            field.default is MISSING or value != field.default
        ):
            text = ".".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()
            parts.append(f"{field.name}{text}")
    return "-".join(parts)


def shape_from(kind: Callable[..., ShapeT], sizes: Mapping[str, Any], name: str) -> ShapeT:
    """The dataclass ``kind`` of a catalog's sizes.

    Raises:
        ModelLoadError: a size that the architecture does not have.
    """
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in sizes.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise ModelLoadError(
            f"{name} has sizes that its architecture does not know ({error}); "
            "check the model's params in the catalog."
        ) from error


def weight_file(files: Mapping[str, Path], name: str) -> Path:
    """The weight file of a version that has one, beside which a graph may lie.

    Raises:
        ModelLoadError: the version has none, or several.
    """
    found = [path for file, path in files.items() if not file.endswith(SUFFIX)]
    if len(found) != 1:
        raise ModelLoadError(
            f"{name} must list exactly one weight file in the catalog, not {len(found)}."
        )
    return found[0]


def load_network(
    architecture: str,
    shape: Any,
    files: Mapping[str, Path],
    name: str,
    device: str = "cpu",
    *,
    convert: Callable[[Path], dict[str, Array]] | None = None,
    select: Callable[[str], str | None] | None = None,
) -> Network:
    """The network of a version that has one weight file.

    Args:
        shape: dataclass of the sizes.
        files: of the version.
        convert, select: see ``weights.read_weights``.

    Raises:
        ModelLoadError: missing, unknown or wrongly shaped arrays (the message names file and
            key), a damaged file, or sizes that no graph has.
        UnsafeFileError: the file would run code.
    """
    path = weight_file(files, name)
    arrays = read_weights(path, convert=convert, select=select)
    graph = read_graph(architecture, shape, files, name)
    return bound_network(graph, arrays, str(path), name, device)


def bound_network(
    graph: bytes, arrays: Mapping[str, Array], source: str, name: str, device: str = "cpu"
) -> Network:
    """``graph`` with ``arrays``, which must be its initialisers, no more and no fewer.

    Args:
        source: what to call the place that the arrays come from.

    Raises:
        ModelLoadError: they are not.
    """
    check_fit(initialisers(graph), arrays, source)
    used = {name: arrays[name] for name in initialisers(graph, used=True)}
    halves = {name for name, values in used.items() if values.dtype == np.float16}
    if not halves:
        return open_network(graph, float32(used), device, name)
    # The session widens them itself, so that no copy in float32 outlives its making.
    renamed = {f"{key}{HALF}" if key in halves else key: v for key, v in used.items()}
    ready = {k: v if k.endswith(HALF) else float32({k: v})[k] for k, v in renamed.items()}
    return open_network(with_halves(graph, halves), ready, device, name)


def read_graph(architecture: str, shape: Any, files: Mapping[str, Path], name: str) -> bytes:
    """The graph that is among a version's files, else the one that the package holds.

    Raises:
        ModelLoadError: there is none of these sizes.
    """
    own = [path for file, path in files.items() if file.endswith(SUFFIX)]
    path = own[0] if own else FOLDER / f"{graph_name(architecture, shape)}{SUFFIX}"
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ModelLoadError(
            f"{name} has sizes of which no graph is installed ({path.stem}); check the model's "
            "params in the catalog, or write the graph by python -m "
            "auto_voice.training.export_graphs CATALOG FOLDER, which needs the extra train "
            "(autovoice doctor says how to install it), and list it among the "
            "model's files."
        ) from error


def why_it_fails(device: str) -> str:
    """What keeps ``device`` from running a small network; empty where it really runs it."""
    graph = (FOLDER / f"ge2e{SUFFIX}").read_bytes()
    weights = {name: np.zeros(shape, np.float32) for name, shape in initialisers(graph).items()}
    try:
        network = open_network(graph, weights, device, "a test network")
        network(np.zeros((1, 8, 40), np.float32))
    except Exception as error:  # Drivers and providers fail in every way there is.
        return next(iter(str(error).splitlines()), type(error).__name__)
    return network.refusal


def check_fit(
    wanted: Mapping[str, tuple[int, ...]], arrays: Mapping[str, Array], source: str
) -> None:
    """Whether ``arrays`` are those of a network.

    Raises:
        ModelLoadError: one is missing, unknown or of another shape.
    """
    if missing := [key for key in wanted if key not in arrays]:
        raise ModelLoadError(f"{source} lacks {_some(missing)}; is it another model's file?")
    if unknown := [key for key in arrays if key not in wanted]:
        raise ModelLoadError(
            f"{source} holds {_some(unknown)}, unknown to this architecture; "
            "is it another model's file?"
        )
    for key, shape in wanted.items():
        if arrays[key].shape != shape:
            raise ModelLoadError(
                f"{source} has {key!r} of shape {arrays[key].shape} where the architecture "
                f"needs {shape}; check the model's params in the catalog."
            )


def initialisers(graph: bytes, *, used: bool = False) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the arrays that an ONNX graph expects from outside.

    Read from the wire format of Protocol Buffers, whose few rules do for this, so that running a
    model needs no further package. Numbers are those of ``onnx.proto``.

    Args:
        used: leave out those that no operation reads.
    """
    (model_graph,) = (value for number, value in _messages(graph) if number == 7)
    tensors = (_outside(value) for number, value in _messages(model_graph) if number == 5)
    found = (tensor for tensor in tensors if tensor is not None)
    return {name: shape for name, shape, note in found if not (used and note == UNUSED)}


def with_halves(graph: bytes, names: Collection[str]) -> bytes:
    """``graph`` with the arrays ``names`` expected in half precision, as ``<name>:half``.

    A Cast gives each its name back; the session computes it once, when it is made.
    """
    parts = []
    for number, value in _fields(graph):
        if number != 7 or isinstance(value, int):
            parts.append(_field(number, value))
            continue
        casts, rest = [], []
        for inner, content in _fields(value):
            known = _outside(content) if inner == 5 and not isinstance(content, int) else None
            if known is None or known[0] not in names:
                rest.append(_field(inner, content))
                continue
            name, shape, _ = known
            rest.append(_field(5, _half_tensor(name, shape)))
            casts.append(_field(1, _cast(name)))
        parts.append(_field(7, b"".join(casts + rest)))
    return b"".join(parts)


def _half_tensor(name: str, shape: tuple[int, ...]) -> bytes:
    place = _field(1, b"location") + _field(2, b"weights")
    dims = b"".join(_field(1, size) for size in shape)
    about = _field(2, FLOAT16) + _field(8, f"{name}{HALF}".encode())
    return dims + about + _field(13, place) + _field(14, 1)


def _cast(name: str) -> bytes:
    """A NodeProto that makes the float32 array ``name`` of its half."""
    to = _field(1, b"to") + _field(3, FLOAT) + _field(20, 2)
    ends = _field(1, f"{name}{HALF}".encode()) + _field(2, name.encode())
    return ends + _field(4, b"Cast") + _field(5, to)


def _field(number: int, value: int | bytes | memoryview) -> bytes:
    if isinstance(value, int):
        return _encoded(number << 3) + _encoded(value)
    return _encoded(number << 3 | 2) + _encoded(len(value)) + bytes(value)


def _encoded(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _outside(tensor: memoryview) -> tuple[str, tuple[int, ...], str] | None:
    """Name, shape and note of a tensor; None for one that holds its numbers."""
    texts: dict[int, str] = {}
    shape: list[int] = []
    outside = False
    for field, value in _fields(tensor):
        if field in (8, 12) and isinstance(value, memoryview):
            texts[field] = bytes(value).decode()
        elif field == 1:
            shape += [value] if isinstance(value, int) else list(_varints(value))
        elif field == 14:
            outside = value == 1
    return (texts.get(8, ""), tuple(shape), texts.get(12, "")) if outside else None


def _messages(data: bytes | memoryview) -> Iterable[tuple[int, memoryview]]:
    return ((number, value) for number, value in _fields(data) if isinstance(value, memoryview))


def _fields(data: bytes | memoryview) -> Iterable[tuple[int, int | memoryview]]:
    view, at = memoryview(data), 0
    while at < len(view):
        key, at = _varint(view, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(view, at)
            yield number, value
            continue
        if kind == 2:
            size, at = _varint(view, at)
        else:
            size = {1: 8, 5: 4}[kind]
        yield number, view[at : at + size]
        at += size


def _varints(view: memoryview) -> Iterable[int]:
    at = 0
    while at < len(view):
        value, at = _varint(view, at)
        yield value


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = view[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _some(keys: Iterable[str]) -> str:
    names = [repr(key) for key in keys]
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
