"""Many processes and threads that want one version cause one transfer."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_kill_resume import DATA, SIZE, Zygote, job_of, zygote

from auto_voice.models.model_loader import DownloadProgressBar, ModelLoader
from auto_voice.models.registry.store import ModelStore
from auto_voice.progress import Progress
from fault_server import Fault, FaultServer, fault_server, model_file, model_version, random_bytes

__all__ = ["zygote"]


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with fault_server() as running:
        running.delay_s = 0.005
        yield running


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are made by fork")
def test_eight_processes_cause_one_transfer(
    zygote: Zygote, server: FaultServer, tmp_path: Path
) -> None:
    url = server.serve("w", DATA)
    zygote.send(job_of(tmp_path, url, children=8))
    assert zygote.read() == [0] * 8
    assert server.sent("w") == SIZE
    assert len(server.of("w")) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are made by fork")
def test_eight_processes_survive_a_cut_with_one_resume(
    zygote: Zygote, server: FaultServer, tmp_path: Path
) -> None:
    url = server.serve("w", DATA)
    server.fail("w", Fault(cut_after=SIZE // 2))
    zygote.send(job_of(tmp_path, url, children=8))
    assert zygote.read() == [0] * 8
    assert server.sent("w") == SIZE


@pytest.mark.parametrize("shared", [True, False], ids=["one loader", "a loader each"])
def test_thirty_two_threads_cause_one_transfer(
    server: FaultServer, tmp_path: Path, shared: bool
) -> None:
    version = model_version(model_file(DATA, server.serve("w", DATA)))
    start = threading.Barrier(32)
    loaders = [ModelLoader(ModelStore(tmp_path)) for _ in range(1 if shared else 32)]

    def ensure(number: int) -> Path:
        start.wait()
        return loaders[number % len(loaders)].ensure(version)["weights.bin"]

    with ThreadPoolExecutor(32) as pool:
        paths = set(pool.map(ensure, range(32)))
    for loader in loaders:
        loader.close()
    assert len(paths) == 1
    assert hashlib.sha256(paths.pop().read_bytes()).hexdigest() == version.files[0].sha256
    assert server.sent("w") == SIZE


def test_different_versions_are_fetched_side_by_side(server: FaultServer, tmp_path: Path) -> None:
    other = random_bytes(SIZE, seed=2)
    versions = [
        model_version(model_file(DATA, server.serve("a", DATA)), version="1.0"),
        model_version(model_file(other, server.serve("b", other)), version="2.0"),
    ]
    with ModelLoader(ModelStore(tmp_path)) as loader, ThreadPoolExecutor(2) as pool:
        list(pool.map(loader.ensure, versions))
        assert loader.store.installed() == [("toy", "1.0"), ("toy", "2.0")]


def test_versions_that_share_files_in_another_order_do_not_deadlock(
    server: FaultServer, tmp_path: Path
) -> None:
    other = random_bytes(SIZE, seed=2)
    a = model_file(DATA, server.serve("a", DATA), name="a.bin")
    b = model_file(other, server.serve("b", other), name="b.bin")
    versions = [model_version(a, b, version="1.0"), model_version(b, a, version="2.0")]
    with ModelLoader(ModelStore(tmp_path)) as loader, ThreadPoolExecutor(2) as pool:
        for paths in pool.map(loader.ensure, versions):
            assert paths["a.bin"].read_bytes() == DATA
            assert paths["b.bin"].read_bytes() == other


def test_progress_counts_every_byte_up_to_the_total(server: FaultServer, tmp_path: Path) -> None:
    heard: list[Progress] = []
    version = model_version(model_file(DATA, server.serve("w", DATA)))
    server.fail("w", Fault(cut_after=SIZE // 2))
    with ModelLoader(ModelStore(tmp_path), progress=heard.append) as loader:
        loader.ensure(version)
    assert {(told.stage, told.item, told.total) for told in heard} == {
        ("download", "toy@1.0 weights.bin", SIZE)
    }
    positions = [told.done for told in heard]
    assert positions == sorted(positions)
    assert positions[-1] == SIZE


def test_the_bar_shows_on_demand_and_is_quiet_without_a_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with DownloadProgressBar("quiet", 100) as bar:
        bar.update_to(50)
    assert capsys.readouterr().err == ""
    with DownloadProgressBar("weights", 100, enabled=True) as bar:
        bar.update_to(0)
        bar.update_to(60)
        bar.update_to(20)
        bar.update_to(100)
    shown = capsys.readouterr().err
    assert "weights" in shown
    assert "100%" in shown
