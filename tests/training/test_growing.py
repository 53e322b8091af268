"""A grown network does what it did; what is added is there to be learnt."""

from __future__ import annotations

import pytest
import torch

from auto_voice.audio.mel import HIFIGAN_MEL
from auto_voice.models.converter_model import PITCH_SIZE, PROFILE_SIZE
from auto_voice.training.networks.generators import ConverterNet, VoiceCondition
from auto_voice.training.networks.loading import grow_converter

NARROW, FRAMES, REFERENCE = 6, 40, 30


def _voice(keys: torch.Tensor) -> VoiceCondition:
    generator = torch.Generator().manual_seed(1)
    count = keys.shape[1]
    return VoiceCondition(
        torch.nn.functional.normalize(torch.randn(1, 256, generator=generator), dim=-1),
        torch.randn(1, PROFILE_SIZE, generator=generator),
        keys,
        torch.randn(1, count, HIFIGAN_MEL.bands, generator=generator),
        torch.ones(1, count, dtype=torch.bool),
    )


@pytest.mark.parametrize(
    ("own", "blocks", "expansion"), [(2, 3, 2), (2, 4, 2), (3, 7, 3), (4, 5, 4), (2, 2, 3)]
)
def test_a_grown_converter_does_what_it_did_and_all_of_it_learns(
    own: int, blocks: int, expansion: int
) -> None:
    torch.manual_seed(0)
    net = ConverterNet(NARROW, width=16, blocks=own, heads=2).eval()
    large = grow_converter(net, blocks, expansion).eval()
    content, pitch = torch.randn(1, FRAMES, NARROW), torch.randn(1, FRAMES, PITCH_SIZE)
    voice = _voice(torch.randn(1, REFERENCE, NARROW))
    made = large(content, pitch, voice)
    assert torch.allclose(net(content, pitch, voice), made, atol=1e-6)
    assert len(large.blocks) == large.arguments["blocks"] == blocks
    assert large.blocks[0].expand.out_features == large.arguments["expansion"] * 16
    made.square().sum().backward()
    # Each hidden value, old and new, is about to be heard.
    assert all(block.project.weight.grad.abs().amax(0).min() > 0 for block in large.blocks)
    fresh = [block for block in large.blocks if not block.project.weight.any()]
    assert len(fresh) == blocks - own
