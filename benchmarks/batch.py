"""What a Ray cluster costs beside local processes: the same batch, by turns on the same cores.

    python benchmarks/batch.py [--runs 3] [--files 12] [--seconds 8] [--workers 2] [--mock] [--json]

The default models must be there (``autovoice models pull``), or ``--mock`` leaves them out, so that
little but the overhead is left. Every worker has one core and one thread. The cluster is started
once, as on machines that serve many batches, and its start is told apart. ``unseen`` is a cluster
whose workers see no file of the driver, so that every recording, voice and result travels through
the object store. CPU time is that of the command, of its workers and of all of Ray, from /proc, so
this needs Linux; on a machine that others use, it is what can be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import soundfile

from auto_voice.models.mock_models import mock_sample

TICKS = os.sysconf("SC_CLK_TCK")
# Python runs it at the start of every worker: a node that sees nothing of a folder.
BLINDFOLD = """
import os
hidden, stat = os.environ.get("BLIND_TO"), os.stat
def blind(path, *args, **options):
    if hidden and isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(hidden):
        raise FileNotFoundError(2, "No such file or directory", os.fspath(path))
    return stat(path, *args, **options)
os.stat = blind
"""


def descendants(without: set[int] = frozenset()) -> dict[int, float]:
    """CPU time of every process that this one has started, and of those that they have, but for
    ``without`` and theirs."""
    parents, spent = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):  # It ended meanwhile.
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                parents[int(entry.name)] = int(fields[1])
                spent[int(entry.name)] = (int(fields[11]) + int(fields[12])) / TICKS

    def ours(pid: int) -> bool:
        while pid in parents and pid not in without:
            pid = parents[pid]
            if pid == os.getpid():
                return True
        return False

    return {pid: seconds for pid, seconds in spent.items() if ours(pid)}


class CpuTime:
    """CPU time of all descendants while it runs; what they spend in their last moment is missed.

    Args:
        idle: processes of clusters that have no part in it.
    """

    def __init__(self, idle: set[int]) -> None:
        self.idle = idle

    def __enter__(self) -> CpuTime:
        self.before = descendants(self.idle)
        self.most: dict[int, float] = {}
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    @property
    def seconds(self) -> float:
        return sum(now - self.before.get(pid, 0.0) for pid, now in self.most.items())

    def _watch(self) -> None:
        while True:
            self.most |= descendants(self.idle)
            if self.over.wait(0.1):
                return


def batch(
    folder: Path, name: str, options: list[str], workers: int, idle: set[int]
) -> dict[str, float]:
    """Runs one and says what it took."""
    out = folder / name
    command = [
        sys.executable, "-m", "auto_voice.cli", "batch", str(folder / "in"), "--voice",
        str(folder / "voice.wav"), "-o", str(out), "--quiet", "--overwrite",
        "--workers", str(workers), *options,
    ]  # fmt: skip
    files = len(list((folder / "in").iterdir()))
    started = time.perf_counter()
    with CpuTime(idle) as cpu:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wall = time.perf_counter() - started
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    done = [line for line in lines[1:] if line["status"] == "done"][-files:]
    return {
        "cpu": cpu.seconds,
        "wall": wall,
        "in jobs": sum(line["took"] for line in done) / workers,
        "audio": sum(line["seconds"] for line in done),
    }


@contextmanager
def cluster(workers: int, **variables: str) -> Iterator[tuple[str, set[int], float]]:
    """One of as many cores as workers; its address, its processes and the seconds that it took to
    start."""
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    from ray.cluster_utils import Cluster

    before, started = set(descendants()), time.perf_counter()
    made = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": workers,
            "include_dashboard": False,
            "object_store_memory": 256 << 20,
            "env_vars": {**os.environ, **variables},
        },
    )
    try:
        took = time.perf_counter() - started
        time.sleep(5)  # Until all of its daemons are there.
        yield made.address, set(descendants()) - before, took
    finally:
        made.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--files", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--mock", action="store_true")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {"local": [], "ray": [], "unseen": []}
    with (
        tempfile.TemporaryDirectory(prefix="avb") as place,
        tempfile.TemporaryDirectory(prefix="avs") as site,
    ):
        folder = Path(place)
        (folder / "in").mkdir()
        for number in range(given.files):
            speech = mock_sample(given.seconds, seed=number)
            soundfile.write(folder / "in" / f"{number:03d}.wav", speech.samples, speech.sample_rate)
        voice = mock_sample(6.0, seed=1000)
        soundfile.write(folder / "voice.wav", voice.samples, voice.sample_rate)
        Path(site, "sitecustomize.py").write_text(BLINDFOLD)
        path = os.pathsep.join([site, os.environ.get("PYTHONPATH", "")])
        blind = {"PYTHONPATH": path, "BLIND_TO": str(folder)}
        mock = ["--mock"] if given.mock else []
        os.environ["OMP_NUM_THREADS"] = "1"
        on = ["--executor", "ray", "--resources", "cpu=1", "--address"]
        with (
            cluster(given.workers) as (seen, a, start),
            cluster(given.workers, **blind) as (other, b, _),
        ):
            ways = (
                ("local", [], a | b),
                ("ray", [*on, seen], b),
                ("unseen", [*on, other], a),
            )
            for _ in range(given.runs):
                for name, options, idle in ways:
                    made = batch(folder, name, [*mock, *options], given.workers, idle)
                    found[name].append(made)
    table = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for name, runs in found.items()
    }
    if given.json:
        print(json.dumps({"cluster_start": start, **table}, indent=2))
        return
    print(f"{given.files} recordings, {table['local']['audio']:.0f} s of audio, "
          f"{given.workers} workers, medians of {given.runs} runs; "
          f"a cluster starts in {start:.1f} s")  # fmt: skip
    print(f"{'':8} {'CPU, s':>8} {'wall, s':>8} {'of it in jobs, s':>17} {'CPU beside local':>17}")
    for name, row in table.items():
        share = 100 * (row["cpu"] / table["local"]["cpu"] - 1)
        print(f"{name:8} {row['cpu']:8.1f} {row['wall']:8.1f} {row['in jobs']:17.1f} "
              f"{share:+15.1f} %")  # fmt: skip


if __name__ == "__main__":
    main()
