"""What goes over the wire, with examples for the OpenAPI document."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from auto_voice.server.jobs import Item, Job

Format = Literal["wav", "flac", "ogg", "opus", "mp3", "aiff"]
MEDIA_TYPES: dict[str, str] = {
    "wav": "audio/wav",
    "flac": "audio/flac",
    "ogg": "audio/ogg",
    "opus": "audio/ogg",
    "mp3": "audio/mpeg",
    "aiff": "audio/aiff",
}

JOB_ID = "Zm9vYmFyYmF6cXV4cXV1eA"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorBody(_Model):
    type: str = Field(examples=["AudioFormatError"])
    message: str = Field(examples=["talk.txt is text and not a recording that can be read; …"])
    status: int = Field(examples=[415])


class ErrorAnswer(_Model):
    """One sentence that says what is wrong and what to do."""

    error: ErrorBody
    request_id: str = Field(examples=["3f9c2b7d51aa4e0c"])


class ItemView(_Model):
    """One recording of a job."""

    index: int
    name: str = Field(examples=["talk.wav"])
    state: Literal["queued", "running", "done", "failed", "cancelled"]
    progress: float = Field(ge=0, le=1)
    error: ErrorBody | None = None
    result: dict[str, Any] | None = Field(
        None, examples=[{"name": "talk_as_friend.wav", "bytes": 264644, "summary": {}}]
    )

    @staticmethod
    def of(item: Item) -> ItemView:
        hidden = {"file"}
        result = (
            None
            if item.result is None
            else {key: value for key, value in item.result.items() if key not in hidden}
        )
        return ItemView(
            index=item.index,
            name=item.name,
            state=item.state,  # type: ignore[arg-type]
            progress=round(item.progress, 4),
            error=None if item.error is None else ErrorBody(**item.error),
            result=result,
        )


class JobView(_Model):
    """A job as it stands."""

    id: str = Field(examples=[JOB_ID])
    kind: str = Field(examples=["convert"])
    state: Literal["queued", "running", "done", "failed", "cancelled"]
    progress: float = Field(ge=0, le=1, examples=[0.42])
    created: datetime
    started: datetime | None = None
    finished: datetime | None = None
    expires: datetime | None = None
    items: list[ItemView]

    @staticmethod
    def of(job: Job) -> JobView:
        return JobView(
            id=job.id,
            kind=job.kind,
            state=job.state,  # type: ignore[arg-type]
            progress=round(job.progress, 4),
            created=_time(job.created),
            started=None if job.started is None else _time(job.started),
            finished=None if job.finished is None else _time(job.finished),
            expires=None if job.expires is None else _time(job.expires),
            items=[ItemView.of(item) for item in job.items],
        )


class JobList(_Model):
    jobs: list[JobView]


class VoiceView(_Model):
    """A stored voice."""

    name: str = Field(examples=["friend"])
    speech_seconds: float = Field(examples=[12.4])
    pitch_hz: float | None = Field(None, examples=[187.0])
    encoder: str = Field(examples=["speaker_encoder@1.0"])
    quality: dict[str, float | None] = Field({}, examples=[{"snr_db": 31.5, "speakers": 1.0}])
    notes: list[str] = Field([], examples=[["noisy (12 dB SNR): record in a quiet room"]])
    consent: str = Field("", examples=["recorded with her permission, 2 May"])


class VoiceList(_Model):
    voices: list[VoiceView]


class Rename(_Model):
    name: str = Field(min_length=1, max_length=63, examples=["best_friend"])


class ModelView(_Model):
    """One version of a model and where it stands."""

    name: str = Field(examples=["hifigan_universal"])
    version: str = Field(examples=["1.0"])
    kind: str = Field(examples=["vocoder"])
    description: str
    licence: str = Field(examples=["MIT"])
    bytes: int = Field(examples=[55788858])
    default: bool
    pinned: bool
    installed: bool
    loaded: bool


class ModelList(_Model):
    models: list[ModelView]


class Inspection(_Model):
    """What is in a recording."""

    model_config = ConfigDict(extra="allow")

    file: str = Field(examples=["talk.wav"])
    seconds: float | None = Field(examples=[6.2])


class EvaluationAnswer(_Model):
    """Figures of one conversion; what each means is in the document of the evaluation."""

    figures: dict[str, float | None] = Field(examples=[{"secs": 0.81, "wer": 0.02, "dnsmos": 3.2}])
    texts: dict[str, str] = Field({}, examples=[{"reference": "one two", "heard": "one two"}])
    models: dict[str, str] = Field({}, examples=[{"speaker": "speaker_encoder@1.0"}])
    mock: bool = False


class Session(_Model):
    token: str = Field(min_length=1, max_length=1000, examples=["the-token-of-the-server"])


class ServerInfo(_Model):
    """What a client needs to know before it asks."""

    version: str = Field(examples=["0.1.0"])
    mock: bool
    formats: list[str]
    can_evaluate: bool
    may_change_models: bool
    options: dict[str, Any]
    limits: dict[str, float]


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, timezone.utc)
