"""Servers on loopback with mock models, and engines that can be held up."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn

from auto_voice.inference import PipelineConfig, VoiceConversionPipeline
from auto_voice.server import Engine


def mock_engine(folder: Path) -> Engine:
    from auto_voice.cli.serve import PairJudge

    pipeline = VoiceConversionPipeline(PipelineConfig(use_mock_models=True))
    return Engine(pipeline, folder / "voices", PairJudge(pipeline.registry))


class Live:
    """A running server: its address, its app's context, and a client."""

    def __init__(self, app: Any, port: int = 0) -> None:
        self.app = app
        self.context = app.state.context
        config = uvicorn.Config(
            app, port=port, log_config=None, access_log=False, server_header=False,
            proxy_headers=False, timeout_graceful_shutdown=2,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._socket = config.bind_socket()
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],))
        self._thread.start()
        deadline = time.monotonic() + 60
        while not self._server.started:
            assert self._thread.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()
        with contextlib.suppress(OSError):
            self._socket.close()


class Gated(Engine):
    """An engine whose conversions wait until they are let through, or are stopped."""

    def __init__(self, folder: Path) -> None:
        inner = mock_engine(folder)
        super().__init__(inner.pipeline, folder / "voices")
        self.open = threading.Event()
        self.started: list[str] = []
        self.running = 0
        self.most_running = 0
        self._count = threading.Lock()

    def convert(self, source: Any, voice: Any, controls: Any, progress: Any) -> Any:
        with self._count:
            self.started.append(f"{source.seconds:.1f}")
            self.running += 1
            self.most_running = max(self.running, self.most_running)
        try:
            while not self.open.wait(0.02):
                progress(0.5)
            return super().convert(source, voice, controls, progress)
        finally:
            with self._count:
                self.running -= 1


def until(found: Callable[[], Any], seconds: float = 60.0) -> Any:
    """What ``found`` gives once it gives something."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = found()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError("waited in vain")


@contextlib.contextmanager
def reserved_ports(count: int) -> Iterator[list[int]]:
    """Ports for servers that are started meanwhile, which no other program is given.

    On Linux, sockets that do not listen keep them, beside which a server may bind its own.
    """
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in held:
            if sys.platform == "linux":
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in held]
        if sys.platform != "linux":
            stack.close()
        yield ports
