"""Recordings as catalog entries: speech for demo and tests, fetched and hashed like weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from auto_voice.models.registry.catalog import ModelVersion
from auto_voice.types import Waveform


def build(files: Mapping[str, Path], version: ModelVersion, device: str) -> Waveform:
    """The recording of the version's first file, at its own rate.

    Raises:
        AudioError: the file is not audio.
    """
    from auto_voice.audio.io import read_audio

    return read_audio(files[version.files[0].file])
