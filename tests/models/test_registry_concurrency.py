"""Many at once: one transfer across processes, one load across threads."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from auto_voice.errors import ModelLoadError, ModelUnavailableError
from auto_voice.models import ModelRegistry
from auto_voice.models.registry.loading import ModelCache
from local_server import local_server
from registry_kit import model_entry, tone_catalog, version_entry, write_catalog, write_tone

THREADS = 32
PROCESSES = 8


def all_at_once(count: int, call: Callable[[], object]) -> list[object]:
    """What ``call`` returns or raises in ``count`` threads that start together."""
    barrier = threading.Barrier(count)

    def one(_: int) -> object:
        barrier.wait()
        try:
            return call()
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


class Served(http.server.SimpleHTTPRequestHandler):
    """Serves bytes from memory and remembers who asked."""

    data: bytes = b""
    requests: list[str]

    def do_GET(self) -> None:
        self.requests.append(self.path)
        time.sleep(0.2)  # Long enough for the others to arrive while it is under way.
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.data)))
        self.end_headers()
        self.wfile.write(self.data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, list[str]]]:
    """A catalog whose one model comes over HTTP, and the requests that were made."""
    path = write_tone(tmp_path / "tone.wav", seconds=3)
    requests: list[str] = []
    handler = type("Handler", (Served,), {"data": path.read_bytes(), "requests": requests})
    with local_server(handler) as port:
        entry = {**version_entry(path), "sources": [f"http://127.0.0.1:{port}/tone.wav"]}
        catalog = write_catalog(tmp_path / "served.yaml", {"tone": model_entry({"1": entry})})
        yield catalog, requests


def test_threads_share_one_transfer_and_one_load(
    served: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from auto_voice.models import sample_model

    config, requests = served
    build, builds = sample_model.build, []

    def counted(*args: object) -> object:
        builds.append(threading.get_ident())
        time.sleep(0.05)
        return build(*args)

    monkeypatch.setattr(sample_model, "build", counted)
    registry = ModelRegistry(tmp_path / "models", config=config, progress=False)
    found = all_at_once(THREADS, lambda: registry.load("tone"))
    assert all(model is found[0] for model in found)
    assert found[0].sample_rate == 16000
    assert len(builds) == 1
    assert len(requests) == 1


@pytest.mark.slow
def test_processes_share_one_transfer(served: tuple[Path, list[str]], tmp_path: Path) -> None:
    config, requests = served
    code = (
        "import sys\n"
        "from auto_voice.models import ModelRegistry\n"
        "r = ModelRegistry(sys.argv[1], config=sys.argv[2], progress=False)\n"
        "print(r.load('tone').seconds)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "models"), str(config)]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(PROCESSES)
    ]
    outputs = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0] * PROCESSES, outputs
    assert [out.strip() for out, _ in outputs] == ["3.0"] * PROCESSES
    assert len(requests) == 1


def loads_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads end only in pairs that are under way at the same time."""
    together = threading.Barrier(2, timeout=30)

    def build(files: object, version: object, device: str) -> object:
        together.wait()
        return object()

    monkeypatch.setattr("auto_voice.models.sample_model.build", build)


def test_different_models_load_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads_wait_for_each_other(monkeypatch)
    registry = ModelRegistry(tmp_path / "m", config=tone_catalog(tmp_path, ("1", "2")))
    with ThreadPoolExecutor(2) as pool:
        low, high = pool.map(registry.load, ["tone@1", "tone@2"])
    assert low is not high


def test_models_that_are_installed_load_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads_wait_for_each_other(monkeypatch)
    registry = ModelRegistry(tmp_path / "m", config=tone_catalog(tmp_path, ("1", "2", "3")))
    registry.pull("tone", "1")
    registry.pull("tone", "2")
    registry.load_installed(["tone@1", "tone@2", "tone@3"])
    # What is missing is left to whoever asks for it by name.
    assert set(registry.loaded()) == {"tone@1", "tone@2"}


def test_where_no_thread_can_be_started_loads_take_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    registry = ModelRegistry(tmp_path / "m", config=tone_catalog(tmp_path, ("1", "2")))
    registry.pull("tone", "1")
    registry.pull("tone", "2")
    monkeypatch.setattr(threading.Thread, "start", full)
    registry.load_installed(["tone@1", "tone@2"])
    assert registry.load("tone", "1") is not registry.load("tone", "2")


def test_a_load_that_fails_ahead_of_time_is_told_when_the_model_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(files: object, version: object, device: str) -> object:
        raise ModelLoadError("of no use")

    monkeypatch.setattr("auto_voice.models.sample_model.build", build)
    config = tone_catalog(tmp_path, ("1", "2"))
    registry = ModelRegistry(tmp_path / "m", config=config, fallback="none")
    registry.pull("tone", "1")
    registry.pull("tone", "2")
    registry.load_installed(["tone@1", "tone@2"])
    with pytest.raises(ModelLoadError, match="of no use"):
        registry.load("tone", "1")


def test_a_failure_reaches_every_waiting_thread_and_the_next_load_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[int] = []
    registry = ModelRegistry(tmp_path / "m", config=tone_catalog(tmp_path), progress=False)

    def fail(*_: object) -> object:
        attempts.append(1)
        time.sleep(0.2)
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr("auto_voice.models.sample_model.build", fail)
        found = all_at_once(THREADS, lambda: registry.load("tone"))
    assert all(isinstance(error, ModelLoadError) for error in found)
    assert len(attempts) < THREADS
    assert registry.load("tone").sample_rate == 16000


def test_threads_that_fall_back_together_warn_once(tmp_path: Path) -> None:
    import warnings

    from auto_voice.models import FallbackWarning

    missing = version_entry(write_tone(tmp_path / "gone.wav"), "hifigan")
    config = write_catalog(
        tmp_path / "mine.yaml", {"mine": model_entry({"1": missing}, kind="vocoder")}
    )
    (tmp_path / "gone.wav").unlink()
    registry = ModelRegistry(tmp_path / "m", config=config, fallback="compact", progress=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = all_at_once(8, lambda: registry.load("mine"))
    assert all(model is found[0] for model in found)
    assert not isinstance(found[0], ModelUnavailableError)
    assert [w.category for w in caught].count(FallbackWarning) == 1


def test_a_fallback_waits_for_a_load_of_its_substitute_without_a_deadlock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from auto_voice.models import FallbackWarning, hifigan_model

    build, building = hifigan_model.build, threading.Event()

    def slow(*args: object) -> object:
        building.set()
        time.sleep(0.3)  # The other thread decides to fall back meanwhile.
        return build(*args)

    monkeypatch.setattr(hifigan_model, "build", slow)
    registry = ModelRegistry(tmp_path / "m", offline=True, fallback="compact")
    with ThreadPoolExecutor(2) as pool:
        direct = pool.submit(registry.load, "vocoder_compact")
        assert building.wait(30)
        fallen = pool.submit(registry.load_hifigan)
        with pytest.warns(FallbackWarning):
            model = fallen.result(30)
        assert model is direct.result(30)


def test_a_load_that_needs_itself_is_an_error_and_not_a_deadlock() -> None:
    cache = ModelCache()
    with pytest.raises(ModelLoadError, match="needs a itself"):
        cache.get("a", 1, lambda: cache.get("a", 1, object))


def test_the_budget_counts_loads_under_way() -> None:
    cache = ModelCache(budget_mb=100)
    cache.get("old", 60, object)
    inside, release = threading.Event(), threading.Event()

    def slow() -> object:
        inside.set()
        release.wait(30)
        return object()

    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(cache.get, "slow", 70, slow)
        assert inside.wait(30)
        assert cache.keys() == (), "old made room before the load began"
        assert cache.megabytes == 70
        release.set()
        loading.result(30)
    assert cache.keys() == ("slow",)
    assert "slow" in set(cache.keys())
    assert "old" not in set(cache.keys())
    assert not cache.drop("old")


def test_loads_side_by_side_stay_within_the_budget_once_they_are_done() -> None:
    cache = ModelCache(budget_mb=100)
    together = threading.Barrier(2)

    def load() -> object:
        together.wait(30)
        return object()

    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(cache.get, key, 70, load) for key in ("a", "b")]
        assert all(future.result(30) for future in both), "each caller has its model"
    assert len(cache.keys()) == 1
    assert cache.megabytes == 70


def test_a_model_that_is_dropped_while_it_loads_is_not_kept() -> None:
    cache = ModelCache()
    inside, release = threading.Event(), threading.Event()

    def slow() -> object:
        inside.set()
        release.wait(30)
        return object()

    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(cache.get, "slow", 1, slow)
        assert inside.wait(30)
        assert cache.loading() == ("slow",)
        assert not cache.drop("slow")
        release.set()
        assert loading.result(30) is not None
    assert cache.keys() == cache.loading() == ()
    assert cache.get("slow", 1, object) is cache.get("slow", 1, object)
