"""Threads that take items from the queue and do them, on one set of models."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from auto_voice.errors import AutoVoiceError, ServerError, UnknownJobError
from auto_voice.server.cancellation import Control, Stopped
from auto_voice.server.files import JobFiles
from auto_voice.server.jobs import FINISHED, UPKEEP, WORK, Claim, Job, JobStore, Record
from auto_voice.server.logs import request_id

log = logging.getLogger(__name__)

# An idle worker looks into the queue at least this often: another server may have filled it.
IDLE_SECONDS = 2.0
SWEEP_SECONDS = 60.0
MOST_ATTEMPTS = 3
# How long cancelled work may keep its thread, before another takes the next from the queue.
RELIEF_SECONDS = 0.3
MOST_RELIEVED = 4


class Perform(Protocol):
    """Does one item and gives its result."""

    def __call__(self, claim: Claim, control: Control) -> Record: ...


@dataclass(frozen=True, eq=False)
class _Running:
    control: Control
    thread: threading.Thread
    lane: str


class Workers:
    """The threads, and whoever waits for them.

    Args:
        store: where the queue is.
        files: where uploads and results are.
        perform: does one item; Stopped from it means that its control was stopped.
        count: threads for work; one more serves the upkeep of models.
        keep_bytes: results that are kept together.
        observe: told each claim, how it ended and the seconds it took.
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
    ) -> None:
        self._store, self._files, self._perform = store, files, perform
        self._keep_bytes = keep_bytes
        self._observe = observe
        self._wake = threading.Condition()
        self._news = 0
        self._stopping = threading.Event()
        self._running: dict[tuple[str, int], _Running] = {}
        self._relieved: list[threading.Thread] = []
        self._waiting: dict[str, list[Callable[[Job], None]]] = {}
        lanes = [(WORK, f"work-{n}") for n in range(count)] + [(UPKEEP, "upkeep")]
        self._threads = [self._worker(lane, name) for lane, name in lanes]
        self._threads.append(threading.Thread(target=self._sweeping, name="sweep", daemon=True))

    def _worker(self, lane: str, name: str) -> threading.Thread:
        return threading.Thread(target=self._run, args=(lane,), name=name, daemon=True)

    def start(self) -> None:
        """Take up what an earlier process left, then begin."""
        queued, failed = self._store.recover(MOST_ATTEMPTS)
        swept = self._files.sweep(self._store.ids())
        if queued or failed or swept:
            log.info(
                "taken up after a stop: %d queued again, %d failed, %d folders removed",
                queued, failed, swept,
            )  # fmt: skip
        for thread in self._threads:
            thread.start()

    @property
    def alive(self) -> bool:
        return not self._stopping.is_set() and all(thread.is_alive() for thread in self._threads)

    def wake(self) -> None:
        """There is something new in the queue."""
        with self._wake:
            self._news += 1
            self._wake.notify_all()

    def when_finished(self, job_id: str, tell: Callable[[Job], None]) -> None:
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

    def cancel(self, job_id: str) -> Job:
        """Cancel what is not finished of a job, and stop whoever works on it."""
        job = self._store.cancel(job_id)
        with self._wake:
            stopped = [run for (owner, _), run in self._running.items() if owner == job_id]
        for run in stopped:
            run.control.stop()
        if stopped:
            timer = threading.Timer(RELIEF_SECONDS, self._relieve, [stopped])
            timer.daemon = True
            timer.start()
        else:
            self._files.drop_inputs(job_id)
        self._tell(job)
        return job

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
        """Forget a job and delete its files."""
        self._store.remove(job_id)
        self._files.remove(job_id)

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
            run.control.stop()
        for thread in threads:
            thread.join(5.0 if late else 0.0)

    def _run(self, lane: str) -> None:
        me = threading.current_thread()
        while not self._stopping.is_set() and me not in self._relieved:
            seen = self._news
            try:
                claim = self._store.claim(lane)
                if claim is None:
                    with self._wake:
                        if self._news == seen:  # else something came while the queue was read
                            self._wake.wait(IDLE_SECONDS)
                else:
                    self._do(claim, lane)
            except Exception:
                # A full disk under the store, say: the worker must be there when it is over.
                log.exception("a worker could not go on")
                self._stopping.wait(IDLE_SECONDS)

    def _do(self, claim: Claim, lane: str) -> None:
        job_id, index = claim.job.id, claim.item.index
        control = Control(
            lambda fraction: self._store.report(job_id, index, fraction),
            lambda: self._store.others_wait(job_id),
        )
        with self._wake:
            self._running[job_id, index] = _Running(control, threading.current_thread(), lane)
        asked_by = request_id.set(str(claim.job.request.get("request_id", "")))
        started = time.monotonic()
        how, job = "failed", None
        try:
            if self._store.get(job_id).is_finished:
                control.stop()  # cancelled between the claim and the line above
            with control.holds():
                control.check()
                result = self._perform(claim, control)
            how, job = "done", self._store.finish(job_id, index, result=result)
        except UnknownJobError:
            how = "cancelled"  # deleted meanwhile
        except Stopped:
            how, job = self._stopped(job_id, index)
        except Exception as error:
            how, job = self._failed(claim, control, error)
        finally:
            with self._wake:
                self._running.pop((job_id, index), None)
        if self._observe is not None:
            self._observe(claim, how, time.monotonic() - started)
        request_id.reset(asked_by)
        if job is not None:
            self._end(job, index)
        elif how == "cancelled":
            self._files.remove(job_id)  # again, with what the work wrote since

    def _stopped(self, job_id: str, index: int) -> tuple[str, Job | None]:
        try:
            job = self._store.get(job_id)
            if job.is_finished:
                return "cancelled", job
            self._store.release(job_id, index)
        except UnknownJobError:
            return "cancelled", None
        return "released", None

    def _failed(self, claim: Claim, control: Control, error: Exception) -> tuple[str, Job | None]:
        job_id, index = claim.job.id, claim.item.index
        if control.is_stopped:
            # Its files may have been deleted under it, which is no news.
            return self._stopped(job_id, index)
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
            return "failed", self._store.finish(job_id, index, error=error_record(told))
        except UnknownJobError:
            return "cancelled", None

    def _end(self, job: Job, index: int) -> None:
        item = next(item for item in job.items if item.index == index)
        if item.state != "done":
            for path in self._files.folder(job.id).glob(f"out-{index}*"):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
        if job.is_finished:
            self._files.drop_inputs(job.id)
            self._tell(job)
        elif item.state in FINISHED:
            self._files.drop_inputs(job.id, index)

    def _tell(self, job: Job) -> None:
        if not job.is_finished:
            return
        with self._wake:
            told = self._waiting.pop(job.id, [])
        for tell in told:
            tell(job)

    def _sweeping(self) -> None:
        while not self._stopping.wait(SWEEP_SECONDS):
            try:
                self.sweep()
            except Exception:
                log.exception("expired jobs could not be removed")

    def sweep(self) -> int:
        """Remove the jobs that have expired; how many there were."""
        gone = self._store.expired(time.time(), self._keep_bytes)
        for job_id in gone:
            self.remove(job_id)
        return len(gone)


def error_record(error: AutoVoiceError) -> Record:
    """An error as it is kept and answered."""
    return {
        "type": type(error).__name__,
        "message": " ".join(str(error).split()),
        "status": error.http_status,
    }
