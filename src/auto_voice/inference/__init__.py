"""From a recording and a voice to a converted recording."""

from auto_voice.inference.result import ConversionResult
from auto_voice.inference.voice_conversion_pipeline import (
    PipelineConfig,
    VoiceConversionPipeline,
)

__all__ = [
    "ConversionResult",
    "PipelineConfig",
    "VoiceConversionPipeline",
]
