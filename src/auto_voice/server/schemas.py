"""Form fields and answers of the API, with examples for the OpenAPI document."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import datetime, timezone
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

from fastapi import Form, Request
from fastapi.dependencies.models import Dependant
from fastapi.params import Form as FormField
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field

from auto_voice.audio.encoding import choose_encoding
from auto_voice.errors import ConfigError, ServerError
from auto_voice.inference.controls import CONTROLS, Controls, controls_from
from auto_voice.server.jobs import JobItem, JobRecord

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
    def of(item: JobItem) -> ItemView:
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
    def of(job: JobRecord) -> JobView:
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
    remarks: list[str] = Field([], examples=[["friend.wav: resampled from 48000 to 16000 Hz."]])
    has_recording: bool = Field(False, description="Whether /v1/voices/NAME/sound has something.")
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
    problem: str = Field("", description="Why the model cannot be used, such as a stale pin.")
    ram_mb: int = Field(0, description="Memory that the model needs; 0 where that is not known.")
    quantised: str = Field("", description="Its precision where it was made of another version.")


class ModelList(_Model):
    models: list[ModelView]


class InspectionAnswer(_Model):
    """Properties of a recording: length, level, noise, speech, pitch, similar voices."""

    model_config = ConfigDict(extra="allow")

    file: str = Field(examples=["talk.wav"])
    seconds: float | None = Field(examples=[6.2])


class EvaluationAnswer(_Model):
    """Figures of one conversion; what each means is in the document of the evaluation."""

    figures: dict[str, float | None] = Field(examples=[{"secs": 0.81, "wer": 0.02, "dnsmos": 3.2}])
    texts: dict[str, str] = Field({}, examples=[{"reference": "one two", "heard": "one two"}])
    models: dict[str, str] = Field({}, examples=[{"speaker": "speaker_encoder@1.0"}])
    mock: bool = False
    notes: list[str] = Field([], examples=[["talk.wav: mixed 2 channels down to one"]])


class Session(_Model):
    token: str = Field(min_length=1, max_length=1000, examples=["the-token-of-the-server"])


class ServerInfo(_Model):
    """Limits and abilities of this server."""

    version: str = Field(examples=["0.1.0"])
    mock: bool
    formats: list[str]
    can_evaluate: bool
    may_change_models: bool
    has_session: bool = Field(description="Whether a browser session can be ended.")
    options: dict[str, Any]
    limits: dict[str, float]


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, timezone.utc)


# Form fields

AllowTruncated = Annotated[
    bool, Form(description="Take what is there of recordings that end early, with a note.")
]


def _number(control: str) -> Any:
    """The form field of a control that is a number."""
    spec = CONTROLS[control]
    return Form(allow_inf_nan=False, description=f"{spec.help} It lies {spec.span}.")


class ConvertFields:
    """The form fields that ``POST /v1/convert`` and ``POST /v1/jobs`` share.

    What each control may be is checked by :func:`~auto_voice.inference.controls.controls_from`,
    as for the command line.
    """

    def __init__(
        self,
        voice: Annotated[
            str,
            Form(max_length=80, description="A stored voice; or send `reference` instead."),
        ] = "",
        semitones: Annotated[float, _number("semitones")] = Controls.semitones,
        keep_pitch: Annotated[
            bool, Form(description="Do not move the pitch to the voice's.")
        ] = False,
        singing: Annotated[bool, Form(description=CONTROLS["singing"].help)] = False,
        pitch_range: Annotated[
            str, Form(max_length=20, description=CONTROLS["pitch_range"].help)
        ] = str(Controls.pitch_range),
        formants: Annotated[float, _number("formants")] = Controls.formants,
        strength: Annotated[float, _number("strength")] = Controls.strength,
        energy: Annotated[float, _number("energy")] = Controls.energy,
        breathiness: Annotated[float, _number("breathiness")] = Controls.breathiness,
        loudness: Annotated[str, Form(max_length=20, description=CONTROLS["loudness"].help)] = "",
        denoise_db: Annotated[float, _number("denoise_db")] = Controls.denoise_db,
        trim: Annotated[bool, Form(description=CONTROLS["trim"].help)] = False,
        format: Annotated[Format, Form(description="File format of the result.")] = "wav",
        subtype: Annotated[
            str, Form(max_length=20, description="Sample coding, e.g. pcm_24; or bits: 16, 24, 32f")
        ] = "",
        measure: Annotated[
            bool,
            Form(description="Also measure the speaker similarity, and the words that were kept."),
        ] = False,
        allow_truncated: AllowTruncated = False,
    ) -> None:
        self.voice = voice
        self.format = format
        self.subtype = subtype or None
        self.measure = measure
        self.allow_truncated = allow_truncated
        chosen: dict[str, Any] = {
            "semitones": semitones,
            "match_pitch": not keep_pitch,
            "singing": singing,
            "pitch_range": pitch_range,
            "formants": formants,
            "strength": strength,
            "energy": energy,
            "breathiness": breathiness,
            "denoise_db": denoise_db,
            "trim": trim,
        }
        self.controls = chosen | ({"loudness": loudness} if loudness else {})

    def request(self) -> dict[str, Any]:
        """The checked fields, as a worker reads them.

        Raises:
            AudioOutputError: the format has no such coding.
            ConfigError: a control that cannot be.
        """
        try:
            controls_from(self.controls)
        except ConfigError as error:
            error.http_status = 422
            raise
        choose_encoding(Path("result"), self.format, self.subtype)
        return {
            "voice": self.voice,
            "controls": self.controls,
            "format": self.format,
            "subtype": self.subtype,
            "measure": self.measure,
            "allow_truncated": self.allow_truncated,
        }


async def check_fields(request: Request) -> None:
    """Refuse form fields that the request's route does not read, and a second one of a kind.

    Raises:
        ServerError: 422; a misspelt option would else be ignored without a word.
    """
    if not request.headers.get("content-type", "").startswith(_FORMS):
        return
    route = request.scope.get("route")
    params = _body_params(route.dependant) if isinstance(route, APIRoute) else []
    several = {
        param.alias: get_origin(param.field_info.annotation) is list
        for param in params
        if isinstance(param.field_info, FormField)
    }
    if not several:
        return
    sent = Counter(name for name, _ in (await request.form()).multi_items())
    for name, count in sent.items():
        if name not in several:
            close = get_close_matches(name, several, 1)
            meant = f"; did you mean {close[0]}?" if close else "."
            raise ServerError(
                f"There is no field {name[:80]!r}{meant} Known are {', '.join(several)}.", 422
            )
        if count > 1 and not several[name]:
            advice = "; send several recordings to /v1/jobs" if name == "source" else ""
            raise ServerError(
                f"The field {name} was sent {count} times and is taken once{advice}.", 422
            )


def _body_params(dependant: Dependant) -> list[Any]:
    inner = [param for each in dependant.dependencies for param in _body_params(each)]
    return [*dependant.body_params, *inner]


_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")


def sentence_of(problem: Mapping[str, Any]) -> str:
    """One validation error of pydantic as a sentence."""
    where = ".".join(str(part) for part in problem["loc"][1:] or problem["loc"])
    limits = problem.get("ctx", {})
    kind = problem["type"]
    if kind == "missing":
        return f"The field {where} is missing; send it."
    rule = {
        "less_than_equal": f"must be at most {limits.get('le')}",
        "greater_than_equal": f"must be at least {limits.get('ge')}",
        "string_too_long": f"must have at most {limits.get('max_length')} characters",
        "string_too_short": f"must have at least {limits.get('min_length')} characters",
        "literal_error": f"must be one of {_listed(limits.get('expected', ''))}",
        "float_parsing": "must be a number",
        "int_parsing": "must be a whole number",
        "finite_number": "must be a finite number",
        "bool_parsing": "must be true or false",
        "extra_forbidden": "is not known",
        "json_invalid": "is not valid JSON",
    }.get(kind)
    if rule is None:
        return f"{where}: {problem['msg']}."
    given = problem.get("input")
    shown = f", not {given!r}" if isinstance(given, (str, int, float)) else ""
    return f"{where} {rule}{shown if len(shown) < 60 else ''}."


def _listed(expected: str) -> str:
    return expected.replace("'", "").replace(" or ", ", ")
