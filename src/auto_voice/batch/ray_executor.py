"""Jobs on a Ray cluster: actors that hold loaded models, one a worker, on any number of machines.

A file that a node sees at the same path, with the same size and time, is read there; any other
travels through Ray's object store, and so does a result whose folder the node does not share: then
this process writes it. So a cluster needs no shared disk, and uses one where there is one.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import socket
import stat
import sys
import tempfile
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from auto_voice import __version__, events
from auto_voice.batch.executors import (
    FATAL,
    SHARED_KEPT,
    Record,
    WorkerSpec,
    files_in,
    is_url,
    limit_threads,
    portable,
    retold,
    with_files,
)
from auto_voice.errors import (
    AutoVoiceError,
    ConfigError,
    MissingDependencyError,
    first_line,
    install_hint,
    reason,
)
from auto_voice.filesystem import atomic_write

if TYPE_CHECKING:
    from filelock import FileLock

log = logging.getLogger(__name__)

# Workers that a job may cost before it counts as what kills them.
ATTEMPTS = 3
# Workers that may fail to start one after the other before the run is given up.
FAILED_STARTS = 3
# Seconds of waiting for a node after the last one that could hold a worker has gone.
STRANDED_SECONDS = 300.0
# Seconds between two looks at the nodes while nothing comes back.
LOOK_SECONDS = 10.0
# Seconds without any worker after which the log says so.
SAY_SECONDS = 60.0
# Seconds that an address may take to answer at all.
ANSWER_SECONDS = 10.0
# Cores of a worker unless something else is asked for, as local processes have them.
CORES_EACH = 2
MARKER = ".autovoice-shared-"
# Seconds after which a marker of another machine counts as left behind.
MARKER_SECONDS = 24 * 3600.0
# Beginning of the names of workers' folders.
SCRATCH = "autovoice-ray-"

# Status of what a worker says before and between jobs.
_READY, _UNSEEN = "ready", "unseen"
# What Ray calls what users name in small letters.
_NAMES = {"cpu": "CPU", "gpu": "GPU", "memory": "memory"}
GIGABYTE = 1e9
# Where Ray keeps the token of its clusters.
_TOKEN = Path("~/.ray/auth_token")


class RayExecutor:
    """Workers on a Ray cluster.

    A job whose worker or node dies is given to another one; only what has cost ``ATTEMPTS`` workers
    is lost. Each worker has one job at a time, so nothing piles up in the cluster. A worker that
    dies is replaced as soon as a node has room, such as one that an autoscaler has started.

    Args:
        address: ``auto`` (the cluster of this machine), ``host:port`` of the head,
            ``ray://host:port`` of its client server, or ``local`` for a cluster of this machine's
            cores that ends with the run. In a program that has called ``ray.init`` that connection
            is used.
        workers: how many; by default as many as have room when the run begins.
        resources: of each worker: ``cpu``, ``gpu``, ``memory`` in GB, or a resource of the
            cluster's own.
        cores: what ``cpu`` is unless it is said; 1 beside ``gpu``, and no more than a node has.
    """

    def __init__(
        self,
        address: str = "auto",
        workers: int | None = None,
        resources: Mapping[str, float] | None = None,
        cores: int = CORES_EACH,
    ) -> None:
        self.address = address
        self.cores = cores
        self.workers = workers
        self.resources = dict(resources or {})

    def run(self, spec: WorkerSpec, jobs: Iterable[Record]) -> Iterator[tuple[Record, Record]]:
        """See :class:`~auto_voice.batch.executors.Executor`.

        Raises:
            MissingDependencyError: the extra ``ray`` is not installed.
            ConfigError: nothing answers at the address, or no node has what a worker needs.
            AutoVoiceError: no worker can be made, or the cluster has gone.
        """
        waiting = iter(jobs)
        first = next(waiting, None)
        if first is None:
            return
        ray = _import_ray()
        with _connected(ray, self.address):
            need = _needed(ray, self.resources, self.cores)
            room = sum(_room(node, need) for node in _nodes(ray))
            if not room:
                raise ConfigError(_nowhere(ray, need))
            crew = _Crew(ray, spec, need, self.workers or room)
            try:
                yield from crew.work(first, waiting)
            except (ConnectionError, ray.exceptions.RayError) as error:
                raise AutoVoiceError(
                    f"the Ray cluster has gone ({first_line(error)}); what is done stays done, and "
                    "the same command goes on from there."
                ) from error
            finally:
                crew.end()


def parse_resources(texts: Iterable[str]) -> dict[str, float]:
    """``("gpu=0.5,cpu=4", "a100=1")`` as numbers by name.

    Raises:
        ConfigError: a text has another form, or an amount is not above 0.
    """
    found = {}
    for text in (part.strip() for given in texts for part in given.split(",")):
        name, _, amount = text.partition("=")
        try:
            found[name.strip()] = value = float(amount)
        except ValueError:
            value = 0.0
        if not name.strip() or not 0 < value < float("inf"):
            raise ConfigError(f"{text!r} is no resource; write NAME=AMOUNT, such as gpu=0.5.")
    return found


# The driver's side


@dataclass
class _Hand:
    """A worker as the driver knows it.

    Attributes:
        blind: folders of which it has not seen a file.
        ready: whether its models are loaded.
    """

    actor: Any
    number: int
    blind: set[str] = field(default_factory=set)
    ready: bool = False


@dataclass
class _Task:
    """A job and how many workers it has cost; ``None`` stands for the start of a worker."""

    job: Record | None
    costs: int = 0


class _Crew:
    """The workers of one run and what they are doing."""

    def __init__(self, ray: Any, spec: WorkerSpec, need: Mapping[str, float], size: int) -> None:
        self.ray = ray
        self.spec = spec
        self.need = dict(need)
        self.size = size
        self.busy: dict[Any, tuple[_Hand, _Task]] = {}
        self.idle: list[_Hand] = []
        self.again: deque[_Task] = deque()
        self.failed_starts = 0
        self.stranded_since: float | None = None
        self.since: float | None = time.monotonic()  # Until it has been said what is waited for.
        self.parcels = _Parcels(ray, spec)

    def work(self, first: Record, waiting: Iterator[Record]) -> Iterator[tuple[Record, Record]]:
        self.again.append(_Task(first))
        exhausted = False
        while True:
            # As many jobs are under way as there are workers, those to be started included.
            while not exhausted and len(self.again) + len(self._tasks()) < self.size:
                job = next(waiting, None)
                exhausted = job is None
                if job is not None:
                    self.again.append(_Task(job))
            while self.again and self.idle:
                yield from self._give(self.idle.pop(), self.again.popleft())
            while len(self._hands()) - len(self._tasks()) < len(self.again):
                self._hire()
            if not self.again and not self._tasks():
                return
            ready, _ = self.ray.wait(list(self.busy), num_returns=1, timeout=LOOK_SECONDS)
            if not ready:
                self._look_around()
            for reference in ready:
                yield from self._received(reference)

    def end(self) -> None:
        """Lets the workers send what they have to tell, and ends them and what they wait for."""
        with suppress(Exception):  # The cluster may have gone, and the reason is told elsewhere.
            told = [hand.actor.end.remote() for hand in self.idle]
            if told:
                self.ray.wait(told, num_returns=len(told), timeout=ANSWER_SECONDS)
            for hand in self._hands():
                self.ray.kill(hand.actor)
        self.parcels.end()

    def _tasks(self) -> list[_Task]:
        """Jobs that workers have."""
        return [task for _, task in self.busy.values() if task.job is not None]

    def _hands(self) -> list[_Hand]:
        return [*self.idle, *(hand for hand, _ in self.busy.values())]

    def _hire(self) -> None:
        taken = {hand.number for hand in self._hands()}
        number = next(n for n in range(self.size) if n not in taken)
        custom = {name: amount for name, amount in self.need.items() if name not in _NAMES.values()}
        actor = (
            self.ray.remote(_Worker)
            .options(
                num_cpus=self.need["CPU"],
                num_gpus=self.need.get("GPU", 0),
                memory=self.need.get("memory"),
                resources=custom,
                scheduling_strategy="SPREAD",
                max_restarts=0,
            )
            .remote(
                max(1, int(self.need["CPU"])),
                number,
                (events.exported_to(), events.traceparent()),
                __version__,
            )
        )
        hand = _Hand(actor, number)
        self.busy[actor.begin.remote(self.spec, self._settings(hand))] = (hand, _Task(None))

    def _settings(self, hand: _Hand) -> _Parcel:
        try:
            return self.parcels.pack(self.spec.settings, hand.blind)
        except OSError as error:
            raise ConfigError(f"{error.filename} cannot be read ({reason(error)}).") from error

    def _give(self, hand: _Hand, task: _Task) -> Iterator[tuple[Record, Record]]:
        """Sends a job to a worker; yields its outcome where a file of it cannot be sent."""
        assert task.job is not None
        try:
            # Whoever had it before may still be at work on the result, cut off from us.
            parcel = self.parcels.pack(task.job, hand.blind, alone=task.costs > 0)
        except OSError as error:
            self.idle.append(hand)
            text = f"{error.filename} cannot be read ({reason(error)})."
            yield task.job, {"status": "failed", "error": text}
        else:
            self.busy[hand.actor.do.remote(dict(task.job), parcel)] = (hand, task)

    def _received(self, reference: Any) -> Iterator[tuple[Record, Record]]:
        hand, task = self.busy.pop(reference)
        try:
            outcome = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            yield from self._died(hand, task, error)
            return
        status = outcome.get("status")
        if status == _UNSEEN:
            hand.blind.update(_folder(path) for path in outcome["paths"])
            if task.job is None:
                parcel = self._settings(hand)
                self.busy[hand.actor.begin.remote(self.spec, parcel)] = (hand, task)
            else:
                yield from self._give(hand, task)
        elif status == FATAL:  # It would meet every other worker, too.
            raise outcome["error"]
        elif task.job is None:
            self.failed_starts, self.stranded_since, hand.ready = 0, None, True
            log.info("worker %d works on %s", hand.number, outcome["node"])
            self.idle.append(hand)
        else:
            yield task.job, self.parcels.unpack(outcome)
            self.idle.append(hand)

    def _died(self, hand: _Hand, task: _Task, error: Exception) -> Iterator[tuple[Record, Record]]:
        with suppress(Exception):
            self.ray.kill(hand.actor)
        why = first_line(getattr(error, "cause", None) or error)  # What a worker raised.
        if task.job is None:
            self.failed_starts += 1
            if self.failed_starts >= FAILED_STARTS:
                raise AutoVoiceError(_cannot_start(error)) from error
            return
        task.costs += 1
        if task.costs < ATTEMPTS:
            log.warning("worker %d died (%s); another one takes its job", hand.number, why)
            self.again.appendleft(task)
            return
        text = f"{task.costs} workers died on it, the last with: {why}"
        yield task.job, {"status": "lost", "error": text}

    def _look_around(self) -> None:
        """Gives up where no worker lives and no node could hold one.

        Raises:
            AutoVoiceError: it has been so for ``STRANDED_SECONDS``.
        """
        living = [hand for hand in self._hands() if hand.ready]
        if not living and self.since is not None and time.monotonic() - self.since > SAY_SECONDS:
            self.since = None
            log.warning("no worker has room yet: the cluster is busy, growing or loading models")
        if living or any(_room(node, self.need) for node in _nodes(self.ray)):
            self.stranded_since = None
            return
        since = self.stranded_since = self.stranded_since or time.monotonic()
        if time.monotonic() - since > STRANDED_SECONDS:
            raise AutoVoiceError(
                f"{_nowhere(self.ray, self.need)} What is done stays done, and the same command "
                "goes on from there."
            )


@dataclass(frozen=True)
class _Read:
    """A file that a job reads: its path here, size and time; ``data`` holds a reference to its
    bytes, or nothing."""

    path: str
    stamp: tuple[int, int] | None
    data: tuple[Any, ...] = ()
    shared: bool = False


@dataclass(frozen=True)
class _Parcel:
    """Where a record's files lie here, by the names that the record gives them.

    Attributes:
        writes: path of each result and of a marker in its folder, which whoever shares that sees;
            no marker: the result has to come back.
    """

    reads: Mapping[str, _Read]
    writes: Mapping[str, tuple[str, str]]


class _Parcels:
    """Packs the files of records, and writes the results that come back."""

    def __init__(self, ray: Any, spec: WorkerSpec) -> None:
        self.ray = ray
        self.spec = spec
        self._markers: dict[str, Path] = {}
        self._shared: OrderedDict[tuple[Any, ...], Any] = OrderedDict()

    def pack(self, record: Record, blind: set[str], alone: bool = False) -> _Parcel:
        """What a worker needs to find or take the files of ``record``.

        Args:
            blind: folders whose files are sent, because the worker does not see them.
            alone: results come back even where the worker shares their folder.

        Raises:
            OSError: a file cannot be read here.
        """
        reads = {}
        for names, shared in ((self.spec.reads, False), (self.spec.shared, True)):
            for given in filter(_local, files_in(record, names)):
                path = str(Path(given).absolute())
                stamp = _stamp(path)
                data: tuple[Any, ...] = ()
                if stamp is not None and _folder(path) in blind:
                    data = (self._reference(path, stamp, shared),)
                reads[given] = _Read(path, stamp, data, shared)
        writes = {}
        for given in filter(_local, files_in(record, self.spec.writes)):
            path = str(Path(given).absolute())
            writes[given] = (path, "" if alone else self._marker(_folder(path)))
        return _Parcel(reads, writes)

    def unpack(self, outcome: dict[str, Any]) -> dict[str, Any]:
        """``outcome`` once the files that came with it are written."""
        for name, data in outcome.pop("files", ()):
            target = Path(name)
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(target) as temporary:
                    data.tofile(temporary)
            except OSError as error:
                return {"status": "failed", "error": f"{target}: {reason(error)}"}
        return outcome

    def end(self) -> None:
        """Nothing but results stays in the folders."""
        for marker in self._markers.values():
            with suppress(OSError):
                marker.unlink()

    def _reference(self, path: str, stamp: tuple[int, int], shared: bool) -> Any:
        key = (path, *stamp)
        if key in self._shared:
            self._shared.move_to_end(key)
            return self._shared[key]
        reference = self.ray.put(_bytes_of(path))
        if shared:
            self._shared[key] = reference
            if len(self._shared) > SHARED_KEPT:
                self._shared.popitem(last=False)
        return reference

    def _marker(self, folder: str) -> str:
        if folder not in self._markers:
            marker = Path(folder, f"{MARKER}{_here()}-{os.getpid()}-{uuid4().hex}")
            # Where none can be made, results come back and say in words what is wrong.
            with suppress(OSError):
                marker.parent.mkdir(parents=True, exist_ok=True)
                marker.touch()
                now = marker.stat().st_mtime  # By the clock of whoever has the folder.
                for left in marker.parent.glob(f"{MARKER}*"):
                    if _left_behind(left, now):
                        left.unlink(missing_ok=True)
            self._markers[folder] = marker
        return str(self._markers[folder])


def _here() -> str:
    """This machine, in letters that any file system takes."""
    return sha256(socket.gethostname().encode()).hexdigest()[:8]


def _left_behind(marker: Path, now: float) -> bool:
    """Whether a marker is of a run that was killed; another batch may be writing to the folder."""
    host, _, rest = marker.name.removeprefix(MARKER).partition("-")
    process = rest.partition("-")[0]
    # On Windows the signal would end the process.
    if host == _here() and process.isdecimal() and os.name != "nt":
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):  # Another user's, and alive.
            return False
        return False
    try:
        return now - marker.stat().st_mtime > MARKER_SECONDS
    except OSError:
        return False


# The worker's side


class _Worker:
    """The actor: makes the worker of a spec once and does its jobs.

    Args:
        threads: of its networks.
        number: among the workers.
        telemetry: endpoint and ``traceparent`` of the driver.
        version: of auto_voice that the driver has.
    """

    def __init__(self, threads: int, number: int, telemetry: tuple[str, str], version: str) -> None:
        limit_threads(threads)
        self.number = number
        self.version = version
        endpoint, self.traceparent = telemetry
        if endpoint:
            events.export_otlp(endpoint)
        self.folder, self.lock = _own_folder()
        self.kept: OrderedDict[str, str] = OrderedDict()

    def begin(self, spec: WorkerSpec, parcel: _Parcel) -> dict[str, Any]:
        """Loads what the jobs need; says ``ready``, or what stands in the way."""
        if self.version != __version__:
            text = (
                f"the node {socket.gethostname()} has auto_voice {__version__}, and this is "
                f"{self.version}; install the same version on all."
            )
            return {"status": FATAL, "error": AutoVoiceError(text)}
        self.spec = spec
        opened = self._open(parcel, self.folder / "settings")
        if isinstance(opened, dict):
            return opened
        local, _ = opened
        self.kept.clear()  # What was read for the models stays as long as they do.
        names = (*spec.reads, *spec.shared)
        try:
            with events.continued(self.traceparent):
                changed = replace(spec, settings=with_files(spec.settings, names, local))
                self.work = changed.build(self.number)
        except Exception as error:
            return {"status": FATAL, "error": portable(error)}
        return {"status": _READY, "node": socket.gethostname()}

    def do(self, job: dict[str, Any], parcel: _Parcel) -> dict[str, Any]:
        """The outcome of a job, with the bytes of results under ``files`` where the driver has to
        write them."""
        scratch = self.folder / "job"
        opened = self._open(parcel, scratch)
        if isinstance(opened, dict):
            return opened
        local, made = opened
        try:
            names = (*self.spec.reads, *self.spec.shared, *self.spec.writes)
            with events.continued(self.traceparent):
                told = self.work(with_files(job, names, local))
            outcome: dict[str, Any] = retold(told, {path: given for given, path in local.items()})
            if outcome.get("status") == "done" and made:
                outcome["files"] = [
                    (str(Path(target, relative)), data)
                    for target, path in made
                    for relative, data in _files(path)
                ]
            return outcome
        except AutoVoiceError as error:
            return {"status": FATAL, "error": portable(error)}
        except Exception as error:  # A worker process would have died of it.
            text = f"the worker failed ({type(error).__name__}: {first_line(error)})"
            return {"status": "lost", "error": text}
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def end(self) -> None:
        """Sends what waits to be told, and leaves nothing on the disk."""
        events.flush_otlp()
        self.lock.release()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _open(
        self, parcel: _Parcel, scratch: Path
    ) -> tuple[dict[str, str], list[tuple[str, Path]]] | dict[str, Any]:
        """Where each file of the record lies on this node, and the results to send back: what they
        are to become, and where they will be. Or which files are missing here."""
        local, missing = {}, []
        for given, read in parcel.reads.items():
            if read.stamp is None or _stamp(read.path) == read.stamp:
                local[given] = read.path
            elif read.data:
                local[given] = self._fetch(read, scratch)
            else:
                missing.append(read.path)
        if missing:
            return {"status": _UNSEEN, "paths": missing}
        wanted = {local[given] for given, read in parcel.reads.items() if read.shared}
        for key in [k for k, path in self.kept.items() if path not in wanted][:-SHARED_KEPT]:
            Path(self.kept.pop(key)).unlink(missing_ok=True)
        made = []
        for number, (given, (path, marker)) in enumerate(parcel.writes.items()):
            if marker and Path(marker).exists():
                local[given] = path
                continue
            place = scratch / f"out{number}" / Path(path).name
            place.parent.mkdir(parents=True, exist_ok=True)
            local[given] = str(place)
            made.append((path, place))
        return local, made

    def _fetch(self, read: _Read, scratch: Path) -> str:
        """Writes the bytes of a file to this node's disk, in a folder that its neighbours share."""
        import ray

        key = f"{read.path}|{read.stamp}"
        if key in self.kept:
            self.kept.move_to_end(key)
            return self.kept[key]
        beside = sha256(_folder(read.path).encode()).hexdigest()[:16]
        place = (self.folder / "shared" if read.shared else scratch) / beside / Path(read.path).name
        place.parent.mkdir(parents=True, exist_ok=True)
        ray.get(read.data[0]).tofile(place)
        if read.shared:
            self.kept[key] = str(place)
        return str(place)


def _own_folder() -> tuple[Path, FileLock]:
    """A folder for the files of a worker, and the lock that it holds as long as it lives. Folders
    of workers that were killed are deleted: they hold recordings of people."""
    from filelock import FileLock, Timeout

    for left in filter(_mine, Path(tempfile.gettempdir()).glob(f"{SCRATCH}*/lock")):
        # Unless it lives. It is held while it is deleted: see below.
        with suppress(Timeout, OSError), FileLock(left).acquire(timeout=0):
            shutil.rmtree(left.parent, ignore_errors=True)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=SCRATCH))
        lock = FileLock(folder / "lock", thread_local=False)
        lock.acquire()
        if (folder / "lock").exists():  # Nobody took it for left behind before it was held.
            return folder, lock
        lock.release()


def _mine(lock: Path) -> bool:
    """Whether this user made the folder of a lock: opening that of another user could empty any
    file that it is a link to."""
    try:
        folder, file = lock.parent.lstat(), lock.lstat()
    except OSError:
        return False
    own = not hasattr(os, "getuid") or folder.st_uid == file.st_uid == os.getuid()
    return own and stat.S_ISDIR(folder.st_mode) and stat.S_ISREG(file.st_mode)


# Files


def _local(name: str) -> bool:
    """Whether it is a path; addresses are fetched and written by every worker itself."""
    return not is_url(name)


def _stamp(path: str) -> tuple[int, int] | None:
    """What two machines see alike only if they share the file; None for what is no file."""
    try:
        found = Path(path).stat()
    except (OSError, ValueError):
        return None
    return (found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None


def _folder(path: str) -> str:
    return str(Path(path).parent)


def _bytes_of(path: str | Path) -> Any:
    """The bytes of a file as an array that is not read before it is copied."""
    import numpy as np

    if not Path(path).stat().st_size:
        return np.zeros(0, np.uint8)
    return np.asarray(np.memmap(path, np.uint8, "r"))


def _files(path: Path) -> list[tuple[str, Any]]:
    """Relative paths and bytes of a result, or of all files of a folder in the order in which they
    were finished."""
    if path.is_dir():
        inside = [item for item in path.rglob("*") if item.is_file()]
        inside.sort(key=lambda item: (item.stat().st_mtime_ns, item.name))
        return [(str(item.relative_to(path)), _bytes_of(item)) for item in inside]
    return [("", _bytes_of(path))] if path.is_file() else []


# The cluster


def _import_ray() -> Any:
    # A cluster that is started here tells nobody of it.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # `ray start --head` wants a token as soon as there is one; a driver sends it only when told.
    named = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    if named or _TOKEN.expanduser().exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise MissingDependencyError(
            f"{error.name or 'ray'} is not installed; run: {install_hint('ray')}"
        ) from error
    return ray


@contextmanager
def _connected(ray: Any, address: str) -> Iterator[None]:
    """Connected to the cluster at ``address`` until the end of the block.

    Raises:
        ConfigError: it cannot be reached.
    """
    if ray.is_initialized():  # By the program around us, which keeps its connection.
        yield
        return
    _check_address(address)
    # Ray prints what its daemons say on standard output, where results belong.
    worker = sys.modules.get("ray._private.worker")
    if worker is not None:
        vars(worker)["_worker_logs_enabled"] = False
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **({"include_dashboard": False} if address == "local" else {}),
        )
    except Exception as error:  # Ray raises many kinds, RuntimeError and AssertionError among them.
        raise ConfigError(
            f"no Ray cluster can be used at {address!r} ({first_line(error)}); start one with "
            "`ray start --head`, or name another with --address."
        ) from error
    with suppress(ValueError):  # In another thread than the main one, where Ray sets none, either.
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
    try:
        yield
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Says quickly that nothing listens, where Ray would try for a minute."""
    found = address == "auto"
    if found:
        # The cluster that this machine started last; its file stays when the head dies.
        address = os.environ.get("RAY_ADDRESS") or _last_started()
    match = re.fullmatch(r"(?:ray://)?\[?([^/\s]+?)\]?:([0-9]{1,5})", address)
    if match is None and (found or address == "local"):
        return
    if match is None:
        raise ConfigError(
            f"{address!r} is no address of a Ray cluster; give auto, HOST:PORT or ray://HOST:PORT."
        )
    try:
        socket.create_connection((match[1], int(match[2])), ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"no Ray cluster answers at {address} ({reason(error)}); start one with "
            "`ray start --head`, or name another with --address."
        ) from error


def _last_started() -> str:
    """The address of the cluster that ``ray start`` began on this machine, "" if there is none."""
    from ray._private.utils import read_ray_address

    try:
        return read_ray_address() or ""
    except OSError:
        return ""


def _nodes(ray: Any) -> list[Mapping[str, float]]:
    """What each living node has in all, by Ray's names."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _needed(ray: Any, resources: Mapping[str, float], cores: int) -> dict[str, float]:
    """What a worker needs, by Ray's names."""
    need = {_NAMES.get(name.lower(), name): amount for name, amount in resources.items()}
    if "memory" in need:
        need["memory"] *= GIGABYTE
    if "CPU" not in need:
        largest = max((node.get("CPU", 0.0) for node in _nodes(ray)), default=0.0)
        need["CPU"] = 1.0 if "GPU" in need else max(1.0, min(float(cores), largest))
    return need


def _room(node: Mapping[str, float], need: Mapping[str, float]) -> int:
    """Workers that fit into a node."""
    return int(min(node.get(name, 0.0) / amount + 1e-9 for name, amount in need.items()))


def _nowhere(ray: Any, need: Mapping[str, float]) -> str:
    def told(of: Mapping[str, float]) -> str:
        names = {ours: name for name, ours in _NAMES.items()}
        parts = []
        for name in need:
            amount = of.get(name, 0.0) / (GIGABYTE if name == "memory" else 1.0)
            parts.append(f"{names.get(name, name)}={amount:g}")
        return ", ".join(parts)

    there = "; ".join(sorted({told(node) for node in _nodes(ray)})) or "no node"
    return f"no node of the Ray cluster has {told(need)} for a worker; there is {there}."


def _cannot_start(error: Exception) -> str:
    text = str(error)
    if "No module named 'auto_voice'" in text:
        return (
            "auto_voice is not installed where Ray runs its workers; install the same version and "
            f"extras there: {install_hint('ray')}"
        )
    return f"no worker can be started on the Ray cluster ({first_line(error)})."
