"""The parts of a server that request handlers use, made once per app."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, cast

from fastapi import Depends, Request, UploadFile
from filelock import FileLock

from auto_voice import events
from auto_voice.errors import ServerError, UploadError
from auto_voice.server.admission import LiveStreams
from auto_voice.server.engine import Engine
from auto_voice.server.files import VOICE_FILE, JobFiles, StorageError, new_id
from auto_voice.server.jobs import (
    MAINTENANCE,
    JobRecord,
    JobRequest,
    JobStore,
    JobStoreError,
    QueueLimits,
)
from auto_voice.server.security import Sessions
from auto_voice.server.settings import ServerSettings
from auto_voice.server.telemetry import Metrics, request_id
from auto_voice.server.uploads import (
    CUT_IT,
    check_references,
    check_upload,
    display_name,
)
from auto_voice.server.workers import Workers
from auto_voice.voices.voice_file import load_voice

# Seconds to keep the results of direct requests, should their connection not take them.
DIRECT_KEEP_SECONDS = 600.0
# Seconds to keep what became of maintenance.
MAINTENANCE_KEEP_SECONDS = 3600.0
# Seconds between two looks whether a client that waits is still there.
_DISCONNECT_SECONDS = 0.3


@dataclass
class Context:
    """The parts of a running server."""

    settings: ServerSettings
    engine: Engine
    store: JobStore
    files: JobFiles
    workers: Workers
    metrics: Metrics
    sessions: Sessions
    lock: FileLock | None
    live_streams: LiveStreams
    warm: bool = False
    warm_problem: str = ""

    def close(self) -> None:
        """Let go of the data folder."""
        self.store.close()
        if self.lock is not None:
            self.lock.release()

    @property
    def limits(self) -> QueueLimits:
        s = self.settings
        return QueueLimits(
            s.direct_waiting, s.direct_waiting_client, s.queue_items, s.queue_items_client
        )

    def accept(
        self,
        client: str,
        kind: str,
        sources: Sequence[UploadFile],
        references: Sequence[UploadFile] = (),
        request: Mapping[str, Any] | None = None,
        *,
        direct: bool,
        most_seconds: float,
        key: str = "",
        one_item: bool = False,
    ) -> JobRecord:
        """Keep the uploads and queue the job; what is returned survives a crash.

        Args:
            most_seconds: of each source.
            one_item: the sources belong together.

        Raises:
            AudioError: an upload that is no recording, or too long; nothing is kept.
            BusyError: the queue or the disk is full.
        """
        given = {"most_seconds": most_seconds, **(request or {})}
        files = [*sources, *references]
        names = [display_name(file.filename, f"upload {n}") for n, file in enumerate(sources)]
        labels = [display_name(f.filename, f"reference {n}") for n, f in enumerate(references)]
        if len(references) > self.settings.reference_items:
            raise UploadError(
                f"{len(references)} references are more than the {self.settings.reference_items} "
                "that are taken; half a minute of speech is enough."
            )
        digest = _digest(given, sources, references) if key else ""
        if key and (earlier := self.store.find(client, key, digest)) is not None:
            return earlier
        self.files.check_room(sum(file.size or 0 for file in files))
        job_id = new_id()
        folder = self.files.make(job_id)
        try:
            self._keep_uploads(folder, sources, names, references, labels, given, not direct)
            self.files.publish(job_id)
            job = self.store.add(
                JobRequest(
                    id=job_id,
                    client=client,
                    kind=kind,
                    names=[", ".join(names or labels)] if one_item else names,
                    request={
                        "references": labels,
                        "names": names,
                        "request_id": request_id.get(),
                        "traceparent": events.traceparent(),
                        **given,
                    },
                    direct=direct,
                    keep_seconds=DIRECT_KEEP_SECONDS if direct else self.settings.keep_hours * 3600,
                    key=key,
                    digest=digest,
                ),
                self.limits,
            )
        except JobStoreError as error:
            if not error.maybe_done:  # else the job may be there and need them
                self._discard(job_id)
            raise
        except BaseException:
            self._discard(job_id)
            raise
        finally:
            for file in files:
                file.file.close()
        if job.id != job_id:
            self._discard(job_id)
        self.workers.wake()
        return job

    def _discard(self, job_id: str) -> None:
        """Delete the files of what was not accepted, as far as that is possible just now."""
        with contextlib.suppress(StorageError):
            self.files.remove(job_id)

    def _keep_uploads(
        self,
        folder: Path,
        sources: Sequence[UploadFile],
        names: Sequence[str],
        references: Sequence[UploadFile],
        labels: Sequence[str],
        given: Mapping[str, Any],
        durable: bool,
    ) -> None:
        """The uploads and the voice of a job, checked by their headers, in its folder."""
        lenient, most = bool(given.get("allow_truncated")), self.settings.reference_seconds
        if given.get("voice"):
            # Whatever becomes of the stored voice, this job keeps the one that it was given.
            with self.engine.voices.file(given["voice"]).open("rb") as stored:
                frozen = self.files.keep(folder, VOICE_FILE, stored, durable=durable)
            load_voice(frozen)
        for n, (file, name) in enumerate(zip(sources, names, strict=True)):
            path = self.files.keep(folder, f"in-{n}", _raw(file), durable=durable)
            advice = given.get("advice", CUT_IT)
            check_upload(path, name, given["most_seconds"], allow_truncated=lenient, advice=advice)
        speech = 0.0
        for n, (file, name) in enumerate(zip(references, labels, strict=True)):
            path = self.files.keep(folder, f"ref-{n}", _raw(file), durable=durable)
            speech += check_upload(path, name, most, allow_truncated=lenient) or 0.0
            check_references(speech, most)

    def maintain(self, client: str, kind: str, request: Mapping[str, Any], name: str) -> JobRecord:
        """Queue work on models."""
        job = self.store.add(
            JobRequest(
                id=new_id(),
                client=client,
                kind=kind,
                names=[name],
                request={
                    **request,
                    "request_id": request_id.get(),
                    "traceparent": events.traceparent(),
                },
                lane=MAINTENANCE,
                keep_seconds=MAINTENANCE_KEEP_SECONDS,
            ),
            self.limits,
        )
        self.workers.wake()
        return job

    async def outcome(self, job: JobRecord, request: Request) -> Mapping[str, Any]:
        """Wait for a direct job and give its result; cancel it if the client goes away.

        Raises:
            ServerError: with the status and the sentence of what went wrong.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[JobRecord] = loop.create_future()

        def tell(finished: JobRecord) -> None:
            loop.call_soon_threadsafe(_settle, future, finished)

        await asyncio.to_thread(self.workers.when_finished, job.id, tell)
        try:
            while not future.done():
                await asyncio.wait({future}, timeout=_DISCONNECT_SECONDS)
                if not future.done() and await request.is_disconnected():
                    raise ServerError("The client went away.", 499)
        finally:
            if not future.done():
                self.workers.forget(job.id)
                await asyncio.shield(asyncio.to_thread(self.workers.cancel, job.id))
        (item,) = future.result().items
        if item.error is not None:
            raise failure(item.error)
        if item.result is None:
            raise ServerError("The work was cancelled; try again.", 503)
        return item.result


def failure(record: Mapping[str, Any]) -> ServerError:
    """The exception for an error that a worker noted, with its type and status."""
    error = ServerError(str(record["message"]), int(record["status"]))
    error.kind = str(record["type"])  # type: ignore[attr-defined]
    return error


def _digest(
    given: Mapping[str, Any], sources: Sequence[UploadFile], references: Sequence[UploadFile]
) -> str:
    """A hash of all that a request asks and sends."""
    digest = hashlib.sha256(json.dumps(dict(given), sort_keys=True).encode())
    for role, files in (("source", sources), ("reference", references)):
        for file in files:
            digest.update(f"\n{role} {file.filename} {file.size} ".encode("utf-8", "replace"))
            stream = _raw(file)
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _settle(future: asyncio.Future[JobRecord], job: JobRecord) -> None:
    if not future.done():
        future.set_result(job)


def _raw(upload: UploadFile) -> BinaryIO:
    upload.file.seek(0)
    return upload.file


def _context(request: Request) -> Context:
    return cast(Context, request.app.state.context)


def _client(request: Request) -> str:
    return str(request.scope["autovoice.client"])


Here = Annotated[Context, Depends(_context)]
Client = Annotated[str, Depends(_client)]
