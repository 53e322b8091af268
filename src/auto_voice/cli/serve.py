"""``autovoice serve`` and ``autovoice worker``."""

from __future__ import annotations

import errno
import logging
import math
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from auto_voice.cli.options import make_pipeline, model_options
from auto_voice.errors import ConfigError, MissingDependencyError, install_hint, reason
from auto_voice.settings import get_settings

if TYPE_CHECKING:
    from auto_voice.evaluation.judges import Judges
    from auto_voice.inference.voice_conversion_pipeline import VoiceConversionPipeline
    from auto_voice.models.model_registry import ModelRegistry
    from auto_voice.server import Engine, ServerSettings


_SHARED = (
    click.option(
        "--database",
        metavar="URL",
        help="PostgreSQL database that servers and workers share: postgresql://USER@HOST/NAME, "
        "with the password in PGPASSWORD.",
    ),
    click.option(
        "--files",
        metavar="URL",
        help="Where they share uploads, results and voices: a folder that all of them mount, or a "
        "URL of fsspec such as s3://BUCKET/PREFIX.",
    ),
    click.option(
        "--data-dir",
        type=click.Path(path_type=Path),
        help="Folder of the queue, uploads and results.",
    ),
    click.option(
        "--voice-dir", type=click.Path(path_type=Path), help="Folder of the voice library."
    ),
    click.option(
        "--grace",
        default=30.0,
        show_default=True,
        help="Seconds that running work gets when the server stops.",
    ),
    click.option("--warm", is_flag=True, help="Load the models before the first request."),
    click.option(
        "--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True
    ),
)


def shared_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options of every process that does jobs."""
    for option in reversed(_SHARED):
        command = option(command)
    return command


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535))
@click.option(
    "--token",
    "tokens",
    multiple=True,
    help="A bearer token that clients must send; repeat for more.",
)
@click.option(
    "--token-file",
    "token_files",
    multiple=True,
    type=click.Path(path_type=Path),
    help="File of bearer tokens, one a line, which the list of processes does not show.",
)
@click.option(
    "--allow-host",
    multiple=True,
    metavar="NAME",
    help="A host name under which clients reach the server.",
)
@click.option(
    "--allow-origin",
    multiple=True,
    metavar="ORIGIN",
    help="A web site whose pages may call the API.",
)
@click.option(
    "--trust-proxy", multiple=True, metavar="IP", help="A proxy whose X-Forwarded-For is believed."
)
@click.option("--queue", default=200, show_default=True, help="Recordings that may wait in jobs.")
@click.option("--waiting", default=8, show_default=True, help="Direct requests that may wait.")
@click.option("--upload-mb", default=500, show_default=True, help="Size of the largest request.")
@click.option(
    "--direct-seconds",
    default=60.0,
    show_default=True,
    help="Longest recording that is answered directly.",
)
@click.option(
    "--longest-seconds", default=10800.0, show_default=True, help="Longest recording of a job."
)
@click.option(
    "--live-streams",
    type=click.IntRange(0),
    help="Live conversions at the same time [default: one for two cores, or one per device].",
)
@click.option("--keep-hours", default=24.0, show_default=True, help="Hours to keep results.")
@click.option(
    "--keep-mb",
    default=2000,
    show_default=True,
    help="Megabytes of results to keep; the oldest are deleted first.",
)
@click.option(
    "--mirror-fetch",
    is_flag=True,
    help="Fetch what other machines ask for as their mirror and is not here, once for all.",
)
@click.option(
    "--workers",
    type=click.IntRange(0),
    help="Conversions that run at the same time [default: one per device]; 0 leaves them to "
    "workers on other machines.",
)
@shared_options
@model_options
def serve(
    host: str,
    port: int,
    tokens: tuple[str, ...],
    token_files: tuple[Path, ...],
    allow_host: tuple[str, ...],
    allow_origin: tuple[str, ...],
    trust_proxy: tuple[str, ...],
    queue: int,
    waiting: int,
    upload_mb: int,
    direct_seconds: float,
    longest_seconds: float,
    live_streams: int | None,
    keep_hours: float,
    keep_mb: int,
    mirror_fetch: bool,
    mock: bool,
    database: str | None,
    files: str | None,
    data_dir: Path | None,
    voice_dir: Path | None,
    workers: int | None,
    grace: float,
    warm: bool,
    log_format: str,
    **models: Any,
) -> None:
    """Answer an HTTP API and show a web page that convert recordings.

    \b
    autovoice serve                                  # http://127.0.0.1:8000
    autovoice serve --warm --workers 2
    autovoice serve --host 0.0.0.0 --token-file token.txt

    Other machines reach it only with a token. Several servers share one queue with --database and
    --files, and `autovoice worker` adds machines that only work.
    """
    _check_installed()
    import uvicorn

    from auto_voice.models.runtime.sessions import threads
    from auto_voice.server import ServerSettings, create_app
    from auto_voice.server.admission import PatientProtocol
    from auto_voice.server.settings import default_data_dir

    pipelines = make_pipelines(mock, models)
    if live_streams is None:
        # One takes more than half a core, and other conversions run beside it.
        live_streams = max(len(pipelines), threads() // 2)
    shared = get_settings(database=database, files=files)
    settings = ServerSettings(
        data_dir=data_dir or default_data_dir(),
        database=shared.database,
        files=shared.files,
        host=host,
        port=port,
        tokens=(*tokens, *read_tokens(token_files)),
        allow_hosts=tuple(name.lower() for name in allow_host),
        allow_origins=allow_origin,
        trusted_proxies=trust_proxy,
        workers=len(pipelines) if workers is None else workers,
        queue_items=queue,
        queue_items_client=max(1, queue // 2),
        direct_waiting=waiting,
        direct_waiting_client=max(1, waiting // 2),
        upload_mb=upload_mb,
        direct_seconds=direct_seconds,
        longest_seconds=longest_seconds,
        live_streams=live_streams,
        live_streams_client=max(1, live_streams // 2) if live_streams else 0,
        keep_hours=keep_hours,
        keep_mb=keep_mb,
        grace_seconds=grace,
        warm=warm,
        mirror_fetch=mirror_fetch,
    )
    engine = make_engine(pipelines, settings, voice_dir)
    _set_up_logs(log_format)
    listening = listen(host, port)
    app = create_app(settings, engine)
    PatientProtocol.proxies = frozenset(trust_proxy)
    # Uploads are kept there while they come in; the usual place may be the machine's memory.
    tempfile.tempdir = str(settings.data_dir)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            http=PatientProtocol,
            # Without that package everything but /v1/live is there.
            ws="websockets-sansio" if find_spec("websockets") else "none",
            ws_max_size=1 << 20,
            ws_per_message_deflate=False,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=bool(trust_proxy),
            forwarded_allow_ips=list(trust_proxy),
            timeout_keep_alive=10,
            timeout_graceful_shutdown=max(1, int(grace)),
            h11_max_incomplete_event_size=65_536,
            limit_concurrency=1000,
        )
    )
    where = f"[{host}]" if ":" in host else host
    click.echo(f"auto_voice listens on http://{where}:{listening.getsockname()[1]}/", err=True)
    # The server raises the signal again once it has stopped; an orderly end sends the last events.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    server.run([listening])


@click.command()
@click.option(
    "--workers",
    type=click.IntRange(1),
    help="Conversions that run at the same time [default: one per device].",
)
@shared_options
@model_options
def worker(
    mock: bool,
    database: str | None,
    files: str | None,
    data_dir: Path | None,
    voice_dir: Path | None,
    workers: int | None,
    grace: float,
    warm: bool,
    log_format: str,
    **models: Any,
) -> None:
    """Do the jobs of servers on other machines, and answer nobody.

    \b
    autovoice worker --database postgresql://autovoice@db/autovoice --files /mnt/autovoice
    autovoice worker --database … --files s3://bucket/autovoice --workers 2 --warm

    It ends on Ctrl-C or SIGTERM, after the work that it can finish within --grace.
    """
    _check_installed()
    from auto_voice.server import ServerSettings
    from auto_voice.server.app import make_context
    from auto_voice.server.settings import default_data_dir

    shared = get_settings(database=database, files=files)
    if not shared.database:
        raise ConfigError(
            "a worker takes its work from a database that servers share; name it with --database "
            "postgresql://USER@HOST/NAME or AUTOVOICE_DATABASE."
        )
    pipelines = make_pipelines(mock, models)
    settings = ServerSettings(
        data_dir=data_dir or default_data_dir(),
        database=shared.database,
        files=shared.files,
        workers=len(pipelines) if workers is None else workers,
        grace_seconds=grace,
        warm=warm,
    )
    engine = make_engine(pipelines, settings, voice_dir)
    _set_up_logs(log_format)
    if warm:
        engine.warm_up()
    context = make_context(settings, engine, only_works=True)
    over = threading.Event()
    for name in ("SIGTERM", "SIGINT"):
        signal.signal(getattr(signal, name), lambda *_: over.set())
    context.workers.start()
    click.echo("auto_voice works on what servers accept; Ctrl-C ends it", err=True)
    while not over.wait(1.0):  # Windows delivers signals between two waits only
        pass
    context.workers.stop(grace)
    context.close()


def _check_installed() -> None:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"{error.name} is not installed; run: {install_hint('server')}"
        ) from error


def _set_up_logs(style: str) -> None:
    from auto_voice.server.telemetry import set_up_logs

    set_up_logs(style, min(logging.INFO, logging.getLogger("auto_voice").level))


def make_engine(
    pipelines: Sequence[VoiceConversionPipeline], settings: ServerSettings, voice_dir: Path | None
) -> Engine:
    """Models on their devices, and voices where the settings say that they are."""
    from auto_voice.server import Engine
    from auto_voice.server.files import make_voices

    return Engine(
        pipelines[0],
        make_voices(settings, voice_dir),
        evaluator_of(pipelines[0].registry),
        pipelines[1:],
    )


def make_pipelines(mock: bool, models: dict[str, Any]) -> list[VoiceConversionPipeline]:
    """A pipeline for each device that ``--device`` names and that has room for the models."""
    from auto_voice.models.runtime.devices import parse_devices, plan_workers

    first = make_pipeline(mock, quiet=True, **models)
    registry = first.registry
    general = parse_devices(registry.settings.device).general
    if len(general) == 1:
        return [first]
    devices = plan_workers(
        registry.settings.device,
        lambda: [registry.version(name) for name in first.config.models.values()],
        len(general),
    )
    return [
        make_pipeline(mock, quiet=True, **{**models, "device": device})
        for device in dict.fromkeys(devices)
    ]


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address.

    Raises:
        ConfigError: it is taken, or not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRINUSE:
            text = f"port {port} is taken; name another with --port, or 0 for any free one."
        else:
            text = f"{host}:{port} cannot be listened on: {error.strerror}."
        raise ConfigError(text) from error
    found.set_inheritable(True)
    return found


def read_tokens(paths: Sequence[Path]) -> list[str]:
    """The lines of token files.

    Raises:
        ConfigError: a file is missing or empty.
    """
    found = []
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the token file {path} cannot be read ({reason(error)}).") from error
        if not lines:
            raise ConfigError(f"the token file {path} is empty; write one token a line.")
        found += lines
    return found


def evaluator_of(registry: Any) -> Any:
    """The evaluator of the server; None where the evaluation is not installed."""
    needed = ["jiwer", "whisper_normalizer", *(() if registry.use_mock else ("faster_whisper",))]
    if any(find_spec(package) is None for package in needed):
        return None
    return PairJudge(registry)


class PairJudge:
    """One set of judges for all threads, loaded when first asked.

    Args:
        registry: loads them; a mock registry gives mock judges, and the result says so.
    """

    def __init__(self, registry: ModelRegistry) -> None:
        self._registry = registry
        self._lock = threading.Lock()
        self._judges: dict[tuple[str, ...], Judges] = {}

    def words_kept(self, source: Path, converted: Path, allow_truncated: bool) -> float:
        """1 - word error rate of what is recognised in ``converted``, not below 0."""
        from auto_voice.evaluation.metrics import word_errors
        from auto_voice.evaluation.scoring import JudgedRecording

        judges = self._loaded(("similarity", "quality", "pitch", "signal"))
        spoken = JudgedRecording(source, judges, allow_truncated=allow_truncated).text
        counts = word_errors(spoken, JudgedRecording(converted, judges).text)
        return max(0.0, 1.0 - counts.edits / counts.reference) if counts.reference else 1.0

    def pair(
        self,
        source: Path,
        targets: Sequence[Path],
        converted: Path,
        transcript: str,
        allow_truncated: bool,
    ) -> dict[str, Any]:
        """Every figure of one conversion."""
        from auto_voice.evaluation import Pair, Scorer

        judges = self._loaded(())
        scored = Scorer(judges, allow_truncated=allow_truncated).score(
            Pair("pair", source, tuple(targets), converted, transcript=transcript)
        )
        return {
            "figures": _finite(scored.values),
            "texts": dict(scored.texts),
            "models": dict(judges.pins),
            "mock": self._registry.use_mock,
        }

    def _loaded(self, without: tuple[str, ...]) -> Judges:
        from auto_voice.evaluation.judges import DEFAULT_MODELS, GROUPS, Judges, load_judges

        with self._lock:
            if without not in self._judges:
                if self._registry.use_mock:
                    roles = [r for g, rs in GROUPS.items() if g not in without for r in rs]
                    models = {role: DEFAULT_MODELS[role] for role in roles if role != "pitch"}
                    loaded: dict[str, Any] = {
                        role: self._registry.load(name) for role, name in models.items()
                    }
                    pins = {role: self._registry.resolved(name) for role, name in models.items()}
                    self._judges[without] = Judges(
                        **loaded, pins=pins, pitch="pitch" not in without
                    )
                else:
                    self._judges[without] = load_judges(self._registry, without=without)
            return self._judges[without]


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {
        name: round(float(value), 5) if math.isfinite(value) else None
        for name, value in values.items()
    }
