"""Jobs: what a client asks for and how it stands, the store that keeps them, and what stops one.

A job is one request; its items are the recordings in it. Items are what is queued and claimed, so
that a client with a hundred recordings does not keep others waiting for all of them. States move
only this way::

    queued ──► running ──► done | failed
      ▲  │        │
      │  └────────┴──────► cancelled
      └── (the server stopped or died, others wait, or the disk is full)
"""

from __future__ import annotations

import json
import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from auto_voice.errors import BusyError, ServerError
from auto_voice.models.runtime.sessions import Interrupted, Interruption

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
    """An item that a worker has taken.

    Attributes:
        ticket: of this claim alone, where several processes work: who comes with an older one has
            lost the item to another. "" where one process does.
    """

    job: JobRecord
    item: JobItem
    ticket: str = ""

    @property
    def key(self) -> tuple[str, int, str]:
        """What tells it from every other claim."""
        return self.job.id, self.item.index, self.ticket


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


def json_value(text: str | None) -> Any:
    """What a database keeps as :func:`json_text`."""
    return None if text is None else json.loads(text)


def json_text(value: Json | None) -> str | None:
    return None if value is None else json.dumps(dict(value))


# The store

# Of so many turns one goes to jobs although direct requests wait.
JOB_TURN = 4
# Seconds assumed for Retry-After before anything was measured.
SECONDS_PER_ITEM = 5.0
# Seconds without a sign of life after which others take up what a process was doing, and how many
# signs it gives in that time.
LEASE_SECONDS = 20.0
BEATS_PER_LEASE = 5


class JobStoreError(ServerError):
    """The database cannot be used just now.

    Args:
        maybe_done: the connection broke while the change was made, so it may stand.
    """

    http_status = 503
    retry_after = 5

    def __init__(self, message: str, *, maybe_done: bool = False) -> None:
        super().__init__(message)
        self.maybe_done = maybe_done


class ClaimLostError(ServerError):
    """Another worker has taken up the item, because this one gave no sign of life."""

    http_status = 409


class JobStore(ABC):
    """The kept jobs; every method is one transaction and safe to call from any thread.

    What :meth:`add` returned survives the death of the process. Each method raises JobStoreError
    while the database cannot be used; ``problem`` tells why until it works again.

    Attributes:
        shared: other processes work on the same jobs.
    """

    shared = False

    @property
    @abstractmethod
    def problem(self) -> str:
        """The reason why the last transaction failed; "" if it did not."""

    @abstractmethod
    def add(self, job: JobRequest, limits: QueueLimits) -> JobRecord:
        """Keep ``job``, or give the earlier job of the client with the same key.

        Raises:
            BusyError: a limit would be passed; nothing was kept.
            ServerError: the key stands for another request.
        """

    @abstractmethod
    def check(self, client: str, direct: bool, limits: QueueLimits) -> None:
        """Raise BusyError if not one more item could be added."""

    @abstractmethod
    def find(self, client: str, key: str, digest: str) -> JobRecord | None:
        """The job that ``client`` gave ``key``.

        Raises:
            ServerError: it was another request than that of ``digest``.
        """

    @abstractmethod
    def get(self, job_id: str) -> JobRecord:
        """The job; raises UnknownJobError."""

    @abstractmethod
    def listed(self, client: str, limit: int) -> list[JobRecord]:
        """The newest jobs of a client that are not direct."""

    @abstractmethod
    def claim(self, lane: str) -> Claim | None:
        """Take the next item: the oldest direct one, every fourth time one of a job.

        Among jobs it is of the client with the least running, then least recently served.
        """

    @abstractmethod
    def report(self, claim: Claim, progress: float) -> None:
        """Note the fraction done of a running item."""

    @abstractmethod
    def others_wait(self, job_id: str) -> bool:
        """Whether work of another client waits, or a direct request, while this job runs."""

    @abstractmethod
    def finish(
        self, claim: Claim, *, result: Json | None = None, error: Json | None = None
    ) -> JobRecord:
        """End a running item; one that was cancelled meanwhile stays cancelled.

        Raises:
            UnknownJobError: it was deleted meanwhile.
            ClaimLostError: it is another's meanwhile; nothing was changed.
        """

    @abstractmethod
    def release(self, claim: Claim) -> None:
        """Put a running item back into the queue as far as it is, not counting the attempt."""

    @abstractmethod
    def cancel(self, job_id: str) -> JobRecord:
        """Cancel whatever of the job is not finished."""

    @abstractmethod
    def recover(self, most_attempts: int) -> tuple[int, int]:
        """Take up what processes left that are no longer alive.

        Running items go back to the queue, or fail if they died so often. Direct jobs are
        cancelled where nobody waits for them any more. Gives how many items were queued again and
        how many failed.
        """

    @abstractmethod
    def expired(self, keep_bytes: int) -> list[str]:
        """Finished jobs that are too old, and the oldest while all together are too large.

        The clock is that by which their ends were noted.
        """

    @abstractmethod
    def remove(self, job_id: str) -> None:
        """Forget a job."""

    @abstractmethod
    def ids(self) -> set[str]:
        """The ids of all jobs that are kept."""

    @abstractmethod
    def depth(self) -> QueueDepth:
        """Waiting and running items."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the database."""


class SharedJobStore(JobStore):
    """A store that several processes work on, each of which must give signs of life.

    Attributes:
        lease_seconds: without a sign of life after which a process counts as dead.
    """

    shared = True
    lease_seconds = LEASE_SECONDS

    @abstractmethod
    def beat(self) -> set[tuple[str, int, str]]:
        """Give a sign of life; the keys of this process's claims that are no longer its own."""

    @abstractmethod
    def news(self, seconds: float) -> bool:
        """Wait until any process has changed something, at most so long; whether one has."""

    @abstractmethod
    def ended_sessions(self, more: Mapping[str, float]) -> dict[str, float]:
        """The marks of all ended sessions and until when to keep each, with ``more`` added."""

    @abstractmethod
    def exclusively(self, what: str) -> AbstractContextManager[None]:
        """A block that only one of all processes is in at a time, for each ``what``."""


def check_limits(
    limits: QueueLimits,
    direct: bool,
    waiting: tuple[int, int],
    more: int,
    retry_after: Callable[[int], int],
) -> None:
    """Raise BusyError if ``more`` items would pass a limit.

    Args:
        waiting: items of everybody and of the client.
        retry_after: gives the seconds until that many items may be done.
    """
    everybody, own = waiting
    most, most_own = (
        (limits.direct, limits.direct_client) if direct else (limits.queued, limits.queued_client)
    )
    what = "direct requests" if direct else "recordings"
    if own + more > most_own:
        raise BusyError(
            f"{own} of your {what} already wait and {most_own} may; try again later.",
            retry_after(own),
            429,
        )
    if everybody + more > most:
        raise BusyError(
            f"The server is busy: {everybody} {what} wait and {most} may; try again later.",
            retry_after(everybody),
        )


def seconds_until_half(waiting: int, seconds_per_item: float, workers: int) -> int:
    """Whole seconds until about half of the queue is done, 1 to 600."""
    return max(1, min(600, math.ceil(seconds_per_item * max(1, waiting) / 2 / max(1, workers))))


def check_digest(known: str, given: str) -> None:
    """Raise ServerError if a client's key stands for another request."""
    if known != given:
        raise ServerError(
            "This Idempotency-Key was sent with another request before; take a new key for each "
            "request.",
            422,
        )


def gave_up(attempts: int) -> Json:
    """The error of an item that is not tried again."""
    return {
        "type": "ServerError",
        "status": 500,
        "message": f"The server stopped unexpectedly {attempts} times while it worked on this "
        "recording, so it is not tried again.",
    }


def expired_of(rows: Iterable[tuple[str, int, float]], now: float, keep_bytes: int) -> list[str]:
    """The ids of finished jobs that are too old, and the oldest while all are too large.

    Args:
        rows: id, bytes and time of expiry, the last finished first.
    """
    gone, total = [], 0
    for job_id, size, expires in rows:
        total += size
        if expires <= now or (size and total > keep_bytes):
            gone.append(job_id)
    return gone


# Cancelling

# Seconds between two reports of progress.
REPORT_SECONDS = 0.25


class Stopped(BaseException):
    """The work was told to stop; not an Exception, so that no handler of errors keeps it going."""


class CancellationToken:
    """Stops one piece of work, and carries its progress back.

    Args:
        report: told the fraction done, at most four times a second.
        others_wait: whether somebody else's work waits for the worker.
    """

    def __init__(
        self,
        report: Callable[[float], None] | None = None,
        others_wait: Callable[[], bool] | None = None,
    ) -> None:
        self._stop = threading.Event()
        self._networks = Interruption()
        self._report = report
        self._others_wait = others_wait
        self._reported_at = 0.0
        self.fraction = 0.0

    def stop(self) -> None:
        """Make the next :meth:`check` raise, and networks that run; called from any thread."""
        self._stop.set()
        self._networks.stop()

    @property
    def is_stopped(self) -> bool:
        return self._stop.is_set()

    def check(self) -> None:
        """Raise :class:`Stopped` if the work must stop."""
        if self._stop.is_set():
            raise Stopped

    def progress(self, fraction: float) -> None:
        """Say how far the work is, and check."""
        self.check()
        self.fraction = min(1.0, max(0.0, fraction))
        now = time.monotonic()
        if self._report is not None and now - self._reported_at >= REPORT_SECONDS:
            self._reported_at = now
            self._report(self.fraction)

    def give_way(self) -> None:
        """Stop if others wait, for work that goes on later from where it is now."""
        if self._others_wait is not None and self._others_wait():
            self.stop()
            self.check()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Let :meth:`stop` end every network that this thread runs.

        A vocoder spends seconds in one call for half a minute of audio.
        """
        try:
            with self._networks.covers():
                yield
        except Interrupted:
            raise Stopped from None
