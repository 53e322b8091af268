"""Settings of a server: its address, its tokens and its limits."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from auto_voice.errors import ConfigError
from auto_voice.settings import user_folder

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
# Characters of a token.
SHORTEST_TOKEN = 16


@dataclass(frozen=True)
class ServerSettings:
    """All settings of a server but those of its models.

    Attributes:
        host: address to bind; a token is required unless it is loopback.
        port: 0 takes a free one.
        tokens: bearer tokens, any of which lets a client in; none are needed on loopback.
        data_dir: queue, uploads and results, as far as they are not elsewhere.
        database: URL of the PostgreSQL database of jobs that several servers and workers share; ""
            keeps them in SQLite in ``data_dir``.
        files: folder or URL of fsspec of the uploads, results and voices; "" for ``data_dir``.
        allow_hosts: further names under which clients reach the server.
        allow_origins: other web sites whose pages may call it (``https://host[:port]``).
        workers: conversions at the same time, on one set of models; 0 leaves them to other
            processes, which needs a database.
        direct_waiting: direct requests that may wait, of all clients together.
        direct_waiting_client: of one client.
        queue_items: recordings that may wait in jobs, of all clients together.
        queue_items_client: of one client.
        uploads_at_once: requests whose body is being read, of all clients together.
        uploads_at_once_client: of one client.
        upload_mb: of one request.
        uploads_mb: of all requests that are being answered; never less than one may have.
        upload_stall_seconds: longest pause within an upload.
        upload_least_rate: bytes per second on average that an upload must come with.
        upload_seconds: for one upload to come.
        batch_items: recordings of one job.
        direct_seconds: of audio that is answered directly.
        longest_seconds: of audio in a job.
        live_streams: live conversions at the same time, of all clients together.
        live_streams_client: of one client.
        reference_seconds: of all references of a request together.
        reference_items: how many those may be.
        decode_seconds: of work that decoding one upload may take.
        keep_hours: hours to keep results after they were made.
        keep_mb: and before that, oldest first, when they take more than this.
        grace_seconds: for running work when the server stops; what is not done by then goes back
            to the queue.
        warm: load the models before the first request.
        mirror_fetch: fetch files of the catalog that other machines ask for and that are not here.
        trusted_proxies: addresses whose ``X-Forwarded-*`` headers are believed.
    """

    data_dir: Path
    database: str = field(default="", repr=False)
    files: str = field(default="", repr=False)
    host: str = "127.0.0.1"
    port: int = 8000
    tokens: tuple[str, ...] = field(default=(), repr=False)
    allow_hosts: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    workers: int = 1
    direct_waiting: int = 8
    direct_waiting_client: int = 4
    queue_items: int = 200
    queue_items_client: int = 100
    uploads_at_once: int = 16
    uploads_at_once_client: int = 4
    upload_mb: int = 500
    uploads_mb: int = 2000
    upload_stall_seconds: float = 30.0
    upload_least_rate: float = 16_000.0
    upload_seconds: float = 1800.0
    batch_items: int = 100
    direct_seconds: float = 60.0
    longest_seconds: float = 3 * 3600.0
    live_streams: int = 2
    live_streams_client: int = 1
    reference_seconds: float = 300.0
    reference_items: int = 20
    decode_seconds: float = 120.0
    keep_hours: float = 24.0
    keep_mb: int = 2000
    grace_seconds: float = 30.0
    warm: bool = False
    mirror_fetch: bool = False
    trusted_proxies: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.tokens and not self.is_loopback:
            raise ConfigError(
                f"{self.host} can be reached from other machines, so a token is needed; add "
                "--token-file FILE, or bind 127.0.0.1."
            )
        for token in self.tokens:
            if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable():
                raise ConfigError(
                    f"a token needs at least {SHORTEST_TOKEN} printable ASCII characters; make one "
                    'with: python3 -c "import secrets; print(secrets.token_urlsafe(32))"'
                )
        for origin in self.allow_origins:
            if not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
                raise ConfigError(
                    f"{origin} is no origin; write it as https://host or https://host:port."
                )
        if self.files and not self.database:
            raise ConfigError(
                "--files is where several servers and workers share their files, so it needs "
                "--database, too; a server alone keeps them in --data-dir."
            )
        least: Mapping[str, float] = {
            "workers": 0 if self.database else 1,
            "direct_waiting": 1,
            "direct_waiting_client": 1,
            "queue_items": 1,
            "queue_items_client": 1,
            "uploads_at_once": 1,
            "uploads_at_once_client": 1,
            "upload_mb": 1,
            "batch_items": 1,
            "live_streams": 0,
            "live_streams_client": 0,
            "keep_hours": 0,
            "keep_mb": 1,
        }
        for name, smallest in least.items():
            if not getattr(self, name) >= smallest:
                raise ConfigError(f"{name} must be at least {smallest:g}.")

    @property
    def is_loopback(self) -> bool:
        if self.host in LOOPBACK_NAMES:
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def upload_bytes(self) -> int:
        return self.upload_mb * 1_000_000

    @property
    def uploads_bytes(self) -> int:
        return max(self.uploads_mb, self.upload_mb) * 1_000_000


def default_data_dir() -> Path:
    """The server's folder among what the platform keeps for this user."""
    return user_folder("server")
