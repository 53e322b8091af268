"""A run that was stopped goes on as if it had not been."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from auto_voice.errors import TrainingError
from auto_voice.training import trainer as module
from auto_voice.training.trainer import Schedule, Trainer, plot_curves, read_log


class _Line:
    """Fits y = 3 x - 1 from noisy points; dropout makes it depend on torch's generator too."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.1), nn.Linear(8, 1))

    def loss(self, rng: np.random.Generator) -> dict[str, Tensor]:
        x = torch.from_numpy(rng.normal(size=(32, 1)).astype(np.float32))
        return {"loss": (self.model(x) - (3 * x - 1)).square().mean()}

    def validate(self) -> dict[str, float]:
        x = torch.linspace(-1, 1, 9)[:, None]
        with torch.no_grad():
            return {"error": float((self.model(x) - (3 * x - 1)).abs().mean())}

    def score(self, figures: dict[str, float]) -> float:
        return figures["error"]


SCHEDULE = Schedule(60, learning_rate=2e-2, warmup=5, validate_every=20)


def _weights(folder: Path) -> dict[str, Tensor]:
    return Trainer(_Line(), SCHEDULE, folder).average


@pytest.mark.slow
def test_it_learns_and_logs(tmp_path: Path) -> None:
    figures = Trainer(_Line(), Schedule(400, 2e-2, 5, validate_every=100), tmp_path).run()
    assert figures["error"] < 0.1
    rows = read_log(tmp_path)
    assert [row["step"] for row in rows] == [100, 200, 300, 400]
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]


def test_a_stopped_run_ends_where_the_whole_one_does(tmp_path: Path) -> None:
    Trainer(_Line(), SCHEDULE, tmp_path / "whole").run()
    for stop in (7, 33):
        first = Trainer(_Line(), SCHEDULE, tmp_path / "parts")
        first.run(until=lambda first=first, stop=stop: first.step >= stop)
        assert first.step == stop
    Trainer(_Line(), SCHEDULE, tmp_path / "parts").run()
    whole, parts = _weights(tmp_path / "whole"), _weights(tmp_path / "parts")
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_a_finished_run_stays_finished(tmp_path: Path) -> None:
    Trainer(_Line(), SCHEDULE, tmp_path).run()
    before = _weights(tmp_path)
    again = Trainer(_Line(), SCHEDULE, tmp_path)
    again.run()
    assert again.step == 60
    assert all(torch.equal(before[key], value) for key, value in _weights(tmp_path).items())


def test_a_crash_while_saving_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(_Line(), SCHEDULE, tmp_path)
    trainer.run(until=lambda: trainer.step >= 10)

    def half(state: object, path: Path) -> None:
        Path(path).write_bytes(b"half a checkpoint")
        raise OSError("disk full")

    monkeypatch.setattr(module.torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        trainer.save()
    monkeypatch.undo()
    assert Trainer(_Line(), SCHEDULE, tmp_path).step == 10


def test_validation_judges_the_average_and_leaves_the_network_alone(tmp_path: Path) -> None:
    trainer = Trainer(_Line(), SCHEDULE, tmp_path)
    trainer.run(until=lambda: trainer.step >= 15)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.validate()
    assert all(torch.equal(before[k], v) for k, v in trainer.model.state_dict().items())
    assert trainer.model.training


def test_the_rate_rises_then_falls_to_a_fiftieth() -> None:
    schedule = Schedule(1000, learning_rate=1.0, warmup=100)
    rates = [schedule.rate(step) for step in range(1001)]
    assert rates[0] == pytest.approx(0.01)
    assert np.argmax(rates) in range(95, 105)
    assert all(a >= b for a, b in pairwise(rates[110:]))
    assert rates[1000] == pytest.approx(0.02)


def test_curves_are_drawn_from_what_was_logged(tmp_path: Path) -> None:
    assert plot_curves(tmp_path) is None
    Trainer(_Line(), SCHEDULE, tmp_path).run()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 80, "trai')
    picture = plot_curves(tmp_path)
    assert picture is not None
    assert picture.read_bytes().startswith(b"\x89PNG")


class _Worsening(_Line):
    """Its held-out figure is best at the second validation."""

    figures = iter(())

    def __init__(self, figures: list[float]) -> None:
        super().__init__()
        self.figures = iter(figures)

    def validate(self) -> dict[str, float]:
        return {"error": next(self.figures)}


def test_the_best_network_and_the_last_ones_are_kept(tmp_path: Path) -> None:
    schedule = Schedule(50, validate_every=10, keep=2, publish="best")
    trainer = Trainer(_Worsening([3.0, 1.0, 2.0, 2.5, 4.0]), schedule, tmp_path)
    trainer.run(until=lambda: trainer.step >= 20)
    second = {name: values.clone() for name, values in trainer.average.items()}
    trainer.run()
    kept = sorted(path.name for path in (tmp_path / "kept").iterdir())
    assert kept == ["best.safetensors", "step-0000040.safetensors", "step-0000050.safetensors"]
    assert all(torch.equal(second[name], values) for name, values in trainer.weights().items())
    assert any(not torch.equal(second[name], values) for name, values in trainer.average.items())


def test_the_figures_are_those_of_the_network_that_is_given(tmp_path: Path) -> None:
    given = [3.0, 1.0, 2.0, 2.5, 4.0]
    for publish, error in (("best", 1.0), ("last", 4.0)):
        schedule = Schedule(50, validate_every=10, publish=publish)
        trainer = Trainer(_Worsening(given), schedule, tmp_path / publish)
        assert trainer.figures(trainer.run()) == {"error": error}
    # A run that had ended is asked again, and one of before these figures were kept.
    best = Schedule(50, validate_every=10, publish="best")
    again = Trainer(_Worsening([]), best, tmp_path / "best")
    assert again.figures(again.run()) == {"error": 1.0}
    again.best_figures = {}
    again.task = _Line()
    again.task.model = again.model
    assert again.figures({}) != again.validate()


def test_training_ends_when_held_out_figures_stop_getting_better(tmp_path: Path) -> None:
    schedule = Schedule(100, validate_every=10, patience=2)
    trainer = Trainer(_Worsening([3.0, 2.0, 2.5, 2.2, 1.0]), schedule, tmp_path)
    trainer.run()
    assert trainer.step == 40
    again = Trainer(_Worsening([0.0]), schedule, tmp_path)
    assert again.done
    again.run()
    assert again.step == 40


@pytest.mark.parametrize("wrong", [{"publish": "first"}, {"keep": -1}, {"patience": 1.5}])
def test_a_schedule_that_cannot_be_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(TrainingError, match=next(iter(wrong))):
        Schedule(10, **wrong)  # type: ignore[arg-type]
