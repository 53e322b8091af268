from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from auto_voice.training.networks.generators import Dropout  # noqa: E402


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.99])
def test_the_share_is_left_out_and_the_mean_stays(share):
    torch.manual_seed(1)
    y = Dropout(share)(torch.ones(40, 50, 200))
    deviation = (share * (1 - share) / y.numel()) ** 0.5
    assert float((y == 0).double().mean()) == pytest.approx(share, abs=5 * deviation)
    assert float(y.double().mean()) == pytest.approx(1, abs=6 * deviation / (1 - share))


def test_neighbours_are_left_out_independently():
    torch.manual_seed(2)
    left_out = (Dropout(0.3)(torch.ones(500, 400)) == 0).double()
    for shifted in (left_out[:, 1:] * left_out[:, :-1], left_out[1:] * left_out[:-1]):
        assert float(shifted.mean()) == pytest.approx(0.09, abs=0.004)


def test_what_is_left_out_follows_from_the_generator_and_differs_by_call():
    x = torch.rand(6, 7, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(3)
    drop = Dropout(0.5, generator)
    first, second = drop(x), drop(x)
    assert first.dtype == x.dtype
    assert not torch.equal(first, second)
    generator.manual_seed(3)
    torch.manual_seed(99)
    assert torch.equal(drop(x), first)
    everyones = Dropout(0.5)
    torch.manual_seed(4)
    once = everyones(x)
    torch.manual_seed(4)
    assert torch.equal(everyones(x), once)


def test_nothing_is_left_out_by_a_share_of_none_or_outside_of_training():
    x = torch.rand(3, 4)
    assert Dropout(0.0)(x) is x
    assert Dropout(0.5).eval()(x) is x


@pytest.mark.parametrize("share", [0.99999, 0.999999, 1.0])
def test_next_to_all_left_out_is_still_finite(share):
    torch.manual_seed(6)
    y = Dropout(share)(torch.ones(300, 1000))
    assert torch.isfinite(y).all()
    assert float((y == 0).double().mean()) > 0.9995


def test_gradients_pass_what_is_kept():
    torch.manual_seed(5)
    x = torch.ones(1000, requires_grad=True)
    y = Dropout(0.25)(x)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
