"""Devices: which provider of ONNX Runtime runs a model, and whether this machine has it."""

from __future__ import annotations

import ctypes
import json
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from auto_voice.errors import ConfigError, MissingDependencyError, ModelLoadError
from auto_voice.models.registry.architectures import ARCHITECTURES, KINDS
from auto_voice.models.registry.catalog import Catalog, ModelVersion

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
# MB reserved on a CUDA device for each process beside its models: its context, the kernels of cuDNN
# and cuBLAS, and what the networks hold between their layers. An allowance, not a measurement.
CUDA_PROCESS_MB = 800


@dataclass(frozen=True)
class DevicePlan:
    """Which device each model is to run on.

    Attributes:
        general: devices for models that have none of their own; workers are spread over them, and
            a single process takes the first.
        own: device by kind (``vocoder``), model (``hifigan_universal``) or version of one.
    """

    general: tuple[str, ...] = ("auto",)
    own: Mapping[str, str] = field(default_factory=dict)

    def of(self, version: ModelVersion) -> str:
        """The device that is wanted for ``version``; the most exact name decides."""
        names = (version.key, version.name, version.kind)
        return next((self.own[name] for name in names if name in self.own), self.general[0])

    def check(self, catalog: Catalog) -> None:
        """Whether each name of :attr:`own` is a kind or a model.

        Raises:
            ConfigError: one is neither; the message has the closest.
        """
        for name in self.own:
            if name not in KINDS and name.partition("@")[0] not in catalog.models:
                from auto_voice.yaml_nodes import closest

                raise ConfigError(
                    f"device names {name}, which is neither a kind of models "
                    f"({', '.join(KINDS)}) nor a model; {closest(name, catalog.models)}"
                )

    def spread(self) -> tuple[str, ...]:
        """A setting for each general device, with every model's own device in it."""
        own = [f"{name}={device}" for name, device in self.own.items()]
        return tuple(",".join([device, *own]) for device in self.general)


def parse_devices(setting: str) -> DevicePlan:
    """The plan that a checked setting writes: ``cuda:0,cuda:1,vocoder=cpu``."""
    parts = [part.rpartition("=") for part in setting.split(",")]
    general = tuple(device for name, _, device in parts if not name)
    return DevicePlan(general or ("auto",), {name: device for name, _, device in parts if name})


def plan_workers(
    setting: str, versions: Callable[[], Iterable[ModelVersion]], workers: int
) -> tuple[str, ...]:
    """A setting of devices for each of up to ``workers`` sets of models, spread over the devices.

    A CUDA device gets no more sets than fit into its memory by the catalog's needs; that there are
    fewer is told in the log. A device that is missing counts as the CPU, which takes its place.

    Args:
        setting: of devices, checked.
        versions: gives the models of a set; not called where there is no CUDA device.
        workers: how many sets are wanted.

    Raises:
        ConfigError: no set fits on any device.
    """
    plan = parse_devices(setting)
    left: dict[str, int] = {}
    told = []
    for device, place in zip(plan.general, plan.spread(), strict=True):
        gpu = _cuda_index(device)
        if gpu is None:
            left[place] = workers
            continue
        here = parse_devices(place)
        needs = CUDA_PROCESS_MB + sum(
            version.needs.vram_mb for version in versions() if _cuda_index(here.of(version)) == gpu
        )
        left[place] = gpu_memory_mb()[gpu] // needs
        if not left[place]:
            told.append(
                f"cuda:{gpu} has {gpu_memory_mb()[gpu]} MB, and a worker needs {needs} MB on it"
            )
    if not any(left.values()):
        raise ConfigError(
            f"{'; '.join(told)}; choose --device cpu, or give large models to the CPU "
            f"(--device {plan.general[0]},content=cpu)"
        )
    for sentence in told:
        log.warning("%s, so it is left out", sentence)
    places: list[str] = []
    while len(places) < workers and any(left.values()):
        for place in [place for place, room in left.items() if room][: workers - len(places)]:
            left[place] -= 1
            places.append(place)
    if len(places) < workers:
        log.warning("%d instead of %d workers fit into the memory", len(places), workers)
    return tuple(places)


def _cuda_index(device: str) -> int | None:
    """The CUDA device that ``device`` means here; None for another kind or one that is missing."""
    kind, index = kind_and_index(device)
    return None if kind not in ("auto", "cuda") or why_not("cuda", index) else index


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
    """The device for ``version``: ``cpu``, ``cuda:N``, ``directml``, ``coreml``, ``openvino`` or
    ``openvino:bf16``.

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
    kind, index = kind_and_index(wanted)
    if kind == "auto":
        return "cpu" if why_not("cuda", 0, version.needs.vram_mb) else "cuda:0"
    if problem := why_not(kind, index, version.needs.vram_mb):
        log.warning(
            "%s runs on the CPU, because device %s is not available: %s",
            version.key, wanted, problem,
        )  # fmt: skip
        return "cpu"
    return f"cuda:{index}" if kind == "cuda" else wanted


def kind_and_index(device: str) -> tuple[str, int]:
    """``cuda:1`` to ``("cuda", 1)``; the index of what has none is 0."""
    kind, _, index = device.partition(":")
    return kind, int(index) if index.isdecimal() else 0


def why_not(kind: str, index: int = 0, needs_mb: int = 0) -> str:
    """Why a device cannot be used here, as a part of a sentence; empty where it can.

    Args:
        kind: a key of ``PROVIDERS``.
        index: of the CUDA device.
        needs_mb: memory that it must have.
    """
    if PROVIDERS[kind] not in available_providers():
        if kind == "coreml":
            return "only a Mac has it"
        return f"it needs another build of the runtime ({change_wheel(WHEELS[kind])})"
    if kind == "cuda" and index >= (count := len(gpu_memory_mb())):
        return f"the driver shows {count} CUDA devices"
    if kind == "cuda" and (has := gpu_memory_mb()[index]) < needs_mb:
        return f"it has {has} MB, and {needs_mb} MB are needed"
    return ""


def installed_wheels() -> dict[str, str]:
    """Versions of the installed builds of ONNX Runtime by name; several overwrite each other."""
    from importlib import metadata

    found = {}
    for name in ("onnxruntime", *WHEELS.values()):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def change_wheel(wheel: str) -> str:
    """The commands that put ``wheel`` in the place of the build that is installed.

    All builds write the same folder, so every other one must go first.
    """
    there = " ".join(installed_wheels()) or "onnxruntime"
    return f"pip uninstall {there}, then pip install {wheel}"


@cache
def available_providers() -> tuple[str, ...]:
    """Providers of the ONNX Runtime that is installed; none where it is missing."""
    try:
        return tuple(onnx_runtime().get_available_providers())
    except MissingDependencyError:
        return ()


def provider_options(device: str, threads: int) -> dict[str, Any]:
    """What the provider of ``device`` is told.

    Args:
        threads: of one network; providers that compute on the CPU have threads of their own.
    """
    kind, index = kind_and_index(device)
    if kind == "cuda":
        # Measuring every algorithm for each new length would take longer than the work.
        return {"device_id": index, "cudnn_conv_algo_search": "HEURISTIC"}
    if kind == "openvino":
        precision = "bf16" if device.endswith(":bf16") else "f32"
        told = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision}
        return {"device_type": "CPU", "load_config": json.dumps({"CPU": told})}
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
