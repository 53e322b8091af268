"""What a Ray cluster costs beside local processes: the same batch, by turns on the same cores.

    python benchmarks/batch.py [--runs 3] [--files 12] [--seconds 8] [--workers 2] [--mock] [--json]

The default models must be there (``autovoice models pull``), or ``--mock`` leaves them out, so that
little but the overhead is left. Every worker has one core and one thread. The cluster is started
once, as on machines that serve many batches, and its start is told apart. ``unseen`` is a cluster
whose workers see no file of the driver, so that every recording, voice and result travels through
the object store. Of a machine that others use, compare ``rest``: the part of a worker's time that
is not spent in jobs, which is start, loading and what lies between two jobs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import soundfile

from auto_voice.models.mock_models import mock_sample

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


def batch(folder: Path, name: str, options: list[str], workers: int) -> dict[str, float]:
    """Runs one and says what it took."""
    out = folder / name
    command = [
        sys.executable, "-m", "auto_voice.cli", "batch", str(folder / "in"), "--voice",
        str(folder / "voice.wav"), "-o", str(out), "--quiet", "--overwrite",
        "--workers", str(workers), *options,
    ]  # fmt: skip
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wall = time.perf_counter() - started
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    done = [line for line in lines[1:] if line["status"] == "done"]
    done = done[-len(list((folder / "in").iterdir())) :]
    spent = sum(line["took"] for line in done) / workers
    # Between the first result and the last, nothing starts and nothing loads.
    first, last = done[0]["time"], done[-1]["time"]
    between = sum(line["took"] for line in done[workers:]) / workers
    return {
        "wall": wall,
        "in jobs": spent,
        "rest": wall - spent,
        "per job": 1000 * max(0.0, (last - first) - between) / max(1, len(done) - workers),
        "audio": sum(line["seconds"] for line in done),
    }


@contextmanager
def cluster(workers: int, **variables: str) -> Iterator[tuple[str, float]]:
    """One of as many cores as workers; its address and the seconds that it took to start."""
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    from ray.cluster_utils import Cluster

    started = time.perf_counter()
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
        yield made.address, time.perf_counter() - started
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
        with cluster(given.workers) as (seen, start), cluster(given.workers, **blind) as (other, _):
            on = ["--executor", "ray", "--resources", "cpu=1", "--address"]
            for _ in range(given.runs):
                for name, options in (
                    ("local", []),
                    ("ray", [*on, seen]),
                    ("unseen", [*on, other]),
                ):
                    found[name].append(batch(folder, name, [*mock, *options], given.workers))
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
    print(
        f"{'':8} {'wall, s':>9} {'in jobs, s':>11} {'rest, s':>9} {'ms a job':>9} {'overhead':>9}"
    )
    base = table["local"]["wall"] / table["local"]["in jobs"]
    for name, row in table.items():
        share = 100 * (row["wall"] / row["in jobs"] / base - 1)
        print(f"{name:8} {row['wall']:9.1f} {row['in jobs']:11.1f} {row['rest']:9.1f} "
              f"{row['per job']:9.0f} {share:8.1f} %")  # fmt: skip


if __name__ == "__main__":
    main()
