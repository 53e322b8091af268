"""Clone a voice from a few seconds of speech and re-speak any recording in it."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from auto_voice.inference.result import ConversionResult, OutputSpec
    from auto_voice.inference.voice_conversion_pipeline import (
        PipelineConfig,
        VoiceConversionPipeline,
        clone,
        convert,
    )
    from auto_voice.models.model_registry import ModelRegistry
    from auto_voice.types import Voice, Waveform
    from auto_voice.voices.voice_file import load_voice, save_voice

# Libraries read these when they are imported, and every import of them by us comes after this one.
# Threads of OpenMP that wait must not take the core that another process needs. And no library that
# we bring reports anything about our users: ONNX Runtime (from 1.29 on it looks up a host 9 s after
# the start and writes a device id into the user's cache), the model hub's client, Ray, and what
# follows the convention of DO_NOT_TRACK.
for _name, _value in {
    "OMP_WAIT_POLICY": "passive",
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "DO_NOT_TRACK": "1",
}.items():
    os.environ.setdefault(_name, _value)

__version__ = "0.1.0"

_HOMES = {
    "ConversionResult": "inference.result",
    "ModelRegistry": "models.model_registry",
    "OutputSpec": "inference.result",
    "PipelineConfig": "inference.voice_conversion_pipeline",
    "Voice": "types",
    "VoiceConversionPipeline": "inference.voice_conversion_pipeline",
    "Waveform": "types",
    "clone": "inference.voice_conversion_pipeline",
    "convert": "inference.voice_conversion_pipeline",
    "load_voice": "voices.voice_file",
    "save_voice": "voices.voice_file",
}

__all__ = [
    "ConversionResult",
    "ModelRegistry",
    "OutputSpec",
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
