"""Structured logs, and what happens as figures for Prometheus."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from auto_voice import events
from auto_voice.events import Event

# The id of the request that the code at hand works for; every line of the log carries it.
request_id: ContextVar[str] = ContextVar("request_id", default="")

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """Time (UTC), level, logger, message, request id, and whatever ``extra`` held."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _utc(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id.get():
            line["request_id"] = request_id.get()
        if (here := events.current()) is not None and here.sampled:
            line["trace_id"] = here.trace_id
        line |= _extra(record)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    """What ``extra`` held; libraries such as Ray mark every record with names of their own."""
    return {
        key: value
        for key, value in vars(record).items()
        if key not in _STANDARD and not key.startswith("_")
    }


def _utc(record: logging.LogRecord) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{whole}.{int(record.msecs):03d}Z"


class TextFormatter(logging.Formatter):
    """The same for people."""

    def format(self, record: logging.LogRecord) -> str:
        # The sentence of an event says the same.
        extra = {key: value for key, value in _extra(record).items() if key != "event"}
        words = [record.levelname.lower(), record.getMessage()]
        words += [f"{key}={value}" for key, value in extra.items()]
        if request_id.get():
            words.append(f"request={request_id.get()}")
        text = self.formatTime(record, "%H:%M:%S ") + " ".join(words)
        return text + ("\n" + self.formatException(record.exc_info) if record.exc_info else "")


def set_up_logs(style: str = "json", level: int = logging.INFO) -> None:
    """Send the logs of auto_voice and of uvicorn to stderr in one style, ``json`` or ``text``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    for name, least in (("auto_voice", level), ("uvicorn", max(level, logging.WARNING))):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(least)
        logger.propagate = False


# Figures

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Upper ends of the histograms' buckets: from a request for a page to a long conversion; and of
# seconds per second of audio around 1, where live use begins.
_SECONDS = (0.005, 0.02, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_RTF = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5)
_STAGES = ("pitch", "content", "convert", "vocode")


class Metrics:
    """What has happened since the server started, counted from the stream of events."""

    def __init__(self) -> None:
        # Times at which each counter began: as many lines again, which nobody asks for.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._requests = self._counter(
            "requests", "Requests answered.", "method", "route", "status"
        )
        self._request_seconds = self._histogram(
            "request_seconds", "Time to the end of the answer.", _SECONDS, "route"
        )
        self._rejected = self._counter(
            "rejected", "Requests turned away because of load.", "status"
        )
        self._work = self._counter("work", "Items of jobs that ended.", "kind", "how")
        self._work_seconds = self._histogram(
            "work_seconds", "Time that an item took.", _SECONDS, "kind"
        )
        self._audio_seconds = self._counter("audio_seconds", "Seconds of audio converted.")
        self._rtf = self._histogram("rtf", "Seconds of work per second of audio.", _RTF, "stage")
        self._stage_seconds = self._histogram(
            "stage_seconds", "Time that a stage took on a piece.", _SECONDS, "stage"
        )
        self._waiting = self._gauge("queue_items", "Items in the queue.", "state")
        self._loads = self._counter("model_loads", "Models loaded into memory.", "model")
        self._load_seconds = self._histogram(
            "model_load_seconds", "Time to load a model into memory.", _SECONDS, "model"
        )
        self._hits = self._counter("model_cache_hits", "Uses of a model that was loaded already.")
        self._evictions = self._counter(
            "model_evictions", "Models that left the memory for others.", "model"
        )
        self._download_bytes = self._counter(
            "download_bytes", "Bytes of models that were fetched.", "model"
        )
        self._damaged = self._counter(
            "verify_failures", "Files of models whose bytes were not the catalog's.", "model"
        )
        self._fallbacks = self._counter(
            "fallbacks", "Conversions in which another model stood in.", "stage"
        )
        self._loaded = self._gauge("models_loaded", "Models in memory.")
        self._memory = self._gauge("memory_bytes", "Resident memory of the process.")
        self._counts: Mapping[type, Callable[[Event, Any], None]] = {
            events.Request: self._on_request,
            events.Work: self._on_work,
            events.Conversion: self._on_conversion,
            events.Stage: self._on_stage,
            events.Load: self._on_load,
            events.Reuse: lambda event, what: self._hits.inc(),
            events.Evict: lambda event, what: self._evictions.labels(what.model).inc(),
            events.Download: self._on_download,
            events.Verify: self._on_verify,
        }

    def __call__(self, event: Event) -> None:
        """Count an event; from any thread."""
        count = self._counts.get(type(event.what))
        if count is not None:
            count(event, event.what)

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(f"autovoice_{name}", about, labels, registry=self._registry)

    def _gauge(self, name: str, about: str, *labels: str) -> Gauge:
        return Gauge(f"autovoice_{name}", about, labels, registry=self._registry)

    def _histogram(
        self, name: str, about: str, buckets: tuple[float, ...], *labels: str
    ) -> Histogram:
        return Histogram(
            f"autovoice_{name}", about, labels, buckets=buckets, registry=self._registry
        )

    def _on_request(self, event: Event, what: events.Request) -> None:
        self._requests.labels(what.method, what.route, str(what.status)).inc()
        self._request_seconds.labels(what.route).observe(event.seconds)
        if what.status in (429, 503, 507) and what.method in ("POST", "PUT", "PATCH"):
            self._rejected.labels(str(what.status)).inc()

    def _on_work(self, event: Event, what: events.Work) -> None:
        self._work.labels(what.kind, what.how).inc()
        self._work_seconds.labels(what.kind).observe(event.seconds)

    def _on_conversion(self, event: Event, what: events.Conversion) -> None:
        if not what.audio_seconds:
            return
        self._audio_seconds.inc(what.audio_seconds)
        # The times of one that was taken up again are of its end only.
        for stage in () if what.resumed else _STAGES:
            if stage in what.timings:
                self._rtf.labels(stage).observe(what.timings[stage] / what.audio_seconds)
        if not what.resumed:
            self._rtf.labels("all").observe(what.seconds_per_second)
        for stage, model in what.models.items():
            if "fallback" in model:
                self._fallbacks.labels(stage).inc()

    def _on_stage(self, event: Event, what: events.Stage) -> None:
        self._stage_seconds.labels(what.stage).observe(event.seconds)

    def _on_load(self, event: Event, what: events.Load) -> None:
        if not event.error:
            self._loads.labels(what.model).inc()
            self._load_seconds.labels(what.model).observe(event.seconds)

    def _on_download(self, event: Event, what: events.Download) -> None:
        if not event.error:
            self._download_bytes.labels(what.model).inc(what.bytes)

    def _on_verify(self, event: Event, what: events.Verify) -> None:
        if not what.ok:
            self._damaged.labels(what.model).inc()

    def page(self, queue: Mapping[str, int], models: int) -> bytes:
        """All metrics in the text format of Prometheus."""
        for state, count in queue.items():
            self._waiting.labels(state).set(count)
        self._loaded.set(models)
        self._memory.set(resident_bytes())
        return generate_latest(self._registry)


def resident_bytes() -> int:
    """Memory of this process now; where the system does not tell, its peak."""
    status = Path("/proc/self/statm")
    if status.is_file():
        return int(status.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
