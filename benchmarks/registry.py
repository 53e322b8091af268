"""What the registry costs before any weight is loaded: a table with ratios, not a test.

    python benchmarks/registry.py [--runs 9] [--json]

Every figure is the median of fresh processes; the ratio is against a bare interpreter. What is
timed inside a process is processor time, which a busy machine hardly changes; the process itself
is timed by the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass

PROLOGUE = """
import sys, time
start = time.process_time()
def done(value=None):
    try:  # ru_maxrss on Linux counts what the parent held before exec.
        lines = open('/proc/self/status').read().splitlines()
        peak_mb = next(int(x.split()[1]) for x in lines if x.startswith('VmHWM')) / 2**10
    except OSError:
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak_mb = peak / (2**20 if sys.platform == 'darwin' else 2**10)
    inner_ms = 1000 * ((time.process_time() - start) if value is None else value)
    print(inner_ms, peak_mb, 'torch' in sys.modules)
"""

CASES = {
    "bare interpreter": "done()",
    "import numpy": "import numpy; done()",
    "import auto_voice": "import auto_voice; done()",
    "import ModelRegistry": "from auto_voice.models import ModelRegistry; done()",
    "import and create": "from auto_voice.models import ModelRegistry; ModelRegistry(); done()",
    "create alone": (
        "from auto_voice.models import ModelRegistry\n"
        "t = time.process_time(); ModelRegistry(); done(time.process_time() - t)"
    ),
    "read the catalog": (
        "from auto_voice.models import ModelRegistry\n"
        "r = ModelRegistry(); t = time.process_time(); r.catalog; done(time.process_time() - t)"
    ),
    "load three mocks": (
        "from auto_voice.models import ModelRegistry\n"
        "import numpy\n"
        "r = ModelRegistry(use_mock=True); r.catalog\n"
        "t = time.process_time()\n"
        "r.load_hubert(); r.load_hifigan(); r.load_speaker_encoder()\n"
        "done(time.process_time() - t)"
    ),
    "mock HuBERT, 1 s": (
        "from auto_voice.models import ModelRegistry\n"
        "import numpy\n"
        "m = ModelRegistry(use_mock=True).load_hubert()\n"
        "x = numpy.ones(16000, 'f4'); m.extract_features(x)\n"
        "t = time.process_time(); m.extract_features(x); done(time.process_time() - t)"
    ),
    "mock HiFi-GAN, 1 s": (
        "from auto_voice.models import ModelRegistry\n"
        "import numpy\n"
        "m = ModelRegistry(use_mock=True).load_hifigan()\n"
        "x = numpy.zeros((80, 86), 'f4'); m.synthesize(x)\n"
        "t = time.process_time(); m.synthesize(x); done(time.process_time() - t)"
    ),
    "mock speaker, 1 s": (
        "from auto_voice.models import ModelRegistry\n"
        "import numpy\n"
        "m = ModelRegistry(use_mock=True).load_speaker_encoder()\n"
        "x = numpy.ones(16000, 'f4'); m.embed_utterance(x)\n"
        "t = time.process_time(); m.embed_utterance(x); done(time.process_time() - t)"
    ),
    "mock warm-up, numpy imported": (
        "from auto_voice.models import ModelRegistry\n"
        "import numpy\n"
        "r = ModelRegistry(use_mock=True)\n"
        "t = time.process_time()\n"
        "r.warmup_models(['hubert_base', 'hifigan_universal', 'speaker_encoder'])\n"
        "done(time.process_time() - t)"
    ),
    "whole mock warm-up": (
        "from auto_voice.models import ModelRegistry\n"
        "r = ModelRegistry(use_mock=True)\n"
        "r.warmup_models(['hubert_base', 'hifigan_universal', 'speaker_encoder']); done()"
    ),
}


@dataclass(frozen=True)
class Figure:
    """Medians of one case.

    Attributes:
        inner_ms: of processor time, from the process's first statement or around the timed call.
        process_ms: start of the process to its end.
        peak_mb: resident memory at its highest.
        ratio: of ``process_ms`` to the bare interpreter's.
    """

    case: str
    inner_ms: float
    process_ms: float
    peak_mb: float
    ratio: float
    torch: bool


def measure(code: str, runs: int, folder: str) -> tuple[float, float, float, bool]:
    rows = []
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AUTOVOICE_")}
    for _ in range(runs + 1):
        started = time.perf_counter()
        result = subprocess.run(
            [sys.executable, "-c", PROLOGUE + code],
            capture_output=True,
            text=True,
            check=True,
            cwd=folder,
            env=environment,
        )
        whole_ms = 1000 * (time.perf_counter() - started)
        inner, peak, torch = result.stdout.split()
        rows.append((float(inner), whole_ms, float(peak), torch == "True"))
    kept = rows[1:]  # The first run fills the page cache.
    inner_ms, process_ms, peak_mb = (statistics.median(r[i] for r in kept) for i in range(3))
    return inner_ms, process_ms, peak_mb, kept[0][3]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        for case, code in CASES.items():
            inner, process, peak, torch = measure(code, options.runs, folder)
            bare = figures[0].process_ms if figures else process
            figures.append(Figure(case, inner, process, peak, process / bare, torch))
    if options.json:
        print(json.dumps([asdict(figure) for figure in figures], indent=2))
        return
    print(f"Python {platform.python_version()}, {os.cpu_count()} CPUs, medians of {options.runs}\n")
    print("| case | time inside | whole process | ratio | peak memory | torch |")
    print("|---|---|---|---|---|---|")
    for f in figures:
        print(
            f"| {f.case} | {f.inner_ms:.2f} ms | {f.process_ms:.0f} ms | {f.ratio:.2f} "
            f"| {f.peak_mb:.0f} MB | {'loaded' if f.torch else 'no'} |"
        )


if __name__ == "__main__":
    main()
