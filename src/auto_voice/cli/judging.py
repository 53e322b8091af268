"""Judges for the server, which may not import the evaluation itself."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from auto_voice.evaluation.judges import Judges
    from auto_voice.models.model_registry import ModelRegistry


class PairJudge:
    """One set of judges for all threads, loaded when first asked.

    Args:
        registry: loads them; mock judges are used, and said, where it is a mock registry.
    """

    def __init__(self, registry: ModelRegistry) -> None:
        self._registry = registry
        self._lock = threading.Lock()
        self._judges: dict[tuple[str, ...], Judges] = {}

    def words_kept(self, source: Path, converted: Path) -> float:
        """1 - word error rate of what is heard in ``converted``, not below 0."""
        from auto_voice.evaluation.scoring import Recording
        from auto_voice.evaluation.text import word_errors

        judges = self._loaded(("similarity", "quality", "pitch", "signal"))
        counts = word_errors(Recording(source, judges).text, Recording(converted, judges).text)
        return max(0.0, 1.0 - counts.edits / counts.reference) if counts.reference else 1.0

    def pair(
        self, source: Path, targets: Sequence[Path], converted: Path, transcript: str
    ) -> dict[str, Any]:
        """Every figure of one conversion."""
        from auto_voice.evaluation import Item, Scorer

        judges = self._loaded(())
        scored = Scorer(judges).score(
            Item("pair", source, tuple(targets), converted, transcript=transcript)
        )
        return {
            "figures": _finite(scored.values),
            "texts": dict(scored.texts),
            "models": dict(judges.pins),
            "mock": self._registry.use_mock,
        }

    def _loaded(self, without: tuple[str, ...]) -> Judges:
        from auto_voice.evaluation.judges import DEFAULT_MODELS, GROUPS, Judges, load_judges

        with self._lock:
            if without not in self._judges:
                if self._registry.use_mock:
                    roles = [r for g, rs in GROUPS.items() if g not in without for r in rs]
                    models = {role: DEFAULT_MODELS[role] for role in roles if role != "pitch"}
                    loaded: dict[str, Any] = {
                        role: self._registry.load(name) for role, name in models.items()
                    }
                    pins = {role: self._registry.resolved(name) for role, name in models.items()}
                    self._judges[without] = Judges(
                        **loaded, pins=pins, pitch="pitch" not in without
                    )
                else:
                    self._judges[without] = load_judges(self._registry, without=without)
            return self._judges[without]


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {
        name: round(float(value), 5) if math.isfinite(value) else None
        for name, value in values.items()
    }
