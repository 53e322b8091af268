"""The app: routes on one context, errors as sentences, workers that live as long as it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from filelock import FileLock, Timeout
from starlette.exceptions import HTTPException

from auto_voice import __version__, events
from auto_voice.errors import (
    AutoVoiceError,
    ConfigError,
    MissingDependencyError,
    ServerError,
    install_hint,
)
from auto_voice.server import conversion_routes, live_routes, site_routes
from auto_voice.server.admission import LiveStreams
from auto_voice.server.context import Context
from auto_voice.server.engine import Engine
from auto_voice.server.files import JobFiles, make_files
from auto_voice.server.job_store import SqliteJobStore
from auto_voice.server.jobs import LEASE_SECONDS, Claim, JobStore, SharedJobStore
from auto_voice.server.middleware import RequestMiddleware, error_answer
from auto_voice.server.schemas import ErrorAnswer, check_fields, sentence_of
from auto_voice.server.security import Sessions
from auto_voice.server.settings import ServerSettings
from auto_voice.server.tasks import Tasks
from auto_voice.server.telemetry import Metrics
from auto_voice.server.workers import Workers

log = logging.getLogger(__name__)

_STATUSES = {
    400: "An option is wrong.",
    401: "A token is needed.",
    403: "Not permitted.",
    404: "There is no such thing.",
    408: "The upload stalled.",
    409: "Not in this state.",
    413: "Too large.",
    415: "Not a recording that can be read.",
    422: "A recording or a field that cannot be used.",
    429: "Too much of yours waits; Retry-After says when to try again.",
    503: "The queue is full, or a model cannot be had.",
}


def create_app(
    settings: ServerSettings, engine: Engine, *, store: JobStore | None = None
) -> FastAPI:
    """The whole server as one ASGI app; workers run between its start and its stop.

    Args:
        store: where jobs are kept instead of where ``settings`` says.

    Raises:
        ConfigError: the data folder or the database cannot be used, or another server uses it.
    """
    context = make_context(settings, engine, store)
    app = FastAPI(
        title="auto_voice",
        version=__version__,
        description="Re-speak recordings in another person's voice.",
        docs_url=None,
        redoc_url=None,
        lifespan=_lifespan,
        dependencies=[Depends(check_fields)],
        responses={
            status: {"model": ErrorAnswer, "description": text}
            for status, text in _STATUSES.items()
        },
    )
    app.state.context = context
    for router in (conversion_routes.router, site_routes.api, site_routes.router):
        app.include_router(router)
    # A route of Starlette: what the others depend on reads forms, which a WebSocket has not.
    app.router.routes.extend(live_routes.ROUTES)
    app.add_exception_handler(AutoVoiceError, _own_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _field_error)
    app.add_middleware(RequestMiddleware, context=context)
    return app


def make_context(
    settings: ServerSettings,
    engine: Engine,
    store: JobStore | None = None,
    *,
    only_works: bool = False,
    lease_seconds: float = LEASE_SECONDS,
) -> Context:
    """The parts of a server, or of a worker without one.

    Args:
        store: where jobs are kept instead of where ``settings`` says.
        only_works: nobody asks this process, so what has expired is not its business.
        lease_seconds: see :class:`~auto_voice.server.postgres.PostgresJobStore`.

    Raises:
        ConfigError: the data folder or the database cannot be used, or another server uses it.
    """
    lock = None if settings.database else _only_server(settings.data_dir)
    try:
        settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        files = make_files(settings)
        if store is None:
            store = _made_store(settings, files, lease_seconds)
    except BaseException:
        if lock is not None:
            lock.release()
        raise
    shared = store if isinstance(store, SharedJobStore) else None

    def observe(claim: Claim, how: str, seconds: float) -> None:
        log.info(
            "%s %s",
            claim.job.kind,
            how,
            extra={"job": claim.job.id, "item": claim.item.index, "seconds": round(seconds, 3)},
        )

    tasks = Tasks(engine, files, settings)
    sessions = Sessions(
        settings.data_dir / "sessions.json", None if shared is None else shared.ended_sessions
    )
    if shared is not None:
        engine.voices.share(partial(shared.exclusively, "voices"))
    workers = Workers(
        store,
        files,
        tasks,
        count=settings.workers,
        keep_bytes=settings.keep_mb * 1_000_000,
        observe=observe,
        undo=tasks.undo,
        sweeps=not only_works,
        every_beat=sessions.refresh,
    )
    return Context(
        settings, engine, store, files, workers, Metrics(), sessions, lock, LiveStreams(settings)
    )


def _made_store(settings: ServerSettings, files: JobFiles, lease_seconds: float) -> JobStore:
    if not settings.database:
        return SqliteJobStore(settings.data_dir / "jobs.sqlite", settings.workers)
    try:
        from auto_voice.server.postgres import PostgresJobStore
    except ImportError as error:
        raise MissingDependencyError(
            f"{error.name} is not installed; run: {install_hint('postgres')}"
        ) from error
    return PostgresJobStore(
        settings.database, settings.workers, place=files.place, lease_seconds=lease_seconds
    )


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    context: Context = app.state.context
    unsubscribe = events.subscribe(context.metrics)
    context.workers.start()
    warming = asyncio.create_task(_warm(context)) if context.settings.warm else None
    try:
        yield
    finally:
        if warming is not None:
            warming.cancel()
        await asyncio.to_thread(context.workers.stop, context.settings.grace_seconds)
        unsubscribe()
        context.close()


async def _warm(context: Context) -> None:
    try:
        timings = await asyncio.to_thread(context.engine.warm_up)
        context.warm = True
        log.info("models are loaded", extra={"seconds": round(sum(timings.values()), 3)})
    except AutoVoiceError as error:
        context.warm_problem = f"the models could not be loaded: {error}"
        log.error(context.warm_problem)


def _only_server(data_dir: Path) -> FileLock:
    """A lock for as long as the server lives, which ends with its process.

    Raises:
        ConfigError: another server holds it.
    """
    # Taken in one thread and let go in another.
    lock = FileLock(data_dir / "server.lock", thread_local=False)
    try:
        lock.acquire(timeout=2)
    except Timeout:
        raise ConfigError(
            f"another server uses {data_dir}; stop it, or start this one with another --data-dir."
        ) from None
    return lock


async def _own_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, AutoVoiceError)
    body, headers = error_answer(error, request.scope.get("autovoice.request_id", ""))
    return Response(body, error.http_status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, AutoVoiceError):
        # A form that could not be read to its end, and why: the limit of the upload.
        return await _own_error(request, error.__cause__)
    plain = {404: "There is nothing here; GET /openapi.json lists what there is.",
             405: "This path does not take that method."}  # fmt: skip
    text = plain.get(error.status_code, str(error.detail))
    answer = await _own_error(request, ServerError(text, error.status_code))
    answer.headers.update(error.headers or {})
    return answer


async def _field_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    sentences = [sentence_of(found) for found in error.errors()[:5]]
    return await _own_error(request, ServerError(" ".join(sentences)[:1000], 422))
