"""Servers as mirrors: what they hand out, whom they let in, and one fetch for ten machines."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from auto_voice.models import ModelRegistry
from auto_voice.models.model_loader import ModelDownloader, ModelLoader
from auto_voice.models.registry.fetchers import ARRIVED, MIRROR_POLICY, Mirrors
from auto_voice.models.registry.store import ModelStore
from auto_voice.models.registry.transfer import HttpTransfer
from auto_voice.progress import told_to
from auto_voice.server import ServerSettings, create_app
from fault_server import (
    FakeClock,
    Fault,
    FaultServer,
    fault_server,
    model_file,
    model_version,
    random_bytes,
)
from registry_kit import file_entry, model_entry, version_entry, write_catalog, write_tone
from server_kit import Live, mock_engine

DATA = random_bytes(400_000)
SHA256 = hashlib.sha256(DATA).hexdigest()
BLOB = f"v1/blobs/{SHA256}"
TOKEN = "a token of the mirror, long enough"


@pytest.fixture
def origin() -> Iterator[FaultServer]:
    with fault_server() as running:
        yield running


@pytest.fixture
def near() -> Iterator[FaultServer]:
    """A second such server, in the place of a mirror."""
    with fault_server() as running:
        yield running


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[Callable[..., Live]]:
    """Starts a server on a model folder of its own."""
    started: list[Live] = []

    def start(catalog: Path, **settings: Any) -> Live:
        folder = tmp_path / f"mirror-{len(started)}"
        folder.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AUTOVOICE_CONFIG", str(catalog))
            patch.setenv("AUTOVOICE_MODEL_DIR", str(folder / "models"))
            engine = mock_engine(folder)
            assert engine.registry.catalog
        started.append(Live(create_app(ServerSettings(folder, **settings), engine)))
        return started[-1]

    yield start
    for live in started:
        live.stop()


def loader_of(folder: Path, *mirrors: str, clock: FakeClock | None = None) -> ModelLoader:
    store = ModelStore(folder)
    asked = Mirrors(mirrors, TOKEN, HttpTransfer(MIRROR_POLICY, clock=clock))
    return ModelLoader(store, downloader=ModelDownloader(store, mirrors=asked))


def pulled(loader: ModelLoader, *sources: str) -> bytes:
    with loader:
        return loader.ensure(model_version(model_file(DATA, *sources)))["weights.bin"].read_bytes()


def tone_at(origin: FaultServer, folder: Path) -> Path:
    """A catalog whose model ``tone`` is served by ``origin``."""
    path = write_tone(folder / "tone.wav", seconds=3.0)
    url = origin.serve("tone.wav", path.read_bytes())
    entry = version_entry(path, **file_entry(path, [url]))
    return write_catalog(folder / "mine.yaml", {"tone": model_entry({"1.0": entry})})


def test_a_mirror_is_asked_before_the_public_source(origin, near, tmp_path) -> None:
    near.serve(BLOB, DATA)
    url = origin.serve("w", DATA)
    assert pulled(loader_of(tmp_path, near.url("").rstrip("/")), url) == DATA
    assert origin.seen == []
    (request,) = near.seen
    assert request.headers["authorization"] == f"Bearer {TOKEN}"


def test_a_file_of_this_machine_needs_no_mirror(near, tmp_path) -> None:
    (tmp_path / "w").write_bytes(DATA)
    assert pulled(loader_of(tmp_path / "m", near.url("")), str(tmp_path / "w")) == DATA
    assert near.seen == []


def test_what_only_the_mirror_has_left_is_had_from_it(near, tmp_path) -> None:
    near.serve(BLOB, DATA)
    gone = str(tmp_path / "gone")
    assert pulled(loader_of(tmp_path / "m", near.url("").rstrip("/")), gone) == DATA


@pytest.mark.parametrize(
    ("faults", "told", "from_origin"),
    [
        ([Fault(status=401)], "AUTOVOICE_MIRROR_TOKEN", len(DATA)),
        ([Fault(status=500), Fault(status=500)], "answered 500", len(DATA)),
        ([Fault(wrong_bytes=True)], "other bytes", len(DATA)),
        ([Fault(cut_after=300_000), Fault(cut_after=0)], "closed connection", 100_000),
        ([Fault(status=503, headers=(("Retry-After", "900"),))], "answered 503", len(DATA)),
    ],
    ids=["wrong token", "broken", "wrong bytes", "cut", "busy for long"],
)
def test_a_mirror_that_fails_costs_little_and_is_told_once(
    origin, near, tmp_path, caplog, faults, told, from_origin
) -> None:
    near.serve(BLOB, DATA)
    near.fail(BLOB, *faults)
    url = origin.serve("w", DATA)
    loader = loader_of(tmp_path, near.url("").rstrip("/"), clock=FakeClock())
    with caplog.at_level(logging.WARNING):
        assert pulled(loader, url) == DATA
        other = random_bytes(1000, seed=5)
        second = model_version(model_file(other, origin.serve("x", other)), name="second")
        assert loader.ensure(second)["weights.bin"].read_bytes() == other
    (warning,) = [r.getMessage() for r in caplog.records if "is left out" in r.getMessage()]
    assert told in warning
    assert len(near.seen) == len(faults), "and it is not asked again"
    assert origin.sent("w") == from_origin, "what a mirror sent is not fetched twice"


def test_a_mirror_that_nobody_runs_is_told_once(origin, near, tmp_path, caplog) -> None:
    url = origin.serve("w", DATA)
    near_url = "http://127.0.0.1:9"  # the port "discard", which nothing listens on
    assert pulled(loader_of(tmp_path, near_url, clock=FakeClock()), url) == DATA
    assert caplog.text.count("is left out from now on") == 1


def test_a_slow_mirror_is_left_for_the_next_source(origin, near, tmp_path, caplog) -> None:
    class Hurried(FakeClock):
        """Every look at it is eleven seconds after the last."""

        def now(self) -> float:
            self.time += 11.0
            return self.time

    near.serve(BLOB, DATA)
    url = origin.serve("w", DATA)
    loader = loader_of(tmp_path, near.url("").rstrip("/"), clock=Hurried())
    assert pulled(loader, url) == DATA
    assert "bytes a second" in caplog.text
    assert caplog.text.count("is left out from now on") == 1


def test_a_partial_that_began_elsewhere_does_not_speak_against_the_mirror(near, tmp_path) -> None:
    near.serve(BLOB, DATA)
    loader = loader_of(tmp_path, near.url("").rstrip("/"))
    loader.store.partial(SHA256).path.write_bytes(b"x" * 1000)
    assert pulled(loader, "http://127.0.0.1:9/w") == DATA


def test_a_mirror_without_the_file_stays_in_use(origin, near, tmp_path, caplog) -> None:
    url = origin.serve("w", DATA)
    loader = loader_of(tmp_path, near.url("").rstrip("/"))
    assert pulled(loader, url) == DATA
    assert not caplog.records
    other = random_bytes(1000, seed=5)
    near.serve(f"v1/blobs/{hashlib.sha256(other).hexdigest()}", other)
    loader.ensure(model_version(model_file(other, origin.url("gone")), name="second"))
    assert len(near.seen) == 2


def test_who_waits_sees_how_far_the_mirror_is(near, tmp_path) -> None:
    near.serve(BLOB, DATA)
    near.fail(BLOB, *(Fault(status=202, headers=((ARRIVED, str(n)),)) for n in (0, 100_000)))
    shown: list[int] = []
    store = ModelStore(tmp_path)
    asked = Mirrors([near.url("").rstrip("/")], "", HttpTransfer(clock=FakeClock()))
    loader = ModelLoader(store, downloader=ModelDownloader(store, mirrors=asked))
    with told_to(lambda progress: shown.append(round(progress.done))):
        assert pulled(loader, "http://127.0.0.1:9/w") == DATA
    assert 100_000 in shown
    assert shown[-1] == len(DATA)


def test_a_mirror_that_waits_without_end_is_left(origin, near, tmp_path, caplog) -> None:
    near.fail(BLOB, *[Fault(status=202, headers=((ARRIVED, "7"),))] * 1000)
    url = origin.serve("w", DATA)
    loader = loader_of(tmp_path, near.url("").rstrip("/"), clock=FakeClock())
    assert pulled(loader, url) == DATA
    assert "still waits for the file itself" in caplog.text


def test_offline_asks_no_mirror(near, tmp_path, monkeypatch) -> None:
    near.serve(BLOB, DATA)
    store = ModelStore(tmp_path)
    downloader = ModelDownloader(store, mirrors=Mirrors([near.url("")]))
    with pytest.raises(Exception, match="No source"):
        downloader.download(model_file(DATA, "http://127.0.0.1:9/w"), "toy", offline=True)
    assert near.seen == []


# The server's side


def test_a_server_hands_out_ranges_of_what_its_models_name(origin, mirror, tmp_path) -> None:
    live = mirror(tone_at(origin, tmp_path))
    registry = live.context.engine.registry
    data = registry.path("tone").read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    url = f"{live.url}/v1/blobs/{sha256}"

    whole = httpx2.get(url)
    assert whole.content == data
    assert whole.headers["etag"] == f'"{sha256}"'
    assert whole.headers["content-type"] == "application/octet-stream"

    head = httpx2.head(url)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(data))

    part = httpx2.get(url, headers={"range": "bytes=100-199", "if-range": f'"{sha256}"'})
    assert (part.status_code, part.content) == (206, data[100:200])
    assert part.headers["content-range"] == f"bytes 100-199/{len(data)}"
    assert httpx2.get(url, headers={"range": f"bytes={len(data)}-"}).status_code == 416
    assert httpx2.get(url, headers={"if-none-match": f'"{sha256}"'}).status_code == 304
    assert httpx2.post(url).status_code == 405


def test_a_server_hands_out_nothing_else(origin, mirror, tmp_path) -> None:
    live = mirror(tone_at(origin, tmp_path))
    registry = live.context.engine.registry
    path = registry.path("tone")
    version = registry.version("tone")
    made = registry.store.add_derived(
        version, "made.bin", "tone.wav", lambda target: target.write_bytes(b"made") and None
    )
    for data in (made.read_bytes(), b"unknown"):
        answer = httpx2.get(f"{live.url}/v1/blobs/{hashlib.sha256(data).hexdigest()}")
        assert answer.status_code == 404
    for odd in ("../../etc/passwd", "ABC", "0" * 63, "%2e%2e", "0" * 65):
        assert httpx2.get(f"{live.url}/v1/blobs/{odd}").status_code in (404, 422)

    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    damaged = bytearray(path.read_bytes())
    damaged[5000] ^= 1
    path.write_bytes(damaged)
    assert httpx2.get(f"{live.url}/v1/blobs/{sha256}").status_code == 404, "damage is not passed on"


def test_a_mirror_that_may_not_fetch_says_that_it_has_nothing(origin, mirror, tmp_path) -> None:
    live = mirror(tone_at(origin, tmp_path))
    (file,) = live.context.engine.registry.version("tone").files
    assert httpx2.get(f"{live.url}/v1/blobs/{file.sha256}").status_code == 404
    assert origin.seen == []


def test_a_mirror_needs_the_servers_token(origin, mirror, tmp_path, monkeypatch) -> None:
    catalog = tone_at(origin, tmp_path)
    live = mirror(catalog, tokens=(TOKEN,), mirror_fetch=True)
    (file,) = live.context.engine.registry.version("tone").files
    assert httpx2.get(f"{live.url}/v1/blobs/{file.sha256}").status_code == 401
    assert origin.seen == []

    monkeypatch.setenv("AUTOVOICE_MIRROR_TOKEN", TOKEN)
    registry = ModelRegistry(tmp_path / "mine", config=catalog, mirrors=[live.url], progress=False)
    registry.pull("tone")
    served = registry.store.metadata("tone", "1.0")["files"]["tone.wav"]["source"]
    assert served == f"{live.url}/v1/blobs/{file.sha256}"
    assert len(origin.of("tone.wav")) == 1


def test_a_mirror_that_could_not_fetch_sends_others_to_the_source(origin, mirror, tmp_path) -> None:
    catalog = tone_at(origin, tmp_path)
    live = mirror(catalog, mirror_fetch=True)
    origin.fail("tone.wav", Fault(status=404))
    registry = ModelRegistry(tmp_path / "mine", config=catalog, mirrors=[live.url], progress=False)
    assert registry.pull("tone")
    assert len(origin.of("tone.wav")) == 2, "one by the mirror, one by ourselves"


@pytest.mark.slow
def test_ten_machines_that_start_at_once_cause_one_fetch(origin, mirror, tmp_path) -> None:
    catalog = tone_at(origin, tmp_path)
    origin.delay_s = 0.5  # for each 64 kB, so that all ten come while the mirror fetches
    live = mirror(catalog, tokens=(TOKEN,), mirror_fetch=True)
    environment = {
        **os.environ,
        "AUTOVOICE_MIRRORS": live.url,
        "AUTOVOICE_MIRROR_TOKEN": TOKEN,
        "AUTOVOICE_CONFIG": str(catalog),
    }
    command = [sys.executable, "-m", "auto_voice.cli", "models", "pull", "tone", "--model-dir"]
    nodes = [
        subprocess.Popen(
            [*command, str(tmp_path / f"node-{n}")], env=environment, stderr=subprocess.PIPE
        )
        for n in range(10)
    ]
    for node in nodes:
        _, told = node.communicate(timeout=120)
        assert node.returncode == 0, told.decode()
    wanted = (tmp_path / "tone.wav").read_bytes()
    for n in range(10):
        assert (tmp_path / f"node-{n}" / "tone" / "1.0" / "tone.wav").read_bytes() == wanted
    assert len(origin.of("tone.wav")) == 1
    assert origin.sent("tone.wav") == len(wanted)
