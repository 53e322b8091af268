"""kill -9 at any moment leaves no half-installed version, and the next run goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from auto_voice.models.model_loader import ModelDownloader, ModelLoader
from auto_voice.models.registry.maintenance import prune
from auto_voice.models.registry.store import ModelStore
from fault_server import (
    Fault,
    FaultServer,
    fault_server,
    model_file,
    model_version,
    random_bytes,
)

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are made by fork")

SIZE = 4_000_000
DATA = random_bytes(SIZE)
OFFSETS = [1, 100, 65_535, 65_536, 65_537, SIZE - 1, *range(70_000, SIZE, 84_000)]
MIB = 1 << 20


class Zygote:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def send(self, job: dict[str, Any]) -> list[int]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return self.read()

    def read(self) -> list[int]:
        assert self.process.stdout is not None
        answer: list[int] = json.loads(self.process.stdout.readline())
        return answer


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    command = [sys.executable, str(Path(__file__).with_name("zygote.py"))]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield Zygote(process)
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with fault_server() as running:
        yield running


def job_of(root: Path, url: str, **more: Any) -> dict[str, Any]:
    file = model_file(DATA, url)
    return {"root": str(root), "url": url, "sha256": file.sha256, "bytes": SIZE, **more}


def wait_for(path: Path, size: int) -> None:
    deadline = time.monotonic() + 30
    while not path.exists() or path.stat().st_size < size:
        assert time.monotonic() < deadline, f"{path} did not reach {size} bytes"
        time.sleep(0.001)


def finish(root: Path, url: str, server: FaultServer) -> int:
    """Completes the install in this process; the bytes that the server had to send for it.

    Only its own requests count: the server may still be sending to a child that was killed.
    """
    before = len(server.of("w"))
    store = ModelStore(root, lock_timeout_s=20)
    version = model_version(model_file(DATA, url))
    plain = httpx2.HTTPTransport(verify=False)
    with ModelLoader(store, downloader=ModelDownloader(store, transport=plain)) as loader:
        assert loader.ensure(version)["weights.bin"].read_bytes() == DATA
    return sum(request.sent for request in server.of("w")[before:])


def test_there_are_enough_offsets() -> None:
    assert len(set(OFFSETS)) >= 50


@pytest.mark.slow
def test_a_kill_at_any_byte_installs_nothing_and_the_next_run_resumes(
    zygote: Zygote, server: FaultServer, tmp_path: Path
) -> None:
    url = server.serve("w", DATA)
    for offset in OFFSETS:
        root = tmp_path / str(offset)
        file = model_file(DATA, url)
        server.fail("w", Fault(stall_after=offset))
        (pid,) = zygote.send(job_of(root, url))
        partial = root / ".partial" / f"{file.sha256}.part"
        wait_for(partial, offset)
        os.kill(pid, signal.SIGKILL)
        assert zygote.read() == [-signal.SIGKILL]
        store = ModelStore(root)
        assert store.lookup(model_version(file)) is None
        assert store.installed() == []
        assert not (root / "toy").exists()
        refetched = finish(root, url, server) - (SIZE - offset)
        assert 0 <= refetched < MIB, offset


@pytest.mark.slow
def test_a_kill_between_any_two_disk_operations_loses_no_byte(
    zygote: Zygote, server: FaultServer, tmp_path: Path
) -> None:
    url = server.serve("w", DATA)
    moment = 0
    while True:
        root = tmp_path / str(moment)
        zygote.send(job_of(root, url, die_at=moment))
        (status,) = zygote.read()
        if status == 0:
            break
        assert status == -signal.SIGKILL
        sent = finish(root, url, server)
        # Before the body the whole file is due, after it nothing is.
        assert sent in (0, SIZE), moment
        prune(ModelStore(root), older_than_s=-60)
        assert list(root.rglob("*.tmp")) == []
        moment += 1
    # fsync of the file, of the record and of two folders, and their renames at least.
    assert moment >= 6
