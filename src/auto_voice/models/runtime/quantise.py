"""Smaller and faster versions of a model, made of the one that was published.

``int8`` computes the wide convolutions of a vocoder in 8 bits: about half of the time.
The ranges of the numbers between them come from speech that the network is run on once. ``fp16``
and ``bf16`` keep weights in half the bytes; sessions widen them, so they save disk and not time.
"""

from __future__ import annotations

import atexit
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from auto_voice.audio.mel import HIFIGAN_MEL, log_mel
from auto_voice.errors import (
    AudioContentError,
    ConfigError,
    IntegrityError,
    ModelLoadError,
    StoreError,
)
from auto_voice.filesystem import make_folder, sha256_file, storage_errors
from auto_voice.models.hifigan_model import HiFiGANShape
from auto_voice.models.registry.architectures import ARCHITECTURES, with_safetensors
from auto_voice.models.registry.catalog import ModelFile, ModelVersion, Quantised
from auto_voice.models.registry.catalog_schema import (
    PRECISIONS,
    extend_folder_catalog,
    fields_of,
    shrink_folder_catalog,
)
from auto_voice.models.registry.loading import run_once
from auto_voice.models.registry.maintenance import remove
from auto_voice.models.registry.sources import bundled_files
from auto_voice.models.registry.store import Fetched
from auto_voice.models.runtime.graphs import (
    GIVEN,
    SUFFIX,
    Node,
    check_fit,
    initialisers,
    nodes_of,
    read_graph,
    with_outputs,
)
from auto_voice.models.runtime.sessions import float32, open_network
from auto_voice.models.runtime.weights import (
    DTYPES,
    READ,
    STEP,
    Array,
    in_rows,
    is_safetensors,
    map_safetensors,
    read_weights,
)
from auto_voice.progress import tell
from auto_voice.types import Waveform

if TYPE_CHECKING:
    from auto_voice.models.registry.catalog import Catalog
    from auto_voice.models.registry.store import ModelStore

log = logging.getLogger(__name__)

# Kinds that have versions of other precision. Embeddings must not differ between two machines, and
# the other kinds hold recordings or judge.
KINDS = ("content", "converter", "vocoder")
# Of a convolution's wider side, at least. Narrower ones take little time, and the last ones shape
# the samples themselves: with them in 8 bits DNSMOS falls by 0.9.
LEAST_CHANNELS = 64
# Of its narrower side. The first stage decides where each wave lies: with HiFi-GAN's convolutions
# of 256 by 256 in 8 bits the signal-to-noise ratio is 8 to 17 dB, without 25 dB, and they are a
# fifth of the work. Those of 256 by 128 in vocoder_compact leave DNSMOS and save a third of the
# time.
LEAST_NARROW, MOST_NARROW = 32, 128
# Largest weight in steps, 7 bits of the 8: processors before AVX-512 VNNI add two products in 16
# bits, which two weights of 127 would overflow. The sound has the same signal-to-noise ratio.
LARGEST_WEIGHT = 63
# Frames of one piece of the speech that the ranges are taken from: every tensor of a piece is in
# memory at once, some 200 MB. Of more pieces than these, two minutes, evenly spread ones are used.
PIECE_FRAMES, MOST_PIECES = 80, 130
LEAST_SECONDS = 3.0
# Of each model, to see how many times as fast the new one is.
TIMED_RUNS = 4


@dataclass(frozen=True)
class EightBit:
    """What an architecture needs to be computed in 8 bits.

    Attributes:
        shape: sizes of a version's network.
        inputs: speech as the network reads it, ``(1, channels, frames)``.
    """

    shape: Callable[[ModelVersion], Any]
    inputs: Callable[[Waveform], Array]


def _mel(speech: Waveform) -> Array:
    from auto_voice.audio.resample import resample

    samples = resample(speech.samples, speech.sample_rate, HIFIGAN_MEL.sample_rate)
    return log_mel(samples, HIFIGAN_MEL)[None].astype(np.float32)


# The others are a small part of a conversion's time; docs/performance.md has their figures.
EIGHT_BIT: Mapping[str, EightBit] = {
    "hifigan": EightBit(lambda version: HiFiGANShape.from_params(version.params), _mel)
}


def eight_bit_convolutions(graph: bytes) -> list[Node]:
    """The convolutions that are worth 8 bits: with many channels, yet not the most, on both sides.

    What the network reads itself, a mel, has too wide a range for 8 bits.
    """
    shapes = initialisers(graph)
    made = {node.output for node in nodes_of(graph)}
    return [
        node
        for node in nodes_of(graph)
        if node.operation == "Conv"
        and node.inputs[0] in made
        and len(shape := shapes.get(node.inputs[1], ())) > 1
        and max(shape[:2]) >= LEAST_CHANNELS
        and LEAST_NARROW <= min(shape[:2]) <= MOST_NARROW
    ]


def calibration(
    graph: bytes,
    arrays: Mapping[str, Array],
    pieces: Iterable[Array],
) -> dict[str, Array]:
    """Step and zero point of what each wide convolution reads and gives.

    Ranges reach to the extremes: narrower ones of less squared error lost 10 dB in loud speech.

    Args:
        graph: without weights.
        arrays: its float weights.
        pieces: what the network reads, as long as ``PIECE_FRAMES``.

    Returns:
        ``(2,)`` float32 under ``<weight>:read`` and ``<weight>:given``.

    Raises:
        ConfigError: the network has no convolution wide enough.
    """
    found = eight_bit_convolutions(graph)
    tensors = list(dict.fromkeys(name for node in found for name in (node.inputs[0], node.output)))
    if not tensors:
        raise ConfigError(
            f"The network has no convolution of {LEAST_CHANNELS} channels on one side and of "
            f"{LEAST_NARROW} to {MOST_NARROW} on the other, so int8 would gain nothing; choose "
            "fp16."
        )
    network = open_network(with_outputs(graph, tensors), float32(arrays))
    ends = dict.fromkeys(tensors, (0.0, 0.0))
    given = list(pieces)
    for index, piece in enumerate(given):
        for name, values in zip(tensors, network.outputs_of(tensors, piece), strict=True):
            low, high = ends[name]
            ends[name] = min(low, float(values.min())), max(high, float(values.max()))
        tell("quantise", index + 1, len(given))
    numbers = {name: step_and_zero(*both) for name, both in ends.items()}
    read = {f"{node.inputs[1]}{READ}": numbers[node.inputs[0]] for node in found}
    return read | {f"{node.inputs[1]}{GIVEN}": numbers[node.output] for node in found}


def step_and_zero(low: float, high: float) -> Array:
    """Step and zero point with which 8 bits reach from ``low`` to ``high``, zero among them.

    Returns:
        ``(2,)`` float32; the zero point is a whole number from 0 to 255.
    """
    step = max(high - low, 1e-6) / 255
    return np.array([step, np.rint(-low / step)], np.float32)


def int8_arrays(arrays: Mapping[str, Array], numbers: Mapping[str, Array]) -> dict[str, Array]:
    """Weights as ``graphs.with_int8`` takes them: whole numbers where ``numbers`` has a range.

    Weights take 7 bits, with a step for each output channel; the rest is kept in half precision,
    biases as they are.

    Args:
        arrays: float weights.
        numbers: see :func:`calibration`.

    Raises:
        ModelLoadError: ``numbers`` are of another network.
    """
    made = half_arrays(arrays)
    for key in (key for key in numbers if key.endswith(READ)):
        name = key.removesuffix(READ)
        if name not in arrays:
            raise ModelLoadError(f"There is no array {name!r} to quantise; is it another model's?")
        made[name], made[f"{name}{STEP}"] = in_rows(arrays[name], LARGEST_WEIGHT)
    return made | {key: np.asarray(values, np.float32) for key, values in numbers.items()}


def half_arrays(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Matrices and kernels in half precision; vectors, which take few bytes, as they are."""
    return {
        name: values.astype(np.float16) if values.ndim > 1 and values.dtype.kind == "f" else values
        for name, values in arrays.items()
    }


def write_arrays(path: Path, arrays: Mapping[str, Array], to: str) -> None:
    """Writes safetensors; with ``to="bf16"`` float matrices and kernels go to bfloat16.

    By hand, since NumPy has no bfloat16: a length, a header in JSON, the numbers.
    """
    header: dict[str, Any] = {}
    end = 0
    kinds = {np.dtype(code): kind for kind, code in DTYPES.items() if kind != "BF16"}
    for name, values in arrays.items():
        half = _goes_to_bfloat16(values, to)
        begin, end = end, end + values.size * (2 if half else values.itemsize)
        header[name] = {
            "dtype": "BF16" if half else kinds[values.dtype],
            "shape": list(values.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for values in arrays.values():
            half = _goes_to_bfloat16(values, to)
            file.write((_bfloat16(values) if half else values).tobytes())


def _goes_to_bfloat16(values: Array, to: str) -> bool:
    return to == "bf16" and values.ndim > 1 and values.dtype.kind == "f"


def _bfloat16(values: Array) -> Array:
    """The upper half of each float32, to the nearest and of two as near to the even one."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


# Versions of the catalog that are made on each machine


def derived_files(
    version: ModelVersion, files: Mapping[str, Path], store: ModelStore
) -> dict[str, Path]:
    """The files of a version whose ranges are shipped, with its weights quantised by them.

    They are made once, of the verified float weights, and kept beside them; where the store cannot
    be written or the weights lie inside the package, in a folder of this process.

    Raises:
        IntegrityError: the weights' bytes changed since they were installed.
        UnsafeFileError, ModelLoadError: they cannot be read, or the ranges are another model's.
    """
    about = version.quantised
    assert about is not None
    ready = {file: path for file, path in files.items() if file != about.calibration}
    (numbers,) = (file for file in version.files if file.file == about.calibration)
    weights = _weight_file(version)
    name = f"{weights}.{about.to}-{numbers.sha256[:12]}.safetensors"

    def write(target: Path) -> None:
        arrays = read_weights(files[weights], convert=_converter(version, weights))
        made = int8_arrays(arrays, map_safetensors(files[about.calibration]))
        write_arrays(target, made, about.to)

    made = store.derived(version, name)
    if made is None:
        try:
            made = store.add_derived(version, name, weights, write)
            log.info("quantised %s", version.key)
        except StoreError as error:
            if bundled_files(version) is None:
                log.info("%s is quantised at each load: %s", version.key, error)
                store.checked(version, weights)
            folder = tempfile.mkdtemp(prefix="autovoice-")
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            made = Path(folder) / name
            write(made)
    return {**ready, weights: made}


def _converter(version: ModelVersion, file: str) -> Callable[[Path], dict[str, Array]] | None:
    architecture = ARCHITECTURES[version.architecture]
    return architecture.checkpoint_converter() if architecture.is_foreign(file) else None


def _weight_file(version: ModelVersion) -> str:
    return next(file.file for file in version.files if not file.file.endswith(SUFFIX))


# Versions that a user makes


class Registry(Protocol):
    """What is used of a :class:`~auto_voice.models.model_registry.ModelRegistry`, which itself
    needs what stands above."""

    @property
    def catalog(self) -> Catalog: ...

    @property
    def store(self) -> ModelStore: ...

    def version(self, name: str, version: str | None = None) -> ModelVersion: ...

    def pull(self, name: str, version: str | None = None) -> Mapping[str, Path]: ...

    def load(self, name: str, version: str | None = None) -> Any: ...

    def is_obtainable(self, version: ModelVersion) -> bool: ...


def quantise(
    registry: Registry,
    name: str,
    to: str,
    *,
    speech: Iterable[Waveform] = (),
    number: str | None = None,
) -> ModelVersion:
    """Makes a version of other precision in the registry's model folder and its catalog.

    It is there whole or not at all, whenever the work is stopped.

    Args:
        name: ``name`` or ``name@version`` of what it is made of, fetched if need be.
        to: a key of ``PRECISIONS``.
        speech: what ``int8`` takes its ranges from, a few seconds at least.
        number: of the new version; by default that of the old one with ``-<to>`` after it.

    Returns:
        The new version's record; a registry that is made from now on knows it.

    Raises:
        ConfigError: a model or a precision for which there is no such version, or a number that
            is taken.
        AudioContentError: too little speech.
        ModelError: the model cannot be had, or the folder cannot be written.
    """
    version = published(registry, name)
    number = number or f"{version.version}-{to}"
    check_request(registry, version, to, number)
    if to == "int8":
        pieces = list(_pieces(version, speech))
        spread = np.linspace(0, len(pieces) - 1, min(len(pieces), MOST_PIECES))
        pieces = [pieces[int(index)] for index in spread]
    files = registry.pull(version.name, version.version)
    weights = _weight_file(version)
    ready = with_safetensors(version, files, registry.store)
    arrays = read_weights(ready[weights], convert=_converter(version, weights))
    stored = map_safetensors(ready[weights]) if is_safetensors(ready[weights]) else arrays
    whole = any(values.dtype == np.int8 for values in stored.values())
    if to != "int8" and all(v.itemsize < 4 for v in stored.values() if v.ndim > 1):
        precision = "8 bits" if whole else "half precision"
        raise ConfigError(f"the weights of {version.key} are in {precision} already")
    if to == "int8":
        shape = EIGHT_BIT[version.architecture].shape(version)
        graph = read_graph(version.architecture, shape, files, version.key)
        check_fit(initialisers(graph), arrays, str(ready[weights]))
        arrays = int8_arrays(arrays, calibration(graph, arrays, pieces))
    elif to == "fp16":
        arrays = half_arrays(arrays)
    new = f"{Path(weights).name.partition('.')[0]}-{to}.safetensors"
    kept = {file.file: files[file.file] for file in version.files if file.file != weights}
    smaller = sum(values.size * 3 for values in arrays.values() if values.dtype == np.int8)
    ram_mb = max(1, version.needs.ram_mb - smaller // 10**6) if version.needs.ram_mb else 0
    made = replace(
        version,
        version=number,
        quantised=Quantised(version.version, to),
        needs=replace(version.needs, ram_mb=ram_mb),
    )
    return _install(registry.store, (version, ready), made, new, kept, arrays)


def published(registry: Registry, name: str) -> ModelVersion:
    """The version that ``name`` means; for a bare name the original, whatever is preferred.

    Raises:
        UnknownModelError: no such model or version.
    """
    version = registry.version(name)
    if version.quantised is None or "@" in name:
        return version
    return registry.version(name, version.quantised.of)


def check_request(registry: Registry, version: ModelVersion, to: str, number: str) -> None:
    """Whether ``version`` can be made into one of precision ``to``.

    Raises:
        ConfigError: it cannot; the message says why.
    """
    from auto_voice.models.registry.catalog_schema import version_problem

    if to not in PRECISIONS:
        raise ConfigError(f"there is no precision {to}; they are {', '.join(PRECISIONS)}")
    if version.quantised is not None:
        raise ConfigError(
            f"{version.key} is quantised already; give the version it was made of, "
            f"{version.name}@{version.quantised.of}"
        )
    if version.kind not in KINDS or all(file.file.endswith(SUFFIX) for file in version.files):
        raise ConfigError(
            f"{version.key} has no version of other precision; content encoders, converters and "
            "vocoders with weights of their own have"
        )
    if to == "int8" and version.architecture not in EIGHT_BIT:
        raise ConfigError(
            f"int8 gains no time with {version.key}, whose architecture is "
            f"{version.architecture}; choose a model of architecture {', '.join(EIGHT_BIT)}"
        )
    if wrong := version_problem(number):
        raise ConfigError(f"{number} {wrong}")
    known = registry.catalog.entry(version.name).versions.get(number)
    # One that was removed may be made again.
    if known is not None and (known.quantised is None or registry.is_obtainable(known)):
        raise ConfigError(
            f"there is a {known.key} already; give another number with --as, or remove it with "
            f"autovoice models remove {known.key}"
        )


def _pieces(version: ModelVersion, speech: Iterable[Waveform]) -> Iterator[Array]:
    inputs = EIGHT_BIT[version.architecture].inputs
    seconds = 0.0
    for waveform in speech:
        seconds += waveform.seconds
        whole = inputs(waveform)
        count = max(1, whole.shape[2] // PIECE_FRAMES)
        for piece in np.array_split(whole, count, axis=2):
            yield np.ascontiguousarray(piece)
    if seconds < LEAST_SECONDS:
        raise AudioContentError(
            f"{seconds:.1f} s of speech are too few to take ranges from; give at least "
            f"{LEAST_SECONDS:g} s, better a minute."
        )


def _install(
    store: ModelStore,
    original: tuple[ModelVersion, Mapping[str, Path]],
    made: ModelVersion,
    new: str,
    kept: Mapping[str, Path],
    arrays: Mapping[str, Array],
) -> ModelVersion:
    """``made`` with its files in the store, its speed measured, and in the folder's catalog.

    Args:
        original: what it is made of, with the files that a session reads.
        new: name of the file for ``arrays``.
        kept: the other files of ``version``.
    """
    version, ready = original
    about = made.quantised
    assert about is not None
    source = f"made from {version.key}"
    with _arriving(store) as folder, storage_errors(store.root, f"quantising {version.key}"):
        write_arrays(folder / new, arrays, about.to)
        found = [ModelFile(new, (), sha256_file(folder / new), (folder / new).stat().st_size)]
        for file in version.files:
            if file.file in kept:
                shutil.copyfile(kept[file.file], folder / file.file)
                if sha256_file(folder / file.file) != file.sha256:
                    raise IntegrityError(
                        f"{kept[file.file]} does not match its sha256: run `autovoice models "
                        f"repair {version.key}`."
                    )
                found.append(replace(file, sources=()))
        made = replace(made, files=tuple(found))
        arrived = {file.file: folder / file.file for file in found}
        speed = _times_as_fast((version, ready), (made, arrived))
        made = replace(made, quantised=replace(about, speed=speed))
        try:
            with store.lock(made.name, made.version):
                fetched = {name: Fetched(path, source) for name, path in arrived.items()}
                store.install(made, fetched)
            # A plain path counts from the file that names it, which lies in the model folder.
            places = {name: [[f"{made.name}/{made.version}/{name}"]] for name in arrived}
            kind, fields = {"kind": made.kind}, fields_of(made, places)
            extend_folder_catalog(store.root, made.name, made.version, kind, fields)
        except BaseException:
            with suppress(StoreError):
                remove(store, made.name, made.version)
            raise
    return made


def forget(store: ModelStore, version: ModelVersion) -> None:
    """Removes what :func:`quantise` made, from the store and from the folder's catalog."""
    shrink_folder_catalog(store.root, version.name, version.version)
    remove(store, version.name, version.version)


def _times_as_fast(*pair: tuple[ModelVersion, Mapping[str, Path]]) -> float:
    """CPU time of the first version over that of the second, by turns on a second of noise."""
    models = [ARCHITECTURES[v.architecture].build(files, v, "cpu") for v, files in pair]
    taken: list[list[float]] = [[], []]
    for _ in range(TIMED_RUNS):
        for model, (version, _), times in zip(models, pair, taken, strict=True):
            before = time.process_time()
            run_once(model, version)
            times.append(time.process_time() - before)
    # The first run of each makes what the others find.
    first, second = (float(np.median(times[1:])) for times in taken)
    return round(first / max(second, 1e-9), 2)


@contextmanager
def _arriving(store: ModelStore) -> Iterator[Path]:
    """A folder in the store for what is not whole yet; ``models prune`` knows it."""
    parent = make_folder(store.root / ".partial", store.root)
    with storage_errors(store.root, "quantising"):
        folder = Path(tempfile.mkdtemp(prefix="import-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
