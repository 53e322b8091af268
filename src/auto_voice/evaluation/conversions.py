"""Run a pipeline over a test set, and measure how long it takes and how much memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from auto_voice.errors import EvaluationError
from auto_voice.evaluation.items import Item

if TYPE_CHECKING:
    from auto_voice.inference.voice_conversion_pipeline import VoiceConversionPipeline


@dataclass(frozen=True)
class Conversions:
    """What a pipeline made of a test set.

    Attributes:
        items: with their conversions.
        extra: pair id to ``rtf``: seconds of computing per second of audio, without loading
            models and cloning.
        system: stage to the exact ``name@version`` that ran.
        peak_memory_mb: highest resident memory of the process so far; None where the system
            does not tell.
        notes: what the pipeline altered or replaced, each once.
    """

    items: tuple[Item, ...]
    extra: dict[str, dict[str, float]]
    system: dict[str, str]
    peak_memory_mb: float | None
    notes: tuple[str, ...]


def convert_all(
    pipeline: VoiceConversionPipeline,
    items: Sequence[Item],
    folder: Path,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Conversions:
    """Convert each item into ``folder/<id>.wav``; references are cloned once.

    Raises:
        EvaluationError: mock models would be scored.
        AutoVoiceError: whatever the pipeline raises.
    """
    folder.mkdir(parents=True, exist_ok=True)
    voices = {}
    done: list[Item] = []
    extra: dict[str, dict[str, float]] = {}
    system: dict[str, str] = {}
    notes: dict[str, None] = {}
    for number, item in enumerate(items, 1):
        if item.targets not in voices:
            voices[item.targets] = pipeline.clone([str(p) for p in item.targets])
        result = pipeline.convert(item.source, voices[item.targets])
        if result.mock:
            raise EvaluationError(
                "Mock models make noise, which has no quality to measure; use real models."
            )
        # Names come from files, so what could leave the folder is replaced.
        name = "".join(c if c.isalnum() or c in "-_." else "_" for c in item.id).lstrip(".")
        path = result.save(folder / f"{number:04d}_{name}.wav")
        done.append(replace(item, converted=path))
        extra[item.id] = {"rtf": result.seconds_per_second}
        system.update(result.models)
        notes.update(dict.fromkeys(n for n in result.notes if "fallback" in n))
        if progress is not None:
            progress(number, len(items))
    return Conversions(tuple(done), extra, system, peak_memory_mb(), tuple(notes))


def peak_memory_mb() -> float | None:
    """Highest resident memory of this process so far, MB (10^6 bytes)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
