"""The web page, and what surrounds the API: health, metrics, sessions, what the server takes."""

from __future__ import annotations

from dataclasses import asdict
from importlib.resources import files

from fastapi import APIRouter, Request, Response

from auto_voice import __version__
from auto_voice.audio.encoding import FORMATS
from auto_voice.errors import NotPermittedError, UnknownJobError
from auto_voice.inference.controls import CONTROLS
from auto_voice.server.context import Here
from auto_voice.server.schemas import ServerInfo, Session
from auto_voice.server.security import (
    COOKIE,
    SESSION_SECONDS,
    cookie_of,
    matching,
    session_cookie,
)
from auto_voice.server.telemetry import CONTENT_TYPE

router = APIRouter()


@router.get("/healthz", summary="The process answers")
def health() -> dict[str, str]:
    return {"status": "ok"}


@router.get(
    "/readyz",
    summary="Work is taken",
    responses={503: {"description": "Starting, stopping, out of disk, or a worker died."}},
)
def ready(here: Here, response: Response) -> dict[str, str]:
    if not here.workers.alive:
        response.status_code = 503
        return {"status": "a worker is not running"}
    if here.settings.warm and not here.warm:
        response.status_code = 503
        return {"status": here.warm_problem or "models are being loaded"}
    if problem := here.workers.problem:
        response.status_code = 503
        return {"status": problem}
    return {"status": "ready"}


@router.get("/metrics", summary="Figures for Prometheus", response_class=Response)
def metrics(here: Here) -> Response:
    queue = asdict(here.store.depth())
    page = here.metrics.page(queue, len(here.engine.registry.loaded()))
    return Response(page, headers={"content-type": CONTENT_TYPE})


@router.get("/v1/server", summary="What this server takes and gives")
def info(here: Here) -> ServerInfo:
    settings = here.settings
    return ServerInfo(
        version=__version__,
        mock=here.engine.mock,
        formats=list(FORMATS),
        can_evaluate=here.engine.can_evaluate,
        may_change_models=bool(settings.tokens),
        has_session=bool(settings.tokens),
        options={
            "semitones": {"least": CONTROLS["semitones"].low, "most": CONTROLS["semitones"].high},
            "keep_pitch": False,
        },
        limits={
            "direct_seconds": settings.direct_seconds,
            "longest_seconds": settings.longest_seconds,
            "reference_seconds": settings.reference_seconds,
            "upload_mb": settings.upload_mb,
            "batch_items": settings.batch_items,
            "keep_hours": settings.keep_hours,
        },
    )


@router.post("/v1/session", status_code=204, summary="Begin a browser session")
def open_session(here: Here, request: Request, response: Response, body: Session) -> None:
    """Trade the token for a cookie that scripts cannot read."""
    token = matching(here.settings.tokens, body.token)
    if not token:
        raise NotPermittedError("The token is wrong; ask whoever runs this server.", 401)
    response.set_cookie(
        COOKIE,
        session_cookie(token),
        max_age=SESSION_SECONDS,
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )


@router.delete("/v1/session", status_code=204, summary="End the browser session")
def close_session(here: Here, request: Request, response: Response) -> None:
    """The cookie opens nothing from now on, wherever it was copied to."""
    here.sessions.end(here.settings.tokens, cookie_of(request.headers))
    response.delete_cookie(COOKIE, httponly=True, samesite="strict")


# The page: a few files of this package, without a build step and with nothing from elsewhere.

FILES = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
    "api.js": "text/javascript; charset=utf-8",
    "audio.js": "text/javascript; charset=utf-8",
    "live.js": "text/javascript; charset=utf-8",
    "worklet.js": "text/javascript; charset=utf-8",
    "originals.js": "text/javascript; charset=utf-8",
    "views.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}


@router.get("/", include_in_schema=False)
def index() -> Response:
    return _file("index.html")


@router.get("/page/{name}", include_in_schema=False)
def part(name: str) -> Response:
    return _file(name)


def _file(name: str) -> Response:
    if name not in FILES:
        raise UnknownJobError("There is no such page.")
    data = files("auto_voice.server").joinpath("page").joinpath(name).read_bytes()
    return Response(data, media_type=FILES[name], headers={"cache-control": "no-cache"})
