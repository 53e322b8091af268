"""A server under 0.5, 1 and 4 times its capacity: throughput, waiting, refusals, memory.

    python benchmarks/serving.py --mock --requests 60
    python benchmarks/serving.py --source talk.wav --reference friend.wav --minutes 3

With `--minutes` the number of requests at each load is chosen so that all takes about so long.

The server runs in a process of its own and is asked over loopback. Capacity is measured first, with
one request after the other; then requests come at fixed moments, whether or not earlier ones were
answered (an open loop, so that a slow server is not spared). Each has its own loopback address out
of a few, which makes them different clients.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx2
import soundfile

from auto_voice.models.mock_models import mock_sample

ADDRESSES = [f"127.0.0.{n}" for n in range(2, 8)]
MOST_REQUESTS = 400


@dataclass(frozen=True)
class Answer:
    status: int
    seconds: float
    retry_after: str


class Load:
    """What is asked of one server."""

    def __init__(self, port: int, source: bytes, reference: bytes) -> None:
        self.lost = 0
        self._files = {"source": ("talk.wav", source), "reference": ("friend.wav", reference)}
        self._url = f"http://127.0.0.1:{port}"
        self._clients = [
            httpx2.Client(
                base_url=self._url,
                timeout=600,
                transport=httpx2.HTTPTransport(
                    local_address=address, limits=httpx2.Limits(max_connections=200)
                ),
            )
            for address in ADDRESSES
        ]

    def ask(self, n: int) -> Answer:
        started = time.monotonic()
        client = self._clients[n % len(self._clients)]
        answer = client.post("/v1/convert", files=self._files)
        if answer.status_code == 200 and not whole(answer.content):
            self.lost += 1
        return Answer(
            answer.status_code, time.monotonic() - started, answer.headers.get("retry-after", "")
        )

    def at_rate(self, per_second: float, requests: int) -> tuple[list[Answer], float]:
        """``requests`` at fixed moments; their answers and the seconds until the last."""
        started = time.monotonic()
        with ThreadPoolExecutor(min(requests, 200)) as pool:
            futures = []
            for n in range(requests):
                time.sleep(max(0.0, started + n / per_second - time.monotonic()))
                futures.append(pool.submit(self.ask, n))
            answers = [future.result() for future in futures]
        return answers, time.monotonic() - started

    def metric(self, name: str) -> float:
        for line in self._clients[0].get("/metrics").text.splitlines():
            if line.startswith(name + " "):
                return float(line.split()[1])
        return 0.0


class MemoryWatch(threading.Thread):
    """The most resident memory of a process, looked at ten times a second."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._status, self.most_mb, self._over = Path(f"/proc/{pid}/status"), 0.0, False

    def run(self) -> None:
        while not self._over:
            for line in self._status.read_text().splitlines():
                if line.startswith("VmRSS"):
                    self.most_mb = max(self.most_mb, int(line.split()[1]) / 1024)
            time.sleep(0.1)

    def stop(self) -> float:
        self._over = True
        self.join()
        return self.most_mb


def whole(content: bytes) -> bool:
    """Whether this is a sound with something in it."""
    try:
        samples, _ = soundfile.read(io.BytesIO(content))
    except soundfile.LibsndfileError:
        return False
    return len(samples) > 1000 and bool(samples.any())


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def sound(seconds: float, f0_hz: float, folder: Path) -> bytes:
    path = folder / f"{f0_hz:.0f}.wav"
    soundfile.write(path, mock_sample(seconds, f0_hz=f0_hz).samples, 16000)
    return path.read_bytes()


def given(path: Path | None) -> bytes | None:
    return None if path is None else path.read_bytes()


WAITING = 9
"""The default --waiting and the one that runs: so many are done after the last has come."""


def fitting(seconds: float, capacity: float, loads: list[float]) -> int:
    """Requests at each load that together take about ``seconds``."""
    for requests in range(MOST_REQUESTS, 8, -1):
        ends = [requests / (load * capacity) + WAITING / capacity * (load >= 1) for load in loads]
        if sum(ends) <= seconds:
            return requests
    return 8


def start(folder: Path, arguments: list[str]) -> tuple[subprocess.Popen[str], int]:
    command = [sys.executable, "-m", "auto_voice.cli", "serve", "--port", "0", "--warm"]
    command += ["--data-dir", str(folder / "data"), "--voice-dir", str(folder / "voices")]
    log = (folder / "server.log").open("w")
    process = subprocess.Popen([*command, *arguments], stderr=log, text=True)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        said = (folder / "server.log").read_text()
        if "listens on" in said:
            port = int(said.split("listens on http://")[1].split("/")[0].rsplit(":", 1)[1])
            try:
                if httpx2.get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                    return process, port
            except httpx2.TransportError:
                pass
        time.sleep(0.2)
    process.kill()
    raise SystemExit((folder / "server.log").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mock", action="store_true", help="measure the server alone")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each recording")
    parser.add_argument("--source", type=Path, help="a recording in place of made-up babble")
    parser.add_argument("--reference", type=Path, help="of another voice, likewise")
    parser.add_argument("--requests", type=int, default=40, help="at each load")
    parser.add_argument("--minutes", type=float, help="chooses --requests")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 1.0, 4.0])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    requests = min(options.requests, MOST_REQUESTS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = ["--workers", str(options.workers), *(["--mock"] if options.mock else [])]
        process, port = start(folder, arguments)
        try:
            source = given(options.source) or sound(options.seconds, 120, folder)
            load = Load(port, source, given(options.reference) or sound(4.0, 210, folder))
            load.ask(0)
            one_by_one = [load.ask(n).seconds for n in range(5)]
            capacity = options.workers / statistics.median(one_by_one)
            seconds = soundfile.info(io.BytesIO(source)).duration
            print(
                f"{seconds:.1f} s of audio, {options.workers} worker(s): "
                f"{capacity:.2f} requests/s one by one",
                flush=True,
            )
            if options.minutes:
                requests = fitting(options.minutes * 60, capacity, options.loads)
            rows = [
                # Fewer than may wait would show nothing of an overload.
                measure(
                    load, process.pid, factor, capacity, max(requests, 3 * WAITING * (factor > 2))
                )
                for factor in options.loads
            ]
            print(f"accepted requests without a whole result: {load.lost}")
        finally:
            process.terminate()
            process.wait(60)
        left = [p for p in (folder / "data" / "jobs").rglob("*") if p.is_file()]
        print(f"files left in the data folder: {len(left)}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


def measure(
    load: Load, pid: int, factor: float, capacity: float, requests: int
) -> dict[str, object]:
    watch = MemoryWatch(pid)
    watch.start()
    answers, spent = load.at_rate(factor * capacity, requests)
    memory = watch.stop()
    done = [answer.seconds for answer in answers if answer.status == 200]
    refused = [answer for answer in answers if answer.status in (429, 503)]
    row: dict[str, object] = {
        "load": factor,
        "requests": requests,
        "done_per_s": round(len(done) / spent, 2),
        "p50_s": round(percentile(done, 0.5), 2),
        "p95_s": round(percentile(done, 0.95), 2),
        "p99_s": round(percentile(done, 0.99), 2),
        "refused": dict(Counter(answer.status for answer in refused)),
        "refused_p95_s": round(percentile([a.seconds for a in refused], 0.95), 3),
        "without_retry_after": sum(not answer.retry_after for answer in refused),
        "other": sum(answer.status not in (200, 429, 503) for answer in answers),
        "rss_mb": round(memory),
    }
    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return row


if __name__ == "__main__":
    main()
