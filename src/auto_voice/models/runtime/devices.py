"""Devices: which provider of ONNX Runtime runs a model, and whether this machine has it."""

from __future__ import annotations

import ctypes
import logging
import sys
from functools import cache
from typing import Any

from auto_voice.errors import MissingDependencyError, ModelLoadError
from auto_voice.models.registry.architectures import ARCHITECTURES
from auto_voice.models.registry.catalog import ModelVersion

log = logging.getLogger(__name__)

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "directml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}
# The wheel that brings each provider that the plain one lacks; they exclude each other.
WHEELS = {
    "cuda": "onnxruntime-gpu",
    "directml": "onnxruntime-directml",
    "openvino": "onnxruntime-openvino",
}


@cache
def onnx_runtime() -> Any:
    """The module ``onnxruntime``; ``auto_voice`` itself switched its telemetry off.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            "Models run on onnxruntime, which is not installed; run: pip install onnxruntime"
        ) from error
    return onnxruntime


def choose_device(wanted: str, version: ModelVersion) -> str:
    """The device for ``version``: ``cpu``, ``cuda:N``, ``directml``, ``coreml`` or ``openvino``.

    A device that is not there gives way to the CPU, which runs the same model, with a warning.

    Args:
        wanted: ``auto`` takes a CUDA GPU where there is one with enough memory, else the CPU.
            Architectures that do not run in sessions stay on the CPU.

    Raises:
        ModelLoadError: a model that needs a GPU where there is none.
    """
    if not ARCHITECTURES[version.architecture].devices:
        return "cpu"
    device = "cpu" if wanted == "cpu" else _accelerator(wanted, version)
    if device == "cpu" and version.needs.gpu == "required":
        raise ModelLoadError(
            f"{version.key} needs a GPU, and device {wanted} gives none; run it on a machine with "
            "CUDA or choose a model without that need"
        )
    return device


def _accelerator(wanted: str, version: ModelVersion) -> str:
    kind, _, index = wanted.partition(":")
    if kind == "auto":
        roomy = gpu_memory_mb() if PROVIDERS["cuda"] in available_providers() else []
        return "cuda:0" if roomy and roomy[0] >= version.needs.vram_mb else "cpu"
    if problem := why_not(kind, int(index or 0)):
        log.warning(
            "%s runs on the CPU, because device %s is not available: %s",
            version.key, wanted, problem,
        )  # fmt: skip
        return "cpu"
    return f"cuda:{int(index or 0)}" if kind == "cuda" else kind


def why_not(kind: str, index: int = 0) -> str:
    """Why a device cannot be used here, as a part of a sentence; empty where it can.

    Args:
        kind: a key of ``PROVIDERS``.
        index: of the CUDA device.
    """
    if PROVIDERS[kind] not in available_providers():
        if kind == "coreml":
            return "only a Mac has it"
        return (
            f"it needs another build of the runtime (pip uninstall onnxruntime, then pip install "
            f"{WHEELS[kind]})"
        )
    if kind == "cuda" and index >= (count := len(gpu_memory_mb())):
        return f"the driver shows {count} CUDA devices"
    return ""


@cache
def available_providers() -> tuple[str, ...]:
    """Providers of the ONNX Runtime that is installed; none where it is missing."""
    try:
        return tuple(onnx_runtime().get_available_providers())
    except MissingDependencyError:
        return ()


def provider_options(device: str) -> dict[str, Any]:
    """What the provider of ``device`` is told."""
    kind, _, index = device.partition(":")
    if kind == "cuda":
        # Measuring every algorithm for each new length would take longer than the work.
        return {"device_id": int(index or 0), "cudnn_conv_algo_search": "HEURISTIC"}
    if kind == "openvino":
        return {"device_type": "CPU"}
    if kind == "coreml":
        return {"ModelFormat": "MLProgram"}
    return {}


@cache
def gpu_memory_mb() -> list[int]:
    """Memory of each CUDA device in MB, asked of the driver; empty where there is none."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError:
        return []
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    found = []
    for index in range(count.value):
        device, total = ctypes.c_int(), ctypes.c_size_t()
        driver.cuDeviceGet(ctypes.byref(device), index)
        driver.cuDeviceTotalMem_v2(ctypes.byref(total), device)
        found.append(total.value >> 20)
    return found
