"""Health, metrics, sessions, and what the page needs to know."""

from __future__ import annotations

from dataclasses import asdict

from fastapi import APIRouter, Request, Response

from auto_voice import __version__
from auto_voice.audio.encoding import FORMATS
from auto_voice.errors import NotPermittedError
from auto_voice.server.context import Here
from auto_voice.server.metrics import CONTENT_TYPE
from auto_voice.server.schemas import ServerInfo, Session
from auto_voice.server.security import COOKIE, SESSION_SECONDS, matching, session_cookie

router = APIRouter()


@router.get("/healthz", summary="The process answers")
def health() -> dict[str, str]:
    return {"status": "ok"}


@router.get(
    "/readyz",
    summary="Work is taken",
    responses={503: {"description": "Starting, stopping, or a worker died."}},
)
def ready(here: Here, response: Response) -> dict[str, str]:
    if not here.workers.alive:
        response.status_code = 503
        return {"status": "a worker is not running"}
    if here.settings.warm and not here.warm:
        response.status_code = 503
        return {"status": here.warm_problem or "models are being loaded"}
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
        options={"semitones": {"least": -36, "most": 36}, "keep_pitch": False},
        limits={
            "direct_seconds": settings.direct_seconds,
            "longest_seconds": settings.longest_seconds,
            "reference_seconds": settings.reference_seconds,
            "upload_mb": settings.upload_mb,
            "batch_items": settings.batch_items,
            "keep_hours": settings.keep_hours,
        },
    )


@router.post("/v1/session", status_code=204, summary="Let a browser in")
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


@router.delete("/v1/session", status_code=204, summary="Leave")
def close_session(response: Response) -> None:
    response.delete_cookie(COOKIE, httponly=True, samesite="strict")
