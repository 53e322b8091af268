"""Loopback download speed of the model loader beside what bounds it and beside other downloaders.

    python benchmarks/download.py [--megabytes 377] [--rounds 5]

Prints megabytes per second (median of interleaved rounds) and the ratio to the model loader. The
server runs in its own process and sends with sendfile, so it costs almost nothing. Rows that do
not hash or sync by themselves say so: the model loader hashes, forces to disk and installs.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import re
import shutil
import signal
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from auto_voice.models.registry.catalog import ModelFile, ModelVersion

_RANGE = re.compile(rb"range: bytes=(\d+)-", re.IGNORECASE)


def serve(path: Path, link: Connection) -> None:
    """Answers every request with the file, from the offset of its Range."""
    listener = socket.create_server(("127.0.0.1", 0))
    link.send(listener.getsockname()[1])
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_answer, args=(connection, path), daemon=True).start()


def _answer(connection: socket.socket, path: Path) -> None:
    with connection, path.open("rb") as file:
        request = b""
        while b"\r\n\r\n" not in request:
            chunk = connection.recv(1 << 16)
            if not chunk:
                return
            request += chunk
        size = path.stat().st_size
        match = _RANGE.search(request)
        start = int(match[1]) if match else 0
        head = f"HTTP/1.1 {206 if start else 200} OK\r\nContent-Length: {size - start}\r\n"
        head += f"Content-Range: bytes {start}-{size - 1}/{size}\r\n" if start else ""
        head += 'ETag: "bench"\r\nConnection: close\r\n\r\n'
        try:
            connection.sendall(head.encode())
            if not request.startswith(b"HEAD"):
                connection.sendfile(file, offset=start)
        except OSError:
            return


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    os.fsync(descriptor)
    os.close(descriptor)


def version_of(url: str, sha256: str, size: int) -> ModelVersion:
    file = ModelFile("weights.bin", ((url,),), sha256, size)
    return ModelVersion("bench", "1", "vocoder", "bench", (file,), "MIT")


def ours(url: str, source: Path, folder: Path, sha256: str) -> None:
    from auto_voice.models.model_loader import ModelLoader
    from auto_voice.models.registry.store import ModelStore

    with ModelLoader(ModelStore(folder), show_progress=False) as loader:
        loader.ensure(version_of(url, sha256, source.stat().st_size))


def copy_and_hash(url: str, source: Path, folder: Path, sha256: str) -> None:
    digest = hashlib.sha256()
    with source.open("rb") as file, (folder / "copy").open("wb") as out:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            out.write(chunk)
    sync(folder / "copy")
    assert digest.hexdigest() == sha256


def raw_socket(url: str, source: Path, folder: Path, sha256: str) -> None:
    host, _, port = url.split("/")[2].partition(":")
    digest = hashlib.sha256()
    view = memoryview(bytearray(1 << 20))
    with socket.create_connection((host, int(port))) as peer, (folder / "raw").open("wb") as out:
        peer.sendall(b"GET / HTTP/1.1\r\n\r\n")
        body = peer.recv(1 << 16).partition(b"\r\n\r\n")[2]
        digest.update(body)
        out.write(body)
        while count := peer.recv_into(view):
            digest.update(view[:count])
            out.write(view[:count])
    sync(folder / "raw")
    assert digest.hexdigest() == sha256


def client_alone(url: str, source: Path, folder: Path, sha256: str) -> None:
    import httpx2

    with httpx2.stream("GET", url) as response:
        for _ in response.iter_raw():
            pass


def hub(url: str, source: Path, folder: Path, sha256: str) -> None:
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    with (folder / "hub").open("wb") as out:
        http_get(url, out, expected_size=source.stat().st_size)


def hub_hashed(url: str, source: Path, folder: Path, sha256: str) -> None:
    hub(url, source, folder, sha256)
    sync(folder / "hub")
    with (folder / "hub").open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    assert digest.hexdigest() == sha256


def pooch(url: str, source: Path, folder: Path, sha256: str) -> None:
    import pooch as library

    library.get_logger().setLevel("ERROR")
    library.retrieve(url, known_hash=f"sha256:{sha256}", path=folder, fname="pooch")


ROWS: dict[str, Callable[[str, Path, Path, str], None]] = {
    "model loader (hash, fsync, install)": ours,
    "local copy + sha256 + fsync": copy_and_hash,
    "bare socket + sha256 + fsync": raw_socket,
    "httpx2 alone (nothing kept)": client_alone,
    "huggingface_hub http_get (no hash, no fsync)": hub,
    "huggingface_hub http_get + sha256 + fsync": hub_hashed,
    "pooch (hash, no fsync)": pooch,
}


def measure(url: str, source: Path, sha256: str, rounds: int, base: Path) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in ROWS}
    # One round more than asked: the first pays for imports and the page cache.
    for turn in range(rounds + 1):
        for name, run in ROWS.items():
            folder = Path(tempfile.mkdtemp(dir=base))
            start = time.perf_counter()
            try:
                run(url, source, folder, sha256)
            except ImportError:
                continue
            finally:
                elapsed = time.perf_counter() - start
                shutil.rmtree(folder)
            if turn:
                seconds[name].append(elapsed)
    size = source.stat().st_size / 1e6
    return {name: size / statistics.median(times) for name, times in seconds.items() if times}


def refetched_after_kill(url: str, source: Path, sha256: str, base: Path) -> int:
    """Bytes transferred twice when a download is killed half-way with SIGKILL."""
    folder = Path(tempfile.mkdtemp(dir=base))
    partial = folder / ".partial" / f"{sha256}.part"
    process = multiprocessing.get_context("spawn").Process(
        target=ours, args=(url, source, folder, sha256)
    )
    process.start()
    size = source.stat().st_size
    while process.is_alive() and (not partial.exists() or partial.stat().st_size < size // 2):
        time.sleep(0.0005)
    taken = partial.stat().st_size if partial.exists() else 0
    if process.pid is not None and process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    kept = partial.stat().st_size if partial.exists() else size
    ours(url, source, folder, sha256)
    shutil.rmtree(folder)
    # What had reached the process but not the disk is at most what lay in its socket buffer.
    return max(0, taken - kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=377)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    base = Path(tempfile.mkdtemp())
    source = base / "source.bin"
    digest = hashlib.sha256()
    with source.open("wb") as file:
        for _ in range(options.megabytes):
            chunk = os.urandom(1_000_000)
            digest.update(chunk)
            file.write(chunk)
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(
        target=serve, args=(source, there), daemon=True
    )
    server.start()
    url = f"http://127.0.0.1:{here.recv()}/weights.bin"
    try:
        speeds = measure(url, source, digest.hexdigest(), options.rounds, base)
        own = speeds[next(iter(ROWS))]
        print(f"{options.megabytes} MB, {options.rounds} rounds, load {os.getloadavg()[0]:.1f}")
        for name, speed in speeds.items():
            print(f"{name:46s} {speed:7.0f} MB/s   loader is {own / speed:5.2f} x")
        lost = refetched_after_kill(url, source, digest.hexdigest(), base)
        print(f"{'kill -9 half-way: bytes fetched twice':46s} {lost:7d} B")
    finally:
        server.terminate()
        server.join()
        shutil.rmtree(base)


if __name__ == "__main__":
    main()
