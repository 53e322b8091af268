"""``autovoice serve``."""

from __future__ import annotations

import errno
import logging
import os
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from auto_voice.cli.options import make_pipeline, model_options
from auto_voice.errors import ConfigError, MissingDependencyError


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535))
@click.option("--token", "tokens", multiple=True, help="Let in who knows it; repeat for more.")
@click.option(
    "--token-file",
    "token_files",
    multiple=True,
    type=click.Path(path_type=Path),
    help="The same from a file, one a line: not seen in the list of processes.",
)
@click.option("--data-dir", type=click.Path(path_type=Path), help="Queue, uploads and results.")
@click.option("--voice-dir", type=click.Path(path_type=Path), help="Enrolled voices.")
@click.option("--allow-host", multiple=True, metavar="NAME", help="A name of this server.")
@click.option("--allow-origin", multiple=True, metavar="ORIGIN", help="A web site that may call.")
@click.option("--trust-proxy", multiple=True, metavar="IP", help="Believe its X-Forwarded-For.")
@click.option("--workers", default=1, show_default=True, help="Conversions at the same time.")
@click.option("--queue", default=200, show_default=True, help="Recordings that may wait in jobs.")
@click.option("--waiting", default=8, show_default=True, help="Direct requests that may wait.")
@click.option("--upload-mb", default=500, show_default=True, help="Largest request.")
@click.option("--direct-seconds", default=60.0, show_default=True, help="Longest direct audio.")
@click.option("--longest-seconds", default=10800.0, show_default=True, help="Longest audio.")
@click.option("--keep-hours", default=24.0, show_default=True, help="Results live so long.")
@click.option("--keep-mb", default=2000, show_default=True, help="Results may take so much.")
@click.option("--grace", default=30.0, show_default=True, help="Seconds for work at the stop.")
@click.option("--warm", is_flag=True, help="Load the models before the first request.")
@click.option(
    "--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True
)
@model_options
def serve(
    host: str,
    port: int,
    tokens: tuple[str, ...],
    token_files: tuple[Path, ...],
    data_dir: Path | None,
    voice_dir: Path | None,
    allow_host: tuple[str, ...],
    allow_origin: tuple[str, ...],
    trust_proxy: tuple[str, ...],
    workers: int,
    queue: int,
    waiting: int,
    upload_mb: int,
    direct_seconds: float,
    longest_seconds: float,
    keep_hours: float,
    keep_mb: int,
    grace: float,
    warm: bool,
    log_format: str,
    mock: bool,
    **models: Any,
) -> None:
    """Answer an HTTP API and show a web page that convert recordings.

    \b
    autovoice serve                                  # http://127.0.0.1:8000
    autovoice serve --warm --workers 2
    autovoice serve --host 0.0.0.0 --token-file token.txt

    Other machines reach it only with a token.
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise MissingDependencyError(
            f'{error.name} is not installed; run: pip install "auto-voice[server]"'
        ) from error
    from auto_voice.server import Engine, ServerSettings, create_app
    from auto_voice.server.connections import PatientProtocol
    from auto_voice.server.logs import set_up_logs
    from auto_voice.server.settings import default_data_dir

    settings = ServerSettings(
        data_dir=data_dir or default_data_dir(),
        host=host,
        port=port,
        tokens=(*tokens, *read_tokens(token_files)),
        allow_hosts=tuple(name.lower() for name in allow_host),
        allow_origins=allow_origin,
        trusted_proxies=trust_proxy,
        workers=workers,
        queue_items=queue,
        queue_items_client=max(1, queue // 2),
        direct_waiting=waiting,
        direct_waiting_client=max(1, waiting // 2),
        upload_mb=upload_mb,
        direct_seconds=direct_seconds,
        longest_seconds=longest_seconds,
        keep_hours=keep_hours,
        keep_mb=keep_mb,
        grace_seconds=grace,
        warm=warm,
    )
    pipeline = make_pipeline(mock, quiet=True, **models)
    engine = Engine(pipeline, voice_dir, evaluator_of(pipeline.registry))
    set_up_logs(log_format, min(logging.INFO, logging.getLogger("auto_voice").level))
    listening = listen(host, port)
    app = create_app(settings, engine)
    # Uploads are kept there while they come in; the usual place may be the machine's memory.
    tempfile.tempdir = str(settings.data_dir)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            http=PatientProtocol,
            ws="none",
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
    server.run([listening])


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
            raise ConfigError(f"the token file {path} cannot be read: {error}.") from error
        if not lines:
            raise ConfigError(f"the token file {path} is empty; write one token a line.")
        found += lines
    return found


def evaluator_of(registry: Any) -> Any:
    """What judges conversions for the server, made when first asked; None where not installed."""
    from importlib.util import find_spec

    if not registry.use_mock and find_spec("faster_whisper") is None:
        return None
    from auto_voice.cli.judging import PairJudge

    return PairJudge(registry)
