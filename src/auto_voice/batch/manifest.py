"""Many conversions with an account that survives a kill at any point.

The manifest is a file of JSON lines that only grows; each line is on disk before the next step.
``started`` comes before a job touches its output and ``done`` after the output is complete, so
that a later run knows what to skip, what to do again, and which files are its own to replace. A
line that was cut short by a kill is dropped when the manifest is read.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from auto_voice.batch.executors import Executor, Record, Worker, WorkerSpec, exists
from auto_voice.batch.jobs import BatchJob
from auto_voice.errors import AudioOutputError, AutoVoiceError, reason
from auto_voice.filesystem import shown_url
from auto_voice.inference.controls import controls_from

if TYPE_CHECKING:
    from auto_voice.inference.inputs import Target
    from auto_voice.inference.voice_conversion_pipeline import VoiceConversionPipeline

FORMAT = "auto_voice.batch/1"
MANIFEST = "manifest.jsonl"
# A line of a job whose output was there before and is not of this batch: it stays foreign.
REFUSED = "refused"


@dataclass(frozen=True)
class JobOutcome:
    """What came of one job.

    Attributes:
        status: ``done``, ``failed``, ``skipped`` (done by an earlier run) or ``lost`` (the worker
            died).
        error: one sentence, for those that are not done.
        seconds: of audio.
        notes: of the conversion.
    """

    job: BatchJob
    status: str
    error: str = ""
    seconds: float = 0.0
    notes: tuple[str, ...] = ()


class Manifest:
    """The account of a batch; one process writes at a time.

    Raises:
        AudioOutputError: it cannot be written, is no manifest, or another batch has it open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.latest: dict[str, dict[str, Any]] = {}
        self._file: FileIO | None = None

    def __enter__(self) -> Manifest:
        from filelock import FileLock, Timeout

        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.path.with_name(f".{self.path.name}.lock"))
            self._lock.acquire(timeout=0)
            self._read()
            self._file = self.path.open("ab", buffering=0)
        except Timeout:
            raise AudioOutputError(
                f"another batch is writing {self.path}; wait for it or choose another folder."
            ) from None
        except OSError as error:
            raise AudioOutputError(
                f"{self.path} cannot be written ({reason(error)}); choose another folder."
            ) from error
        if self._file.tell() == 0:
            self._append({"format": FORMAT})
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        self._lock.release()

    def record(self, job: BatchJob, status: str, **facts: Any) -> None:
        """One more line, on disk when this returns."""
        shown, place = shown_url(job.target), _place(job.target)
        line = {
            "output": shown, "source": shown_url(job.source), "key": job.key, "status": status,
            "time": round(time.time(), 3), **facts, **({"place": place} if place != shown else {}),
        }  # fmt: skip
        self._append(line)
        if status != REFUSED:
            self.latest[place] = line

    def is_done(self, job: BatchJob) -> bool:
        """Whether an earlier run made the output from the same source, voice and options."""
        line = self.latest.get(_place(job.target), {})
        done = line.get("status") == "done" and line.get("key") == job.key
        return done and exists(job.target)

    def owns(self, job: BatchJob) -> bool:
        """Whether the output, if it exists, is of this batch and may be replaced."""
        return _place(job.target) in self.latest

    def _append(self, line: Mapping[str, Any]) -> None:
        assert self._file is not None
        try:
            data = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        except UnicodeEncodeError:  # A file name that is no UTF-8 comes back only when escaped.
            data = json.dumps(line).encode() + b"\n"
        try:
            if self._file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError as error:
            raise AudioOutputError(
                f"{self.path} cannot be written ({error.strerror}); what is done stays done, and "
                "the same command goes on from there."
            ) from error

    def _read(self) -> None:
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            # The last line was being written when the process died.
            with self.path.open("rb+") as file:
                file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                if not isinstance(row, dict) or (number == 1 and row.get("format") != FORMAT):
                    raise ValueError
            except (ValueError, RecursionError):
                raise AudioOutputError(
                    f"{self.path}:{number} is no line of a batch manifest; move the file away or "
                    "choose another folder."
                ) from None
            if "output" in row and row.get("status") != REFUSED:
                self.latest[row.get("place") or _place(str(row["output"]))] = row


def _place(target: str) -> str:
    """What stands for an output in the manifest: its path, or a hash of an address whose shown form
    lacks a part."""
    return (
        target
        if shown_url(target) == target
        else sha256(target.encode(errors="surrogatepass")).hexdigest()[:16]
    )


def run_batch(
    jobs: Sequence[BatchJob],
    executor: Executor,
    spec: WorkerSpec,
    manifest: Manifest,
    *,
    overwrite: bool = False,
) -> Iterator[JobOutcome]:
    """Do ``jobs`` and yield their outcomes as they come; failures do not stop the others.

    Args:
        spec: of a worker that takes a ``BatchJob.record``, such as :func:`worker`.
        manifest: open.
        overwrite: do again what is done, and replace files that are not of this batch.
    """
    left = []
    for job in jobs:
        if not overwrite and manifest.is_done(job):
            yield JobOutcome(job, "skipped")
        elif not overwrite and not manifest.owns(job) and exists(job.target):
            text = (
                f"{shown_url(job.target)} exists already and is not of this batch; add --overwrite."
            )
            manifest.record(job, REFUSED, error=text)
            yield JobOutcome(job, "failed", text)
        else:
            left.append(job)

    def started() -> Iterator[Record]:
        for job in left:
            manifest.record(job, "started")
            yield job.record()

    for record, result in executor.run(spec, started()):
        job = BatchJob.of(record)
        facts = {k: v for k, v in result.items() if k != "status"}
        manifest.record(job, result["status"], **facts)
        yield JobOutcome(
            job,
            result["status"],
            result.get("error", ""),
            result.get("seconds", 0.0),
            tuple(result.get("notes", ())),
        )


def worker(mock: bool = False, registry: Mapping[str, Any] | None = None,
           pipeline: Mapping[str, Any] | None = None) -> Worker:  # fmt: skip
    """A worker that converts.

    Args:
        registry: keyword arguments of ``ModelRegistry``.
        pipeline: keyword arguments of ``PipelineConfig``.
    """
    from auto_voice.inference.voice_conversion_pipeline import (
        PipelineConfig,
        VoiceConversionPipeline,
    )
    from auto_voice.models import ModelRegistry

    made = VoiceConversionPipeline(
        PipelineConfig(use_mock_models=mock, **(pipeline or {})),
        model_registry=ModelRegistry(use_mock=mock, progress=False, **(registry or {})),
    )
    return Converting(made)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AudioOutputError(
            f"the folder {folder} cannot be made ({reason(error)}); choose another for the results."
        ) from error


# Voices that a worker keeps, each of some MB; the jobs of a table may name thousands.
VOICES_KEPT = 8


class Converting:
    """Does jobs with one pipeline; each voice is made once."""

    def __init__(self, pipeline: VoiceConversionPipeline) -> None:
        self.pipeline = pipeline
        self._voices: OrderedDict[tuple[str, ...], Any] = OrderedDict()

    def __call__(self, record: Record) -> dict[str, Any]:
        started = time.perf_counter()
        job = BatchJob.of(record)
        try:
            _make_folder(Path(job.target).parent)
            account = self.pipeline.convert_file(
                job.source,
                self._voice(job.voice),
                job.output,
                controls=controls_from(job.controls),
            )
        except (AutoVoiceError, OSError, MemoryError) as error:
            text = " ".join(reason(error).split()) or type(error).__name__
            return {"status": "failed", "error": text}
        except Exception as error:  # A defect in one file must not end the night's batch.
            return {"status": "failed", "error": f"unexpected {type(error).__name__}: {error}"}
        return {
            "status": "done",
            "seconds": round(account.seconds, 3),
            "took": round(time.perf_counter() - started, 3),
            "models": dict(account.models),
            "notes": list(account.notes),
        }

    def _voice(self, names: tuple[str, ...]) -> Any:
        from auto_voice.voices.library import resolve_voice

        if names not in self._voices:
            found = [resolve_voice(name) for name in names]
            # A stored voice among several is refused there, in words.
            target = cast("Target", found[0] if len(found) == 1 else found)
            self._voices[names] = self.pipeline.voice(target)
        self._voices.move_to_end(names)
        if len(self._voices) > VOICES_KEPT:
            self._voices.popitem(last=False)
        return self._voices[names]
