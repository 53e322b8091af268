"""Everything but conversions: the page, health and metrics, sessions, voices, models, samples."""

from __future__ import annotations

import asyncio
import io
from dataclasses import asdict
from importlib.resources import files
from typing import Annotated

import soundfile
from fastapi import APIRouter, Depends, File, Form, Query, Request, Response, UploadFile
from fastapi import Path as PathField
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse

from auto_voice import __version__
from auto_voice.audio.encoding import FORMATS
from auto_voice.errors import NotPermittedError, UnknownJobError, UnknownModelError
from auto_voice.inference.controls import CONTROLS
from auto_voice.models.registry.fetchers import ARRIVED
from auto_voice.server.context import Client, Context, Here
from auto_voice.server.engine import VOICE_FILE_BYTES, about
from auto_voice.server.schemas import (
    AllowTruncated,
    JobView,
    ModelList,
    ModelView,
    Rename,
    ServerInfo,
    Session,
    VoiceList,
    VoiceView,
)
from auto_voice.server.security import (
    COOKIE,
    SESSION_SECONDS,
    cookie_of,
    matching,
    session_cookie,
    token_of,
)
from auto_voice.server.telemetry import CONTENT_TYPE
from auto_voice.types import Waveform

router = APIRouter()
# Of it, the part below /v1 that is not about the site itself.
api = APIRouter(prefix="/v1")

# Voices

VoiceName = Annotated[str, PathField(max_length=80, examples=["friend"])]


@api.get("/voices", summary="The stored voices")
def listed(here: Here) -> VoiceList:
    return VoiceList(voices=[VoiceView(**voice) for voice in here.engine.voices.listed()])


@api.post("/voices", status_code=201, summary="Enrol a voice")
async def enrol(
    request: Request,
    response: Response,
    here: Here,
    client: Client,
    name: Annotated[str, Form(min_length=1, max_length=63, examples=["friend"])],
    reference: Annotated[list[UploadFile], File(description="Recordings of one person.")],
    consent: Annotated[
        str, Form(max_length=500, description="Who allowed it, kept with the voice.")
    ] = "",
    overwrite: Annotated[bool, Form(description="Replace a voice of this name.")] = False,
    allow_truncated: AllowTruncated = False,
    wait: Annotated[
        bool, Form(description="False: answer 202 with a job, which has progress and a cancel.")
    ] = True,
) -> VoiceView | JobView:
    """Keep the voice of the recordings. `notes` says what is wrong with them, and what to record
    instead."""
    await asyncio.to_thread(here.engine.voices.check_name, name, overwrite)
    job = await run_in_threadpool(
        here.accept,
        client,
        "enrol",
        [],
        reference,
        {
            "name": name,
            "consent": consent,
            "overwrite": overwrite,
            "allow_truncated": allow_truncated,
        },
        direct=wait,
        most_seconds=here.settings.reference_seconds,
        one_item=True,
    )
    if not wait:
        response.status_code = 202
        response.headers["location"] = f"/v1/jobs/{job.id}"
        return JobView.of(job)
    return VoiceView(**await here.outcome(job, request))


@api.post("/voices/import", status_code=201, summary="Import a voice file")
def take(
    here: Here,
    file: Annotated[UploadFile, File(description="What export gave: numbers, no code.")],
    name: Annotated[str, Form(max_length=80, description="Empty for the file's own.")] = "",
) -> VoiceView:
    data = file.file.read(VOICE_FILE_BYTES + 1)
    return VoiceView(**about(here.engine.voices.import_bytes(data, name)))


@api.get("/voices/{name}", summary="One voice")
def show(here: Here, name: VoiceName) -> VoiceView:
    return VoiceView(**about(here.engine.voices.get(name)))


@api.patch("/voices/{name}", summary="Rename a voice")
def rename(here: Here, name: VoiceName, body: Rename) -> VoiceView:
    return VoiceView(**about(here.engine.voices.rename(name, body.name)))


@api.delete("/voices/{name}", status_code=204, summary="Delete a voice")
def delete(here: Here, name: VoiceName) -> None:
    here.engine.voices.remove(name)


@api.get(
    "/voices/{name}/file",
    summary="Export a voice",
    response_class=Response,
    responses={200: {"content": {"application/octet-stream": {}}}},
)
def export(here: Here, name: VoiceName) -> Response:
    """One safetensors file that `autovoice` and other servers take."""
    data = here.engine.voices.export_bytes(name)
    headers = {"content-disposition": 'attachment; filename="voice.safetensors"'}
    return Response(data, media_type="application/octet-stream", headers=headers)


@api.get(
    "/voices/{name}/sound",
    summary="Listen to a voice",
    response_class=Response,
    responses={200: {"content": {"audio/wav": {}}}},
)
def sound(here: Here, name: VoiceName) -> Response:
    """The recording that was kept with the voice, as WAV."""
    return _wav(here.engine.voices.speech(name))


@api.get(
    "/samples/{name}",
    summary="A recording to try the server with",
    response_class=Response,
    responses={200: {"content": {"audio/wav": {}}}},
)
def sample(
    here: Here, name: Annotated[str, PathField(max_length=80, examples=["recording"])]
) -> Response:
    """`recording` to convert, `voice` as a reference; fetched when first asked for."""
    return _wav(here.engine.sample(name))


def _wav(audio: Waveform) -> Response:
    data = io.BytesIO()
    soundfile.write(data, audio.samples, audio.sample_rate, format="WAV", subtype="PCM_16")
    return Response(data.getvalue(), media_type="audio/wav")


# Models

ModelName = Annotated[str, PathField(max_length=80, examples=["hifigan_universal"])]
Version = Annotated[str | None, Query(max_length=40, examples=["1.0"])]


def may_change(here: Here) -> None:
    """Raises NotPermittedError on a server without a token (elsewhere it has been checked)."""
    if not here.settings.tokens:
        raise NotPermittedError(
            "Changing models over HTTP needs a token; start the server with --token-file FILE, or "
            "use `autovoice models` on its machine."
        )


@api.get("/models", summary="All models")
def models(here: Here) -> ModelList:
    return ModelList(models=[ModelView(**model) for model in here.engine.models()])


@api.get("/models/{name}", summary="The versions of a model")
def model(here: Here, name: ModelName, version: Version = None) -> ModelList:
    return ModelList(models=[ModelView(**m) for m in here.engine.model(name, version)])


@api.post(
    "/models/{name}/pull",
    status_code=202,
    summary="Fetch a model's files",
    dependencies=[Depends(may_change)],
)
def pull(
    response: Response, here: Here, client: Client, name: ModelName, version: Version = None
) -> JobView:
    return _maintain(response, here, client, "pull", name, version)


@api.post(
    "/models/{name}/warm",
    status_code=202,
    summary="Load a model and run it once",
    dependencies=[Depends(may_change)],
)
def warm(
    response: Response, here: Here, client: Client, name: ModelName, version: Version = None
) -> JobView:
    return _maintain(response, here, client, "warm", name, version)


@api.post(
    "/models/{name}/unload",
    status_code=204,
    summary="Free a model's memory",
    dependencies=[Depends(may_change)],
)
def unload(here: Here, name: ModelName, version: Version = None) -> None:
    here.engine.unload(name, version)


def _maintain(
    response: Response, here: Here, client: str, kind: str, name: str, version: str | None
) -> JobView:
    here.engine.model(name, version)
    job = here.maintain(client, kind, {"model": name, "version": version}, name)
    response.headers["location"] = f"/v1/jobs/{job.id}"
    return JobView.of(job)


# Files of models, for other machines

Sha256 = Annotated[
    str, PathField(pattern="^[0-9a-f]{64}$", description="Of the file, in lower case.")
]


@api.get(
    "/blobs/{sha256}",
    summary="A file of a model by its hash",
    response_class=FileResponse,
    responses={
        200: {"content": {"application/octet-stream": {}}},
        202: {"description": "The server fetches it just now; ask again."},
        206: {"description": "The range that was asked for."},
        304: {"description": "The client has it."},
        416: {"description": "The file is shorter than the range."},
    },
)
def blob(here: Here, request: Request, sha256: Sha256) -> Response:
    """For the stores of other machines (`AUTOVOICE_MIRRORS`). Only files that a model's version
    names are served; ranges and `If-None-Match` work."""
    path, arrived = here.engine.blobs.path(sha256), None
    if path is None and here.settings.mirror_fetch and request.method == "GET":
        arrived = here.engine.blobs.fetch(sha256)
        if arrived is None:  # It may have come in just now.
            path = here.engine.blobs.path(sha256)
    if arrived is not None:
        return Response(status_code=202, headers={ARRIVED: str(arrived), "retry-after": "1"})
    if path is None:
        raise UnknownModelError("No model that is here has a file with this hash.")
    etag = f'"{sha256}"'
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers={"etag": etag})
    return FileResponse(path, media_type="application/octet-stream", headers={"etag": etag})


api.head("/blobs/{sha256}", include_in_schema=False)(blob)


# The site


@router.get("/healthz", summary="The process answers")
def health() -> dict[str, str]:
    return {"status": "ok"}


@router.get(
    "/readyz",
    summary="Work is taken",
    responses={503: {"description": "Starting, stopping, out of disk, or a worker died."}},
)
def ready(here: Here, request: Request, response: Response) -> dict[str, str]:
    """With a token, if the server has any, the reason may name machines and folders."""
    if not here.workers.alive:
        response.status_code = 503
        return {"status": "a worker is not running"}
    if here.settings.warm and not here.warm:
        response.status_code = 503
        told = _told(here, request, here.warm_problem, "the models could not be loaded")
        return {"status": told or "models are being loaded"}
    if problem := here.workers.problem:
        response.status_code = 503
        here.workers.warn(f"work waits: {problem}")
        hidden = "work waits for the job database or for room and reach of its files"
        return {"status": _told(here, request, problem, hidden)}
    return {"status": "ready"}


def _told(here: Context, request: Request, problem: str, hidden: str) -> str:
    """``problem`` for who may know it, else ``hidden``, which says where it is told."""
    try:
        token_of(here.settings, request.headers, here.sessions)
    except NotPermittedError:
        return problem and f"{hidden}; the log tells why, as does this with a token"
    return problem


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
