"""User audio in and out, and the one definition of each signal that the models see.

Names are found in their modules on first use, so that importing this room loads neither
libsndfile nor a detector. ``resample.resample``, ``denoise.denoise``, ``mel`` and ``pitch`` are
imported from their modules, whose names they share.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from auto_voice.audio.io import (
        AudioInfo,
        AudioWriter,
        ensure_writable,
        iter_blocks,
        probe,
        read_audio,
        write_audio,
    )
    from auto_voice.audio.loudness import integrated_loudness, match_loudness, true_peak
    from auto_voice.audio.quality import RecordingQuality, measure_quality
    from auto_voice.audio.vad import speech_seconds, speech_segments, trim_silence

_HOMES = {
    "AudioInfo": "io",
    "AudioWriter": "io",
    "RecordingQuality": "quality",
    "ensure_writable": "io",
    "integrated_loudness": "loudness",
    "iter_blocks": "io",
    "match_loudness": "loudness",
    "measure_quality": "quality",
    "probe": "io",
    "read_audio": "io",
    "speech_seconds": "vad",
    "speech_segments": "vad",
    "trim_silence": "vad",
    "true_peak": "loudness",
    "write_audio": "io",
}

__all__ = [
    "AudioInfo",
    "AudioWriter",
    "RecordingQuality",
    "ensure_writable",
    "integrated_loudness",
    "iter_blocks",
    "match_loudness",
    "measure_quality",
    "probe",
    "read_audio",
    "speech_seconds",
    "speech_segments",
    "trim_silence",
    "true_peak",
    "write_audio",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)
