"""Time from the shell to the first audio, and where it goes: a table, not a test.

    python benchmarks/cold_start.py [--runs 5] [--mock] [--json]

Each figure is the median of fresh processes, with models on disk, the page cache warm and modules
compiled, as after an installation; the ratio is against a bare interpreter.
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
from pathlib import Path

# Where Python may not store what it compiles, every process compiles the package again.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
CLI = "import sys; from auto_voice.cli.main import main; sys.exit(main())"


def cases(folder: Path, mock: bool) -> dict[str, list[str]]:
    """Name to the arguments of a python process."""
    extra = ["--mock"] if mock else []
    convert = ["convert", str(folder / "talk.wav"), "-o", str(folder / "out.wav"), "--overwrite"]
    voice = str(folder / "friend.safetensors")
    return {
        "bare interpreter": ["-c", "pass"],
        "autovoice --help": ["-c", CLI, "--help"],
        "autovoice voices list": ["-c", CLI, "voices", "list"],
        "convert 3 s, voice file": ["-c", CLI, *convert, "--voice", voice, *extra],
        "convert 3 s, recording": [
            "-c", CLI, *convert, "--voice", str(folder / "friend.wav"), *extra,
        ],
    }  # fmt: skip


def prepare(folder: Path, mock: bool) -> None:
    import soundfile

    from auto_voice.models.mock_models import mock_sample

    soundfile.write(folder / "talk.wav", mock_sample(3.0, f0_hz=120.0).samples, 16000)
    soundfile.write(folder / "friend.wav", mock_sample(6.0, f0_hz=210.0).samples, 16000)
    args = ["clone", str(folder / "friend.wav"), "-o", str(folder / "friend.safetensors")]
    subprocess.run(
        [sys.executable, "-c", CLI, *args, *(["--mock"] if mock else [])],
        check=True, capture_output=True, env=ENVIRONMENT,
    )  # fmt: skip


def measure(args: list[str], runs: int) -> list[float]:
    taken = []
    for _ in range(runs):
        started = time.perf_counter()
        subprocess.run([sys.executable, *args], check=True, capture_output=True, env=ENVIRONMENT)
        taken.append(time.perf_counter() - started)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--mock", action="store_true", help="without models: imports and I/O alone")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, options.mock)
        for case, args in cases(folder, options.mock).items():
            taken = measure(args, options.runs)
            rows.append({"case": case, "seconds": round(statistics.median(taken), 3),
                         "fastest": round(min(taken), 3)})  # fmt: skip
    for row in rows:
        row["ratio"] = round(row["seconds"] / rows[0]["seconds"], 1)
    if options.json:
        print(json.dumps(rows))
        return
    print(f"{'case':<26}{'median s':>10}{'fastest s':>11}{'ratio':>8}")
    for row in rows:
        print(f"{row['case']:<26}{row['seconds']:>10}{row['fastest']:>11}{row['ratio']:>8}")


if __name__ == "__main__":
    main()
