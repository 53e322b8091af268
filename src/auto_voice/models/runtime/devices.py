"""Which device a model runs on."""

from __future__ import annotations

from auto_voice.errors import ModelLoadError
from auto_voice.models.registry.architectures import ARCHITECTURES
from auto_voice.models.registry.catalog import ModelVersion


def choose_device(wanted: str, version: ModelVersion) -> str:
    """The device for ``version``: ``cpu``, ``cuda:N`` or ``mps``.

    Args:
        wanted: ``auto`` takes a GPU where there is one with room, else the CPU. Architectures
            that do not run on torch stay on the CPU.

    Raises:
        ModelLoadError: a device that is not there, or a model that needs a GPU.
    """
    if not ARCHITECTURES[version.architecture].torch:
        return "cpu"
    device = "cpu" if wanted == "cpu" else _accelerator(wanted, version)
    if device == "cpu" and version.needs.gpu == "required":
        raise ModelLoadError(
            f"{version.key} needs a GPU, and device {wanted} gives none; run it on a machine with "
            "CUDA or choose a model without that need"
        )
    return device


def _accelerator(wanted: str, version: ModelVersion) -> str:
    try:
        import torch
    except ImportError:
        # The architecture's own import says what to install.
        return "cpu"
    if wanted == "mps":
        if not torch.backends.mps.is_available():
            raise ModelLoadError("device mps is not available here; use device auto or cpu")
        return "mps"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted.startswith("cuda"):
        index = int(wanted.partition(":")[2] or 0)
        if index >= count:
            raise ModelLoadError(
                f"device {wanted} is not available: torch sees {count} CUDA devices; "
                "use device auto or cpu, or install a CUDA build of torch"
            )
        return f"cuda:{index}"
    if count:
        free_mb = torch.cuda.mem_get_info(0)[0] // 2**20
        return "cuda:0" if free_mb >= version.needs.vram_mb else "cpu"
    return "mps" if torch.backends.mps.is_available() else "cpu"
