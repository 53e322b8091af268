"""Servers on loopback with mock models, and recordings to send them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile

from auto_voice.client import Client
from auto_voice.models.mock_models import mock_sample
from auto_voice.server import Engine, ServerSettings, create_app
from postgres_kit import PostgresServer, programs
from server_kit import Gated, Live, mock_engine


@pytest.fixture(scope="session")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seconds of babble."""
    path = tmp_path_factory.mktemp("sounds") / "talk.wav"
    soundfile.write(path, mock_sample(3.0, f0_hz=120.0).samples, 16000)
    return path


@pytest.fixture(scope="session")
def friend(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six seconds of higher babble."""
    path = tmp_path_factory.mktemp("sounds") / "friend.wav"
    soundfile.write(path, mock_sample(f0_hz=210.0).samples, 16000)
    return path


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Live]]:
    """Starts servers: ``serve(engine=None, **settings)``."""
    running: list[Live] = []

    def start(engine: Engine | None = None, *, on_port: int = 0, **settings: Any) -> Live:
        given = {"data_dir": tmp_path / "data", "grace_seconds": 1.0, **settings}
        app = create_app(ServerSettings(**given), engine or mock_engine(tmp_path))
        running.append(Live(app, on_port))
        return running[-1]

    yield start
    for live in running:
        live.stop()


@pytest.fixture
def live(serve: Callable[..., Live]) -> Live:
    return serve()


@pytest.fixture
def client(live: Live) -> Iterator[Client]:
    with Client(live.url, timeout_seconds=60) as found:
        yield found


@pytest.fixture
def gated(tmp_path: Path) -> Gated:
    return Gated(tmp_path)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A PostgreSQL server for the tests of one process."""
    pytest.importorskip("psycopg", reason="psycopg is not installed (extra postgres)")
    if programs() is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    server = PostgresServer()
    yield server
    server.close()


@pytest.fixture
def database(postgres_server: PostgresServer) -> str:
    """The URL of an empty PostgreSQL database."""
    return postgres_server.database()
