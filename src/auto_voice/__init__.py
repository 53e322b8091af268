"""Clone a voice from a few seconds of speech and re-speak any recording in it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from auto_voice.inference.api import clone, convert
    from auto_voice.inference.result import ConversionResult
    from auto_voice.inference.voice_conversion_pipeline import (
        PipelineConfig,
        VoiceConversionPipeline,
    )
    from auto_voice.models.model_registry import ModelRegistry
    from auto_voice.types import Voice, Waveform
    from auto_voice.voices.voice_file import load_voice, save_voice

__version__ = "0.1.0"

_HOMES = {
    "ConversionResult": "inference.result",
    "ModelRegistry": "models.model_registry",
    "PipelineConfig": "inference.voice_conversion_pipeline",
    "Voice": "types",
    "VoiceConversionPipeline": "inference.voice_conversion_pipeline",
    "Waveform": "types",
    "clone": "inference.api",
    "convert": "inference.api",
    "load_voice": "voices.voice_file",
    "save_voice": "voices.voice_file",
}

__all__ = [
    "ConversionResult",
    "ModelRegistry",
    "PipelineConfig",
    "Voice",
    "VoiceConversionPipeline",
    "Waveform",
    "__version__",
    "clone",
    "convert",
    "load_voice",
    "save_voice",
]


def __getattr__(name: str) -> object:
    """Names are imported when first used (PEP 562), so that ``import auto_voice`` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"auto_voice.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
