"""From a recording and a voice to a converted recording."""

from auto_voice.inference.result import ConversionResult
from auto_voice.inference.voice_conversion_pipeline import (
    PipelineConfig,
    VoiceConversionPipeline,
)
from auto_voice.inference.voice_file import load_voice, save_voice

__all__ = [
    "ConversionResult",
    "PipelineConfig",
    "VoiceConversionPipeline",
    "load_voice",
    "save_voice",
]
