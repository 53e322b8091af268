"""Conversions: ``/v1/convert``, ``/inspect``, ``/evaluate`` at once, ``/v1/jobs`` in the queue."""

from __future__ import annotations

import asyncio
import contextlib
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import IO, Annotated, Any, cast

from fastapi import (
    APIRouter,
    Depends,
    File,
    Form,
    Header,
    Query,
    Request,
    Response,
    UploadFile,
)
from fastapi import Path as PathField
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, StreamingResponse
from starlette.background import BackgroundTask

from auto_voice.errors import ConfigError, JobStateError, ServerError, UploadError
from auto_voice.server.context import Client, Context, Here, failure
from auto_voice.server.jobs import DONE, JobRecord
from auto_voice.server.schemas import (
    JOB_ID,
    MEDIA_TYPES,
    AllowTruncated,
    ConvertFields,
    EvaluationAnswer,
    InspectionAnswer,
    JobList,
    JobView,
)

router = APIRouter(prefix="/v1")

# Bytes of the header X-Conversion; proxies refuse much longer ones.
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
    options: Annotated[ConvertFields, Depends()],
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
        {**options.request(), "advice": "send it to POST /v1/jobs, or cut it"},
        direct=True,
        most_seconds=here.settings.direct_seconds,
    )
    result = await here.outcome(job, request)

    def done() -> None:
        with contextlib.suppress(ServerError):  # it expires soon
            here.workers.remove(job.id)

    return await run_in_threadpool(
        _file,
        here,
        job.id,
        result,
        MEDIA_TYPES[options.format],
        {"x-job-id": job.id, "x-conversion": account(result)},
        done,
    )


def _file(
    here: Context,
    job_id: str,
    result: Mapping[str, Any],
    media_type: str,
    headers: Mapping[str, str],
    done: Callable[[], None],
) -> FileResponse:
    """The file of a result, which is here until it is sent.

    Raises:
        JobStateError: it was deleted.
    """
    open_until_sent = ExitStack()
    try:
        path = open_until_sent.enter_context(here.files.result(job_id, result["file"]))
    except FileNotFoundError:
        raise JobStateError("The result has been deleted.", 410) from None
    open_until_sent.callback(done)
    return FileResponse(
        path,
        media_type=media_type,
        filename=result["name"],
        headers=headers,
        background=BackgroundTask(open_until_sent.close),
    )


async def check_target(here: Context, options: ConvertFields, references: list[UploadFile]) -> None:
    """Refuse what names no voice, or two, before anything is queued.

    Raises:
        ConfigError: none or both.
        UnknownVoiceError: there is no such voice.
    """
    if bool(options.voice) == bool(references):
        raise ConfigError(
            "Say whose voice it shall be: send either the field voice with a stored voice's name, "
            "or one or more files reference."
        )
    if options.voice:
        await asyncio.to_thread(here.engine.voices.file, options.voice)


def account(result: Mapping[str, Any]) -> str:
    """Summary and figures as one line of ASCII; without notes where they would be too long."""
    told = {**result["summary"], "figures": result.get("figures")}
    text = json.dumps(told)
    if len(text) > HEADER_BYTES:
        text = json.dumps({**told, "notes": ["too long for a header"]})
    return text


@router.post("/inspect", summary="What is in a recording")
async def inspect(
    request: Request,
    here: Here,
    client: Client,
    file: Sound,
    allow_truncated: AllowTruncated = False,
) -> InspectionAnswer:
    """Length, level, noise, speech, pitch, and the stored voices it resembles."""
    job = await run_in_threadpool(
        here.accept,
        client,
        "inspect",
        [file],
        request={"allow_truncated": allow_truncated},
        direct=True,
        most_seconds=here.settings.reference_seconds,
    )
    return InspectionAnswer(**await here.outcome(job, request))


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
    allow_truncated: AllowTruncated = False,
) -> EvaluationAnswer:
    """Speaker similarity by two encoders, words, sound, pitch and level of a conversion."""
    _ = here.engine.evaluator
    job = await run_in_threadpool(
        here.accept,
        client,
        "evaluate",
        [source, converted],
        target,
        {"transcript": transcript, "allow_truncated": allow_truncated},
        direct=True,
        most_seconds=here.settings.direct_seconds,
        one_item=True,
    )
    return EvaluationAnswer(**await here.outcome(job, request))


# Jobs

# Bytes of a zip that are read at once.
BLOCK_BYTES = 1 << 18
JobId = Annotated[str, PathField(max_length=64, examples=[JOB_ID])]


@router.post("/jobs", status_code=202, summary="Convert long recordings, or many")
async def create(
    response: Response,
    here: Here,
    client: Client,
    options: Annotated[ConvertFields, Depends()],
    source: Annotated[list[UploadFile], File(description="One recording or a batch.")],
    reference: References = [],  # noqa: B006
    idempotency_key: Annotated[
        str, Header(max_length=100, description="The same key twice gives the same job.")
    ] = "",
) -> JobView:
    """Queue a conversion of each `source`. What is accepted survives a restart."""
    most = here.settings.batch_items
    if len(source) > most:
        raise UploadError(f"{len(source)} recordings are more than the {most} of one job.")
    await check_target(here, options, reference)
    job = await run_in_threadpool(
        here.accept,
        client,
        "convert",
        source,
        reference,
        options.request(),
        direct=False,
        most_seconds=here.settings.longest_seconds,
        key=idempotency_key,
    )
    response.headers["location"] = f"/v1/jobs/{job.id}"
    return JobView.of(job)


@router.get("/jobs", summary="Your newest jobs")
def listed(here: Here, client: Client, limit: Annotated[int, Query(ge=1, le=100)] = 20) -> JobList:
    return JobList(jobs=[JobView.of(job) for job in here.store.listed(client, limit)])


@router.get("/jobs/{job_id}", summary="How a job stands")
def show(here: Here, job_id: JobId) -> JobView:
    return JobView.of(here.store.get(job_id))


@router.post("/jobs/{job_id}/cancel", summary="Stop a job")
def cancel(here: Here, job_id: JobId) -> JobView:
    """Recordings that are finished stay; running work stops within a second."""
    here.store.get(job_id)
    return JobView.of(here.workers.cancel(job_id))


@router.delete("/jobs/{job_id}", status_code=204, summary="Delete a job and its results")
def delete(here: Here, job_id: JobId) -> None:
    here.store.get(job_id)
    here.workers.cancel(job_id)
    here.workers.remove(job_id)


@router.get(
    "/jobs/{job_id}/result",
    summary="The result",
    response_class=FileResponse,
    responses={200: {"content": {"audio/wav": {}, "application/zip": {}}}},
)
def result(here: Here, job_id: JobId) -> Response:
    """The sound of a job with one recording, a zip of all results of a batch."""
    job = here.store.get(job_id)
    if not job.is_finished:
        raise JobStateError("The job is not finished; ask again when its state is done.")
    if len(job.items) == 1:
        return _sound(here, job, 0)
    return StreamingResponse(
        _archive(here, job),
        media_type="application/zip",
        headers={"content-disposition": 'attachment; filename="converted.zip"'},
    )


@router.get(
    "/jobs/{job_id}/results/{index}",
    summary="The result of one recording of a batch",
    response_class=FileResponse,
    responses={200: {"content": {"audio/wav": {}}}},
)
def one_result(
    here: Here, job_id: JobId, index: Annotated[int, PathField(ge=0, le=10_000)]
) -> FileResponse:
    """As soon as it is done, even while the rest of the batch runs."""
    return _sound(here, here.store.get(job_id), index)


def _sound(here: Context, job: JobRecord, index: int) -> FileResponse:
    found = [item for item in job.items if item.index == index]
    if not found:
        raise JobStateError(f"The job has {len(job.items)} recordings, counted from 0.", 404)
    (item,) = found
    if item.error is not None:
        raise failure(item.error)
    if item.state != DONE or item.result is None:
        raise JobStateError(f"The recording is {item.state}, so it has no result.")
    if "file" not in item.result:
        raise JobStateError("This kind of job has no sound; its result is in the job itself.")
    media = MEDIA_TYPES[item.result["file"].rpartition(".")[2]]
    return _file(here, job.id, item.result, media, {}, lambda: None)


def _archive(here: Context, job: JobRecord) -> Iterator[bytes]:
    """The finished sounds as one zip, stored as they are, made while it is sent."""
    done = {
        f"{item.index:03d}_{item.result['name']}": str(item.result["file"])
        for item in job.items
        if item.state == DONE and item.result
    }
    if not done:
        raise JobStateError("No recording of this job was converted; the job says why.")
    if not here.files.names(job.id).issuperset(done.values()):
        raise JobStateError("The results have been deleted.", 410)
    return _zipped({name: partial(here.files.result, job.id, file) for name, file in done.items()})


class _Pipe:
    """A buffer that a zip is written to and read from again."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def flush(self) -> None:
        """Nothing waits elsewhere."""

    def take(self) -> bytes:
        taken, self._parts = b"".join(self._parts), []
        return taken


def _zipped(
    files: Mapping[str, Callable[[], AbstractContextManager[Path]]],
) -> Iterator[bytes]:
    pipe = _Pipe()
    with zipfile.ZipFile(cast(IO[bytes], pipe), "w", zipfile.ZIP_STORED) as archive:
        for name, opened in files.items():
            with opened() as path:
                about = zipfile.ZipInfo.from_file(path, name)
                with path.open("rb") as sound, archive.open(about, "w") as part:
                    while block := sound.read(BLOCK_BYTES):
                        part.write(block)
                        yield pipe.take()
    yield pipe.take()
