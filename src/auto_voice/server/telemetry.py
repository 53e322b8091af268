"""Structured logs, and metrics for Prometheus."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterable, Mapping
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
        line |= {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def _utc(record: logging.LogRecord) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{whole}.{int(record.msecs):03d}Z"


class TextFormatter(logging.Formatter):
    """The same for people."""

    def format(self, record: logging.LogRecord) -> str:
        extra = {key: value for key, value in vars(record).items() if key not in _STANDARD}
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
_REQUEST_SECONDS = (0.005, 0.02, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_RTF = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5)
_STAGES = ("pitch", "content", "convert", "vocode")


class Metrics:
    """The counters of one app; every method may be called from any thread."""

    def __init__(self) -> None:
        # Times at which each counter began: as many lines again, which nobody asks for.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        registry = self._registry = CollectorRegistry()
        self._requests = Counter(
            "autovoice_requests", "Requests answered.", ["method", "route", "status"],
            registry=registry,
        )  # fmt: skip
        self._request_seconds = Histogram(
            "autovoice_request_seconds", "Time to the end of the answer.", ["route"],
            buckets=_REQUEST_SECONDS, registry=registry,
        )  # fmt: skip
        self._rejected = Counter(
            "autovoice_rejected", "Requests turned away because of load.", ["status"],
            registry=registry,
        )  # fmt: skip
        self._work = Counter(
            "autovoice_work", "Items of jobs that ended.", ["kind", "how"], registry=registry
        )
        self._work_seconds = Histogram(
            "autovoice_work_seconds", "Time that an item took.", ["kind"],
            buckets=_REQUEST_SECONDS, registry=registry,
        )  # fmt: skip
        self._audio_seconds = Counter(
            "autovoice_audio_seconds", "Seconds of audio converted.", registry=registry
        )
        self._rtf = Histogram(
            "autovoice_rtf", "Seconds of work per second of audio.", ["stage"],
            buckets=_RTF, registry=registry,
        )  # fmt: skip
        self._waiting = Gauge(
            "autovoice_queue_items", "Items in the queue.", ["state"], registry=registry
        )
        self._loads = Counter(
            "autovoice_model_loads", "Models loaded into memory.", ["model"], registry=registry
        )
        self._hits = Counter(
            "autovoice_model_cache_hits", "Uses of a model that was loaded already.",
            registry=registry,
        )  # fmt: skip
        self._fallbacks = Counter(
            "autovoice_fallbacks", "Conversions in which another model stood in.", ["stage"],
            registry=registry,
        )  # fmt: skip
        self._loaded = Gauge("autovoice_models_loaded", "Models in memory.", registry=registry)
        self._memory = Gauge(
            "autovoice_memory_bytes", "Resident memory of the process.", registry=registry
        )
        self._known: set[str] = set()
        self._lock = threading.Lock()

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        self._requests.labels(method, route, str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def rejected(self, status: int) -> None:
        self._rejected.labels(str(status)).inc()

    def work(self, kind: str, how: str, seconds: float) -> None:
        self._work.labels(kind, how).inc()
        self._work_seconds.labels(kind).observe(seconds)

    def conversion(self, summary: Mapping[str, Any], *, whole: bool = True) -> None:
        """Count one conversion by its account.

        Args:
            whole: false where it was stopped and taken up again, so that times are of its end only.
        """
        seconds = float(summary["seconds"])
        self._audio_seconds.inc(seconds)
        for stage in _STAGES if whole else ():
            if stage in summary["timings"]:
                self._rtf.labels(stage).observe(summary["timings"][stage] / seconds)
        if whole:
            self._rtf.labels("all").observe(summary["seconds_per_second"])
        for stage, model in summary["models"].items():
            if "fallback" in model:
                self._fallbacks.labels(stage).inc()

    def models_used(self, before: Iterable[str], after: Iterable[str], wanted: int) -> None:
        """Count loads and hits by what was in memory before and after ``wanted`` models ran."""
        new = set(after) - set(before)
        with self._lock:
            for model in new:
                self._loads.labels(model).inc()
            self._hits.inc(max(0, wanted - len(new)))

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
