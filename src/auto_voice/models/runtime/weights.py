"""Weights from files to modules: safely, once, without a second copy in memory.

A published checkpoint is a pickle in disguise. It is read with PyTorch's restricted unpickler,
its weight normalisation is folded, and the arrays go to safetensors beside it. From there a load
costs a memory map: the module is built on the meta device and the mapped tensors are assigned.
"""

from __future__ import annotations

import pickle
import re
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from auto_voice.errors import AudioContentError, ModelLoadError, UnsafeFileError

Array = NDArray[np.generic]
ModuleT = TypeVar("ModuleT", bound=nn.Module)

# Keys that an error message lists before it says how many more there are.
NAMES_SHOWN = 3

# Old and new spelling of torch's weight normalisation: (magnitude, direction).
_MAGNITUDES = {
    "weight_g": "weight_v",
    "parametrizations.weight.original0": "parametrizations.weight.original1",
}


def read_torch_checkpoint(path: Path) -> Any:
    """What ``torch.save`` wrote to ``path``, on the CPU, without running anything in it.

    Reads the zip layout (memory-mapped) and the older plain-pickle layout.

    Raises:
        UnsafeFileError: the file names anything but tensors and plain containers, or has the
            tar layout of before 2018, which cannot be read safely.
        ModelLoadError: it is no checkpoint, or is damaged or cut short.
    """
    try:
        zipped = zipfile.is_zipfile(path)
        if not zipped and tarfile.is_tarfile(path):
            raise UnsafeFileError(
                f"{path} has the legacy tar layout of PyTorch, which cannot be read without "
                "running code from it; save it again as safetensors."
            )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL:? (\S+)", str(error))
        what = f"asks for {culprit[1].rstrip('.,')}" if culprit else "asks for more than numbers"
        raise UnsafeFileError(
            f"{path} is a pickle that {what}, so it could run code and was not loaded; "
            "save its tensors as safetensors if you trust it."
        ) from error
    except (UnsafeFileError, FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # torch names the same damage in a dozen ways
        raise ModelLoadError(
            f"{path} is not a PyTorch checkpoint or is damaged ({type(error).__name__}); "
            "fetch it again."
        ) from error


def checkpoint_arrays(path: Path, under: str | None = None) -> dict[str, Array]:
    """The tensors of a torch checkpoint as C-ordered arrays, weight normalisation folded.

    Args:
        path: a file of ``torch.save``.
        under: key of the dictionary that holds them; None for the top level.

    Raises:
        UnsafeFileError: as ``read_torch_checkpoint``.
        ModelLoadError: damaged, or no tensors where they should be.
    """
    state = read_torch_checkpoint(path)
    if under is not None and isinstance(state, Mapping) and under in state:
        state = state[under]
    if not isinstance(state, Mapping):
        raise ModelLoadError(f"{path} holds no dictionary of tensors; is it another model's file?")
    arrays = {str(key): _to_numpy(value) for key, value in state.items() if torch.is_tensor(value)}
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


def map_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors that share memory with the file; pages are read when they are first touched.

    Raises:
        ModelLoadError: the file is not safetensors or is cut short.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, RuntimeError) as error:
        raise ModelLoadError(
            f"{path} is not a whole safetensors file ({error}); repair or fetch it again."
        ) from error


def load_module(
    make: Callable[[], ModuleT],
    path: Path,
    *,
    device: str = "cpu",
    convert: Callable[[Path], dict[str, Array]] | None = None,
    select: Callable[[str], str | None] | None = None,
) -> ModuleT:
    """A module in evaluation mode whose parameters are the tensors of ``path``.

    Args:
        make: builds the module; called under the meta device, so nothing is initialised.
        path: safetensors, or with ``convert`` also the published checkpoint.
        device: where the parameters go; on ``cpu`` they stay mapped to the file.
        convert: reads the published checkpoint into arrays named as in the safetensors.
        select: maps a key of the file to the module's name for it; None leaves it out.

    Raises:
        ModelLoadError: missing, unknown or wrongly shaped tensors (the message names file and
            key), a damaged file, or a device that is absent or full.
        UnsafeFileError: as ``read_torch_checkpoint``.
    """
    if not path.is_file():
        raise ModelLoadError(f"{path} does not exist; pull the model again.")
    if convert is None or is_safetensors(path):
        tensors = _fold_tensors(map_safetensors(path))
    else:
        tensors = {key: torch.from_numpy(value) for key, value in convert(path).items()}
    if select is not None:
        renamed = ((select(key), value) for key, value in tensors.items())
        tensors = {key: value for key, value in renamed if key is not None}
    with torch.device("meta"):
        module = make()
    _check_fit(module, tensors, path)
    module.load_state_dict(tensors, assign=True)
    module.requires_grad_(False).eval()
    if device == "cpu":
        return module
    try:
        return module.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ModelLoadError(
            f"{path} could not be placed on {device!r} ({str(error).splitlines()[0]}); "
            "choose device 'cpu'."
        ) from error


def _fold_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # Only the normalised weights leave the mapping; all others stay where the file is.
    normed = {
        key: tensor.numpy()
        for key, tensor in tensors.items()
        if key.endswith((*_MAGNITUDES, *_MAGNITUDES.values()))
    }
    if not normed:
        return tensors
    rest = {key: tensor for key, tensor in tensors.items() if key not in normed}
    return rest | {key: torch.from_numpy(value) for key, value in fold_weight_norm(normed).items()}


def _check_fit(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    wanted = module.state_dict()
    if missing := [key for key in wanted if key not in tensors]:
        raise ModelLoadError(f"{path} lacks {_some(missing)}; is it another model's file?")
    if unknown := [key for key in tensors if key not in wanted]:
        raise ModelLoadError(
            f"{path} holds {_some(unknown)}, unknown to this architecture; "
            "is it another model's file?"
        )
    for key, value in wanted.items():
        if value.shape != tensors[key].shape:
            raise ModelLoadError(
                f"{path} has {key!r} of shape {tuple(tensors[key].shape)} where the architecture "
                f"needs {tuple(value.shape)}; check the model's params in the catalog."
            )


def _some(keys: Iterable[str]) -> str:
    names = [repr(key) for key in keys]
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def _to_numpy(tensor: Tensor) -> Array:
    dense = tensor.detach()
    if dense.dtype in (torch.bfloat16, torch.float16, torch.float64):
        dense = dense.float()
    return np.ascontiguousarray(dense.numpy())


def as_batch(values: Any, dims: int, what: str) -> NDArray[np.float32]:
    """Numpy or torch input as a finite, C-ordered float32 array of ``dims`` dimensions.

    An input that lacks the first, the batch axis gets one of length 1.

    Raises:
        AudioContentError: wrong number of dimensions, empty, or not finite.
    """
    if torch.is_tensor(values):
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


def only_file(files: Mapping[str, Path], name: str) -> Path:
    """The weight file of a version that has one.

    Raises:
        ModelLoadError: the version has none, or several.
    """
    if len(files) != 1:
        raise ModelLoadError(
            f"{name} must list exactly one weight file in the catalog, not {len(files)}."
        )
    return next(iter(files.values()))
