"""The two verbs as functions: pipelines are made once for each configuration and kept."""

from __future__ import annotations

import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

from auto_voice.inference.inputs import AudioInput
from auto_voice.inference.result import ConversionResult
from auto_voice.inference.voice_conversion_pipeline import (
    PipelineConfig,
    Target,
    VoiceConversionPipeline,
)
from auto_voice.types import Voice

_lock = threading.Lock()


def convert(
    source: AudioInput,
    voice: Target,
    out: str | Path | None = None,
    *,
    config: PipelineConfig | None = None,
    **options: Any,
) -> ConversionResult:
    """``source`` re-spoken in the voice of ``voice``; also written to ``out`` if given.

    Args:
        source: a file, a waveform, or ``(samples,)`` at ``sample_rate`` (an option, 16000).
        voice: what :func:`clone` returned, a recording or several, a voice file, an embedding.
        config: which models run, and where.
        options: see :meth:`VoiceConversionPipeline.convert`.

    Raises:
        AutoVoiceError: one sentence that says what to do.
    """
    if out is not None:
        from auto_voice.audio.io import ensure_writable

        inputs = [Path(path) for path in (source, voice) if isinstance(path, (str, Path))]
        ensure_writable(out, inputs)
    result = pipeline(config).convert(source, voice, **options)
    if out is not None:
        result.save(out, allow_mock=(config or PipelineConfig()).use_mock_models)
    return result


def clone(
    references: Target,
    *,
    name: str = "",
    sample_rate: int = 16000,
    config: PipelineConfig | None = None,
) -> Voice:
    """The voice heard in one or several recordings; see :meth:`VoiceConversionPipeline.clone`."""
    return pipeline(config).clone(references, name=name, sample_rate=sample_rate)


def pipeline(config: PipelineConfig | None = None) -> VoiceConversionPipeline:
    """The one pipeline of this process with this configuration."""
    with _lock:
        return _pipeline(config or PipelineConfig())


@lru_cache(maxsize=4)
def _pipeline(config: PipelineConfig) -> VoiceConversionPipeline:
    return VoiceConversionPipeline(config)
