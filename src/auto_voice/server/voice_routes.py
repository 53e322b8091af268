"""``/v1/voices``, ``/v1/samples``, ``/v1/models`` and ``/v1/blobs``."""

from __future__ import annotations

import asyncio
import io
from typing import Annotated

import soundfile
from fastapi import APIRouter, Depends, File, Form, Query, Request, Response, UploadFile
from fastapi import Path as PathField
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse

from auto_voice.errors import NotPermittedError, UnknownModelError
from auto_voice.models.registry.fetchers import ARRIVED
from auto_voice.server.context import Client, Here
from auto_voice.server.engine import VOICE_FILE_BYTES, about
from auto_voice.server.schemas import (
    AllowTruncated,
    JobView,
    ModelList,
    ModelView,
    Rename,
    VoiceList,
    VoiceView,
)
from auto_voice.types import Waveform

router = APIRouter(prefix="/v1")

VoiceName = Annotated[str, PathField(max_length=80, examples=["friend"])]


@router.get("/voices", summary="The stored voices")
def listed(here: Here) -> VoiceList:
    return VoiceList(voices=[VoiceView(**voice) for voice in here.engine.voices.listed()])


@router.post("/voices", status_code=201, summary="Enrol a voice")
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


@router.post("/voices/import", status_code=201, summary="Import a voice file")
def take(
    here: Here,
    file: Annotated[UploadFile, File(description="What export gave: numbers, no code.")],
    name: Annotated[str, Form(max_length=80, description="Empty for the file's own.")] = "",
) -> VoiceView:
    data = file.file.read(VOICE_FILE_BYTES + 1)
    return VoiceView(**about(here.engine.voices.import_bytes(data, name)))


@router.get("/voices/{name}", summary="One voice")
def show(here: Here, name: VoiceName) -> VoiceView:
    return VoiceView(**about(here.engine.voices.get(name)))


@router.patch("/voices/{name}", summary="Rename a voice")
def rename(here: Here, name: VoiceName, body: Rename) -> VoiceView:
    return VoiceView(**about(here.engine.voices.rename(name, body.name)))


@router.delete("/voices/{name}", status_code=204, summary="Delete a voice")
def delete(here: Here, name: VoiceName) -> None:
    here.engine.voices.remove(name)


@router.get(
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


@router.get(
    "/voices/{name}/sound",
    summary="Listen to a voice",
    response_class=Response,
    responses={200: {"content": {"audio/wav": {}}}},
)
def sound(here: Here, name: VoiceName) -> Response:
    """The recording that was kept with the voice, as WAV."""
    return _wav(here.engine.voices.speech(name))


@router.get(
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


@router.get("/models", summary="All models")
def models(here: Here) -> ModelList:
    return ModelList(models=[ModelView(**model) for model in here.engine.models()])


@router.get("/models/{name}", summary="The versions of a model")
def model(here: Here, name: ModelName, version: Version = None) -> ModelList:
    return ModelList(models=[ModelView(**m) for m in here.engine.model(name, version)])


@router.post(
    "/models/{name}/pull",
    status_code=202,
    summary="Fetch a model's files",
    dependencies=[Depends(may_change)],
)
def pull(
    response: Response, here: Here, client: Client, name: ModelName, version: Version = None
) -> JobView:
    return _maintain(response, here, client, "pull", name, version)


@router.post(
    "/models/{name}/warm",
    status_code=202,
    summary="Load a model and run it once",
    dependencies=[Depends(may_change)],
)
def warm(
    response: Response, here: Here, client: Client, name: ModelName, version: Version = None
) -> JobView:
    return _maintain(response, here, client, "warm", name, version)


@router.post(
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


@router.get(
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


router.head("/blobs/{sha256}", include_in_schema=False)(blob)
