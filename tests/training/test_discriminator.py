"""What the discriminator says of a mel, and that a converter can learn from it."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from auto_voice.training.losses import AdversarialLoss
from auto_voice.training.tasks import ContentTask, ConverterTask
from auto_voice.training.trainer import Schedule, Trainer
from graph_kit import content_net
from speech_kit import DIMS, corpus

NET = {"dims": DIMS, "width": 32, "blocks": 2}
CROPS = {"batch": 4, "frames": 64}


def _blurred(mel: Tensor, bands: int) -> Tensor:
    kernel = torch.ones(1, 1, bands) / bands
    rows = mel.reshape(-1, 1, mel.shape[-1])
    padded = torch.nn.functional.pad(rows, (bands // 2, bands // 2), mode="replicate")
    return torch.nn.functional.conv1d(padded, kernel).reshape(mel.shape)


def test_the_discriminator_learns_to_tell_rough_from_smooth_and_says_how() -> None:
    torch.manual_seed(0)
    adversary = AdversarialLoss({"channels": (8, 8)}, learning_rate=5e-3)

    def real() -> Tensor:
        return torch.randn(4, 32, 80)

    first = float(adversary.update(_blurred(real(), 9), real()))
    for _ in range(60):
        last = float(adversary.update(_blurred(real(), 9), real()))
    assert last < 0.2 < first
    smooth = _blurred(real(), 9).requires_grad_(True)
    passing, _ = adversary.losses(smooth, real())
    (direction,) = torch.autograd.grad(passing, smooth)
    better, _ = adversary.losses(smooth - 20 * direction / direction.norm(), real())
    assert float(better.detach()) < float(passing.detach())
    assert all(p.requires_grad for p in adversary.discriminator.parameters())


@pytest.mark.slow
def test_a_discriminator_makes_the_mels_of_a_converter_sharper(tmp_path: Path) -> None:
    """Where content does not tell the fine structure, the mean is smooth; this loss is not."""
    speech = corpus()
    rng = np.random.default_rng(3)
    for one in speech.items:
        rough = one.features["mel"] + rng.normal(0, 1.0, one.features["mel"].shape)
        one.features["mel"] = rough.astype(np.float16)
    detail = {}
    for texture in (0.0, 2.0):
        torch.manual_seed(0)
        task = ConverterTask(
            speech,
            speech,
            NET,
            reference_frames=64,
            feature_matching_loss=texture,
            adversarial_loss=texture,
            **CROPS,
        )
        schedule = Schedule(steps=80, learning_rate=2e-3, warmup=5, validate_every=80)
        detail[texture] = Trainer(task, schedule, tmp_path / str(texture)).run()["detail_teacher"]
    assert detail[2.0] > 1.3 * detail[0.0]


def test_noise_is_for_training_only() -> None:
    speech = corpus()
    task = ConverterTask(speech, speech, NET, reference_frames=64, noise=3.0, **CROPS)
    quiet = ConverterTask(speech, speech, NET, reference_frames=64, **CROPS)
    quiet.model.load_state_dict(task.model.state_dict())
    assert task.validate() == quiet.validate()
    noisy, _, _ = task.forward(speech, np.random.default_rng(0), 4)
    clean, _, _ = quiet.forward(speech, np.random.default_rng(0), 4)
    assert not torch.allclose(noisy, clean)


@pytest.mark.slow
def test_a_training_with_a_discriminator_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    schedule = Schedule(steps=6, warmup=2, validate_every=3)

    def task() -> ConverterTask:
        torch.manual_seed(1)
        return ConverterTask(
            corpus(),
            corpus(),
            NET,
            reference_frames=64,
            feature_matching_loss=0.5,
            adversarial_loss=0.1,
            **CROPS,
        )

    whole = task()
    Trainer(whole, schedule, tmp_path / "whole").run()
    half = Trainer(task(), schedule, tmp_path / "halves")
    half.run(until=lambda: half.step >= 3)
    rest = task()
    Trainer(rest, schedule, tmp_path / "halves").run()
    for one, other in zip(
        [*whole.model.parameters(), *whole.adversary.discriminator.parameters()],  # type: ignore[union-attr]
        [*rest.model.parameters(), *rest.adversary.discriminator.parameters()],  # type: ignore[union-attr]
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_batches_lie_where_the_network_lies() -> None:
    """The meta device stands in for a GPU: it refuses to meet tensors of the processor."""
    speech, rng = corpus(), np.random.default_rng(0)
    converter = ConverterTask(speech, speech, NET, reference_frames=64, **CROPS)
    converter.model.to("meta")
    assert {t.device.type for t in converter.forward(speech, rng, 2)} == {"meta"}
    content = ContentTask(speech, speech, content_net(DIMS), **CROPS)
    content.model.to("meta")
    for place in ((0, 0, 0), (100, 8, 5)):
        assert content._errors(speech.items[0], rng, 1.0, place).device.type == "meta"


def test_a_discriminator_is_taken_up_where_the_network_lies() -> None:
    speech = corpus()
    task = ConverterTask(
        speech, speech, NET, reference_frames=64, feature_matching_loss=0.5, **CROPS
    )
    task.loss(np.random.default_rng(0))
    saved = task.state_dict()
    other = ConverterTask(
        speech, speech, NET, reference_frames=64, feature_matching_loss=0.5, **CROPS
    )
    other.model.to("meta")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Copying numbers to the meta device does nothing.
        other.load_state_dict(saved)
    assert other.adversary is not None
    held = [
        v for s in other.adversary.optimizer.state.values() for k, v in s.items() if k != "step"
    ]
    assert held
    assert {t.device.type for t in held} == {"meta"}
