"""Threads that take items from the queue and do them, on one set of models."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from auto_voice import events
from auto_voice.errors import AutoVoiceError, ServerError, UnknownJobError
from auto_voice.server.files import (
    STRANGE_SECONDS,
    JobFiles,
    NoRoomError,
    StorageError,
    is_disk_full,
)
from auto_voice.server.jobs import (
    BEATS_PER_LEASE,
    CANCELLED,
    COMPUTE,
    DONE,
    FINISHED,
    MAINTENANCE,
    RUNNING,
    CancellationToken,
    Claim,
    ClaimLostError,
    JobRecord,
    JobStore,
    JobStoreError,
    Json,
    SharedJobStore,
    Stopped,
)
from auto_voice.server.telemetry import request_id

log = logging.getLogger(__name__)

T = TypeVar("T")

# Seconds after which an idle worker looks into the queue again: another server may have filled it.
IDLE_SECONDS = 2.0
# Seconds between two looks for what has expired, and for folders of no job where others make some.
SWEEP_SECONDS, STRAY_SECONDS = 60.0, 3600.0
# An item that brought the server down so often is given up; on several machines, which also end for
# reasons of their own, later.
MOST_ATTEMPTS, MOST_ATTEMPTS_SHARED = 3, 6
# Seconds that cancelled work may keep its thread, before another takes the next from the queue.
RELIEF_SECONDS = 0.3
# Seconds that stopped work has to end and to carry to others how far it is, when the server stops.
STOPPING_SECONDS = 5.0
# Threads that may be inside calls which cannot be stopped, beside the workers.
MOST_RELIEVED = 4
# Seconds that a worker waits after the disk was full, doubled each time up to the second.
STORAGE_SECONDS, MOST_STORAGE_SECONDS = 1.0, 60.0
# And at most after the database was away.
MOST_DATABASE_SECONDS = 4.0
# Seconds that the link to other processes listens at a time, and between two looks for what is
# finished, however much it hears.
LISTEN_SECONDS, LOOK_SECONDS = 1.0, 0.05


class Perform(Protocol):
    """Does one item and gives its result."""

    def __call__(self, claim: Claim, token: CancellationToken) -> Json: ...


@dataclass(frozen=True, eq=False)
class _Running:
    claim: Claim
    token: CancellationToken
    thread: threading.Thread
    lane: str


class Workers:
    """The threads, and whoever waits for them.

    Args:
        store: where the queue is.
        files: where uploads and results are.
        perform: does one item; Stopped from it means that its token was stopped.
        count: threads for work; one more serves the upkeep of models.
        keep_bytes: results that are kept together.
        observe: told each claim, how it ended and the seconds it took.
        undo: takes back what an item did outside its job, where it was cancelled in the moment in
            which it was done.
        sweeps: whether this process removes what has expired.
        every_beat: called every few seconds where other processes share the store.
    """

    def __init__(
        self,
        store: JobStore,
        files: JobFiles,
        perform: Perform,
        *,
        count: int,
        keep_bytes: int,
        observe: Callable[[Claim, str, float], None] | None = None,
        undo: Callable[[Claim], None] | None = None,
        sweeps: bool = True,
        every_beat: Callable[[], None] = lambda: None,
    ) -> None:
        self._store, self._files, self._perform = store, files, perform
        self._keep_bytes = keep_bytes
        self._observe, self._undo = observe, undo
        self._every_beat = every_beat
        self._wake = threading.Condition()
        self._news = 0
        self._stopping = threading.Event()
        self._running: dict[tuple[str, int, str], _Running] = {}
        self._relieved: list[threading.Thread] = []
        self._waiting: dict[str, list[Callable[[JobRecord], None]]] = {}
        # How often in a row work found the disk full.
        self._full_times = 0
        self._warned = ""
        lanes = [(COMPUTE, f"work-{n}") for n in range(count)] + [(MAINTENANCE, "upkeep")]
        self._threads = [self._worker(lane, name) for lane, name in lanes]
        if sweeps:
            self._threads.append(threading.Thread(target=self._sweeping, name="sweep", daemon=True))
        # Ends after all others: while they finish, the signs of life must go on.
        self._link: threading.Thread | None = None
        self._ended = threading.Event()
        self._lost: set[tuple[str, int, str]] = set()
        if isinstance(store, SharedJobStore):
            self._link = threading.Thread(
                target=self._linking, args=(store,), name="link", daemon=True
            )

    def _worker(self, lane: str, name: str) -> threading.Thread:
        return threading.Thread(target=self._run, args=(lane,), name=name, daemon=True)

    def start(self) -> None:
        """Take up what an earlier process left, then begin.

        Where others share the store, the link and the sweep do that when its time has come.
        """
        queued = failed = swept = 0
        if not self._store.shared:
            queued, failed = self._store.recover(MOST_ATTEMPTS)
            swept = self._files.sweep(self._store.ids())
        if queued or failed or swept:
            log.info(
                "taken up after a stop: %d queued again, %d failed, %d folders removed",
                queued, failed, swept,
            )  # fmt: skip
        for thread in self._threads:
            thread.start()
        if self._link is not None:
            self._link.start()

    @property
    def alive(self) -> bool:
        threads = self._threads if self._link is None else [*self._threads, self._link]
        return not self._stopping.is_set() and all(thread.is_alive() for thread in threads)

    def wake(self) -> None:
        """There is something new in the queue."""
        with self._wake:
            self._news += 1
            self._wake.notify_all()

    def when_finished(self, job_id: str, tell: Callable[[JobRecord], None]) -> None:
        """Call ``tell`` once with the finished job, from any thread."""
        with self._wake:
            self._waiting.setdefault(job_id, []).append(tell)
        job = self._store.get(job_id)
        if job.is_finished:
            self._tell(job)

    def forget(self, job_id: str) -> None:
        """Nobody waits for the job any more."""
        with self._wake:
            self._waiting.pop(job_id, None)

    def cancel(self, job_id: str) -> JobRecord:
        """Cancel what is not finished of a job, and stop whoever works on it."""
        elsewhere = self._store.shared and any(
            item.state == RUNNING for item in self._store.get(job_id).items
        )
        job = self._store.cancel(job_id)
        with self._wake:
            stopped = [run for run in self._running.values() if run.claim.job.id == job_id]
        if stopped:
            self._stop(stopped)
        elif not elsewhere:  # else whoever works on it reads them, and deletes them when it stops
            self._files.drop_inputs(job_id)
        self._tell(job)
        return job

    def _stop(self, stopped: list[_Running]) -> None:
        for run in stopped:
            run.token.stop()
        timer = threading.Timer(RELIEF_SECONDS, self._relieve, [stopped])
        timer.daemon = True
        timer.start()

    def _relieve(self, stopped: list[_Running]) -> None:
        """Put others in the place of threads that are still inside a call which cannot be stopped.

        They end with that call. So few may do so at once that memory stays bounded.
        """
        for run in stopped:
            with self._wake:
                self._relieved = [thread for thread in self._relieved if thread.is_alive()]
                over = run not in self._running.values() or run.thread in self._relieved
                if over or self._stopping.is_set() or len(self._relieved) >= MOST_RELIEVED:
                    continue
                other = self._worker(run.lane, run.thread.name)
                self._threads[self._threads.index(run.thread)] = other
                self._relieved.append(run.thread)
            other.start()

    def remove(self, job_id: str) -> None:
        """Delete the files of a job and forget it; it is known as long as any of them is there.

        Raises:
            ServerError: that cannot be done just now.
        """
        self._files.remove(job_id)
        self._store.remove(job_id)

    def stop(self, grace_seconds: float) -> None:
        """Finish what runs within ``grace_seconds``, put the rest back, and end the threads."""
        self._stopping.set()
        self.wake()
        deadline = time.monotonic() + grace_seconds
        with self._wake:
            threads = [*self._threads, *self._relieved]
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        with self._wake:
            late = list(self._running.values())
        for run in late:
            run.token.stop()
        deadline = time.monotonic() + STOPPING_SECONDS
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()) if late else 0.0)
        if self._store.shared:
            self._release_late()
        self._ended.set()
        if self._link is not None:
            self._link.join(5.0)

    def _release_late(self) -> None:
        """Let others have at once what could not be ended here; its own thread finds it taken."""
        with self._wake:
            late = list(self._running.values())
        with contextlib.suppress(JobStoreError):
            for run in late:
                log.info("%s is done elsewhere, maybe from its start", run.claim.item.name)
                self._store.release(run.claim)

    @property
    def problem(self) -> str:
        """The reason why accepted work has to wait; "" where none has to."""
        return self._files.problem() or self._store.problem

    def _run(self, lane: str) -> None:
        me = threading.current_thread()
        while not self._stopping.is_set() and me not in self._relieved:
            seen = self._news
            try:
                if lane == COMPUTE and (problem := self._files.problem()):
                    self.warn(f"work waits: {problem}")
                    self._stopping.wait(STORAGE_SECONDS)
                    continue
                claim = self._store.claim(lane)
                if claim is None:
                    with self._wake:
                        if self._news == seen:  # else something came while the queue was read
                            self._wake.wait(IDLE_SECONDS)
                else:
                    self._do(claim, lane)
            except JobStoreError as error:
                self._wait_for_storage(self._store.problem or str(error), MOST_DATABASE_SECONDS)
            except Exception:
                # The worker must be there when it is over, whatever it is.
                log.exception("a worker could not go on")
                self._stopping.wait(IDLE_SECONDS)

    def _wait_for_storage(self, problem: str, most: float = MOST_STORAGE_SECONDS) -> None:
        """Accepted work is not failed for a full disk: it waits until there is room."""
        self.warn(f"work waits: {problem}")
        self._stopping.wait(min(most, STORAGE_SECONDS * 2**self._full_times))
        self._full_times = min(self._full_times + 1, 10)

    def warn(self, text: str) -> None:
        """Log ``text`` once, however often it is said in a row."""
        if text != self._warned:
            self._warned = text
            log.warning(text)

    def _surely(self, change: Callable[[], T]) -> T:
        """``change`` to the store, tried again until it is made or the server stops."""
        while True:
            try:
                return change()
            except JobStoreError as error:
                if self._stopping.is_set():
                    raise
                self._wait_for_storage(self._store.problem or str(error), MOST_DATABASE_SECONDS)

    def _do(self, claim: Claim, lane: str) -> None:
        """The item of a claim, as part of the trace of the request that asked for it."""
        asked_by = request_id.set(str(claim.job.request.get("request_id", "")))
        with (
            events.continued(str(claim.job.request.get("traceparent", ""))),
            events.span(events.Work(claim.job.kind)) as working,
        ):
            job, how = self._perform_claim(claim, lane)
            working.complete(how=how)
        request_id.reset(asked_by)
        if job is not None:
            self._end(job, claim.item.index)
        elif how == "cancelled":
            with contextlib.suppress(StorageError):
                self._files.remove(claim.job.id)  # again, with what the work wrote since

    def _perform_claim(self, claim: Claim, lane: str) -> tuple[JobRecord | None, str]:
        """Performs it and notes the outcome; the job, if it is still there, and how it ended."""
        job_id, index = claim.job.id, claim.item.index
        token = CancellationToken(
            lambda fraction: self._report(claim, fraction),
            lambda: self._others_wait(job_id),
        )
        with self._wake:
            self._running[claim.key] = _Running(claim, token, threading.current_thread(), lane)
        started = time.monotonic()
        how, job, performed = "failed", None, False
        try:
            if self._store.get(job_id).is_finished:
                token.stop()  # cancelled between the claim and the line above
            with token.watching():
                token.check()
                self._files.bring(claim)
                result = self._perform(claim, token)
                self._files.deliver(claim, result)
            performed = True
            self._full_times, self._warned = 0, ""
            job = self._surely(lambda: self._store.finish(claim, result=result))
            how = CANCELLED if job.items[index].state == CANCELLED else DONE
        except UnknownJobError:
            how = "cancelled"  # deleted meanwhile
        except ClaimLostError:
            how, job = self._lose(claim)
        except Stopped:
            how, job = self._stopped(claim)
        except Exception as error:
            how, job = self._failed(claim, token, error)
        finally:
            with self._wake:
                self._running.pop(claim.key, None)
                self._lost.discard(claim.key)
            self._files.leave(claim)
        if how == CANCELLED and performed and self._undo is not None:
            self._undo(claim)
        if self._observe is not None:
            self._observe(claim, how, time.monotonic() - started)
        return job, how

    def _report(self, claim: Claim, fraction: float) -> None:
        with contextlib.suppress(JobStoreError):  # progress is not worth the work itself
            self._store.report(claim, fraction)

    def _others_wait(self, job_id: str) -> bool:
        try:
            return self._store.others_wait(job_id)
        except JobStoreError:
            return False

    def _stopped(self, claim: Claim) -> tuple[str, JobRecord | None]:
        try:
            job = self._surely(lambda: self._store.get(claim.job.id))
            if job.is_finished:
                return "cancelled", job
            if claim.key in self._lost:
                return self._lose(claim)
            try:
                self._files.put_back(claim)
            except StorageError as error:
                log.info("%s of job %s begins anew: %s", claim.item.name, claim.job.id, error)
            self._surely(lambda: self._store.release(claim))
        except UnknownJobError:
            return "cancelled", None
        return "released", None

    def _lose(self, claim: Claim) -> tuple[str, JobRecord | None]:
        """Another worker does the item: what this one made of it is nobody's."""
        log.warning(
            "%s of job %s was taken up by another worker, because the database had heard nothing "
            "from this one",
            claim.item.name,
            claim.job.id,
        )
        self._files.drop_claim(claim)
        return "lost", None

    def _failed(
        self, claim: Claim, token: CancellationToken, error: Exception
    ) -> tuple[str, JobRecord | None]:
        job_id = claim.job.id
        if token.is_stopped:
            # Its files may have been deleted under it, which is no news.
            return self._stopped(claim)
        waits = is_disk_full(error) or isinstance(error, JobStoreError) or self._files.problem()
        if waits and not claim.job.direct:
            outcome = self._stopped(claim)
            self._wait_for_storage(self.problem or str(error))
            return outcome
        if is_disk_full(error):
            error = NoRoomError()
        if isinstance(error, AutoVoiceError):
            log.info("%s of job %s failed: %s", claim.item.name, job_id, error)
            told = error
        elif isinstance(error, MemoryError):
            log.error("job %s ran out of memory", job_id)
            told = ServerError("The server ran out of memory; try a shorter recording.", 503)
        else:
            log.error("job %s failed unexpectedly", job_id, exc_info=error)
            told = ServerError(
                f"Unexpected {type(error).__name__}; the server's log has more.", 500
            )
        try:
            record = error_record(told)
            return "failed", self._surely(lambda: self._store.finish(claim, error=record))
        except UnknownJobError:
            return "cancelled", None
        except ClaimLostError:
            return self._lose(claim)

    def _end(self, job: JobRecord, index: int) -> None:
        item = next(item for item in job.items if item.index == index)
        if item.state != DONE:
            self._files.drop_results(job.id, index)
        if job.is_finished:
            self._files.drop_inputs(job.id)
            self._tell(job)
        elif item.state in FINISHED:
            self._files.drop_inputs(job.id, index)

    def _tell(self, job: JobRecord) -> None:
        if not job.is_finished:
            return
        with self._wake:
            told = self._waiting.pop(job.id, [])
        for tell in told:
            tell(job)

    def _sweeping(self) -> None:
        due = time.monotonic()
        while not self._stopping.wait(SWEEP_SECONDS):
            try:
                self.sweep()
                if self._store.shared and time.monotonic() >= due:
                    self._files.sweep(self._store.ids(), STRANGE_SECONDS)
                    due = time.monotonic() + STRAY_SECONDS
            except (JobStoreError, StorageError) as error:
                self.warn(f"nothing is removed: {self.problem or error}")
            except Exception:
                log.exception("expired jobs could not be removed")

    def _linking(self, store: SharedJobStore) -> None:
        """Give signs of life, and hear what other processes do to the jobs of this one."""
        due = 0.0
        while not self._ended.is_set():
            try:
                heard = store.news(LISTEN_SECONDS)
                is_due = time.monotonic() >= due
                if heard or is_due:
                    self._beat(store)
                if is_due:  # and not whenever anybody changes anything
                    due = time.monotonic() + store.lease_seconds / BEATS_PER_LEASE
                    self._take_up(store)
                if heard:
                    self.wake()
                self._look_for_finished()
            except JobStoreError as error:
                self.warn(f"work waits: {self._store.problem or error}")
                self._ended.wait(STORAGE_SECONDS)
            except Exception:
                log.exception("the link to the other processes could not go on")
                self._ended.wait(STORAGE_SECONDS)
            self._ended.wait(LOOK_SECONDS)

    def _beat(self, store: SharedJobStore) -> None:
        lost = store.beat()
        with self._wake:
            self._lost |= lost & self._running.keys()
            stopped = [self._running[key] for key in lost & self._running.keys()]
        if stopped:
            self._stop(stopped)

    def _take_up(self, store: SharedJobStore) -> None:
        queued, failed = store.recover(MOST_ATTEMPTS_SHARED)
        if queued or failed:
            log.info("taken up from others: %d queued again, %d failed", queued, failed)
        self._every_beat()

    def _look_for_finished(self) -> None:
        """Tell those who wait here for jobs that others did."""
        with self._wake:
            waiting = list(self._waiting)
        for job_id in waiting:
            try:
                self._tell(self._store.get(job_id))
            except UnknownJobError:
                self.forget(job_id)

    def sweep(self) -> int:
        """Remove the jobs that have expired; how many there were."""
        gone = self._store.expired(self._keep_bytes)
        for job_id in gone:
            self.remove(job_id)
        return len(gone)


def error_record(error: AutoVoiceError) -> Json:
    """An error as it is kept and answered."""
    return {
        "type": getattr(error, "kind", type(error).__name__),
        "message": " ".join(str(error).split()),
        "status": error.http_status,
    }
