"""The API as methods; what the server refuses comes back as the exception that it raised there."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias, TypeVar
from urllib.parse import quote, unquote

import httpx2 as httpx
import numpy as np
from numpy.typing import NDArray

from auto_voice import errors, events
from auto_voice.errors import AutoVoiceError, BusyError, ServerError, UploadError

# A file, or a name and the bytes of one.
Sound: TypeAlias = "str | Path | tuple[str, bytes]"

# Seconds between two looks at a job, and between two tries to reach the server.
POLL_SECONDS = 0.3
RECONNECT_SECONDS = 1.0
# Bytes from which on the server's limit is asked for before they are sent.
LARGE_BYTES = 1_000_000
# Close codes of a WebSocket: what was asked cannot be, and the server is full.
UNUSABLE, TRY_AGAIN_LATER = 1008, 1013


R = TypeVar("R")


@dataclass(frozen=True)
class Conversion:
    """A converted recording.

    Attributes:
        content: the bytes of the file.
        name: what the server would call it.
        account: seconds, models, notes, timings; ``figures`` where they were asked for.
    """

    content: bytes
    name: str
    account: Mapping[str, Any]

    def save(self, path: str | Path) -> Path:
        """Write the file."""
        target = Path(path)
        target.write_bytes(self.content)
        return target


@dataclass(frozen=True)
class ItemStatus:
    """One recording of a job; ``error`` and ``result`` as the API describes them."""

    index: int
    name: str
    state: str
    progress: float
    error: Mapping[str, Any] | None = None
    result: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class JobStatus:
    """A job as it stood when the server was asked."""

    id: str
    kind: str
    state: str
    progress: float
    created: datetime
    items: tuple[ItemStatus, ...]
    started: datetime | None = None
    finished: datetime | None = None
    expires: datetime | None = None

    @property
    def is_finished(self) -> bool:
        return self.state in ("done", "failed", "cancelled")

    @staticmethod
    def of(answer: Mapping[str, Any]) -> JobStatus:
        """From the JSON of the API."""
        times: dict[str, Any] = {
            name: _time(answer[name])
            for name in ("created", "started", "finished", "expires")
            if answer.get(name)
        }
        items = tuple(known(ItemStatus, item) for item in answer["items"])
        plain = {name: answer[name] for name in ("id", "kind", "state", "progress")}
        return JobStatus(**plain, **times, items=items)


@dataclass(frozen=True)
class VoiceInfo:
    """A stored voice; ``notes`` say what is wrong with it, ``remarks`` what was done."""

    name: str
    speech_seconds: float
    encoder: str
    pitch_hz: float | None = None
    notes: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    consent: str = ""
    has_recording: bool = False


@dataclass(frozen=True)
class ModelInfo:
    """One version of a model and where it stands."""

    name: str
    version: str
    kind: str
    description: str
    licence: str
    bytes: int
    default: bool
    pinned: bool
    installed: bool
    loaded: bool
    problem: str = ""
    ram_mb: int = 0
    quantised: str = ""


def known(record: type[R], answer: Mapping[str, Any]) -> R:
    """``record`` from JSON, leaving out what a newer server may add."""
    names = {field.name for field in fields(record)}  # type: ignore[arg-type]
    values = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in answer.items()
        if name in names
    }
    return record(**values)


def _time(text: str) -> datetime:
    # fromisoformat takes "Z" only from Python 3.11 on.
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


class Client:
    """One server.

    Args:
        url: of the server.
        token: where it needs one.
        timeout_seconds: longest silence of the server; a direct conversion is silent until it is
            done.
        patience_seconds: how long to try again, as the server advises, while it is busy; looking
            (not sending) is tried again as long while the server cannot be reached.
        transport: instead of the network, for tests.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        token: str | None = None,
        *,
        timeout_seconds: float = 300.0,
        patience_seconds: float = 0.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        headers = {"authorization": f"Bearer {token}"} if token else {}
        self._patience = patience_seconds
        self._upload_mb: float | None = None
        self._http = httpx.Client(
            base_url=url.rstrip("/"),
            headers=headers,
            timeout=httpx.Timeout(timeout_seconds, connect=10.0),
            transport=transport,
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    # Converting

    def convert(
        self,
        source: Sound,
        *,
        voice: str = "",
        references: Sequence[Sound] = (),
        format: str = "wav",
        **options: Any,
    ) -> Conversion:
        """Convert a short recording and wait for it.

        Args:
            voice: a stored voice; or give ``references``.
            options: fields of ``POST /v1/convert``: semitones, keep_pitch, strength, measure…

        Raises:
            AutoVoiceError: what the server says is wrong.
        """
        fields = {"voice": voice, "format": format, **options}
        answer = self._send_files(
            "/v1/convert", fields, [("source", source), *_each("reference", references)]
        )
        account = json.loads(answer.headers.get("x-conversion", "{}"))
        return Conversion(answer.content, _file_name(answer), account)

    def live(self, voice: str, *, sample_rate: int, **options: Any) -> LiveConversion:
        """A live conversion to a stored voice.

        Args:
            sample_rate: of the samples that will be sent, Hz.
            options: ``output_rate``, ``own_voice``, ``block_ms``, ``lookahead_ms``, ``controls``
                and ``drop``, as the server's documentation describes them.

        Raises:
            MissingDependencyError: the package websockets is not installed.
            NotPermittedError: the token is wrong.
            BusyError: the server has no place for another one.
            ServerError: the server refuses what is asked, or cannot be reached.
        """
        url = str(self._http.base_url.join("v1/live")).replace("http", "ws", 1)
        request = {"voice": voice, "sample_rate": sample_rate, "format": "float32", **options}
        return LiveConversion(url, self._http.headers.get("authorization", ""), request)

    def submit(
        self,
        sources: Sequence[Sound],
        *,
        voice: str = "",
        references: Sequence[Sound] = (),
        format: str = "wav",
        key: str = "",
        **options: Any,
    ) -> JobStatus:
        """Queue recordings of any length; with the same ``key`` twice they are queued once."""
        fields = {"voice": voice, "format": format, **options}
        files = [*_each("source", sources), *_each("reference", references)]
        headers = {"idempotency-key": key} if key else {}
        return JobStatus.of(self._send_files("/v1/jobs", fields, files, headers).json())

    def job(self, job_id: str) -> JobStatus:
        """The state of a job."""
        return JobStatus.of(self._ask("GET", f"/v1/jobs/{quote(job_id, safe='')}").json())

    def jobs(self, limit: int = 20) -> list[JobStatus]:
        """Your newest jobs."""
        answer = self._ask("GET", "/v1/jobs", params={"limit": limit})
        return [JobStatus.of(job) for job in answer.json()["jobs"]]

    def wait(
        self,
        job: JobStatus | str,
        *,
        progress: Callable[[float], None] | None = None,
        within_seconds: float | None = None,
    ) -> JobStatus:
        """The job once it is finished.

        Args:
            progress: told the fraction done.
            within_seconds: raise TimeoutError after so long.
        """
        job_id = job if isinstance(job, str) else job.id
        deadline = None if within_seconds is None else time.monotonic() + within_seconds
        while True:
            found = self.job(job_id)
            if progress is not None:
                progress(found.progress)
            if found.is_finished:
                return found
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"job {job_id} is {found.state} after {within_seconds:g} s")
            time.sleep(POLL_SECONDS)

    def result(self, job: JobStatus | str, index: int | None = None) -> Conversion:
        """The sound of a job, of one of its recordings, or a zip of a batch."""
        job_id = quote(job if isinstance(job, str) else job.id, safe="")
        path = (
            f"/v1/jobs/{job_id}/result" if index is None else f"/v1/jobs/{job_id}/results/{index}"
        )
        answer = self._ask("GET", path)
        return Conversion(answer.content, _file_name(answer), {})

    def cancel(self, job: JobStatus | str) -> JobStatus:
        """Stop a job; what is finished of it stays."""
        job_id = quote(job if isinstance(job, str) else job.id, safe="")
        return JobStatus.of(self._ask("POST", f"/v1/jobs/{job_id}/cancel").json())

    def delete(self, job: JobStatus | str) -> None:
        """Delete a job and its results."""
        job_id = quote(job if isinstance(job, str) else job.id, safe="")
        self._ask("DELETE", f"/v1/jobs/{job_id}")

    # Voices

    def voices(self) -> list[VoiceInfo]:
        """The stored voices."""
        return [
            known(VoiceInfo, voice) for voice in self._ask("GET", "/v1/voices").json()["voices"]
        ]

    def voice(self, name: str) -> VoiceInfo:
        """One of them."""
        return known(VoiceInfo, self._ask("GET", _voice(name)).json())

    def enrol(
        self,
        name: str,
        references: Sequence[Sound],
        *,
        consent: str = "",
        overwrite: bool = False,
        allow_truncated: bool = False,
    ) -> VoiceInfo:
        """Keep the voice of the recordings."""
        fields = {
            "name": name,
            "consent": consent,
            "overwrite": overwrite,
            "allow_truncated": allow_truncated,
        }
        answer = self._send_files("/v1/voices", fields, _each("reference", references))
        return known(VoiceInfo, answer.json())

    def rename_voice(self, name: str, to: str) -> VoiceInfo:
        """Call a voice something else."""
        return known(VoiceInfo, self._ask("PATCH", _voice(name), json={"name": to}).json())

    def delete_voice(self, name: str) -> None:
        """Forget a voice."""
        self._ask("DELETE", _voice(name))

    def export_voice(self, name: str) -> bytes:
        """A voice as a file that ``autovoice`` takes."""
        return self._ask("GET", f"{_voice(name)}/file").content

    def import_voice(self, file: Sound, name: str = "") -> VoiceInfo:
        """Keep the voice of such a file."""
        answer = self._send_files("/v1/voices/import", {"name": name}, [("file", file)])
        return known(VoiceInfo, answer.json())

    # Models and measures

    def models(self) -> list[ModelInfo]:
        """Every version of every model."""
        return [
            known(ModelInfo, model) for model in self._ask("GET", "/v1/models").json()["models"]
        ]

    def pull_model(self, name: str, version: str | None = None) -> JobStatus:
        """Fetch a model's files."""
        return JobStatus.of(self._model("pull", name, version).json())

    def warm_model(self, name: str, version: str | None = None) -> JobStatus:
        """Load a model and run it once."""
        return JobStatus.of(self._model("warm", name, version).json())

    def unload_model(self, name: str, version: str | None = None) -> None:
        """Free its memory."""
        self._model("unload", name, version)

    def inspect(self, file: Sound, *, allow_truncated: bool = False) -> Mapping[str, Any]:
        """Length, level, noise, speech and pitch of a recording, and similar stored voices."""
        answer: Mapping[str, Any] = self._send_files(
            "/v1/inspect", {"allow_truncated": allow_truncated}, [("file", file)]
        ).json()
        return answer

    def evaluate(
        self,
        source: Sound,
        targets: Sequence[Sound],
        converted: Sound,
        transcript: str = "",
        *,
        allow_truncated: bool = False,
    ) -> Mapping[str, Any]:
        """Figures of one conversion."""
        fields = {"transcript": transcript, "allow_truncated": allow_truncated}
        files = [("source", source), *_each("target", targets), ("converted", converted)]
        answer: Mapping[str, Any] = self._send_files("/v1/evaluate", fields, files).json()
        return answer

    def server(self) -> Mapping[str, Any]:
        """Limits and abilities of the server."""
        answer: Mapping[str, Any] = self._ask("GET", "/v1/server").json()
        return answer

    # How

    def _model(self, action: str, name: str, version: str | None) -> httpx.Response:
        params = {} if version is None else {"version": version}
        return self._ask("POST", f"/v1/models/{quote(name, safe='')}/{action}", params=params)

    def _send_files(
        self,
        path: str,
        fields: Mapping[str, Any],
        files: Sequence[tuple[str, Sound]],
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        plain = {name: _text(value) for name, value in fields.items() if value not in ("", None)}
        self._check_size(sum(_size(sound) for _, sound in files))

        given = dict(headers or {})

        def send() -> httpx.Response:
            # Opened again for each try: a refused upload has been read in part.
            with ExitStack() as opened:
                parts = [(field, _part(sound, opened)) for field, sound in files]
                return self._http.post(path, data=plain, files=parts, headers=given)

        with events.span(events.Call("POST", path)) as call:
            if trace := events.traceparent():
                given["traceparent"] = trace
            answer = self._patiently(send)
            call.complete(status=answer.status_code)
        return answer

    def _check_size(self, size: int) -> None:
        """Refuse what is too large before it is sent.

        A server refuses it before it has read it, and the connection that breaks then can hide
        the server's sentence.
        """
        if size < LARGE_BYTES:
            return
        if self._upload_mb is None:
            self._upload_mb = float(self.server()["limits"]["upload_mb"])
        if size > self._upload_mb * 1e6:
            raise UploadError(
                f"The request has {size / 1e6:.0f} MB and the server takes {self._upload_mb:g} MB; "
                "send FLAC or MP3 in place of WAV, or fewer files."
            )

    def _ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        # A look changes nothing, so it can be taken again while a server restarts.
        return self._patiently(
            lambda: self._http.request(method, path, **more), again=method == "GET"
        )

    def _patiently(
        self, send: Callable[[], httpx.Response], *, again: bool = False
    ) -> httpx.Response:
        deadline = time.monotonic() + self._patience
        while True:
            try:
                return _checked(send())
            except BusyError as error:
                if time.monotonic() + error.retry_after > deadline:
                    raise
                time.sleep(error.retry_after)
            except httpx.TransportError as error:
                if again and time.monotonic() + RECONNECT_SECONDS < deadline:
                    time.sleep(RECONNECT_SECONDS)
                    continue
                if not isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
                    raise ServerError(
                        f"{self._http.base_url} was reached, but the connection broke before it "
                        f"answered ({str(error).rstrip('.') or type(error).__name__}); try again, "
                        "and look at the server's log if it happens again.",
                        503,
                    ) from error
                raise ServerError(
                    f"{self._http.base_url} cannot be reached ({error}); is the server running?",
                    503,
                ) from error


class LiveConversion:
    """A conversion that goes on while one speaks; one thread may send while another receives.

    Attributes:
        ready: what the server said at the beginning: ``latency_ms``, ``block_ms``, ``models``, …
        report: what it said at the end; empty before.
        dropped_samples: that the server left out so far because it fell behind.
    """

    def __init__(self, url: str, authorization: str, request: Mapping[str, Any]) -> None:
        try:
            from websockets.exceptions import InvalidStatus
            from websockets.sync.client import connect
        except ImportError as error:
            raise errors.MissingDependencyError(
                f"websockets is not installed; run: {errors.install_hint('live')}"
            ) from error
        headers = {"authorization": authorization} if authorization else {}
        self._open = ExitStack()
        try:
            self._socket = self._open.enter_context(
                connect(url, additional_headers=headers, compression=None, max_size=None)
            )
        except InvalidStatus as error:
            status = error.response.status_code
            if status in (401, 403):
                raise errors.NotPermittedError(
                    f"{url} refuses this client; give the server's token."
                ) from error
            raise ServerError(f"{url} answered {status}.", status) from error
        except (OSError, TimeoutError) as error:
            raise ServerError(f"{url} cannot be reached ({error}).", 503) from error
        self.report: Mapping[str, Any] = {}
        self.dropped_samples = 0
        try:
            self._say(request)
            self.ready: Mapping[str, Any] = self._message(None)
        except BaseException:
            self._open.close()
            raise

    def __enter__(self) -> LiveConversion:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def send(self, samples: NDArray[np.float32]) -> None:
        """The next ``(samples,)`` of the source."""
        with self._translated():
            self._socket.send(samples.astype("<f4").tobytes())

    def receive(self, timeout_seconds: float | None = None) -> NDArray[np.float32]:
        """The next ``(samples,)`` of the result; none where nothing came in that time."""
        found = self._message(timeout_seconds)
        return found if isinstance(found, np.ndarray) else np.zeros(0, np.float32)

    def change(self, voice: str | None = None, controls: Mapping[str, Any] | None = None) -> None:
        """Another voice or other controls from the next block on."""
        wanted: dict[str, Any] = {"voice": voice, "controls": controls}
        self._say({name: value for name, value in wanted.items() if value is not None})

    def finish(self) -> NDArray[np.float32]:
        """Ends the conversion and gives the rest of the result."""
        self._say({"end": True})
        parts = []
        while not self.report:
            parts.append(self.receive())
        return np.concatenate(parts)

    def _say(self, message: Mapping[str, Any]) -> None:
        with self._translated():
            self._socket.send(json.dumps(dict(message)))

    def _message(self, timeout: float | None) -> Any:
        """Samples, or the message ``ready``; others are noted and give None."""
        try:
            with self._translated():
                data = self._socket.recv(timeout=timeout)
        except TimeoutError:
            return None
        if isinstance(data, bytes):
            return np.frombuffer(data, "<f4").astype(np.float32)
        message = json.loads(data)
        if message["type"] == "error":
            with self._translated():
                self._socket.recv()  # The reason that follows says of which kind it is.
            raise ServerError(str(message["message"]))
        if message["type"] == "dropped":
            self.dropped_samples += message["samples"]
        if message["type"] == "report":
            self.report = message
        return message if message["type"] == "ready" else None

    @contextmanager
    def _translated(self) -> Iterator[None]:
        from websockets.exceptions import ConnectionClosed

        try:
            yield
        except ConnectionClosed as error:
            code = error.rcvd.code if error.rcvd else 1006
            reason = (error.rcvd.reason if error.rcvd else "") or "the connection broke"
            if code == TRY_AGAIN_LATER:
                raise BusyError(reason, 5) from error
            raise ServerError(reason, 400 if code == UNUSABLE else 503) from error


def _checked(answer: httpx.Response) -> httpx.Response:
    """The answer if it is one.

    Raises:
        AutoVoiceError: of the class that the server raised.
    """
    if answer.is_success:
        return answer
    try:
        record = answer.json()["error"]
        kind, message = str(record["type"]), str(record["message"])
    except (ValueError, KeyError, TypeError):
        kind, message = "ServerError", f"The server answered {answer.status_code}."
    if answer.status_code in (429, 503, 507) and "retry-after" in answer.headers:
        wait = answer.headers["retry-after"]
        # At least a second: a busy server that says 0 is not to be asked without a pause.
        seconds = max(1, int(wait)) if wait.isdigit() else 1
        raise BusyError(message, seconds, answer.status_code)
    found = getattr(errors, kind, None)
    if not (isinstance(found, type) and issubclass(found, AutoVoiceError)):
        raise ServerError(message, answer.status_code)
    if issubclass(found, ServerError):
        raise (
            ServerError(message, answer.status_code)
            if found is BusyError
            else found(message, answer.status_code)
        )
    if found is errors.DownloadStatusError:
        raise errors.DownloadStatusError(message, answer.status_code)
    raise found(message)


def _each(field: str, sounds: Sequence[Sound]) -> list[tuple[str, Sound]]:
    return [(field, sound) for sound in sounds]


def _part(sound: Sound, opened: ExitStack) -> tuple[str, Any]:
    if isinstance(sound, tuple):
        return sound
    path = Path(sound)
    if not path.is_file():
        raise errors.AudioNotFoundError(f"there is no file {path}; check the name.")
    return path.name, opened.enter_context(path.open("rb"))


def _size(sound: Sound) -> int:
    if isinstance(sound, tuple):
        return len(sound[1])
    path = Path(sound)
    return path.stat().st_size if path.is_file() else 0


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _voice(name: str) -> str:
    return f"/v1/voices/{quote(name, safe='')}"


def _file_name(answer: httpx.Response) -> str:
    """The file name of Content-Disposition (RFC 6266), without folders."""
    header = answer.headers.get("content-disposition", "")
    coded = re.search(r"filename\*=utf-8''([^;]+)", header, re.IGNORECASE)
    plain = re.search(r'filename="([^"]*)"', header)
    name = unquote(coded[1]) if coded else plain[1] if plain else "result"
    return Path(name.replace("\\", "/")).name or "result"
