"""What the engine costs: start, loads, warm-up, the vocoder stage, an hour; idle and beside others.

    python benchmarks/engine.py [--runs 5] [--seconds 60] [--only init,cold,warm] [--json]
    python benchmarks/engine.py --only cold,long --before /path/to/older/src

The default models must be there (``autovoice models pull``). Cases are interleaved and every figure
is a median over fresh processes, with wall and CPU time: on a machine that others use, CPU time is
what can be compared. ``beside`` rows run while one process does nothing but count. ``--before``
runs the same commands by turns with the code of another checkout.
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
# NumPy, which every load needs, is left out of the last two steps.
INIT = """
import json, time
laps = [(time.perf_counter(), time.process_time())]
lap = lambda: laps.append((time.perf_counter(), time.process_time()))
from auto_voice.models import ModelRegistry
lap()
registry = ModelRegistry(use_mock=True)
lap()
import numpy
lap()
registry.catalog
lap()
registry.load_hifigan()
lap()
print(json.dumps([[b[0] - a[0], b[1] - a[1]] for a, b in zip(laps, laps[1:])]))
"""
# Lengths that grow by no common step, so that the tenth is as new as the first.
WARM = """
import json, time
import numpy as np
from auto_voice import Waveform
from auto_voice.inference import PipelineConfig, VoiceConversionPipeline
from auto_voice.models.mock_models import mock_sample
pipeline = VoiceConversionPipeline(PipelineConfig(offline=True, device="cpu"))
rows = []
def laps(action):
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    rows.append([time.perf_counter() - wall, time.process_time() - cpu])
laps(pipeline.warmup)
voice = pipeline.clone(mock_sample(8.0, f0_hz=210.0))
talk = mock_sample(6.0, f0_hz=120.0)
for samples in 62011, 57697, 64189, 59021, 61507, 58337, 63313, 60169, 57107, 62987:
    source = Waveform(talk.samples[:samples], talk.sample_rate)
    laps(lambda: pipeline.convert(source, voice))
    rows[-1] = [value / (samples / talk.sample_rate) for value in rows[-1]]
print(json.dumps(rows))
"""
# The vocoder in float32 and in int8 take turns on the same 5 s of mel.
PRECISION = """
import json, time
import numpy as np
from auto_voice.models import ModelRegistry
registry = ModelRegistry(offline=True, device="cpu")
exact, low = (registry.load("hifigan_universal@" + v) for v in ("1.0", "1.0-int8"))
mel = (np.random.default_rng(0).standard_normal((1, 80, 431)) - 5).astype("f4")
rows = []
for model in (exact, low) * 2:
    wall, cpu = time.perf_counter(), time.process_time()
    model.synthesize(mel)
    rows.append([time.perf_counter() - wall, time.process_time() - cpu])
print(json.dumps(rows[2:]))
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


def timed(args: list[str], code: str = "") -> tuple[float, float, float, str]:
    """Wall seconds, CPU seconds, peak MB and output of a python process.

    Args:
        code: folder of the package, of the one that is installed if empty.
    """
    env = os.environ | {"AUTOVOICE_OFFLINE": "1"} | ({"PYTHONPATH": code} if code else {})
    # Compiled modules are stored, as after an installation.
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen([sys.executable, *args], stdout=out, stderr=err, env=env)
        # Of this process alone; the peak of all children would be that of the largest so far.
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if process.returncode:
            raise SystemExit(err.read())
        peak_mb = used.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        return wall, used.ru_utime + used.ru_stime, peak_mb, out.read()


# Written by a process of its own: the peak of a process begins with what its parent holds.
SOUNDS = """
import sys
import soundfile
from auto_voice.models.mock_models import mock_sample
folder, seconds = sys.argv[1], float(sys.argv[2])
for name, length, f0_hz in (("talk", 3.5, 120.0), ("long", seconds, 120.0), ("friend", 8.0, 210.0)):
    soundfile.write(f"{folder}/{name}.wav", mock_sample(length, f0_hz=f0_hz).samples, 16000)
"""


def prepare(folder: Path, seconds: float) -> None:
    timed(["-c", SOUNDS, str(folder), str(seconds)])
    voice = str(folder / "friend.safetensors")
    timed(["-c", CLI, "clone", str(folder / "friend.wav"), "-o", voice])


def conversion(folder: Path, source: str) -> list[str]:
    voice = str(folder / "friend.safetensors")
    return [
        "-c", CLI, "convert", str(folder / source), "--voice", voice,
        "-o", str(folder / "out.wav"), "--overwrite", "-q",
    ]  # fmt: skip


def init(runs: int) -> list[dict[str, object]]:
    """The registry without a weight: imported, made, its catalog read, and a mock loaded."""
    names = ("import the registry", "make it", "import numpy", "read the catalog", "load a mock")
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    peaks = []
    for _ in range(runs):
        _, _, peak_mb, out = timed(["-c", INIT])
        peaks.append(peak_mb)
        for values, (wall, cpu) in zip(taken.values(), json.loads(out), strict=True):
            values.append((wall, cpu))
    rows = [row(name, values, 4) for name, values in taken.items()]
    return [*rows[:-1], rows[-1] | {"peak_mb": round(statistics.median(peaks))}]


def cold(folder: Path, runs: int, codes: dict[str, str]) -> list[dict[str, object]]:
    """Conversions of 3.5 s with a stored voice, from the shell to the file."""
    return conversions(folder, "talk.wav", "convert 3.5 s, cold", runs, codes)


def conversions(
    folder: Path, source: str, what: str, runs: int, codes: dict[str, str]
) -> list[dict[str, object]]:
    """One command with each code by turns, idle and beside a busy process."""
    cases = [(busy, name) for busy in (False, True) for name in codes]
    taken: dict[tuple[bool, str], list[tuple[float, float]]] = {case: [] for case in cases}
    peaks: dict[tuple[bool, str], float] = dict.fromkeys(cases, 0.0)
    for _ in range(runs):
        for busy, name in cases:
            with neighbour(busy):
                wall, cpu, peak_mb, _ = timed(conversion(folder, source), codes[name])
            taken[busy, name].append((wall, cpu))
            peaks[busy, name] = max(peaks[busy, name], peak_mb)
    rows = []
    for busy, name in cases:
        made = row(f"{what}{name}{', beside' if busy else ''}", taken[busy, name])
        made["peak_mb"] = round(peaks[busy, name])
        if busy:
            alone = statistics.median(wall for wall, _ in taken[False, name])
            made["slower"] = round(float(str(made["wall_s"])) / alone, 2)
        rows.append(made)
    return rows


def warm(runs: int) -> list[dict[str, object]]:
    """All stages warmed up in a fresh process, then ten conversions of lengths new to it."""
    taken: dict[str, list[tuple[float, float]]] = {"warm-up of all stages": []}
    for _ in range(runs):
        first, *rest = json.loads(timed(["-c", WARM])[3])
        taken["warm-up of all stages"].append((first[0], first[1]))
        for name, (wall, cpu) in (("first", rest[0]), ("tenth", rest[-1])):
            taken.setdefault(f"{name} conversion, a second of it", []).append((wall, cpu))
    return [row(name, values) for name, values in taken.items()]


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


def precision(runs: int) -> list[dict[str, object]]:
    """The vocoder in float32 and in int8, after one run of each."""
    taken = [json.loads(timed(["-c", PRECISION])[3]) for _ in range(runs)]
    names = ("float32", "int8")
    found = [
        row(f"vocoder in {name}, 5 s", [(values[i][0], values[i][1]) for values in taken])
        for i, name in enumerate(names)
    ]
    exact, low = (float(str(made["cpu_s"])) for made in found)
    found[1]["ratio"] = round(low / exact, 2)
    return found


def long(folder: Path, seconds: float, runs: int, codes: dict[str, str]) -> list[dict[str, object]]:
    """Conversions of some length, with the peak memory."""
    rows = conversions(folder, "long.wav", f"convert {seconds:g} s", runs, codes)
    for made in rows:
        made["rtf"] = round(float(str(made["wall_s"])) / seconds, 3)
        made["cpu_s_per_s"] = round(float(str(made["cpu_s"])) / seconds, 3)
    return rows


def row(case: str, values: list[tuple[float, float]], digits: int = 3) -> dict[str, object]:
    wall, cpu = (statistics.median(column) for column in zip(*values, strict=True))
    return {"case": case, "wall_s": round(wall, digits), "cpu_s": round(cpu, digits)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--only", default="init,cold,load,warm,stage,precision,long")
    parser.add_argument("--before", default="", help="folder of older code: its src")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    wanted = options.only.split(",")
    codes = {"": ""} | ({", before": options.before} if options.before else {})
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if {"cold", "long"} & set(wanted):
            prepare(folder, options.seconds)
        rows += init(options.runs) if "init" in wanted else []
        rows += cold(folder, options.runs, codes) if "cold" in wanted else []
        rows += loads(options.runs) if "load" in wanted else []
        rows += warm(options.runs) if "warm" in wanted else []
        rows += stages(options.runs) if "stage" in wanted else []
        rows += precision(options.runs) if "precision" in wanted else []
        # Long ones vary little, and a run is a minute.
        few = (options.runs + 1) // 2
        rows += long(folder, options.seconds, few, codes) if "long" in wanted else []
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
