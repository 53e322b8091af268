"""The models that judge: loaded by the registry, never replaced, pinned in the result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Protocol

from auto_voice.audio.pitch import PITCH_RULES
from auto_voice.errors import ConfigError, EvaluationError
from auto_voice.evaluation.metrics import Embedder
from auto_voice.models.quality_model import Quality
from auto_voice.types import FloatArray

if TYPE_CHECKING:
    from auto_voice.models.model_registry import ModelRegistry

# Role to the model of the catalog that plays it.
DEFAULT_MODELS: Mapping[str, str] = {
    "speaker": "speaker_encoder",
    "speaker2": "speaker_dvector",
    "recogniser": "recogniser_base",
    "quality": "quality_dnsmos",
}
# Groups of metrics that can be left out, and the judges each needs.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "similarity": ("speaker", "speaker2"),
    "words": ("recogniser",),
    "quality": ("quality",),
    "pitch": ("pitch",),
    "signal": (),
}


class Transcriber(Protocol):
    """Speech to text."""

    sample_rate: int

    def transcribe(self, samples: FloatArray) -> str: ...


class QualityJudge(Protocol):
    """Audio to opinion scores."""

    sample_rate: int

    def score(self, samples: FloatArray) -> Quality: ...


@dataclass(frozen=True, eq=False)
class Judges:
    """Loaded judges by role; None for one that is left out.

    Attributes:
        pins: role to ``name@version``.
        pitch, signal: whether these groups are measured.
    """

    speaker: Embedder | None = None
    speaker2: Embedder | None = None
    recogniser: Transcriber | None = None
    quality: QualityJudge | None = None
    pitch: bool = True
    signal: bool = True
    pins: Mapping[str, str] = field(default_factory=dict)


def load_judges(
    registry: ModelRegistry,
    *,
    without: Iterable[str] = (),
    models: Mapping[str, str] | None = None,
) -> Judges:
    """Load every judge that the wanted metrics need.

    Args:
        without: groups to leave out, keys of ``GROUPS``.
        models: role to ``name`` or ``name@version``, over ``DEFAULT_MODELS``.

    Raises:
        ConfigError: an unknown group or role; the message lists the known ones.
        EvaluationError: the registry put a substitute in place of a judge.
        MissingDependencyError: an extra is missing; the message holds the install command.
        ModelError: a model cannot be had.
    """
    left_out = frozenset(without)
    if unknown := sorted(left_out - set(GROUPS)):
        raise ConfigError(
            f"There is no group of metrics {unknown[0]!r}; the groups are {', '.join(GROUPS)}."
        )
    chosen = dict(DEFAULT_MODELS) | dict(models or {})
    if strange := sorted(set(chosen) - set(DEFAULT_MODELS)):
        raise ConfigError(
            f"There is no judge {strange[0]!r}; the judges are {', '.join(DEFAULT_MODELS)}."
        )
    wanted = [role for group, roles in GROUPS.items() if group not in left_out for role in roles]
    loaded: dict[str, Any] = {}
    pins: dict[str, str] = {}
    for role in wanted:
        if role == "pitch":
            pins[role] = f"swift_f0@{_package_version('swift-f0')}+{PITCH_RULES}"
        else:
            loaded[role], pins[role] = _load(registry, chosen[role])
    return Judges(
        **loaded, pins=pins, pitch="pitch" not in left_out, signal="signal" not in left_out
    )


def _load(registry: ModelRegistry, spec: str) -> tuple[Any, str]:
    name, _, number = spec.partition("@")
    model = registry.load(name, number or None)
    resolved = registry.resolved(spec)
    if "fallback" in resolved or resolved.startswith("mock"):
        raise EvaluationError(
            f"{spec} cannot judge because {resolved} stands in for it; fetch it with: "
            f"autovoice models pull {name}"
        )
    return model, resolved


def _package_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
