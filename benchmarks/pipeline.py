"""Where the time of a conversion goes: by stage, length and threads, as ratios of one run.

    python benchmarks/pipeline.py [--seconds 1 10 60] [--threads 1 2] [--fine-tune-steps 0 40]

Every row is a fresh process with the default models, which must be there (``autovoice models
pull``). The voice is cloned first, then one short conversion warms up, then the one that counts.
Audio is babble with pauses, as long as the title says; the reference lasts 8 s. Times are seconds
of computing per second of audio; ``ratio`` compares the totals with the first row's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

CHILD = """
import json, resource, sys, time
seconds, threads, steps = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
from auto_voice import PipelineConfig, VoiceConversionPipeline
from auto_voice.models.mock_models import mock_sample
from auto_voice.types import Waveform
pipeline = VoiceConversionPipeline(PipelineConfig(fine_tune_steps=steps))
pipeline.stages()
reference = Waveform(mock_sample(8.0, f0_hz=200.0, seed=1).samples, 16000)
started = time.perf_counter()
voice = pipeline.clone(reference)
cloned = time.perf_counter() - started
source = Waveform(mock_sample(seconds, f0_hz=120.0).samples, 16000)
pipeline.convert(Waveform(source.samples[: 16000], 16000), voice)
started = time.perf_counter()
result = pipeline.convert(source, voice)
total = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({
    "seconds": seconds, "threads": threads, "fine_tune_steps": steps,
    "stages": {k: round(v / seconds, 4) for k, v in (result.timings or {}).items()},
    "total": round(total / seconds, 4), "clone_seconds": round(cloned, 2),
    "peak_mb": round(peak / (2**20 if sys.platform == "darwin" else 2**10)),
}))
"""
STAGES = ("pitch", "content", "convert", "vocode")


def measure(seconds: float, threads: int, steps: int) -> dict[str, object]:
    """One row, in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "AUTOVOICE_OFFLINE": "1"}
    command = [sys.executable, "-c", CHILD, str(seconds), str(threads), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    row: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, nargs="+", default=[1, 10, 60])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--fine-tune-steps", type=int, nargs="+", default=[0])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [
        measure(seconds, threads, steps)
        for threads in dict.fromkeys(options.threads)
        for seconds in options.seconds
        for steps in options.fine_tune_steps
    ]
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print("| audio | threads | steps | " + " | ".join(STAGES) + " | all | ratio | clone | peak |")
    print("|---" * (len(STAGES) + 7) + "|")
    for row in rows:
        stages = " | ".join(f"{row['stages'].get(stage, 0):.3f}" for stage in STAGES)  # type: ignore[attr-defined]
        print(
            f"| {row['seconds']:g} s | {row['threads']} | {row['fine_tune_steps']} | {stages} "
            f"| {row['total']:.3f} | {row['total'] / rows[0]['total']:.2f} "  # type: ignore[operator]
            f"| {row['clone_seconds']} s | {row['peak_mb']} MB |"
        )


if __name__ == "__main__":
    main()
