"""Threads that take items from the queue and do them, on one set of models."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable
from typing import Protocol

from auto_voice.errors import AutoVoiceError, ServerError
from auto_voice.server.control import Control, Stopped
from auto_voice.server.files import JobFiles
from auto_voice.server.jobs import FINISHED, UPKEEP, WORK, Claim, Job, JobStore, Record

log = logging.getLogger(__name__)

IDLE_SECONDS = 2.0
"""An idle worker looks into the queue at least this often: another server may have filled it."""
SWEEP_SECONDS = 60.0
MOST_ATTEMPTS = 3


class Perform(Protocol):
    """Does one item and gives its result."""

    def __call__(self, claim: Claim, control: Control) -> Record: ...


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
        self._stopping = threading.Event()
        self._controls: dict[tuple[str, int], Control] = {}
        self._waiting: dict[str, list[Callable[[Job], None]]] = {}
        lanes = [(WORK, f"work-{n}") for n in range(count)] + [(UPKEEP, "upkeep")]
        self._threads = [
            threading.Thread(target=self._run, args=(lane,), name=name, daemon=True)
            for lane, name in lanes
        ]
        self._threads.append(threading.Thread(target=self._sweeping, name="sweep", daemon=True))

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
            running = [c for (owner, _), c in self._controls.items() if owner == job_id]
        for control in running:
            control.stop()
        if not running:
            self._files.drop_inputs(job_id)
        self._tell(job)
        return job

    def remove(self, job_id: str) -> None:
        """Forget a job and delete its files."""
        self._store.remove(job_id)
        self._files.remove(job_id)

    def stop(self, grace_seconds: float) -> None:
        """Finish what runs within ``grace_seconds``, put the rest back, and end the threads."""
        self._stopping.set()
        self.wake()
        deadline = time.monotonic() + grace_seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        with self._wake:
            late = list(self._controls.values())
        for control in late:
            control.stop()
        for thread in self._threads:
            thread.join(5.0 if late else 0.0)

    def _run(self, lane: str) -> None:
        while not self._stopping.is_set():
            try:
                claim = self._store.claim(lane)
                if claim is None:
                    with self._wake:
                        self._wake.wait(IDLE_SECONDS)
                else:
                    self._do(claim)
            except Exception:
                # A full disk under the store, say: the worker must be there when it is over.
                log.exception("a worker could not go on")
                self._stopping.wait(IDLE_SECONDS)

    def _do(self, claim: Claim) -> None:
        job_id, index = claim.job.id, claim.item.index
        control = Control(lambda fraction: self._store.report(job_id, index, fraction))
        with self._wake:
            self._controls[job_id, index] = control
        if self._store.get(job_id).is_finished:
            control.stop()  # cancelled between the claim and the line above
        started = time.monotonic()
        how, job = "failed", None
        try:
            with control.holds():
                control.check()
                result = self._perform(claim, control)
            how, job = "done", self._store.finish(job_id, index, result=result)
        except Stopped:
            how, job = self._stopped(job_id, index)
        except AutoVoiceError as error:
            log.info("%s of job %s failed: %s", claim.item.name, job_id, error)
            job = self._store.finish(job_id, index, error=error_record(error))
        except MemoryError:
            log.error("job %s ran out of memory", job_id)
            failure = ServerError("The server ran out of memory; try a shorter recording.", 503)
            job = self._store.finish(job_id, index, error=error_record(failure))
        except Exception as error:
            log.exception("job %s failed unexpectedly", job_id)
            text = f"Unexpected {type(error).__name__}; the server's log has more."
            job = self._store.finish(job_id, index, error=error_record(ServerError(text, 500)))
        finally:
            with self._wake:
                self._controls.pop((job_id, index), None)
        if self._observe is not None:
            self._observe(claim, how, time.monotonic() - started)
        if job is not None:
            self._end(job, index)

    def _stopped(self, job_id: str, index: int) -> tuple[str, Job | None]:
        if self._store.get(job_id).is_finished:
            return "cancelled", self._store.get(job_id)
        self._store.release(job_id, index)
        return "released", None

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
