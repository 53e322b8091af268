"""What happens in registry, pipeline, server and client, as one stream of typed events.

Whoever wants to know subscribes: the log, the record behind ``autovoice models stats``, the
server's metrics for Prometheus, and OpenTelemetry where the user asked for it. Nothing leaves the
machine otherwise. Every event is a span, too: it knows its own id, that of the work around it and
that of the trace, as the W3C has them (https://www.w3.org/TR/trace-context/), so that a trace goes
from a client through the server into the process that does the work.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeAlias

from auto_voice.errors import ConfigError, MissingDependencyError, install_hint

log = logging.getLogger(__name__)


# What can happen. Models are named ``name@version``; no event names a voice, a file of the user or
# a client.


@dataclass(frozen=True)
class Resolve:
    """A name was resolved to what answers to it; ``served`` names a substitute and its reason."""

    name: str
    served: str


@dataclass(frozen=True)
class Download:
    """A file was fetched; ``source`` is the address that served it, without credentials."""

    model: str
    file: str
    bytes: int
    source: str = ""


@dataclass(frozen=True)
class Verify:
    """Bytes were hashed; ``ok`` says whether they are the catalog's."""

    model: str
    file: str
    bytes: int
    ok: bool = True


@dataclass(frozen=True)
class Load:
    """A model was loaded into memory."""

    model: str
    device: str = ""
    megabytes: int = 0


@dataclass(frozen=True)
class Reuse:
    """A model that was in memory already was used."""

    model: str


@dataclass(frozen=True)
class Evict:
    """A model had to leave the memory for another."""

    model: str
    wanted: str
    megabytes: int = 0


@dataclass(frozen=True)
class Fallback:
    """Another model, or a mock, answers in place of the one that was asked for."""

    model: str
    served: str
    reason: str


@dataclass(frozen=True)
class Stage:
    """A stage of a conversion ran on a piece of the recording."""

    stage: str


@dataclass(frozen=True)
class Conversion:
    """A recording was converted.

    Attributes:
        audio_seconds: of the result; 0 where the conversion failed.
        models: stage to ``name@version``, with the reason where it stands in for another.
        timings: seconds by step.
        seconds_per_second: time spent on a second of audio, without loading and cloning.
        resumed: whether it went on from an earlier run, so that the times are of its end only.
    """

    audio_seconds: float = 0.0
    models: Mapping[str, str] = field(default_factory=dict)
    timings: Mapping[str, float] = field(default_factory=dict)
    seconds_per_second: float = 0.0
    resumed: bool = False


@dataclass(frozen=True)
class Call:
    """A client sent a request to a server."""

    method: str
    path: str
    status: int = 0


@dataclass(frozen=True)
class Request:
    """The server answered a request; ``route`` is the pattern of its path."""

    method: str
    route: str = ""
    status: int = 0


@dataclass(frozen=True)
class Work:
    """A worker ended an item of a job: done, failed, cancelled or released."""

    kind: str
    how: str = ""


What: TypeAlias = (
    "Resolve | Download | Verify | Load | Reuse | Evict | Fallback | Stage | Conversion | Call"
    " | Request | Work"
)


# Where in a trace

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


@dataclass(frozen=True)
class SpanContext:
    """A place in a trace.

    Attributes:
        trace_id: 32 hexadecimal digits.
        span_id: 16 hexadecimal digits.
        sampled: whether somebody collects the trace.
    """

    trace_id: str
    span_id: str
    sampled: bool = False

    @property
    def traceparent(self) -> str:
        """The header that hands it on."""
        return f"00-{self.trace_id}-{self.span_id}-{int(self.sampled):02x}"

    @staticmethod
    def of(traceparent: str) -> SpanContext | None:
        """From a header; None if it is not a valid one, which is then ignored."""
        match = _TRACEPARENT.fullmatch(traceparent.strip())
        if match is None or not int(match[1], 16) or not int(match[2], 16):
            return None
        return SpanContext(match[1], match[2], bool(int(match[3], 16) & 1))


_here: ContextVar[SpanContext | None] = ContextVar("auto_voice_span", default=None)


def current() -> SpanContext | None:
    """Where the code at hand is in a trace: ours, or that of the program around us."""
    if (here := _here.get()) is not None:
        return here
    api = sys.modules.get("opentelemetry.trace")  # Never imported for this: it may be absent.
    if api is None:
        return None
    around = api.get_current_span().get_span_context()
    if not around.is_valid:
        return None
    sampled = bool(around.trace_flags.sampled)
    return SpanContext(f"{around.trace_id:032x}", f"{around.span_id:016x}", sampled)


def traceparent() -> str:
    """The header ``traceparent`` for others that work for us; "" if nobody collects the trace."""
    here = current()
    return here.traceparent if here is not None and here.sampled else ""


@contextmanager
def continued(header: str) -> Iterator[None]:
    """What happens inside belongs to the trace of a ``traceparent``; "" begins one anew."""
    token = _here.set(SpanContext.of(header))
    try:
        yield
    finally:
        _here.reset(token)


# The stream


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Attributes:
        what: one of the records above.
        started: seconds since the epoch.
        seconds: it took; 0 for what has no length.
        context: its own place in the trace.
        parent: span id of the work around it; "" at the root.
        error: name of the exception that ended it; "" if it went well.
    """

    what: What
    started: float
    seconds: float
    context: SpanContext
    parent: str = ""
    error: str = ""

    @property
    def name(self) -> str:
        """``load``, ``download``, …"""
        return type(self.what).__name__.lower()


@dataclass
class Span:
    """Work that is under way; ``what`` may be completed until it ends."""

    what: What
    context: SpanContext

    def complete(self, **facts: Any) -> None:
        """Set fields that were not known when it began."""
        self.what = replace(self.what, **facts)


Subscriber: TypeAlias = Callable[[Event], None]
_subscribers: tuple[Subscriber, ...] = ()
_changing = threading.Lock()


def subscribe(tell: Subscriber) -> Callable[[], None]:
    """Have ``tell`` called with every event, in the thread where it happens; ends the same."""
    global _subscribers
    with _changing:
        _subscribers = (*_subscribers, tell)

    def end() -> None:
        global _subscribers
        with _changing:
            _subscribers = tuple(other for other in _subscribers if other is not tell)

    return end


def emit(what: What, seconds: float = 0.0) -> None:
    """Tell of something that has happened and took ``seconds`` until now."""
    around = current()
    parent = around.span_id if around is not None else ""
    _tell(Event(what, time.time() - seconds, seconds, _child(around), parent))


@contextmanager
def span(what: What) -> Iterator[Span]:
    """Work that takes time: one event at its end, and the parent of all that happens inside."""
    around = current()
    under_way = Span(what, _child(around))
    token = _here.set(under_way.context)
    started, since, error = time.time(), time.perf_counter(), ""
    try:
        yield under_way
    except BaseException as raised:
        error = type(raised).__name__
        raise
    finally:
        _here.reset(token)
        seconds = time.perf_counter() - since
        parent = around.span_id if around is not None else ""
        _tell(Event(under_way.what, started, seconds, under_way.context, parent, error))


def _child(around: SpanContext | None) -> SpanContext:
    span_id = os.urandom(8).hex()
    if around is not None:
        return SpanContext(around.trace_id, span_id, around.sampled)
    return SpanContext(os.urandom(16).hex(), span_id, _export is not None)


def _tell(event: Event) -> None:
    _log(event)
    for tell in _subscribers:
        try:
            tell(event)
        except Exception:
            # Who watches must not stop the work.
            log.warning("an event could not be told", exc_info=True)


# The log

_SENTENCES: Mapping[type, tuple[int, str]] = {
    Resolve: (logging.DEBUG, "{name} is {served}"),
    Download: (logging.INFO, "fetched {file} of {model} from {source} in {seconds:.2f} s"),
    Verify: (logging.DEBUG, "hashed {file} of {model}: {ok}"),
    Load: (logging.INFO, "loaded {model} on {device} in {seconds:.3f} s"),
    Evict: (logging.INFO, "unloading {model} to make room for {wanted}"),
    Fallback: (logging.DEBUG, "{served} stands in for {model}, which is {reason}"),
    Stage: (logging.DEBUG, "{stage} took {seconds:.3f} s"),
    Conversion: (logging.INFO, "converted {audio_seconds:.1f} s in {seconds:.2f} s"),
}


def _log(event: Event) -> None:
    level, sentence = _SENTENCES.get(type(event.what), (logging.DEBUG, ""))
    if event.error or not sentence or not log.isEnabledFor(level):
        return
    facts = asdict(event.what)
    told = {"event": event.name, **facts, "seconds": round(event.seconds, 4)}
    log.log(level, sentence.format(**facts, seconds=event.seconds), extra={"event": told})


# OpenTelemetry

# Seconds that an export may take: at the end of a program somebody waits for it.
_EXPORT_SECONDS = 3.0
# Seconds between two exports of figures.
_FIGURES_SECONDS = 15.0
# Bounds in seconds of what takes from milliseconds to minutes.
_BOUNDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_export: _Export | None = None


def export_otlp(endpoint: str, service: str = "autovoice") -> None:
    """Send traces and metrics to an OpenTelemetry collector from now until the process ends.

    Args:
        endpoint: base address of OTLP over HTTP, such as ``http://127.0.0.1:4318``. The other
            variables of OpenTelemetry hold, too (``OTEL_EXPORTER_OTLP_HEADERS``,
            ``OTEL_SERVICE_NAME``, ``OTEL_RESOURCE_ATTRIBUTES``).
        service: name of the service unless a variable gives another.

    Raises:
        MissingDependencyError: the extra ``otel`` is not installed.
        ConfigError: the endpoint is no address.
    """
    global _export
    if not re.fullmatch(r"https?://[^\s@]+", endpoint):
        raise ConfigError(
            f'the OTLP endpoint must look like http://127.0.0.1:4318, not "{endpoint}"'
        )
    if _export is None:
        _export = _Export(endpoint.rstrip("/"), service)


def exported_to() -> str:
    """The endpoint that events are sent to, for worker processes; "" if they stay here."""
    return "" if _export is None else _export.endpoint


def flush_otlp() -> None:
    """Send what waits, and stop exporting."""
    global _export
    if (ended := _export) is not None:
        _export = None
        ended.close()


class _Export:
    """Events as spans and figures of the OpenTelemetry SDK."""

    def __init__(self, endpoint: str, service: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.metrics import MeterProvider
            from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise MissingDependencyError(
                f"{error.name} is not installed; run: {install_hint('otel')}"
            ) from error
        # Importing the package would be a circle.
        version = str(vars(sys.modules["auto_voice"])["__version__"])
        self.endpoint = endpoint
        _tell_trouble_once(endpoint)
        about = {"service.name": os.environ.get("OTEL_SERVICE_NAME") or service}
        self._resource = Resource.create({**about, "service.version": version})
        self._spans: Any = BatchSpanProcessor(
            OTLPSpanExporter(f"{endpoint}/v1/traces", timeout=_EXPORT_SECONDS)
        )
        reader = PeriodicExportingMetricReader(
            OTLPMetricExporter(f"{endpoint}/v1/metrics", timeout=_EXPORT_SECONDS),
            export_interval_millis=_FIGURES_SECONDS * 1000,
            export_timeout_millis=_EXPORT_SECONDS * 1000,
        )
        self._meters = MeterProvider([reader], resource=self._resource, shutdown_on_exit=False)
        meter = self._meters.get_meter("auto_voice", version)
        self._seconds = meter.create_histogram(
            "autovoice.duration", "s", "Time that an event took, by its kind and subject.",
            explicit_bucket_boundaries_advisory=list(_BOUNDS),
        )  # fmt: skip
        self._bytes = meter.create_counter(
            "autovoice.download.size", "By", "Bytes of models that were fetched."
        )
        self._audio = meter.create_counter(
            "autovoice.audio", "s", "Seconds of audio that were converted."
        )
        import atexit

        atexit.register(flush_otlp)
        self._unsubscribe = subscribe(self)

    def __call__(self, event: Event) -> None:
        self._measure(event)
        # Polls and probes that belong to nobody's trace would bury the rest.
        probe = isinstance(event.what, Request) and event.what.method in ("GET", "HEAD")
        if not event.context.sampled or isinstance(event.what, Reuse) or (
            probe and not event.parent
        ):  # fmt: skip
            return
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.trace import SpanKind, Status, StatusCode

        kinds: Mapping[type, SpanKind] = {Call: SpanKind.CLIENT, Request: SpanKind.SERVER}
        kinds = {**kinds, Work: SpanKind.CONSUMER}
        begun = int(event.started * 1e9)
        parent = replace(event.context, span_id=event.parent) if event.parent else None
        self._spans.on_end(
            ReadableSpan(
                _title(event),
                context=_sdk_context(event.context, remote=False),
                parent=None if parent is None else _sdk_context(parent, remote=True),
                resource=self._resource,
                attributes=_attributes(event),
                kind=kinds.get(type(event.what), SpanKind.INTERNAL),
                status=Status(StatusCode.ERROR, event.error) if event.error else Status(),
                start_time=begun,
                end_time=begun + int(event.seconds * 1e9),
            )
        )

    def _measure(self, event: Event) -> None:
        what = event.what
        if event.seconds and not event.error:
            subject = getattr(what, "model", "") or getattr(what, "stage", "")
            subject = subject or getattr(what, "route", "") or getattr(what, "kind", "")
            self._seconds.record(event.seconds, {"event": event.name, "subject": subject})
        if isinstance(what, Download):
            self._bytes.add(what.bytes, {"model": what.model})
        elif isinstance(what, Conversion):
            self._audio.add(what.audio_seconds)

    def close(self) -> None:
        self._unsubscribe()
        self._spans.shutdown()
        self._meters.shutdown(_EXPORT_SECONDS * 1000)


def _title(event: Event) -> str:
    what = event.what
    if isinstance(what, (Request, Call)):
        return f"{what.method} {what.route if isinstance(what, Request) else what.path}"
    subject = getattr(what, "model", "") or getattr(what, "stage", "") or getattr(what, "kind", "")
    return f"{event.name} {subject}".rstrip()


def _attributes(event: Event) -> dict[str, str | int | float | bool]:
    found: dict[str, str | int | float | bool] = {}
    for key, value in asdict(event.what).items():
        inner = value.items() if isinstance(value, Mapping) else [("", value)]
        found |= {f"autovoice.{key}{'.' if name else ''}{name}": worth for name, worth in inner}
    return found


def _sdk_context(context: SpanContext, *, remote: bool) -> Any:
    from opentelemetry.trace import SpanContext as SdkContext
    from opentelemetry.trace import TraceFlags

    flags = TraceFlags(int(context.sampled))
    return SdkContext(int(context.trace_id, 16), int(context.span_id, 16), remote, flags)


def _tell_trouble_once(endpoint: str) -> None:
    """A collector that is away is worth one line, not one for each try."""

    class Once(logging.Handler):
        told = False

        def emit(self, record: logging.LogRecord) -> None:
            if not self.told:
                self.told = True
                log.warning("telemetry does not reach %s: %s", endpoint, record.getMessage())

    library = logging.getLogger("opentelemetry")
    library.handlers[:] = [Once(logging.WARNING)]
    library.propagate = False
