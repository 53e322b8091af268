"""What importing an architecture changes in the process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from auto_voice.models.registry.architectures import KERNELS_KEPT

VARIABLE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
SAY = f"""
import os
from auto_voice.models.registry.architectures import ARCHITECTURES
ARCHITECTURES["{{name}}"]._import()
print(os.environ.get("{VARIABLE}"))
"""
GROW = """
from auto_voice.models.registry.architectures import ARCHITECTURES
ARCHITECTURES["hifigan"]._import()
import torch
torch.set_num_threads(1)
def held():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith("VmRSS")) / 2**10
net = torch.nn.Sequential(
    torch.nn.Conv1d(80, 192, 5, padding=2), torch.nn.Conv1d(192, 192, 7, groups=192)).eval()
with torch.inference_mode():
    x = torch.zeros(1, 80, 1300)
    net(x)
    before = held()
    for frames in range(900, 1300):
        net(x[..., :frames])
    print(held() - before)
"""


def _run(code: str, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name != VARIABLE}
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, check=True, capture_output=True,
        text=True,
    )  # fmt: skip
    return done.stdout.split()[-1]


def test_torch_keeps_few_compiled_kernels_unless_told_otherwise() -> None:
    assert _run(SAY.format(name="hifigan")) == str(KERNELS_KEPT)
    assert _run(SAY.format(name="hifigan"), **{VARIABLE: "7"}) == "7"
    assert _run(SAY.format(name="griffin_lim")) == "None"


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="reads /proc; oneDNN on x86"
)
def test_pieces_of_many_lengths_do_not_fill_the_memory() -> None:
    ours, theirs = float(_run(GROW)), float(_run(GROW, **{VARIABLE: "1024"}))
    assert ours < 0.6 * theirs
