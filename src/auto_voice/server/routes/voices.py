"""``/v1/voices``: enrol, list, show, rename, delete, export, import."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, File, Form, Request, Response, UploadFile
from fastapi import Path as PathField
from fastapi.concurrency import run_in_threadpool

from auto_voice.server.context import Client, Here
from auto_voice.server.schemas import Rename, VoiceList, VoiceView
from auto_voice.server.voice_library import VOICE_FILE_BYTES, about

router = APIRouter(prefix="/v1/voices")

Name = Annotated[str, PathField(max_length=80, examples=["friend"])]


@router.get("", summary="The stored voices")
def listed(here: Here) -> VoiceList:
    return VoiceList(voices=[VoiceView(**voice) for voice in here.engine.voices.listed()])


@router.post("", status_code=201, summary="Enrol a voice")
async def enrol(
    request: Request,
    here: Here,
    client: Client,
    name: Annotated[str, Form(min_length=1, max_length=63, examples=["friend"])],
    reference: Annotated[list[UploadFile], File(description="Recordings of one person.")],
    consent: Annotated[
        str, Form(max_length=500, description="Who allowed it, kept with the voice.")
    ] = "",
    overwrite: Annotated[bool, Form(description="Replace a voice of this name.")] = False,
) -> VoiceView:
    """The voice heard in the recordings. `notes` says what was wrong with them, and what to
    record instead."""
    await asyncio.to_thread(here.engine.voices.check_name, name, overwrite)
    job = await run_in_threadpool(
        here.accept,
        client,
        "enrol",
        [],
        reference,
        {"name": name, "consent": consent, "overwrite": overwrite},
        direct=True,
        most_seconds=here.settings.reference_seconds,
        one_item=True,
    )
    return VoiceView(**await here.outcome(job, request))


@router.post("/import", status_code=201, summary="Import a voice file")
def take(
    here: Here,
    file: Annotated[UploadFile, File(description="What export gave: numbers, no code.")],
    name: Annotated[str, Form(max_length=80, description="Empty for the file's own.")] = "",
) -> VoiceView:
    data = file.file.read(VOICE_FILE_BYTES + 1)
    return VoiceView(**about(here.engine.voices.import_bytes(data, name)))


@router.get("/{name}", summary="One voice")
def show(here: Here, name: Name) -> VoiceView:
    return VoiceView(**about(here.engine.voices.get(name)))


@router.patch("/{name}", summary="Rename a voice")
def rename(here: Here, name: Name, body: Rename) -> VoiceView:
    return VoiceView(**about(here.engine.voices.rename(name, body.name)))


@router.delete("/{name}", status_code=204, summary="Delete a voice")
def delete(here: Here, name: Name) -> None:
    here.engine.voices.remove(name)


@router.get(
    "/{name}/file",
    summary="Export a voice",
    response_class=Response,
    responses={200: {"content": {"application/octet-stream": {}}}},
)
def export(here: Here, name: Name) -> Response:
    """One safetensors file that `autovoice` and other servers take."""
    data = here.engine.voices.export_bytes(name)
    headers = {"content-disposition": 'attachment; filename="voice.safetensors"'}
    return Response(data, media_type="application/octet-stream", headers=headers)
