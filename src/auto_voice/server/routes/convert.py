"""``POST /v1/convert``, ``/v1/inspect`` and ``/v1/evaluate``: answered on the same connection."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends, File, Form, Request, UploadFile
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse
from starlette.background import BackgroundTask

from auto_voice.errors import ConfigError
from auto_voice.server.context import Client, Context, Here
from auto_voice.server.options import ConvertOptions
from auto_voice.server.schemas import MEDIA_TYPES, EvaluationAnswer, Inspection

router = APIRouter(prefix="/v1")

HEADER_BYTES = 4000
_AUDIO = {"schema": {"type": "string", "format": "binary"}}

Sound = Annotated[UploadFile, File(description="wav, flac, mp3, ogg, opus, aiff…")]
References = Annotated[
    list[UploadFile],
    File(description="One or several recordings of the wanted voice, if `voice` is empty."),
]


@router.post(
    "/convert",
    summary="Re-speak a short recording in another voice",
    response_class=FileResponse,
    responses={
        200: {
            "description": "The sound. `X-Conversion` holds the account as JSON.",
            "content": dict.fromkeys(sorted({*MEDIA_TYPES.values()}), _AUDIO),
        }
    },
)
async def convert(
    request: Request,
    here: Here,
    client: Client,
    options: Annotated[ConvertOptions, Depends()],
    source: Sound,
    reference: References = [],  # noqa: B006
) -> FileResponse:
    """The converted recording itself. Longer recordings go to `POST /v1/jobs`."""
    await check_target(here, options, reference)
    job = await run_in_threadpool(
        here.accept,
        client,
        "convert",
        [source],
        reference,
        options.request(),
        direct=True,
        most_seconds=here.settings.direct_seconds,
    )
    result = await here.outcome(job, request)
    folder = here.files.folder(job.id)
    return FileResponse(
        folder / result["file"],
        media_type=MEDIA_TYPES[options.format],
        filename=result["name"],
        headers={"x-job-id": job.id, "x-conversion": account(result)},
        background=BackgroundTask(here.workers.remove, job.id),
    )


async def check_target(
    here: Context, options: ConvertOptions, references: list[UploadFile]
) -> None:
    """Exactly one of a stored voice and references, before anything is queued.

    Raises:
        ConfigError: none or both.
        VoiceError: there is no such voice.
    """
    if bool(options.voice) == bool(references):
        raise ConfigError(
            "Say whose voice it shall be: either the field voice with a stored voice's name, or "
            "one or more reference recordings."
        )
    if options.voice:
        await asyncio.to_thread(here.engine.voices.get, options.voice)


def account(result: Mapping[str, Any]) -> str:
    """Summary and figures as one line of ASCII; without notes where they would be too long."""
    told = {**result["summary"], "figures": result.get("figures")}
    text = json.dumps(told)
    if len(text) > HEADER_BYTES:
        text = json.dumps({**told, "notes": ["too long for a header"]})
    return text


@router.post("/inspect", summary="What is in a recording")
async def inspect(request: Request, here: Here, client: Client, file: Sound) -> Inspection:
    """Length, level, noise, speech, pitch, and the stored voices it resembles."""
    job = await run_in_threadpool(
        here.accept,
        client,
        "inspect",
        [file],
        direct=True,
        most_seconds=here.settings.reference_seconds,
    )
    return Inspection(**await here.outcome(job, request))


@router.post("/evaluate", summary="Measure one conversion")
async def evaluate(
    request: Request,
    here: Here,
    client: Client,
    source: Sound,
    converted: Sound,
    target: Annotated[list[UploadFile], File(description="Recordings of the wanted voice.")],
    transcript: Annotated[
        str, Form(max_length=10_000, description="What is said; empty to hear it in the source.")
    ] = "",
) -> EvaluationAnswer:
    """Likeness by two encoders, words, sound, pitch and level of a finished conversion."""
    _ = here.engine.evaluator
    job = await run_in_threadpool(
        here.accept,
        client,
        "evaluate",
        [source, converted],
        target,
        {"transcript": transcript},
        direct=True,
        most_seconds=here.settings.direct_seconds,
        one_item=True,
    )
    return EvaluationAnswer(**await here.outcome(job, request))
