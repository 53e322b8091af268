"""Models: the registry that finds, fetches, verifies and loads them, and the stages themselves.

Importing this room loads neither torch nor onnxruntime; names are imported when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from auto_voice.models.hifigan_model import HiFiGANModel
    from auto_voice.models.hubert_model import HuBERTModel
    from auto_voice.models.model_loader import DownloadProgressBar, ModelDownloader, ModelLoader
    from auto_voice.models.model_registry import ModelRegistry, ModelStatus
    from auto_voice.models.registry.catalog import Catalog, ModelEntry, ModelFile, ModelVersion
    from auto_voice.models.registry.catalog_schema import load_catalog
    from auto_voice.models.registry.loading import FallbackWarning, WarmupTiming
    from auto_voice.models.registry.store import ModelStore
    from auto_voice.models.speaker_encoder import SpeakerEncoder, SpeakerEncoderModel

_HOMES = {
    "Catalog": "registry.catalog",
    "DownloadProgressBar": "model_loader",
    "FallbackWarning": "registry.loading",
    "HiFiGANModel": "hifigan_model",
    "HuBERTModel": "hubert_model",
    "ModelDownloader": "model_loader",
    "ModelEntry": "registry.catalog",
    "ModelFile": "registry.catalog",
    "ModelLoader": "model_loader",
    "ModelRegistry": "model_registry",
    "ModelStatus": "model_registry",
    "ModelStore": "registry.store",
    "ModelVersion": "registry.catalog",
    "SpeakerEncoder": "speaker_encoder",
    "SpeakerEncoderModel": "speaker_encoder",
    "WarmupTiming": "registry.loading",
    "load_catalog": "registry.catalog_schema",
}

__all__ = [
    "Catalog",
    "DownloadProgressBar",
    "FallbackWarning",
    "HiFiGANModel",
    "HuBERTModel",
    "ModelDownloader",
    "ModelEntry",
    "ModelFile",
    "ModelLoader",
    "ModelRegistry",
    "ModelStatus",
    "ModelStore",
    "ModelVersion",
    "SpeakerEncoder",
    "SpeakerEncoderModel",
    "WarmupTiming",
    "load_catalog",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
