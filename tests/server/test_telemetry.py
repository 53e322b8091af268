"""What happens as events: in Prometheus, in the log, in traces from a client to the worker."""

from __future__ import annotations

import gzip
import http.server
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from auto_voice import events
from auto_voice.client import Client
from auto_voice.server.telemetry import JsonFormatter, Metrics, TextFormatter
from local_server import local_server
from server_kit import until

ROOT = Path(__file__).parents[2]
try:
    has_otel = bool(find_spec("opentelemetry.sdk") and find_spec("opentelemetry.exporter.otlp"))
except ModuleNotFoundError:
    has_otel = False
needs_otel = pytest.mark.skipif(not has_otel, reason="auto-voice[otel] is not installed")
TRACE = "0af7651916cd43dd8448eb211c80319c"
HEADER = f"00-{TRACE}-b7ad6b7169203331-01"


@pytest.fixture
def seen() -> Iterator[list[events.Event]]:
    """Every event of the test."""
    found: list[events.Event] = []
    end = events.subscribe(found.append)
    yield found
    end()


@pytest.fixture
def collector() -> Iterator[Any]:
    """An OTLP receiver: ``url``, and by path what was posted, parsed."""
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
        ExportMetricsServiceRequest,
    )
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    kinds = {"/v1/traces": ExportTraceServiceRequest, "/v1/metrics": ExportMetricsServiceRequest}
    got: dict[str, list[Any]] = {path: [] for path in kinds}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            got[self.path].append(kinds[self.path].FromString(body))
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    class Collector:
        url = ""

        @staticmethod
        def spans() -> list[Any]:
            return [
                span
                for request in got["/v1/traces"]
                for resource in request.resource_spans
                for scope in resource.scope_spans
                for span in scope.spans
            ]

        @staticmethod
        def figures() -> dict[str, Any]:
            return {
                metric.name: metric
                for request in got["/v1/metrics"]
                for resource in request.resource_metrics
                for scope in resource.scope_metrics
                for metric in scope.metrics
            }

    with local_server(Handler) as port:
        Collector.url = f"http://127.0.0.1:{port}"
        yield Collector
        events.flush_otlp()


# The stream


def test_spans_nest_and_carry_what_became_of_them(seen) -> None:
    with events.continued(HEADER), events.span(events.Work("convert")) as outer:
        with pytest.raises(ValueError), events.span(events.Stage("pitch")):
            raise ValueError
        outer.complete(how="done")
    stage, work = seen
    assert (work.what, work.parent) == (events.Work("convert", "done"), "b7ad6b7169203331")
    assert (stage.parent, stage.error) == (work.context.span_id, "ValueError")
    assert {stage.context.trace_id, work.context.trace_id} == {TRACE}
    assert work.seconds >= stage.seconds > 0


@pytest.mark.parametrize(
    "header",
    ["", "00-0-1-01", HEADER.upper(), HEADER.replace("00-", "ff-"), f"00-{'0' * 32}-{'1' * 16}-01",
     f"00-{'1' * 32}-{'0' * 16}-01", "x" * 5000],
)  # fmt: skip
def test_a_header_that_is_none_begins_a_trace_anew(header, seen) -> None:
    with events.continued(header):
        assert events.traceparent() == ""
        events.emit(events.Reuse("a@1"))
    assert re.fullmatch("[0-9a-f]{32}", seen[0].context.trace_id)
    assert not seen[0].context.sampled, "nobody collects it"


def test_a_watcher_that_fails_stops_no_work(seen, caplog) -> None:
    def fail(event: events.Event) -> None:
        raise RuntimeError("no")

    end = events.subscribe(fail)
    try:
        events.emit(events.Reuse("a@1"))
    finally:
        end()
    assert len(seen) == 1
    assert "an event could not be told" in caplog.text


def test_a_program_that_traces_by_itself_is_the_parent(seen) -> None:
    trace = pytest.importorskip("opentelemetry.trace")
    context = trace.SpanContext(int(TRACE, 16), 7, False, trace.TraceFlags(1))
    with trace.use_span(trace.NonRecordingSpan(context)):
        assert events.traceparent() == f"00-{TRACE}-{7:016x}-01"
        events.emit(events.Reuse("a@1"))
    assert seen[0].parent == f"{7:016x}"


def test_the_log_tells_events_in_both_styles(caplog) -> None:
    with caplog.at_level(logging.INFO, "auto_voice"), events.continued(HEADER):
        events.emit(events.Load("a@1", "cpu", 12), 0.25)
        (record,) = caplog.records
        record._of_a_library = 1  # Ray marks the records of the whole process so.
        told = json.loads(JsonFormatter().format(record))
    assert "_of_a_library" not in told
    assert told["message"] == "loaded a@1 on cpu in 0.250 s"
    assert told["trace_id"] == TRACE
    assert told["event"] == {
        "event": "load", "model": "a@1", "device": "cpu", "megabytes": 12, "seconds": 0.25,
    }  # fmt: skip
    assert TextFormatter().format(record).endswith("loaded a@1 on cpu in 0.250 s")


# Prometheus


def test_every_query_of_the_dashboard_names_a_metric_of_the_server() -> None:
    metrics = Metrics()
    dashboard = json.loads((ROOT / "deploy" / "grafana.json").read_text(encoding="utf-8"))
    samples = {"a@1": events.Load("a@1"), "": events.Reuse("a@1")}
    for what in (
        *samples.values(),
        events.Evict("a@1", "b@1"),
        events.Download("a@1", "f", 5),
        events.Verify("a@1", "f", 5, ok=False),
        events.Stage("pitch"),
        events.Conversion(2.0, {"vocoder": "b@1 (fallback: …)"}, {"pitch": 0.1}, 0.05),
        events.Request("POST", "/v1/convert", 503),
        events.Work("convert", "done"),
    ):
        context = events.SpanContext("1" * 32, "1" * 16)
        metrics(events.Event(what, 0.0, 0.5, context))
    page = metrics.page({"running": 1}, 2).decode()
    given: dict[str, set[str]] = {}
    for name, labels in re.findall(r"^(\w+)(?:\{(.*)\})? ", page, re.MULTILINE):
        given.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
    queries = [
        target["expr"]
        for panel in dashboard["panels"]
        for target in panel["targets"]
        if "expr" in target
    ]
    queries.append(dashboard["templating"]["list"][-1]["query"]["query"])
    assert len(queries) > 15
    for query in queries:
        (metric,) = re.findall(r"autovoice_\w+", query)
        assert metric in given, query
        asked = set(re.findall(r'(\w+)(?:=~?)"', query)) - {"instance"}
        for listed in re.findall(r"by \(([^)]*)\)", query):
            asked |= set(listed.replace(" ", "").split(","))
        assert asked <= given[metric], query
    shown = {re.search(r"autovoice_\w+", query)[0] for query in queries}  # type: ignore[index]
    own = {name for name in given if not name.endswith(("_sum", "_count"))}
    assert own <= shown, "and every metric is shown"


@pytest.mark.slow
def test_the_server_counts_what_the_registry_tells(live, client, talk, friend) -> None:
    client.convert(talk, references=[friend])
    client.convert(talk, references=[friend])
    page = httpx2.get(f"{live.url}/metrics").text
    assert 'autovoice_model_loads_total{model="hifigan_universal@1.0 (mock)"} 1.0' in page
    hits = re.search(r"^autovoice_model_cache_hits_total (\S+)", page, re.MULTILINE)
    assert hits is not None
    assert float(hits[1]) >= 4
    stage = re.search(r'autovoice_stage_seconds_count\{stage="vocode"\} (\S+)', page)
    assert stage is not None
    assert float(stage[1]) >= 2


# OpenTelemetry


def test_nothing_is_exported_unless_asked(live, client, talk, friend, seen) -> None:
    client.convert(talk, references=[friend])
    assert events.exported_to() == ""
    assert not any(event.context.sampled for event in seen)
    answered = events.Request("POST", "/v1/convert", 200)
    # The server's account of a request ends a moment after its answer.
    (request,) = until(lambda: [event for event in seen if event.what == answered])
    assert request.parent == "", "no header is sent for a trace that nobody collects"


@needs_otel
def test_a_trace_goes_from_the_client_to_the_worker(
    live, client, talk, friend, collector, seen
) -> None:
    events.export_otlp(collector.url)
    with events.continued(HEADER):
        client.convert(talk, references=[friend])
    httpx2.get(f"{live.url}/v1/server")
    until(lambda: {"/v1/convert", "/v1/server"} <= {getattr(e.what, "route", "") for e in seen})
    events.flush_otlp()
    spans = {span.span_id: span for span in collector.spans()}
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE}, "and no polls"

    def chain(span: Any) -> list[str]:
        above = spans.get(span.parent_span_id)
        return [span.name, *(chain(above) if above else [])]

    chains = {tuple(chain(span)) for span in spans.values()}
    way = ("conversion", "work convert", "POST /v1/convert", "POST /v1/convert")
    assert ("stage vocode", *way) in chains
    assert any(names[0].startswith("load hifigan") for names in chains)
    (call,) = [s for s in spans.values() if s.parent_span_id.hex() == "b7ad6b7169203331"]
    inside = [s for s in spans.values() if s.parent_span_id == call.span_id]
    assert all(call.start_time_unix_nano <= s.start_time_unix_nano for s in inside)
    figures = collector.figures()
    assert figures["autovoice.audio"].sum.data_points[0].as_double == pytest.approx(3.0)
    subjects = {
        value.value.string_value
        for point in figures["autovoice.duration"].histogram.data_points
        for value in point.attributes
    }
    assert {"conversion", "stage", "vocode", "load"} <= subjects


@pytest.mark.slow
@needs_otel
@pytest.mark.slow
def test_a_server_that_is_told_to_end_sends_its_last_spans(collector, tmp_path) -> None:
    log = tmp_path / "log.txt"
    command = [sys.executable, "-m", "auto_voice.cli", "--otlp", collector.url, "serve", "--mock"]
    command += ["--port", "0", "--data-dir", str(tmp_path / "data")]
    with log.open("w") as stderr:
        process = subprocess.Popen([*command, "--voice-dir", str(tmp_path)], stderr=stderr)
    try:
        found = until(lambda: re.search(r"listens on (http://\S+)/", log.read_text()))
        answer = httpx2.get(f"{found[1]}/v1/voices", headers={"traceparent": HEADER})
        assert answer.status_code == 200
        process.terminate()
        assert process.wait(60) == 143, log.read_text()
    finally:
        process.kill()
        process.wait()
    assert any(span.name == "GET /v1/voices" for span in collector.spans())


@pytest.mark.slow
@needs_otel
def test_a_collector_that_is_away_costs_one_line(caplog) -> None:
    events.export_otlp("http://127.0.0.1:9")
    with events.span(events.Stage("pitch")):
        pass
    events.flush_otlp()
    assert caplog.text.count("telemetry does not reach http://127.0.0.1:9") == 1


@needs_otel
@pytest.mark.slow
def test_worker_processes_of_a_batch_belong_to_the_trace(
    collector, talk, friend, tmp_path, monkeypatch, capfd
) -> None:
    from auto_voice.cli.main import main

    monkeypatch.setenv("TRACEPARENT", HEADER)
    told = ["--otlp", collector.url, "batch", str(talk), "--voice", str(friend), "--mock"]
    assert main([*told, "-o", str(tmp_path / "out"), "--workers", "2"]) == 0
    events.flush_otlp()
    spans = {span.name: span for span in collector.spans()}
    assert spans["conversion"].trace_id.hex() == TRACE
    assert spans["conversion"].parent_span_id.hex() == "b7ad6b7169203331"


def test_offline_sends_nothing(capsys) -> None:
    from auto_voice.cli.main import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOVOICE_OFFLINE", "1")
        assert main(["--otlp", "http://127.0.0.1:9", "config", "show"]) == 0
    assert events.exported_to() == ""
    assert "no telemetry is sent" in capsys.readouterr().err


def test_an_endpoint_that_is_no_address_is_told(capsys) -> None:
    from auto_voice.cli.main import main

    assert main(["--otlp", "collector", "config", "show"]) == 2
    assert "http://127.0.0.1:4318" in capsys.readouterr().err


def test_a_client_in_no_trace_sends_no_header(talk) -> None:
    sent: list[httpx2.Request] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        sent.append(request)
        return httpx2.Response(200, content=b"", headers={"x-conversion": "{}"})

    with Client("http://server", transport=httpx2.MockTransport(answer)) as client:
        client.convert(talk, voice="friend")
        with events.continued(HEADER):
            client.convert(talk, voice="friend")
    first, second = (request.headers.get("traceparent", "") for request in sent)
    assert first == ""
    assert second.startswith(f"00-{TRACE}-")
    assert second != HEADER, "the call is a span of its own"


# What users are given


@needs_otel
def test_the_code_of_the_document_runs(live, talk, friend, collector, tmp_path, monkeypatch):
    text = (ROOT / "docs" / "telemetry.md").read_text(encoding="utf-8")
    first, second = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    exec(compile(first, "telemetry.md", "exec"), {})
    monkeypatch.chdir(tmp_path)
    for path in (talk, friend):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    second = second.replace("http://127.0.0.1:8000", live.url)
    second = second.replace("http://127.0.0.1:4318", collector.url)
    exec(compile(second, "telemetry.md", "exec"), {})
    events.flush_otlp()
    assert "POST /v1/convert" in {span.name for span in collector.spans()}
    listed = set(re.findall(r"`(\w+_(?:total|seconds|items|loaded|bytes)|rtf)`", text))
    page = httpx2.get(f"{live.url}/metrics").text
    given = set(re.findall(r"^# TYPE autovoice_(\w+) ", page, re.MULTILINE))
    assert listed <= given
    assert given <= listed


def test_the_observability_example_fits_together() -> None:
    folder = ROOT / "deploy" / "observability"
    read = {path.name: yaml.safe_load(path.read_text()) for path in folder.glob("*.yaml")}
    for service in read["compose.yaml"]["services"].values():
        for mount in service["volumes"]:
            assert (folder / mount.partition(":")[0]).is_file()
    receiver = read["collector.yaml"]["receivers"]["otlp"]["protocols"]["http"]["endpoint"]
    assert f"http://{receiver}" in (ROOT / "docs" / "telemetry.md").read_text(encoding="utf-8")
    tempo = read["tempo.yaml"]["distributor"]["receivers"]["otlp"]["protocols"]["http"]["endpoint"]
    exporters = read["collector.yaml"]["exporters"]
    assert exporters["otlphttp/tempo"]["endpoint"] == f"http://{tempo}"
    addresses = {one["type"]: one["url"] for one in read["datasources.yaml"]["datasources"]}
    assert exporters["otlphttp/prometheus"]["endpoint"].startswith(addresses["prometheus"])
    assert addresses["tempo"].endswith(str(read["tempo.yaml"]["server"]["http_listen_port"]))
