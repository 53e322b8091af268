"""Where jobs run: the interface, and worker processes on this machine.

A job and its outcome are plain dictionaries of JSON values, so an executor may carry them
anywhere: to a process, a queue, a cluster. The function that does a job is named, not passed:
``module:function`` is imported where it runs, called once with the settings, and returns the
function that takes jobs.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any, Protocol

from auto_voice import events
from auto_voice.errors import AutoVoiceError, ConfigError, MissingDependencyError, first_line
from auto_voice.filesystem import shown_url, without_secrets

# A job, or what came of it: names to JSON values.
Record = Mapping[str, Any]

# Status of an outcome that ends the run, such as that the worker could not be made.
FATAL = "fatal"
# Files that many jobs share, such as voices, and that each worker keeps.
SHARED_KEPT = 64
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://.")
# Does one job. Its own errors are outcomes; an AutoVoiceError that it raises ends the run, as every
# other job would meet it, too.
Worker = Callable[[Record], dict[str, Any]]


@dataclass(frozen=True)
class WorkerSpec:
    """How a worker is made, wherever it runs.

    Attributes:
        factory: ``module:function``; called once in each worker with ``settings``.
        settings: JSON values.
        places: settings that differ from worker to worker, such as the device: worker ``n`` adds
            entry ``n``, beginning anew after the last.
        reads: names of the fields of settings and jobs that hold paths of files to read: a text,
            or a list of them. Executors that leave this machine send what is not seen elsewhere;
            workers fetch themselves what has an address (:func:`is_url`).
        shared: the same for files that many jobs have in common, such as voices.
        writes: the same for results; each is a file, or a folder of which all is the job's.
    """

    factory: str
    settings: Record = field(default_factory=dict)
    places: tuple[Record, ...] = ()
    reads: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()

    def build(self, worker: int = 0) -> Worker:
        module, _, name = self.factory.partition(":")
        place = self.places[worker % len(self.places)] if self.places else {}
        made: Worker = getattr(import_module(module), name)(**{**self.settings, **place})
        return _Fetching(self, made) if self.reads or self.shared or self.writes else made


class Executor(Protocol):
    """Runs jobs and hands back outcomes as they come, in any order."""

    def run(self, spec: WorkerSpec, jobs: Iterable[Record]) -> Iterator[tuple[Record, Record]]:
        """Pairs of a job and its outcome.

        Jobs are taken when there is room for them. An outcome with ``status`` ``"lost"`` says that
        the worker died on the job; the run goes on without it.

        Raises:
            AutoVoiceError: no worker can be made from ``spec``, or one raised it.
        """
        ...


class InlineExecutor:
    """One job after the other, in this process."""

    def run(self, spec: WorkerSpec, jobs: Iterable[Record]) -> Iterator[tuple[Record, Record]]:
        worker = spec.build()
        for job in jobs:
            yield job, worker(job)


class ProcessExecutor:
    """Worker processes on this machine, each with its share of the cores.

    Workers are started fresh (spawn), so nothing of this process, threads and locks least of all,
    leaks into them. The weights that they load are mapped from the same files, so the system keeps
    them in memory once. A worker that dies takes only its own job with it.

    Args:
        workers: processes; by default one for each two cores.
    """

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers or max(1, cores() // 2)

    def run(self, spec: WorkerSpec, jobs: Iterable[Record]) -> Iterator[tuple[Record, Record]]:
        from multiprocessing.connection import wait

        waiting = iter(jobs)
        threads = max(1, cores() // self.workers)
        crew: list[_Process] = []
        try:
            for job in waiting:
                crew.append(_Process(spec, threads, job, len(crew)))
                if len(crew) == self.workers:
                    break
            while crew:
                ready = wait([process.pipe for process in crew])
                for process in [p for p in crew if p.pipe in ready]:
                    outcome = process.receive()
                    yield process.job, outcome
                    lost = outcome.get("status") == "lost"
                    following = next(waiting, None)
                    if lost or following is None:
                        crew.remove(process)
                        process.end()
                        if following is not None:
                            crew.append(_Process(spec, threads, following, process.number))
                    else:
                        process.send(following)
        finally:
            for process in crew:
                process.end(force=True)


class _Process:
    """One worker and the job that it has; one that takes another's place has its number."""

    def __init__(self, spec: WorkerSpec, threads: int, job: Record, number: int) -> None:
        from multiprocessing import get_context

        self.number = number
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        telemetry = (events.exported_to(), events.traceparent())
        self._process = context.Process(
            target=_serve, args=(theirs, spec, threads, number, telemetry), daemon=True
        )
        self._process.start()
        theirs.close()
        self.send(job)

    def send(self, job: Record) -> None:
        self.job = job
        with suppress(OSError):  # It died between two jobs; receive() will say so.
            self.pipe.send(dict(job))

    def receive(self) -> dict[str, Any]:
        try:
            outcome: dict[str, Any] = self.pipe.recv()
        except (EOFError, OSError):
            self._process.join(10)
            code = self._process.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return {"status": "lost", "error": f"the worker process died ({how})"}
        if outcome.get("status") == FATAL:  # It would meet every other worker, too.
            raise outcome["error"]
        return outcome

    def end(self, *, force: bool = False) -> None:
        with suppress(OSError):
            self.pipe.send(None)
        if force:
            self._process.terminate()
        self._process.join(10)
        self.pipe.close()


def _serve(
    pipe: Any, spec: WorkerSpec, threads: int, number: int, telemetry: tuple[str, str]
) -> None:
    """The life of a worker process, whose events belong to the trace of the one that made it."""
    endpoint, traceparent = telemetry
    if endpoint:
        events.export_otlp(endpoint)
    with events.continued(traceparent):
        _work(pipe, spec, threads, number)
    events.flush_otlp()  # A process of multiprocessing runs no handlers at its end.


def _work(pipe: Any, spec: WorkerSpec, threads: int, number: int) -> None:
    # Ctrl-C reaches the whole group; the parent decides what happens.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    limit_threads(threads)
    try:
        worker = spec.build(number)
    except Exception as error:
        pipe.send({"status": FATAL, "error": portable(error)})
        return
    while True:
        try:
            job = pipe.recv()
        except (EOFError, OSError):
            return
        if job is None:
            return
        try:
            outcome = worker(job)
        except AutoVoiceError as error:
            pipe.send({"status": FATAL, "error": portable(error)})
            return
        pipe.send(outcome)


def portable(error: Exception) -> AutoVoiceError:
    """``error`` as one that can be sent to another process."""
    if isinstance(error, AutoVoiceError):
        for kind in type(error).__mro__:
            with suppress(TypeError):  # Some take more than their sentence.
                return kind(str(error))  # type: ignore[no-any-return]
    return AutoVoiceError(f"no worker can be started ({type(error).__name__}: {error}).")


def _end_with_parent() -> None:
    """A killed batch must not go on writing behind the back of the one that follows it."""
    from multiprocessing import parent_process

    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


# Records and the files that they name


def files_in(record: Any, names: Sequence[str]) -> list[str]:
    """The texts in fields of these names, however deep."""
    found: list[str] = []
    if isinstance(record, Mapping):
        for key, value in record.items():
            if key in names and isinstance(value, str):
                found += [value] if value else []
            elif key in names and isinstance(value, (list, tuple)):
                found += [item for item in value if item and isinstance(item, str)]
            else:
                found += files_in(value, names)
    return found


def with_files(record: Any, names: Sequence[str], local: Mapping[str, str]) -> Any:
    """``record`` with other texts in fields of these names."""
    if not isinstance(record, Mapping):
        return record
    out: dict[str, Any] = {}
    for key, value in record.items():
        if key in names and isinstance(value, str):
            out[key] = local.get(value, value)
        elif key in names and isinstance(value, (list, tuple)):
            out[key] = [local.get(item, item) for item in value]
        else:
            out[key] = with_files(value, names, local)
    return out


def retold(value: Any, back: Mapping[str, str]) -> Any:
    """An outcome whose sentences name files as the user does."""
    if isinstance(value, str):
        text = value
        for path in sorted(back, key=len, reverse=True):
            text = text.replace(path, back[path])
        return text
    if isinstance(value, Mapping):
        return {key: retold(item, back) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [retold(item, back) for item in value]
    return value


def is_url(name: str) -> bool:
    """Whether it is an address of fsspec, such as ``s3://bucket/talk.wav``, and no path."""
    return _URL.match(name) is not None


def said(error: BaseException) -> str:
    """What a library of storage says in its first line, which may repeat the address."""
    return without_secrets(first_line(error))


def remote(url: str) -> tuple[Any, str]:
    """The file system of fsspec that an address belongs to, and the path there.

    Raises:
        MissingDependencyError: fsspec, or the package for this kind of address, is not installed.
        ConfigError: there is no such kind of address, or no such place.
    """
    try:
        import fsspec

        found: tuple[Any, str] = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise MissingDependencyError(
            f"{shown_url(url)} needs a package that is not installed ({first_line(error)}); run: "
            "pip install fsspec, and s3fs for s3://, gcsfs for gs://."
        ) from error
    except Exception as error:  # Each kind of storage has its own.
        raise ConfigError(f"{shown_url(url)} cannot be reached ({said(error)}).") from error
    return found


def exists(name: str) -> bool:
    """Whether there is something at a path or an address.

    Raises:
        ConfigError: the address cannot be asked.
    """
    if not is_url(name):
        return Path(name).exists()
    files, path = remote(name)
    try:
        return bool(files.exists(path))
    except Exception as error:
        raise ConfigError(f"{shown_url(name)} cannot be reached ({said(error)}).") from error


class _Fetching:
    """A worker of local files that takes jobs with addresses: fetches what they read, and brings
    what they write to where it belongs."""

    def __init__(self, spec: WorkerSpec, work: Worker) -> None:
        self.spec, self.work = spec, work
        self.kept: OrderedDict[str, Path] = OrderedDict()

    def __call__(self, job: Record) -> dict[str, Any]:
        names = (*self.spec.reads, *self.spec.shared, *self.spec.writes)
        if not any(is_url(name) for name in files_in(job, names)):
            return self.work(job)
        with TemporaryDirectory(prefix="autovoice-") as scratch:
            local: dict[str, str] = {}
            try:
                for url in filter(is_url, files_in(job, self.spec.reads)):
                    local[url] = _fetched(url, Path(scratch, f"in{len(local)}"))
                for url in filter(is_url, files_in(job, self.spec.shared)):
                    local[url] = self._shared(url)
                written = list(filter(is_url, files_in(job, self.spec.writes)))
                for url in written:
                    folder = Path(scratch, f"out{len(local)}")
                    folder.mkdir()
                    local[url] = str(folder / file_name(url))
                told = self.work(with_files(job, names, local))
                outcome: dict[str, Any] = retold(
                    told, {path: shown_url(url) for url, path in local.items()}
                )
                if outcome.get("status") == "done":
                    for url in written:
                        _bring(Path(local[url]), url)
            except ConfigError as error:
                return {"status": "failed", "error": str(error)}
        return outcome

    def _shared(self, url: str) -> str:
        if url not in self.kept:
            folder = Path(mkdtemp(prefix="autovoice-"))
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            _fetched(url, folder)
            self.kept[url] = folder
        self.kept.move_to_end(url)
        if len(self.kept) > SHARED_KEPT:
            shutil.rmtree(self.kept.popitem(last=False)[1], ignore_errors=True)
        return str(self.kept[url] / file_name(url))


def file_name(url: str) -> str:
    """Of what lies at an address, without its query."""
    return shown_url(url).removesuffix("?***").rstrip("/").rpartition("/")[2]


def _fetched(url: str, folder: Path) -> str:
    """Where the file of an address lies now.

    Raises:
        ConfigError: it cannot be read.
    """
    files, path = remote(url)
    folder.mkdir(exist_ok=True)
    target = folder / file_name(url)
    try:
        files.get_file(path, str(target))
    except Exception as error:
        why = "there is no such file" if isinstance(error, FileNotFoundError) else said(error)
        raise ConfigError(f"{shown_url(url)} cannot be read ({why}).") from error
    return str(target)


def _bring(source: Path, url: str) -> None:
    """Writes a file, or all files of a folder, to an address.

    Raises:
        ConfigError: it cannot be written.
    """
    files, path = remote(url)
    inside = [item for item in source.rglob("*") if item.is_file()] if source.is_dir() else [source]
    try:
        for item in sorted(inside, key=lambda item: item.stat().st_mtime_ns):
            target = path if item is source else f"{path}/{item.relative_to(source).as_posix()}"
            files.makedirs(target.rpartition("/")[0], exist_ok=True)
            files.put_file(str(item), target)
    except Exception as error:
        raise ConfigError(f"{shown_url(url)} cannot be written ({said(error)}).") from error


def limit_threads(threads: int) -> None:
    """Let numeric libraries that are loaded from here on use so many threads."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
