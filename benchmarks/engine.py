"""What the engine costs: cold starts, loads, the vocoder stage, memory; idle and beside others.

    python benchmarks/engine.py [--runs 5] [--seconds 60] [--only cold,load,stage,long] [--json]

The default models must be there (``autovoice models pull``). Cases are interleaved and every figure
is a median over fresh processes, with wall and CPU time: on a machine that others use, CPU time is
what can be compared. ``beside`` rows run while one process does nothing but count.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CLI = "import sys; from auto_voice.cli.main import main; sys.exit(main())"
LOAD = """
import json, sys, time
from auto_voice.models import ModelRegistry
registry = ModelRegistry(offline=True, device="cpu")
before, cpu = time.perf_counter(), time.process_time()
model = registry.load(sys.argv[1])
print(json.dumps([time.perf_counter() - before, time.process_time() - cpu]))
"""
# Stage and bare network take turns, at lengths that the process has not seen before.
STAGE = """
import json, sys, time
import numpy as np
from auto_voice.models import ModelRegistry
vocoder = ModelRegistry(offline=True, device="cpu").load_hifigan()
rng = np.random.default_rng(0)
rows = []
for frames in map(int, sys.argv[1:]):
    mel = (rng.standard_normal((1, 80, frames)) - 5).astype("f4")
    for call in (vocoder.synthesize, vocoder.network):
        wall, cpu = time.perf_counter(), time.process_time()
        call(mel)
        rows.append([frames, time.perf_counter() - wall, time.process_time() - cpu])
print(json.dumps(rows))
"""
MODELS = (
    "content_whisper", "converter_compact", "hifigan_universal", "speaker_encoder",
    "content_compact", "speaker_dvector",
)  # fmt: skip
# Mel frames: half a second to twelve; none is a multiple of another.
LENGTHS = (43, 89, 431, 509, 613, 1033)


@contextmanager
def neighbour(busy: bool) -> Iterator[None]:
    """One process that counts for ever, where ``busy`` says so."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def timed(args: list[str]) -> tuple[float, float, float, str]:
    """Wall seconds, CPU seconds, peak MB and output of a python process."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"AUTOVOICE_OFFLINE": "1"},
    )  # fmt: skip
    out, err = process.communicate()
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise SystemExit(err)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, cpu, after.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10), out


def prepare(folder: Path, seconds: float) -> None:
    import soundfile

    from auto_voice.models.mock_models import mock_sample

    for name, length, pitch_hz in (("talk", 3.5, 120.0), ("long", seconds, 120.0)):
        soundfile.write(folder / f"{name}.wav", mock_sample(length, f0_hz=pitch_hz).samples, 16000)
    soundfile.write(folder / "friend.wav", mock_sample(8.0, f0_hz=210.0).samples, 16000)
    voice = str(folder / "friend.safetensors")
    timed(["-c", CLI, "clone", str(folder / "friend.wav"), "-o", voice])


def conversion(folder: Path, source: str) -> list[str]:
    voice = str(folder / "friend.safetensors")
    return [
        "-c", CLI, "convert", str(folder / source), "--voice", voice,
        "-o", str(folder / "out.wav"), "--overwrite", "-q",
    ]  # fmt: skip


def cold(folder: Path, runs: int) -> list[dict[str, object]]:
    """Conversions of 3.5 s with a stored voice, from the shell to the file."""
    taken: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for _ in range(runs):
        for busy, values in taken.items():
            with neighbour(busy):
                values.append(timed(conversion(folder, "talk.wav"))[:2])
    return [
        row("convert 3.5 s, cold" + (", beside" if busy else ""), values)
        for busy, values in taken.items()
    ]


def loads(runs: int) -> list[dict[str, object]]:
    """Each model, loaded in a process that has loaded nothing."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in MODELS}
    for _ in range(runs):
        for name, values in taken.items():
            wall, cpu = json.loads(timed(["-c", LOAD, name])[3])
            values.append((wall, cpu))
    return [row(f"load {name}", values) for name, values in taken.items()]


def stages(runs: int) -> list[dict[str, object]]:
    """The vocoder stage against its network alone, at lengths seen for the first time."""
    taken: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for _ in range(runs):
        rows = json.loads(timed(["-c", STAGE, *map(str, LENGTHS)])[3])
        for index, (frames, wall, cpu) in enumerate(rows):
            what = "network" if index % 2 else "stage"
            taken.setdefault((frames, what), []).append((wall, cpu))
    found = []
    for (frames, what), values in taken.items():
        made = row(f"vocoder {what}, {frames} frames", values)
        if what == "stage":
            bare = statistics.median(cpu for _, cpu in taken[frames, "network"])
            made["ratio"] = round(float(str(made["cpu_s"])) / bare, 2)
        found.append(made)
    return found


def long(folder: Path, seconds: float) -> list[dict[str, object]]:
    """One conversion of some length, with its peak memory."""
    wall, cpu, peak_mb, _ = timed(conversion(folder, "long.wav"))
    made = row(f"convert {seconds:g} s", [(wall, cpu)])
    return [made | {"peak_mb": round(peak_mb), "cpu_s_per_s": round(cpu / seconds, 3)}]


def row(case: str, values: list[tuple[float, float]]) -> dict[str, object]:
    wall, cpu = (statistics.median(column) for column in zip(*values, strict=True))
    return {"case": case, "wall_s": round(wall, 3), "cpu_s": round(cpu, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--only", default="cold,load,stage,long")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    wanted = options.only.split(",")
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if {"cold", "long"} & set(wanted):
            prepare(folder, options.seconds)
        rows += cold(folder, options.runs) if "cold" in wanted else []
        rows += loads(options.runs) if "load" in wanted else []
        rows += stages(options.runs) if "stage" in wanted else []
        rows += long(folder, options.seconds) if "long" in wanted else []
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print("| case | wall | CPU | |")
    print("|---|---|---|---|")
    for found in rows:
        rest = ", ".join(
            f"{key} {value}" for key, value in found.items()
            if key not in ("case", "wall_s", "cpu_s")
        )  # fmt: skip
        print(f"| {found['case']} | {found['wall_s']} s | {found['cpu_s']} s | {rest} |")


if __name__ == "__main__":
    main()
