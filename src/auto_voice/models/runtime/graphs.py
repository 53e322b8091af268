"""Graphs of the networks: exported from their definitions, committed without weights.

A graph belongs to an architecture and to sizes, so one serves all weights of that shape. A model
of other sizes brings its graph as one of its files, as published trainings do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from auto_voice.errors import ModelLoadError, UnsafeFileError, first_line
from auto_voice.models.runtime.sessions import Network, float32, open_network
from auto_voice.models.runtime.weights import READ, STEP, Array, read_weights

FOLDER = Path(__file__).parents[2] / "graphs"
SUFFIX = ".onnx"
# Note of an array that a network has and no operation of its graph reads.
UNUSED = "unused"
# What follows the name of an array that is handed over in half precision.
HALF = ":half"
# What follows the name of a convolution's int8 weight: step and zero point of the 8-bit numbers
# that it gives; see also ``weights.STEP`` and ``READ``.
GIVEN = ":given"
# ``TensorProto.DataType``.
FLOAT, UINT8, INT8, INT32, INT64, FLOAT16 = 1, 2, 3, 6, 7, 10
_TYPES = {"float32": FLOAT, "uint8": UINT8, "int8": INT8, "int32": INT32, "float16": FLOAT16}
# Names that an error message lists before it says how many more there are.
NAMES_SHOWN = 3
# Bytes of a file of Protocol Buffers, at most.
LARGEST_BYTES = 2**31
# Operations of ONNX itself, and those of the runtime that quantised models use; an operation of
# anybody else would need a library of theirs.
DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
# A compiled network by its path.
FILE_READERS = frozenset({"EPContext"})
# Graphs within graphs, as loops and conditions have them.
DEEPEST = 20

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
    edit: Callable[[bytes], bytes] | None = None,
) -> Network:
    """The network of a version that has one weight file.

    Args:
        shape: dataclass of the sizes.
        files: of the version.
        convert, select: see ``weights.read_weights``.
        edit: what is changed in the graph.

    Raises:
        ModelLoadError: missing, unknown or wrongly shaped arrays (the message names file and
            key), a damaged file, or sizes that no graph has.
        UnsafeFileError: the file would run code.
    """
    path = weight_file(files, name)
    arrays = read_weights(path, convert=convert, select=select)
    graph = read_graph(architecture, shape, files, name)
    graph = graph if edit is None else edit(graph)
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
    if any(values.dtype == np.int8 for values in arrays.values()):
        graph, arrays = with_int8(graph, arrays, source)
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
        return first_line(error)
    return network.refusal


def check_foreign(path: Path, name: str) -> None:
    """Whether an ONNX file from outside asks for nothing but its own numbers and known operations.

    Raises:
        UnsafeFileError: it names files beside itself, operations of other makers, or is larger
            than the format allows.
        ModelLoadError: it is no ONNX file.
    """
    try:
        if path.stat().st_size >= LARGEST_BYTES:
            problem: str | None = "is larger than an ONNX file can be (2 GB)"
        else:
            problem = next(
                _foreign_parts(memoryview(cast(bytes, np.memmap(path, np.uint8, "r")))), None
            )
    except (IndexError, KeyError, ValueError) as error:  # Bytes that are no Protocol Buffers.
        raise ModelLoadError(f"{name}: {path.name} is not an ONNX file; give another") from error
    if problem:
        raise UnsafeFileError(f"{name}: {path.name} {problem}, so it was not loaded")


def _foreign_parts(model: memoryview) -> Iterator[str]:
    """What a model must not ask for, each as the rest of a sentence about its file."""
    functions = [value for number, value in _messages(model) if number == 25]
    # Those that the file defines itself, of operations that are looked at, too.
    domains = DOMAINS | {_text(function, 10) for function in functions}
    for number, value in _messages(model):
        if number == 7:
            yield from _foreign_in_graph(value, domains)
    for function in functions:
        for number, value in _messages(function):
            if number == 7:
                yield from _foreign_in_node(value, domains, 0)


def _foreign_in_graph(graph: memoryview, domains: Collection[str], depth: int = 0) -> Iterator[str]:
    if depth > DEEPEST:
        raise ValueError("graphs within graphs")
    for number, value in _messages(graph):
        if number == 1:
            yield from _foreign_in_node(value, domains, depth)
        elif number in (5, 15):
            yield from _outside_numbers(value, sparse=number == 15)


def _foreign_in_node(node: memoryview, domains: Collection[str], depth: int) -> Iterator[str]:
    operation, domain = _text(node, 4), _text(node, 7)
    if domain not in domains:
        yield f"uses the operation {operation} of {domain}, which is none of ONNX"
    if operation in FILE_READERS:
        yield f"uses the operation {operation}, which reads another file"
    for number, attribute in _messages(node):
        if number != 5:
            continue
        for part, value in _messages(attribute):
            if part in (6, 11):
                yield from _foreign_in_graph(value, domains, depth + 1)
            elif part in (5, 10, 22, 23):
                yield from _outside_numbers(value, sparse=part > 20)


def _outside_numbers(tensor: memoryview, *, sparse: bool) -> Iterator[str]:
    if sparse:
        for number, value in _messages(tensor):
            if number in (1, 2):
                yield from _outside_numbers(value, sparse=False)
    elif any(number == 13 or (number == 14 and value == 1) for number, value in _fields(tensor)):
        yield "keeps its numbers in another file; save it with all of them inside"


def _text(message: memoryview, number: int) -> str:
    found = [bytes(value) for field, value in _messages(message) if field == number]
    return found[-1].decode() if found else ""


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
    casts: list[tuple[int, bytes]] = []
    rest: list[tuple[int, int | bytes | memoryview]] = []
    for number, content in fields_of_graph(graph):
        known = _outside(content) if number == 5 and not isinstance(content, int) else None
        if known is None or known[0] not in names:
            rest.append((number, content))
            continue
        name, shape, _ = known
        rest.append((5, _tensor(f"{name}{HALF}", shape, FLOAT16)))
        casts.append((1, _node("Cast", [f"{name}{HALF}"], name, to=FLOAT)))
    return with_fields(graph, [*casts, *rest])


def with_int8(
    graph: bytes, arrays: Mapping[str, Array], source: str
) -> tuple[bytes, dict[str, Array]]:
    """``graph`` with the convolutions computed in 8 bits whose weights are int8, and its arrays.

    The numbers that such a convolution reads and gives pass through QuantizeLinear and
    DequantizeLinear, which is how ONNX writes it; the session makes one operation of it all.

    Args:
        arrays: as ``quantise.int8_arrays`` gives them.
        source: what to call the place that they come from.

    Raises:
        ModelLoadError: a step is missing or is no positive number, or a weight is of another shape.
    """
    edit = _Int8(arrays, initialisers(graph), source)
    for number, content in fields_of_graph(graph):
        if number == 1 and not isinstance(content, int):
            edit.take(content)
        else:
            edit.rest.append((number, content))
    kept = [
        (number, content)
        for number, content in edit.rest
        if number != 5 or isinstance(content, int)
        or (known := _outside(content)) is None or known[0] not in edit.replaced
    ]  # fmt: skip
    tensors = [
        (5, _tensor(name, values.shape, _TYPES[values.dtype.name]))
        for name, values in edit.made.items()
    ]
    others = {name: values for name, values in arrays.items() if name not in edit.taken}
    return with_fields(graph, [*edit.nodes, *tensors, *kept]), others | edit.made


class _Int8:
    """What :func:`with_int8` collects while it walks over the nodes, which stand in order."""

    def __init__(
        self, arrays: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]], source: str
    ) -> None:
        self.arrays, self.shapes, self.source = arrays, shapes, source
        self.nodes: list[tuple[int, bytes]] = []
        self.rest: list[tuple[int, int | memoryview]] = []
        # New arrays of the graph; names of those that it no longer has; names that were read.
        self.made: dict[str, Array] = {}
        self.replaced: set[str] = set()
        self.taken: set[str] = set()
        # Tensor to what stands for it after its 8 bits, and to their step.
        self._eighths: dict[str, tuple[str, np.float32]] = {}

    def take(self, content: memoryview) -> None:
        node = read_node(content)
        inputs = [self._eighths.get(name, (name,))[0] for name in node.inputs]
        weight = node.inputs[1] if node.operation == "Conv" else ""
        if weight not in self.arrays or self.arrays[weight].dtype != np.int8:
            self.nodes.append((1, _renamed(content, inputs)))
            return
        inputs[0], step = self._eight_bits(node.inputs[0], f"{weight}{READ}")
        steps = self._array(f"{weight}{STEP}", self.shapes[weight][:1])
        if self.arrays[weight].shape != self.shapes[weight] or not (steps > 0).all():
            raise ModelLoadError(f"{self.source} holds {weight!r} with steps that do not fit it.")
        inputs[1] = self._constant(weight, self.arrays[weight], steps)
        self.taken.add(weight)
        if len(inputs) > 2:
            bias = node.inputs[2]
            both = (step * steps).astype(np.float32)
            whole = np.rint(self._array(bias, self.shapes[bias]).astype(np.float64) / both)
            limit = 2**31 - 1
            whole = np.clip(whole, -limit, limit).astype(np.int32)
            inputs[2] = self._constant(bias, whole, both)
        self.nodes.append((1, _renamed(content, inputs)))
        self._eight_bits(node.output, f"{weight}{GIVEN}")

    def _eight_bits(self, tensor: str, numbers: str) -> tuple[str, np.float32]:
        """The name of ``tensor`` after it went through 8 bits, and their step."""
        step, zero = self._array(numbers, (2,))
        if tensor not in self._eighths:
            if not (step > 0 and 0 <= zero <= 255):
                raise ModelLoadError(f"{self.source} holds {numbers!r} with impossible numbers.")
            scale = (f"{tensor}:scale", f"{tensor}:zero")
            self.made |= {scale[0]: np.array(step, np.float32), scale[1]: np.array(zero, np.uint8)}
            whole, again = f"{tensor}:whole", f"{tensor}:again"
            self.nodes.append((1, _node("QuantizeLinear", [tensor, *scale], whole)))
            self.nodes.append((1, _node("DequantizeLinear", [whole, *scale], again)))
            self._eighths[tensor] = again, np.float32(step)
        return self._eighths[tensor]

    def _constant(self, name: str, values: Array, steps: Array) -> str:
        """The name of an array that is kept in whole numbers, after it was widened again."""
        if name not in self.replaced:
            parts = [f"{name}:whole", f"{name}:scale", f"{name}:zero"]
            arrays = (values, steps, np.zeros(len(steps), values.dtype))
            self.made |= dict(zip(parts, arrays, strict=True))
            self.nodes.append((1, _node("DequantizeLinear", parts, f"{name}:again", axis=0)))
            self.replaced.add(name)
        return f"{name}:again"

    def _array(self, name: str, shape: tuple[int, ...]) -> Array:
        values = self.arrays.get(name)
        if values is None or values.shape != shape or not np.isfinite(values).all():
            raise ModelLoadError(
                f"{self.source} lacks {name!r} of {shape[0]} numbers; quantise the model again."
            )
        self.taken.add(name)
        return values


@dataclass(frozen=True)
class Node:
    """An operation of a graph: what it is, what it reads, and its first output."""

    operation: str
    inputs: tuple[str, ...]
    output: str


def nodes_of(graph: bytes) -> list[Node]:
    """The operations of an ONNX graph, each after those whose outputs it reads."""
    found = fields_of_graph(graph)
    return [read_node(v) for number, v in found if number == 1 and not isinstance(v, int)]


def with_outputs(graph: bytes, names: Iterable[str]) -> bytes:
    """``graph`` that also gives the tensors ``names``."""
    outputs = [(12, _field(1, name.encode())) for name in names]
    return with_fields(graph, [*fields_of_graph(graph), *outputs])


# Operations that go along each value alone.
_ELEMENTWISE = frozenset({"LeakyRelu", "Tanh", "Div", "Add"})


def without_padding(graph: bytes) -> bytes:
    """``graph``, a stack of convolutions that keep the length, which makes up no surroundings.

    Nothing is padded, so what comes out is shorter by as much on both sides, equals the middle of
    what the whole gives, and costs no work that is thrown away: each operation computes what the
    following ones read.

    Raises:
        ValueError: another operation is among them.
    """
    found = fields_of_graph(graph)
    outputs = [_text(v, 1) for n, v in found if n == 12 and not isinstance(v, int)]
    inputs = [_text(v, 1) for n, v in found if n == 11 and not isinstance(v, int)]
    steps = [
        _Trimmed(read_node(v), v) for n, v in found if n == 1 and not isinstance(v, int)
    ]  # fmt: skip
    hop = int(np.prod([step.stride for step in steps]))
    cut = 0
    while (missing := min(_cuts(steps, outputs[0], cut).get(name, 0) for name in inputs)) < 0:
        cut -= missing * hop
    cuts = _cuts(steps, outputs[0], cut)
    fields: list[tuple[int, int | bytes | memoryview]] = []
    slices: dict[str, bytes] = {}
    for step in steps:
        reads = []
        for name in step.node.inputs:
            more = step.needs(cuts[step.node.output]) - cuts[name] if name in cuts else 0
            part = f"{name}:without{more}" if more else name
            if more and part not in slices:
                edges = f"from{more}", f"to{more}"
                slices |= {edges[0]: _int64(edges[0], more), edges[1]: _int64(edges[1], -more)}
                slices[part] = b""
                fields.append((1, _node("Slice", [name, *edges, "time"], part)))
            reads.append(part)
        fields.append((1, step.trimmed(reads, cuts.get(step.node.output, 0))))
    constants = [(5, value) for value in (*slices.values(), _int64("time", 2)) if value]
    return with_fields(graph, [*fields, *constants, *(f for f in found if f[0] not in (1, 13))])


class _Trimmed:
    """An operation of :func:`without_padding`: what it reads for what it gives."""

    def __init__(self, node: Node, content: memoryview) -> None:
        self.node, self._content = node, content
        self._numbers = {
            _text(value, 1): [
                whole for part, v in _fields(value) if part == 8
                for whole in ([v] if isinstance(v, int) else _varints(v))
            ]
            for number, value in _messages(content) if number == 5
        }  # fmt: skip
        known = {*_ELEMENTWISE, "Constant", "Conv", "ConvTranspose"}
        if node.operation not in known:
            raise ValueError(f"{node.operation} is no convolution that keeps the length")
        transposed = node.operation == "ConvTranspose"
        self.stride = self._numbers["strides"][0] if transposed else 1

    def needs(self, cut: int) -> int:
        """What may be missing at each end of the input, if ``cut`` may be of the output."""
        if self.node.operation == "Conv":
            (kernel,), (dilation,) = self._numbers["kernel_shape"], self._numbers["dilations"]
            return cut - dilation * (kernel - 1) // 2
        if self.node.operation == "ConvTranspose":
            overhang = self._numbers["kernel_shape"][0] - self.stride - self._numbers["pads"][0]
            return (cut - overhang) // self.stride
        return cut

    def trimmed(self, inputs: Sequence[str], cut: int) -> bytes:
        """The operation on inputs that lack as much as they may."""
        content = _renamed(self._content, inputs)
        if self.node.operation not in ("Conv", "ConvTranspose"):
            return content
        pad = 0
        if self.node.operation == "ConvTranspose":
            pad = cut + self._numbers["pads"][0] - self.stride * self.needs(cut)
        kept = (
            _field(number, value) for number, value in _fields(memoryview(content))
            if number != 5 or isinstance(value, int) or _text(value, 1) != "pads"
        )  # fmt: skip
        pads = _field(1, b"pads") + 2 * _field(8, pad) + _field(20, 7)
        return b"".join([*kept, _field(5, pads)])


def _cuts(steps: Sequence[_Trimmed], output: str, cut: int) -> dict[str, int]:
    """What may be missing at each end of every tensor, if ``cut`` may be of ``output``."""
    cuts = {output: cut}
    for step in reversed(steps):
        if step.node.operation == "Constant":
            cuts.pop(step.node.output, None)
            continue
        read = step.node.inputs if step.node.operation == "Add" else step.node.inputs[:1]
        for name in read:
            cuts[name] = min(step.needs(cuts[step.node.output]), cuts.get(name, sys.maxsize))
    return cuts


def _int64(name: str, value: int) -> bytes:
    """A TensorProto of one whole number."""
    raw = int(value).to_bytes(8, "little", signed=True)
    return _field(1, 1) + _field(2, INT64) + _field(8, name.encode()) + _field(9, raw)


def fields_of_graph(graph: bytes) -> list[tuple[int, int | memoryview]]:
    """Number and value of each field of the graph in an ONNX model."""
    (model_graph,) = (value for number, value in _messages(graph) if number == 7)
    return list(_fields(model_graph))


def with_fields(graph: bytes, fields: Iterable[tuple[int, int | bytes | memoryview]]) -> bytes:
    """The ONNX model with ``fields`` in place of those of its graph."""
    inner = b"".join(_field(number, value) for number, value in fields)
    return b"".join(
        _field(number, inner if number == 7 else value) for number, value in _fields(graph)
    )


def read_node(content: memoryview) -> Node:
    texts: dict[int, list[str]] = {1: [], 2: [], 4: []}
    for number, value in _messages(content):
        if number in texts:
            texts[number].append(bytes(value).decode())
    return Node(texts[4][0], tuple(texts[1]), texts[2][0])


def _renamed(content: memoryview, inputs: Sequence[str]) -> bytes:
    """A NodeProto that reads ``inputs``."""
    rest = (_field(number, value) for number, value in _fields(content) if number != 1)
    return b"".join([*(_field(1, name.encode()) for name in inputs), *rest])


def _node(operation: str, inputs: Sequence[str], output: str, **attributes: int) -> bytes:
    """A NodeProto."""
    reads = b"".join(_field(1, name.encode()) for name in inputs)
    told = (
        _field(5, _field(1, name.encode()) + _field(3, value) + _field(20, 2))
        for name, value in attributes.items()
    )
    return reads + _field(2, output.encode()) + _field(4, operation.encode()) + b"".join(told)


def _tensor(name: str, shape: tuple[int, ...], kind: int) -> bytes:
    """A TensorProto whose numbers lie outside."""
    place = _field(1, b"location") + _field(2, b"weights")
    dims = b"".join(_field(1, size) for size in shape)
    return dims + _field(2, kind) + _field(8, name.encode()) + _field(13, place) + _field(14, 1)


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
