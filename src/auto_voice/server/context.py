"""Everything a request handler may need, made once per app."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, BinaryIO, cast

from fastapi import Depends, Request, UploadFile

from auto_voice.errors import BusyError, ServerError, UploadError
from auto_voice.server.engine import Engine
from auto_voice.server.files import JobFiles, new_id
from auto_voice.server.jobs import UPKEEP, Job, JobStore, Limits, NewJob
from auto_voice.server.logs import request_id
from auto_voice.server.metrics import Metrics
from auto_voice.server.settings import ServerSettings
from auto_voice.server.uploads import check_references, check_upload, display_name
from auto_voice.server.worker import Workers

DIRECT_KEEP_SECONDS = 600.0
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
    warm: bool = False
    warm_problem: str = ""

    @property
    def limits(self) -> Limits:
        s = self.settings
        return Limits(
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
    ) -> Job:
        """Keep the uploads and queue the job; what is returned survives a crash.

        Args:
            most_seconds: of each source.
            one_item: the sources belong together.

        Raises:
            AudioError: an upload that is no recording, or too long; nothing is kept.
            BusyError: the queue or the disk is full.
        """
        if key and (earlier := self.store.find(client, key)) is not None:
            return earlier
        files = [*sources, *references]
        if len(references) > self.settings.reference_items:
            raise UploadError(
                f"{len(references)} references are more than the {self.settings.reference_items} "
                "that are taken; half a minute of speech is enough."
            )
        if not self.files.has_room(sum(file.size or 0 for file in files)):
            raise BusyError("The server's disk is full; try again later.", 60, 507)
        job_id = new_id()
        folder = self.files.make(job_id)
        try:
            names = [display_name(file.filename, f"upload {n}") for n, file in enumerate(sources)]
            for n, (file, name) in enumerate(zip(sources, names, strict=True)):
                path = self.files.keep(folder, f"in-{n}", _raw(file))
                check_upload(path, name, most_seconds)
            labels = [display_name(f.filename, f"reference {n}") for n, f in enumerate(references)]
            speech = 0.0
            for n, (file, name) in enumerate(zip(references, labels, strict=True)):
                path = self.files.keep(folder, f"ref-{n}", _raw(file))
                speech += check_upload(path, name, self.settings.reference_seconds) or 0.0
                check_references(speech, self.settings.reference_seconds)
            asked = {
                "most_seconds": most_seconds,
                "references": labels,
                "names": names,
                "request_id": request_id.get(),
            }
            job = self.store.add(
                NewJob(
                    id=job_id,
                    client=client,
                    kind=kind,
                    names=[", ".join(names or labels)] if one_item else names,
                    request={**asked, **(request or {})},
                    direct=direct,
                    keep_seconds=DIRECT_KEEP_SECONDS if direct else self.settings.keep_hours * 3600,
                    key=key,
                ),
                self.limits,
            )
        except BaseException:
            self.files.remove(job_id)
            raise
        finally:
            for file in files:
                file.file.close()
        if job.id != job_id:
            self.files.remove(job_id)
        self.workers.wake()
        return job

    def upkeep(self, client: str, kind: str, request: Mapping[str, Any], name: str) -> Job:
        """Queue work on models."""
        job = self.store.add(
            NewJob(
                id=new_id(),
                client=client,
                kind=kind,
                names=[name],
                request={**request, "request_id": request_id.get()},
                lane=UPKEEP,
                keep_seconds=3600.0,
            ),
            self.limits,
        )
        self.workers.wake()
        return job

    async def outcome(self, job: Job, request: Request) -> Mapping[str, Any]:
        """Wait for a direct job and give its result; cancel it if the client goes away.

        Raises:
            ServerError: with the status and the sentence of what went wrong.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Job] = loop.create_future()

        def tell(finished: Job) -> None:
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
    """What a worker noted, as an exception that is answered with its type and status."""
    error = ServerError(str(record["message"]), int(record["status"]))
    error.kind = str(record["type"])  # type: ignore[attr-defined]
    return error


def _settle(future: asyncio.Future[Job], job: Job) -> None:
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
