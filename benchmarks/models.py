"""What the published networks cost to load and to run: tables with ratios, not tests.

    python benchmarks/models.py [--runs 5] [--seconds 10] [--json] [--only load,run,warm,batch]

Random weights of the published sizes are written to a temporary folder first (they cost what the
published ones cost), so nothing is fetched. Every figure is the median of fresh processes; the
first, which fills the page cache, is left out. It needs the extra ``train``, and rows with
``transformers`` need that, too.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

PROLOGUE = """
import sys, time, pathlib
folder = pathlib.Path(sys.argv[1])
seconds = float(sys.argv[2])
from auto_voice.models.registry.catalog import ModelVersion
def version(name, **params):
    return ModelVersion(name, 'random', 'any', 'any', (), 'MIT', params)
def done(start, *after):
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak_mb = peak / (2**20 if sys.platform == 'darwin' else 2**10)
    print(*(1000 * (t - start) for t in after), peak_mb)
"""

PREPARE = """
import torch
from safetensors.torch import save_file
from auto_voice.models.hifigan_model import HiFiGANShape
from auto_voice.models.hubert_model import HuBERTShape
from auto_voice.training.networks.encoders import HuBERTNet, SpeakerNet
from auto_voice.training.networks.generators import HiFiGANNet
torch.manual_seed(0)
nets = {
    'hubert': HuBERTNet(HuBERTShape()),
    'hifigan': HiFiGANNet(HiFiGANShape()),
    'ge2e': SpeakerNet(),
}
for name, net in nets.items():
    save_file(net.state_dict(), folder / f'{name}.safetensors')
if 'transformers' in sys.argv:
    import transformers
    transformers.HubertModel(transformers.HubertConfig()).save_pretrained(folder / 'reference')
"""

LOADS = {
    "read the bytes": """
start = time.perf_counter()
with open(folder / 'hubert.safetensors', 'rb', buffering=0) as file:
    buffer = bytearray(2**22)
    while file.readinto(buffer): pass
t = time.perf_counter(); done(start, t, t)
""",
    "read and hash the bytes": """
import hashlib
start = time.perf_counter()
with open(folder / 'hubert.safetensors', 'rb') as file: hashlib.file_digest(file, 'sha256')
t = time.perf_counter(); done(start, t, t)
""",
    "import onnxruntime": """
start = time.perf_counter(); import onnxruntime
t = time.perf_counter(); done(start, t, t)
""",
    "auto_voice": """
import numpy
start = time.perf_counter()
from auto_voice.models import hubert_model
before = time.perf_counter()
model = hubert_model.build({'f': folder / 'hubert.safetensors'}, version('hubert'), 'cpu')
loaded = time.perf_counter()
model.extract_features(numpy.ones(16000, 'f4'))
done(start, start + loaded - before, time.perf_counter())
""",
    "transformers": """
import numpy
start = time.perf_counter()
import torch, transformers
transformers.HubertModel
before = time.perf_counter()
model = transformers.HubertModel.from_pretrained(folder / 'reference').eval()
loaded = time.perf_counter()
with torch.inference_mode(): model(torch.ones(1, 16000))
done(start, start + loaded - before, time.perf_counter())
""",
}

WARM = """
import numpy, onnxruntime
start = time.perf_counter()
from auto_voice.models import hubert_model, hifigan_model, speaker_encoder
hubert = hubert_model.build({'f': folder / 'hubert.safetensors'}, version('hubert'), 'cpu')
hifigan = hifigan_model.build({'f': folder / 'hifigan.safetensors'}, version('hifigan'), 'cpu')
speaker = speaker_encoder.build({'f': folder / 'ge2e.safetensors'}, version('ge2e'), 'cpu')
loaded = time.perf_counter()
rng = numpy.random.default_rng(0)
hubert.extract_features(rng.standard_normal(16000))
hifigan.synthesize(rng.standard_normal((80, 43)))
speaker.embed_utterance(rng.standard_normal(25600))
done(start, loaded, time.perf_counter())
"""

RUN_PROLOGUE = """
import numpy
rng = numpy.random.default_rng(0)
mel = rng.standard_normal((80, round(seconds * 22050 / 256))).astype('f4')
audio = (0.1 * rng.standard_normal(round(seconds * 16000))).astype('f4')
def timed(call):
    call()
    start = time.perf_counter(); call(); done(start, time.perf_counter())
"""
VOCODER = """
from auto_voice.models import hifigan_model
model = hifigan_model.build({'f': folder / 'hifigan.safetensors'}, version('hifigan'), 'cpu')
timed(lambda: model.synthesize(mel))
"""
RUNS = {
    "HiFi-GAN": VOCODER,
    "HiFi-GAN, the same network in torch": """
import torch
from auto_voice.models.hifigan_model import HiFiGANShape
from auto_voice.training.networks.generators import HiFiGANNet
net = HiFiGANNet(HiFiGANShape()).eval()
def call():
    with torch.inference_mode(): net(torch.from_numpy(mel)[None])
timed(call)
""",
    "Griffin-Lim": """
from auto_voice.models.griffin_lim_model import GriffinLimModel
timed(lambda: GriffinLimModel().synthesize(mel))
""",
    "HuBERT, 12 layers": """
from auto_voice.models import hubert_model
model = hubert_model.build({'f': folder / 'hubert.safetensors'}, version('hubert'), 'cpu')
timed(lambda: model.extract_features(audio))
""",
    "HuBERT, content layer": """
from auto_voice.models import hubert_model
model = hubert_model.build({'f': folder / 'hubert.safetensors'}, version('hubert'), 'cpu')
timed(lambda: model.encode(audio))
""",
    "HuBERT, transformers": """
import torch, transformers
model = transformers.HubertModel.from_pretrained(folder / 'reference').eval()
def call():
    with torch.inference_mode(): model(torch.from_numpy(audio)[None])
timed(call)
""",
    "GE2E in torch, window by window": """
import torch
from auto_voice.training.networks.encoders import SpeakerNet
net = SpeakerNet().eval()
windows = torch.randn(max(1, round(seconds / 0.77)), 160, 40)
def call():
    with torch.no_grad():
        for window in windows: net(window[None])
timed(call)
""",
    "GE2E, all windows at once": """
from auto_voice.models import speaker_encoder
model = speaker_encoder.build({'f': folder / 'ge2e.safetensors'}, version('ge2e'), 'cpu')
timed(lambda: model.embed_utterance(audio))
""",
}

BATCH = """
import numpy
rng = numpy.random.default_rng(0)
batch = (0.1 * rng.standard_normal(({count}, round(seconds * 16000)))).astype('f4')
{model}
call()
start = time.perf_counter(); call()
done(start, start + (time.perf_counter() - start) / {count})
"""
HUBERT_BATCH = """
from auto_voice.models import hubert_model
model = hubert_model.build({'f': folder / 'hubert.safetensors'}, version('hubert'), 'cpu')
call = lambda: model.extract_features(batch)
"""
TRANSFORMERS_BATCH = """
import torch, transformers
model = transformers.HubertModel.from_pretrained(folder / 'reference').eval()
def call():
    with torch.inference_mode(): model(torch.from_numpy(batch))
"""
BATCHES = {
    f"HuBERT{by}, {count} at once": BATCH.format(count=count, model=model)
    for by, model in (("", HUBERT_BATCH), (", transformers", TRANSFORMERS_BATCH))
    for count in (1, 4, 16)
}


@dataclass(frozen=True)
class Figure:
    """Medians of one case.

    Attributes:
        values: milliseconds, in the order of the table's columns.
        process_ms: start of the process to its end, interpreter included.
        peak_mb: resident memory at its highest, mapped file pages included.
    """

    table: str
    case: str
    values: tuple[float, ...]
    process_ms: float
    peak_mb: float


def run(code: str, folder: Path, seconds: float, *more: str) -> tuple[list[float], float]:
    command = [sys.executable, "-c", PROLOGUE + code, str(folder), str(seconds), *more]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AUTOVOICE_")}
    started = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    process_ms = 1000 * (time.perf_counter() - started)
    if result.returncode:
        raise SystemExit(result.stderr)
    return [float(value) for value in result.stdout.split()], process_ms


def measure(
    table: str, cases: dict[str, str], folder: Path, seconds: float, runs: int
) -> list[Figure]:
    # Rounds over all cases, not one case after the other: a busy minute then hits all alike.
    rows: dict[str, list[list[float]]] = {case: [] for case in cases}
    for _ in range(runs + 1):
        for case, code in cases.items():
            values, process_ms = run(code, folder, seconds)
            rows[case].append([*values, process_ms])
    figures = []
    for case, measured in rows.items():
        *values, peak_mb, process_ms = (
            statistics.median(column) for column in zip(*measured[1:], strict=True)
        )
        figures.append(Figure(table, case, tuple(values), process_ms, peak_mb))
    return figures


def show(figures: list[Figure], seconds: float) -> None:
    tables: dict[str, list[Figure]] = {}
    for figure in figures:
        tables.setdefault(figure.table, []).append(figure)
    if rows := tables.get("load"):
        print(
            "HuBERT-sized checkpoint (94.4 M parameters, 377 MB), to the first second of features\n"
        )
        print("| | load | ratio to reading | imports to first result | ratio | peak memory |")
        print("|---|---|---|---|---|---|")
        ours = next(row for row in rows if row.case == "auto_voice")
        for row in rows:
            print(
                f"| {row.case} | {row.values[0]:.0f} ms | {row.values[0] / rows[0].values[0]:.2f} "
                f"| {row.values[1]:.0f} ms | {row.values[1] / ours.values[1]:.2f} "
                f"| {row.peak_mb:.0f} MB |"
            )
    for row in tables.get("warm", []):
        print(
            "\nAll three after `import onnxruntime`: loaded in "
            f"{row.values[0]:.0f} ms, first results "
            f"after {row.values[1]:.0f} ms, peak {row.peak_mb:.0f} MB"
        )
    for name, what in (("run", "s of audio"), ("batch", "s of audio for each recording")):
        if not (rows := tables.get(name)):
            continue
        print(f"\n{seconds:g} {what}, second call in its process\n")
        print("| | time | time per second of audio | ratio to the first row | peak memory |")
        print("|---|---|---|---|---|")
        for row in rows:
            print(
                f"| {row.case} | {row.values[0]:.0f} ms | {row.values[0] / seconds / 1000:.3f} "
                f"| {row.values[0] / rows[0].values[0]:.2f} | {row.peak_mb:.0f} MB |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--only", default="load,warm,run,batch", help="tables, by comma")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    reference = importlib.util.find_spec("transformers") is not None
    tables = {
        "load": LOADS,
        "warm": {"all three": WARM},
        "run": {case: RUN_PROLOGUE + code for case, code in RUNS.items()},
        "batch": BATCHES,
    }
    figures = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(PREPARE, folder, options.seconds, *(["transformers"] if reference else []))
        for table in options.only.split(","):
            cases = {
                case: code
                for case, code in tables[table].items()
                if reference or "transformers" not in case
            }
            figures += measure(table, cases, folder, options.seconds, options.runs)
    if options.json:
        print(json.dumps([asdict(figure) for figure in figures], indent=2))
        return
    print(f"Python {platform.python_version()}, {os.cpu_count()} CPUs, medians of {options.runs}\n")
    show(figures, options.seconds)


if __name__ == "__main__":
    main()
