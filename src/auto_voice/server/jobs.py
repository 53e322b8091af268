"""Jobs and the interface of what keeps them.

A job is one request; its items are the recordings in it. Items are what is queued and claimed, so
that a client with a hundred recordings does not keep others waiting for all of them. States move
only this way::

    queued ──► running ──► done | failed
      ▲  │        │
      │  └────────┴──────► cancelled
      └── (server stopped or died)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

QUEUED, RUNNING, DONE, FAILED, CANCELLED = "queued", "running", "done", "failed", "cancelled"
FINISHED = frozenset({DONE, FAILED, CANCELLED})
# Lanes: what needs the models' compute, and what waits for the network or a load.
WORK, UPKEEP = "work", "upkeep"

Record = Mapping[str, Any]


@dataclass(frozen=True)
class NewJob:
    """What a client asks for.

    Attributes:
        id: unguessable.
        client: whom fairness and limits count it for.
        kind: key of the table of work.
        names: what the client calls each item; for display, never a path.
        request: options, the same for every item.
        direct: a connection waits for it, so it comes before the client's other work and does not
            outlive the server.
        keep_seconds: between its end and its deletion.
        key: the client's own mark for "the same request again"; "" for none.
    """

    id: str
    client: str
    kind: str
    names: Sequence[str]
    request: Record
    lane: str = WORK
    direct: bool = False
    keep_seconds: float = 86400.0
    key: str = ""


@dataclass(frozen=True)
class Item:
    """One recording of a job.

    Attributes:
        error: ``type``, ``message`` and ``status`` where it failed.
        result: what the work gave, with ``file`` (in the job's folder) and ``bytes`` where there
            is a file.
        attempts: how often it was begun.
    """

    index: int
    name: str
    state: str = QUEUED
    progress: float = 0.0
    error: Record | None = None
    result: Record | None = None
    attempts: int = 0


@dataclass(frozen=True)
class Job:
    """A job as it stands; times are seconds since the epoch."""

    id: str
    client: str
    kind: str
    state: str
    request: Record
    direct: bool
    created: float
    started: float | None
    finished: float | None
    expires: float | None
    items: Sequence[Item] = field(default_factory=tuple)

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

    job: Job
    item: Item


@dataclass(frozen=True)
class Limits:
    """What may wait. Items of direct jobs and of others are counted apart."""

    direct: int
    direct_client: int
    queued: int
    queued_client: int


@dataclass(frozen=True)
class Depth:
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


class JobStore(Protocol):
    """Where jobs are kept; every method is one transaction and safe to call from any thread.

    What :meth:`add` returned survives the death of the process.
    """

    def add(self, job: NewJob, limits: Limits) -> Job:
        """Keep ``job``, or give the earlier job of the client with the same key.

        Raises:
            BusyError: a limit would be passed; nothing was kept.
        """
        ...

    def check(self, client: str, direct: bool, limits: Limits) -> None:
        """Raise BusyError if not one more item could be added."""
        ...

    def find(self, client: str, key: str) -> Job | None:
        """The job that ``client`` gave ``key``."""
        ...

    def get(self, job_id: str) -> Job:
        """Raises UnknownJobError."""
        ...

    def listed(self, client: str, limit: int) -> list[Job]:
        """The newest jobs of a client that are not direct."""
        ...

    def claim(self, lane: str) -> Claim | None:
        """Take the next item: of the client with the least running, then least recently served."""
        ...

    def report(self, job_id: str, index: int, progress: float) -> None:
        """Note the fraction done of a running item."""
        ...

    def others_wait(self, job_id: str) -> bool:
        """Whether work of another client waits, or a direct request, while this job runs."""
        ...

    def finish(
        self, job_id: str, index: int, *, result: Record | None = None, error: Record | None = None
    ) -> Job:
        """End a running item; one that was cancelled meanwhile stays cancelled."""
        ...

    def release(self, job_id: str, index: int) -> None:
        """Put a running item back into the queue as far as it is, not counting the attempt."""
        ...

    def cancel(self, job_id: str) -> Job:
        """Cancel whatever of the job is not finished."""
        ...

    def recover(self, most_attempts: int) -> tuple[int, int]:
        """After a death: running items go back to the queue, or fail if they died too often.

        Direct jobs are cancelled, because nobody waits for them. Gives how many were queued again
        and how many failed.
        """
        ...

    def expired(self, now: float, keep_bytes: int) -> list[str]:
        """Finished jobs that are too old, and the oldest while all together are too large."""
        ...

    def remove(self, job_id: str) -> None:
        """Forget a job."""
        ...

    def ids(self) -> set[str]:
        """Of every job that is kept."""
        ...

    def depth(self) -> Depth:
        """Waiting and running items."""
        ...

    def close(self) -> None:
        """Let go of the storage."""
        ...
