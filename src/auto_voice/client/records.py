"""What the server answers, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

R = TypeVar("R")


@dataclass(frozen=True)
class Conversion:
    """A converted recording.

    Attributes:
        content: the bytes of the file.
        name: what the server would call it.
        account: seconds, models, notes, timings; ``figures`` where they were asked for.
    """

    content: bytes
    name: str
    account: Mapping[str, Any]

    def save(self, path: str | Path) -> Path:
        """Write the file."""
        target = Path(path)
        target.write_bytes(self.content)
        return target


@dataclass(frozen=True)
class ItemStatus:
    """One recording of a job; ``error`` and ``result`` as the API describes them."""

    index: int
    name: str
    state: str
    progress: float
    error: Mapping[str, Any] | None = None
    result: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class JobStatus:
    """A job as it stood when the server was asked."""

    id: str
    kind: str
    state: str
    progress: float
    created: datetime
    items: tuple[ItemStatus, ...]
    started: datetime | None = None
    finished: datetime | None = None
    expires: datetime | None = None

    @property
    def is_finished(self) -> bool:
        return self.state in ("done", "failed", "cancelled")

    @staticmethod
    def of(answer: Mapping[str, Any]) -> JobStatus:
        """From the JSON of the API."""
        times: dict[str, Any] = {
            name: _time(answer[name])
            for name in ("created", "started", "finished", "expires")
            if answer.get(name)
        }
        items = tuple(known(ItemStatus, item) for item in answer["items"])
        plain = {name: answer[name] for name in ("id", "kind", "state", "progress")}
        return JobStatus(**plain, **times, items=items)


@dataclass(frozen=True)
class VoiceInfo:
    """A stored voice; ``notes`` says what was wrong with its recordings."""

    name: str
    speech_seconds: float
    encoder: str
    pitch_hz: float | None = None
    notes: tuple[str, ...] = ()
    consent: str = ""


@dataclass(frozen=True)
class ModelInfo:
    """One version of a model and where it stands."""

    name: str
    version: str
    kind: str
    description: str
    licence: str
    bytes: int
    default: bool
    pinned: bool
    installed: bool
    loaded: bool


def known(record: type[R], answer: Mapping[str, Any]) -> R:
    """``record`` from JSON, leaving out what a newer server may add."""
    names = {field.name for field in fields(record)}  # type: ignore[arg-type]
    values = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in answer.items()
        if name in names
    }
    return record(**values)


def _time(text: str) -> datetime:
    # fromisoformat takes "Z" only from Python 3.11 on.
    return datetime.fromisoformat(text.replace("Z", "+00:00"))
