"""Files on their way into the store: named by the sha256 they should have, so a resume
survives a crash, a reboot and a change of mirror."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from auto_voice.errors import IntegrityError
from auto_voice.filesystem import CHUNK_BYTES, read_json, write_json

# Bytes that are hashed at a time: handing less to another thread costs more than the hash.
_HASH_BATCH = 1 << 19
# Batches that may wait for the hash, so that a slow processor bounds the memory: 8 MB.
_HASH_AHEAD = 16


@dataclass(frozen=True)
class PartialRecord:
    """What is known about the remote file that a partial was cut from.

    Attributes:
        url: it came from, without credentials.
        etag: strong ETag, or Last-Modified where there is none; empty if the server gave neither.
        size: of the whole remote file in bytes; -1 if unknown.
    """

    url: str
    etag: str
    size: int


@dataclass(frozen=True)
class Partial:
    """A partial file and its record; ``path`` holds the first bytes of the wanted file."""

    path: Path

    @property
    def record_path(self) -> Path:
        return self.path.with_suffix(".json")

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def read_record(self) -> PartialRecord | None:
        raw = read_json(self.record_path)
        if raw is None:
            return None
        try:
            return PartialRecord(str(raw["url"]), str(raw["etag"]), int(raw["size"]))
        except (KeyError, TypeError, ValueError):
            return None

    def write_record(self, record: PartialRecord) -> None:
        write_json(self.record_path, asdict(record), durable=False)

    def discard(self) -> None:
        """Forgets everything, record first: a partial without one is only ever re-hashed."""
        self.record_path.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    def piece(self, index: int) -> Partial:
        """The partial of one piece of a file that is joined from several URIs."""
        return Partial(self.path.with_name(f"{self.path.stem}-{index}.part"))


class HashingSink:
    """Appends to a partial and hashes all that it holds.

    Hashing runs on a second thread (hashlib lets the interpreter go), so a fast network waits
    for the disk or the hash, whichever is slower, and not for their sum. Writes are unbuffered:
    what arrived survives the death of the process.

    Args:
        partial: continued where it ends.
        limit: bytes it may hold.
    """

    def __init__(self, partial: Partial, limit: int) -> None:
        self.partial = partial
        self.limit = limit
        self.position = 0
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="sha256")
        self._waiting: deque[Future[None]] = deque()
        self._batch: list[bytes] = []
        self._batch_bytes = 0
        self._digest = hashlib.sha256()
        if partial.size > limit:
            partial.discard()
        self._file = partial.path.open("ab", buffering=0)
        self._hash_existing()

    def write(self, chunk: bytes) -> None:
        """Appends.

        Raises:
            IntegrityError: the file grew past ``limit``.
        """
        if self.position + len(chunk) > self.limit:
            raise IntegrityError(f"more than the expected {self.limit} bytes arrived")
        written = self._file.write(chunk)
        while written < len(chunk):
            written += self._file.write(chunk[written:])
        self.position += len(chunk)
        self._batch.append(chunk)
        self._batch_bytes += len(chunk)
        if self._batch_bytes >= _HASH_BATCH:
            self._submit()

    def restart(self) -> None:
        """Starts again from nothing, in a new file."""
        self._drain()
        self._file.close()
        self.partial.discard()
        self._file = self.partial.path.open("ab", buffering=0)
        self._digest = hashlib.sha256()
        self._batch, self._batch_bytes = [], 0
        self.position = 0

    def hexdigest(self) -> str:
        """sha256 of everything in the partial so far."""
        self._submit()
        self._drain()
        return self._digest.hexdigest()

    def sync(self) -> None:
        """Forces the bytes to the disk."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> HashingSink:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._worker.shutdown(wait=True, cancel_futures=True)
        self._file.close()

    def _hash_existing(self) -> None:
        with self.partial.path.open("rb", buffering=0) as file:
            while chunk := file.read(CHUNK_BYTES):
                self._digest.update(chunk)
                self.position += len(chunk)

    def _submit(self) -> None:
        if not self._batch:
            return
        batch, self._batch, self._batch_bytes = self._batch, [], 0
        digest = self._digest

        def update() -> None:
            for chunk in batch:
                digest.update(chunk)

        self._waiting.append(self._worker.submit(update))
        while len(self._waiting) > _HASH_AHEAD:
            self._waiting.popleft().result()

    def _drain(self) -> None:
        while self._waiting:
            self._waiting.popleft().result()
