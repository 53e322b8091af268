"""Signals and pipelines for the tests of inference."""

from __future__ import annotations

import pytest

from auto_voice.inference import PipelineConfig, VoiceConversionPipeline
from auto_voice.types import Waveform
from hand_made_stages import HandMade, speech_like


@pytest.fixture
def speech():
    """:func:`speech_like`."""
    return speech_like


@pytest.fixture
def source() -> Waveform:
    return Waveform(speech_like(3.0, 120.0), 16000)


@pytest.fixture
def reference() -> Waveform:
    return Waveform(speech_like(6.0, 210.0, seed=1), 16000)


@pytest.fixture
def mock_pipeline() -> VoiceConversionPipeline:
    return VoiceConversionPipeline(PipelineConfig(use_mock_models=True))


@pytest.fixture
def hand_made():
    """Makes a pipeline over hand-made stages: ``(pipeline, registry)``."""

    def make(config: PipelineConfig | None = None, **stages):
        registry = HandMade(**stages)
        return VoiceConversionPipeline(config, model_registry=registry), registry

    return make
