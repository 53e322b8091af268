"""Jobs as values: what a client asks for, and how it stands.

A job is one request; its items are the recordings in it. Items are what is queued and claimed, so
that a client with a hundred recordings does not keep others waiting for all of them. States move
only this way::

    queued ──► running ──► done | failed
      ▲  │        │
      │  └────────┴──────► cancelled
      └── (the server stopped or died, others wait, or the disk is full)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

QUEUED, RUNNING, DONE, FAILED, CANCELLED = "queued", "running", "done", "failed", "cancelled"
FINISHED = frozenset({DONE, FAILED, CANCELLED})
# Lanes: what needs the models' compute, and what waits for the network or for a load.
COMPUTE, MAINTENANCE = "compute", "maintenance"

Json: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class JobRequest:
    """A job as a client asks for it.

    Attributes:
        id: unguessable.
        client: whom fairness and limits count it for.
        kind: key of the table of tasks.
        names: what the client calls each item; for display, never a path.
        request: options, the same for every item.
        direct: a connection waits for it, so it comes before jobs and does not outlive the server.
        keep_seconds: between its end and its deletion.
        key: the client's own mark for "the same request again"; "" for none.
        digest: of everything that was asked and sent, where there is a key.
    """

    id: str
    client: str
    kind: str
    names: Sequence[str]
    request: Json
    lane: str = COMPUTE
    direct: bool = False
    keep_seconds: float = 86400.0
    key: str = ""
    digest: str = ""


@dataclass(frozen=True)
class JobItem:
    """One recording of a job.

    Attributes:
        error: ``type``, ``message`` and ``status`` where it failed.
        result: what the task gave, with ``file`` (in the job's folder) and ``bytes`` where there
            is a file.
        attempts: how often it was begun.
    """

    index: int
    name: str
    state: str = QUEUED
    progress: float = 0.0
    error: Json | None = None
    result: Json | None = None
    attempts: int = 0


@dataclass(frozen=True)
class JobRecord:
    """A job as it stands; times are seconds since the epoch."""

    id: str
    client: str
    kind: str
    state: str
    request: Json
    direct: bool
    created: float
    started: float | None
    finished: float | None
    expires: float | None
    items: Sequence[JobItem] = field(default_factory=tuple)

    @property
    def progress(self) -> float:
        parts = [1.0 if item.state in FINISHED else item.progress for item in self.items]
        return sum(parts) / len(parts) if parts else 1.0

    @property
    def is_finished(self) -> bool:
        return self.state in FINISHED


@dataclass(frozen=True)
class Claim:
    """An item that a worker has taken."""

    job: JobRecord
    item: JobItem


@dataclass(frozen=True)
class QueueLimits:
    """Numbers of items that may wait; those of direct jobs and of others are counted apart."""

    direct: int
    direct_client: int
    queued: int
    queued_client: int


@dataclass(frozen=True)
class QueueDepth:
    """Items now waiting and now running."""

    direct: int
    queued: int
    running: int


def state_of(states: Sequence[str]) -> str:
    """The state of a job whose items have these: done if anything was made."""
    if any(state not in FINISHED for state in states):
        return QUEUED if all(state == QUEUED for state in states) else RUNNING
    if CANCELLED in states:
        return CANCELLED
    return DONE if DONE in states else FAILED
