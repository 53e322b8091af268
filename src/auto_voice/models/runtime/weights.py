"""Weights from files to arrays: safely, without torch, without a second copy in memory.

A published checkpoint is read by the strict reader of ``checkpoints``, its weight normalisation is
folded, and the arrays go to safetensors beside it. From there a load costs a memory map.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from auto_voice.errors import AudioContentError, ModelLoadError
from auto_voice.models.runtime.checkpoints import Array as Array
from auto_voice.models.runtime.checkpoints import read_torch_checkpoint, widened

# Old and new spelling of torch's weight normalisation: (magnitude, direction).
_MAGNITUDES = {
    "weight_g": "weight_v",
    "parametrizations.weight.original0": "parametrizations.weight.original1",
}
# What follows the name of an int8 array: the step of each of its rows; and, where a network is
# computed in 8 bits, step and zero point of the numbers that a convolution reads.
STEP, READ = ":step", ":read"
# Types of safetensors that NumPy knows; BF16 is widened.
DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?", "BF16": "<u2",
}  # fmt: skip


def checkpoint_arrays(
    path: Path, under: str | None = None, ignored: Collection[str] = ()
) -> dict[str, Array]:
    """The tensors of a torch checkpoint as C-ordered arrays, weight normalisation folded.

    Numbers of half and double precision come as float32.

    Args:
        path: a file of ``torch.save``.
        under: key of the dictionary that holds them; None for the top level.
        ignored: see ``read_torch_checkpoint``.

    Raises:
        UnsafeFileError: as ``read_torch_checkpoint``.
        ModelLoadError: damaged, or no tensors where they should be.
    """
    state = read_torch_checkpoint(path, ignored)
    if under is not None and isinstance(state, Mapping) and under in state:
        state = state[under]
    if not isinstance(state, Mapping):
        raise ModelLoadError(f"{path} holds no dictionary of tensors; is it another model's file?")
    arrays = {str(key): _single(v) for key, v in state.items() if isinstance(v, np.ndarray)}
    if not arrays:
        where = f"under {under!r}" if under else "at its top level"
        raise ModelLoadError(f"{path} holds no tensors {where}; is it another model's file?")
    return fold_weight_norm(arrays)


def fold_weight_norm(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Replace each magnitude and direction by the weight they stand for.

    ``w = g * v / |v|``, the norm taken over every axis on which ``g`` has one element (Salimans
    and Kingma 2016), computed in float64. Both spellings are understood: ``weight_g``/``weight_v``
    and ``parametrizations.weight.original0``/``original1``. Other keys pass through.
    """
    folded = dict(arrays)
    for key in arrays:
        for magnitude, direction in _MAGNITUDES.items():
            partner = key[: -len(magnitude)] + direction
            if key.endswith(f".{magnitude}") and partner in arrays:
                g, v = folded.pop(key), folded.pop(partner)
                axes = tuple(axis for axis in range(v.ndim) if g.shape[axis] == 1)
                wide = v.astype(np.float64)
                norm = np.sqrt(np.sum(wide * wide, axis=axes, keepdims=True))
                folded[f"{key[: -len(magnitude)]}weight"] = (
                    g.astype(np.float64) * wide / norm
                ).astype(v.dtype)
    return folded


def is_safetensors(path: Path) -> bool:
    """Whether the file starts as safetensors does: a header length, then a JSON object."""
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < 2**27


def map_safetensors(path: Path) -> dict[str, Array]:
    """Arrays that share memory with the file; pages are read when they are first touched.

    Raises:
        ModelLoadError: the file is not safetensors or is cut short.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="np"):
            pass  # The library checks every offset; all that is left is to map what lies there.
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(
            f"{path} is not a whole safetensors file ({error}); repair or fetch it again."
        ) from error
    data = np.memmap(path, np.uint8, "r")
    begin = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:begin].tobytes())
    header.pop("__metadata__", None)
    return {name: _mapped(data[begin:], about, path) for name, about in header.items()}


def _mapped(data: NDArray[np.uint8], about: Mapping[str, Any], path: Path) -> Array:
    if about["dtype"] not in DTYPES:
        raise ModelLoadError(f"{path} holds numbers of type {about['dtype']}, which none can read.")
    start, stop = about["data_offsets"]
    array: Array = np.asarray(data[start:stop]).view(DTYPES[about["dtype"]])
    array = array.reshape(about["shape"])
    return widened(array) if about["dtype"] == "BF16" else array


def in_rows(values: Array, largest: int) -> tuple[Array, Array]:
    """``values`` as int8, and ``(rows,)`` float32, the step of each row (a filter, an output).

    Args:
        largest: whole number that a row's largest value becomes.
    """
    wide = np.asarray(values, np.float32)
    steps = np.abs(wide).max(axis=tuple(range(1, wide.ndim)), keepdims=True)
    steps = np.maximum(steps, 1e-12) / largest
    return np.rint(wide / steps).astype(np.int8), steps.reshape(-1).astype(np.float32)


def in_whole_numbers(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """``arrays`` with matrices and kernels as int8 and a step for each row, a quarter of their
    size, and the others in half precision; :func:`whole_numbers_widened` undoes it."""
    small: dict[str, Array] = {}
    for name, values in arrays.items():
        if values.ndim > 1:
            small[name], small[f"{name}{STEP}"] = in_rows(values, 127)
        else:
            small[name] = values.astype(np.float16)
    return small


def whole_numbers_widened(arrays: Mapping[str, Array], path: Path) -> dict[str, Array]:
    """``arrays`` with int8 ones times the steps of their rows, and without these.

    Raises:
        ModelLoadError: the steps are missing or do not fit.
    """
    wide = dict(arrays)
    for name in [name for name, values in arrays.items() if values.dtype == np.int8]:
        values, steps = wide[name], wide.pop(f"{name}{STEP}", None)
        with np.errstate(over="ignore"):
            rows = None if steps is None else steps.astype(np.float32)
        fit = rows is not None and values.ndim > 1 and rows.shape == values.shape[:1]
        if rows is None or not fit or not (np.isfinite(rows) & (rows > 0)).all():
            raise ModelLoadError(f"{path} holds {name!r} with steps that do not fit it.")
        rows = rows.reshape(-1, *(1 for _ in values.shape[1:]))
        wide[name] = values.astype(np.float32) * rows
    return wide


def read_weights(
    path: Path,
    *,
    convert: Callable[[Path], dict[str, Array]] | None = None,
    select: Callable[[str], str | None] | None = None,
) -> dict[str, Array]:
    """The arrays of ``path`` under a network's names, weight normalisation folded.

    Whole numbers are widened, but for those that a network is computed in.

    Args:
        path: safetensors, or with ``convert`` also the published checkpoint.
        convert: reads the published checkpoint into arrays named as in the safetensors.
        select: maps a key of the file to the network's name for it; None leaves it out.

    Raises:
        ModelLoadError: a damaged or missing file.
        UnsafeFileError: as ``read_torch_checkpoint``.
    """
    if not path.is_file():
        raise ModelLoadError(f"{path} does not exist; pull the model again.")
    if convert is None or is_safetensors(path):
        arrays = fold_weight_norm(map_safetensors(path))
    else:
        arrays = convert(path)
    if select is not None:
        renamed = ((select(key), value) for key, value in arrays.items())
        arrays = {key: value for key, value in renamed if key is not None}
    if any(name.endswith(READ) for name in arrays):
        return arrays
    return whole_numbers_widened(arrays, path)


def _single(array: Array) -> Array:
    if array.dtype in (np.float16, np.float64):
        array = array.astype(np.float32)
    return np.ascontiguousarray(array)


def as_batch(values: Any, dims: int, what: str) -> NDArray[np.float32]:
    """Numpy or torch input as a finite, C-ordered float32 array of ``dims`` dimensions.

    An input that lacks the first, the batch axis gets one of length 1.

    Raises:
        AudioContentError: wrong number of dimensions, empty, or not finite.
    """
    if hasattr(values, "detach"):  # A torch tensor, perhaps on a GPU or with gradients.
        values = values.detach().cpu().float().numpy()
    array = np.ascontiguousarray(values, dtype=np.float32)
    if array.ndim == dims - 1:
        array = array[None]
    if array.ndim != dims:
        raise AudioContentError(f"{what} must have {dims - 1} or {dims} axes, not {array.ndim}.")
    if array.size == 0:
        raise AudioContentError(f"{what} is empty; give at least one frame.")
    if not np.isfinite(array).all():
        raise AudioContentError(f"{what} holds NaN or infinity; repair the input first.")
    return array
