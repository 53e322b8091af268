"""The training loop: one for every task; stops and goes on at any step.

A run folder holds ``checkpoint.pt`` (network, averaged network, optimiser, generators: enough to go
on as if nothing had happened), ``log.jsonl`` (a line for each validation) and ``curves.png``. The
averaged networks of the last validations lie in ``kept/step-N.safetensors``, and the one with the
best held-out figure in ``kept/best.safetensors``.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from auto_voice.errors import MissingDependencyError, TrainingError
from auto_voice.filesystem import atomic_write
from auto_voice.training.tasks import NetT, Task

log = logging.getLogger(__name__)

# A crash loses at most so much work.
CHECKPOINT_SECONDS = 60.0
# Folder of the averaged networks that are kept, and the name of the best one in it.
KEPT, BEST = "kept", "best.safetensors"
# Figures of ``log.jsonl``, and their labels in the picture.
PREFIXES = ("train_", "held_out_")
LABELS = ("training speakers", "held-out speakers")
# Share of the averaged weights that a step keeps, once there are many steps.
AVERAGE_DECAY = 0.999


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes:
        steps: in all.
        learning_rate: at its peak; rises over ``warmup`` steps, then falls along a cosine to 2 %.
        warmup: steps.
        weight_decay: of matrices.
        validate_every: steps.
        seed: of crops, augmentation and initial weights.
        keep: averaged networks of so many last validations are kept, besides the best.
        patience: validations without a better held-out figure after which training ends; 0: never.
        publish: ``last`` or ``best``, the network that a training gives.
    """

    steps: int
    learning_rate: float = 1.5e-3
    warmup: int = 100
    weight_decay: float = 0.01
    validate_every: int = 500
    seed: int = 0
    keep: int = 3
    patience: int = 0
    publish: str = "last"

    def __post_init__(self) -> None:
        if self.publish not in ("last", "best"):
            raise TrainingError(f"schedule.publish is last or best, not {self.publish!r}.")
        for name in ("keep", "patience"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise TrainingError(
                    f"schedule.{name} must be a whole number, 0 or more, not {value!r}."
                )

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        rise = min(1.0, (step + 1) / self.warmup)
        fall = 0.5 * (1 + np.cos(np.pi * min(1.0, step / self.steps)))
        return float(self.learning_rate * rise * (0.02 + 0.98 * fall))


class Trainer(Generic[NetT]):
    """Runs a task to the end of its schedule, from wherever the run folder stands.

    Args:
        task: what to train.
        schedule: how long and how fast.
        folder: of the run.
        device: ``cpu`` or ``cuda``.
    """

    def __init__(
        self, task: Task[NetT], schedule: Schedule, folder: Path, device: str = "cpu"
    ) -> None:
        self.task, self.schedule, self.folder, self.device = task, schedule, folder, device
        folder.mkdir(parents=True, exist_ok=True)
        self.model = task.model.to(device)
        self.average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        others = [p for p in self.model.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": schedule.weight_decay},
             {"params": others, "weight_decay": 0.0}],
            lr=schedule.learning_rate, betas=(0.9, 0.98),
        )  # fmt: skip
        self.step = 0
        self.seconds = 0.0
        self.best = math.inf
        # Held-out figures of the best network.
        self.best_figures: dict[str, float] = {}
        # Validations since the best one.
        self.stale = 0
        self._resume()

    def run(self, until: Callable[[], bool] = lambda: False) -> dict[str, float]:
        """Trains to the last step, or until ``until()``; returns the last held-out figures."""
        started = saved = time.monotonic()
        sums: defaultdict[str, float] = defaultdict(float)
        count = 0
        figures: dict[str, float] = {}
        with tqdm(total=self.schedule.steps, initial=self.step, unit="step", disable=None) as bar:
            while not self.done and not until():
                for name, value in self._step().items():
                    sums[name] += value
                count += 1
                bar.update()
                last = self.step == self.schedule.steps
                if self.step % self.schedule.validate_every == 0 or last:
                    figures = self.validate()
                    now = time.monotonic()
                    self.seconds, started = self.seconds + now - started, now
                    means = {name: total / count for name, total in sums.items()}
                    self._log(means, figures)
                    self._keep(figures)
                    bar.set_postfix({k: f"{v:.3f}" for k, v in figures.items()})
                    sums.clear()
                    count = 0
                if last or time.monotonic() - saved > CHECKPOINT_SECONDS:
                    now = time.monotonic()
                    self.seconds, started, saved = self.seconds + now - started, now, now
                    self.save()
        self.save()
        return figures

    @property
    def done(self) -> bool:
        """Whether all steps are made, or held-out figures stopped getting better."""
        patience = self.schedule.patience
        return self.step >= self.schedule.steps or bool(patience and self.stale >= patience)

    def weights(self) -> dict[str, Tensor]:
        """The averaged network that the schedule asks for: the last, or the best so far."""
        best = self.folder / KEPT / BEST
        if self.schedule.publish == "best" and best.exists():
            return load_file(best)
        return self.average

    def figures(self, last: dict[str, float]) -> dict[str, float]:
        """Held-out figures of the network that ``weights`` gives.

        Args:
            last: those of the last validation, as ``run`` returns them.
        """
        weights = self.weights()
        if weights is self.average:
            return last or self.validate()
        return self.best_figures or self.validate(weights)

    def _keep(self, figures: dict[str, float]) -> None:
        """Keeps the averaged network of a validation, and lets go of older ones."""
        folder = self.folder / KEPT
        folder.mkdir(exist_ok=True)
        if self.schedule.keep:
            self._store(folder / f"step-{self.step:07d}.safetensors")
        for old in sorted(folder.glob("step-*.safetensors"))[: -self.schedule.keep or None]:
            old.unlink()
        score = self.task.score(figures)
        if score < self.best:
            self.best, self.stale, self.best_figures = score, 0, dict(figures)
            self._store(folder / BEST)
            return
        self.stale += 1
        if self.schedule.patience and self.stale >= self.schedule.patience:
            log.warning(
                "stopped at step %d: no better held-out figure in %d validations",
                self.step, self.stale,
            )  # fmt: skip

    def _store(self, path: Path) -> None:
        with atomic_write(path) as temporary:
            arrays = {name: values.contiguous() for name, values in self.average.items()}
            save_file(arrays, temporary)

    def validate(self, weights: dict[str, Tensor] | None = None) -> dict[str, float]:
        """Held-out figures of the averaged network, or of other ``weights``."""
        kept = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.model.load_state_dict(weights or self.average)
        self.model.eval()
        with self._precision():
            figures = self.task.validate()
        self.model.train()
        self.model.load_state_dict(kept)
        return figures

    def save(self) -> None:
        """Writes the checkpoint; a crash leaves the old one or the new one."""
        state = {
            "model": self.model.state_dict(), "average": self.average,
            "optimizer": self.optimizer.state_dict(), "step": self.step, "seconds": self.seconds,
            "extra": self._extra_state(), "best": self.best, "stale": self.stale,
            "best_figures": self.best_figures,
        }  # fmt: skip
        with atomic_write(self.folder / "checkpoint.pt") as temporary:
            torch.save(state, temporary)

    def _step(self) -> dict[str, float]:
        # Each step has its own generator, so a resumed run draws what the whole one would have.
        rng = np.random.default_rng((self.schedule.seed, self.step))
        torch.manual_seed(self.schedule.seed * 1_000_003 + self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate(self.step)
        with self._precision():
            terms = self.task.loss(rng)
        self.optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(AVERAGE_DECAY, self.step / (self.step + 10))
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                self.average[name].lerp_(value, 1 - decay)
        return {name: float(value.detach()) for name, value in terms.items()}

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(
            self.device.partition(":")[0], torch.bfloat16, enabled=fast_bfloat16(self.device)
        )

    def _extra_state(self) -> dict[str, Any]:
        save = getattr(self.task, "state_dict", None)
        return save() if save else {}

    def _resume(self) -> None:
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.best, self.stale = state.get("best", math.inf), state.get("stale", 0)
        self.best_figures = state.get("best_figures", {})
        if state["extra"]:
            self.task.load_state_dict(state["extra"])  # type: ignore[attr-defined]

    def _log(self, means: dict[str, float], figures: dict[str, float]) -> None:
        row = {"step": self.step, "seconds": round(self.seconds, 1)}
        row |= {f"train_{k}": round(v, 5) for k, v in means.items()}
        row |= {f"held_out_{k}": round(v, 5) for k, v in figures.items()}
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def fast_bfloat16(device: str, convolutions: bool = False) -> bool:
    """Whether bfloat16 is faster than float32. On a CPU it takes matrix units (AMX): emulated it is
    four times slower, and with AVX-512's dot products a step takes 1.2 to 1.4 times as long.

    Args:
        convolutions: nearly all work is theirs; AVX-512's dot products halve their time.
    """
    if device != "cpu":
        return True
    wanted = ["_is_amx_tile_supported", *["_is_avx512_bf16_supported"] * convolutions]
    return any(getattr(torch.cpu, name, lambda: False)() for name in wanted)


def read_log(folder: Path) -> list[dict[str, float]]:
    """Rows of a run folder's ``log.jsonl``; a line that a crash cut short is left out."""
    path = folder / "log.jsonl"
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def plot_curves(folder: Path) -> Path | None:
    """Draws every logged figure over the steps into ``curves.png``; None without any rows."""
    rows = read_log(folder)
    if not rows:
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "Curves need matplotlib; install it with: pip install 'auto-voice[plot]'"
        ) from error
    names = sorted({_figure(key) for row in rows for key in row if key.startswith(PREFIXES)})
    figure = Figure(figsize=(4.2 * len(names), 3.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for prefix, style, label in zip(PREFIXES, ("-", "o-"), LABELS, strict=True):
            points = [(r["step"], r[prefix + name]) for r in rows if prefix + name in r]
            if points:
                axes.plot(*zip(*points, strict=True), style, markersize=3, label=label)
        axes.set(title=name, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend()
    target = folder / "curves.png"
    figure.savefig(target, dpi=110)
    return target


def _figure(key: str) -> str:
    for prefix in PREFIXES:
        key = key.removeprefix(prefix)
    return key
