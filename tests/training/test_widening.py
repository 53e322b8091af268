"""A widened network does what it did; its further features are there to be learnt."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from auto_voice.audio.mel import HIFIGAN_MEL
from auto_voice.models.converter_model import PITCH_SIZE, PROFILE_SIZE
from auto_voice.models.whisper_encoder import ContentSpace
from auto_voice.training.networks.encoders import ContentNet
from auto_voice.training.networks.generators import ConverterNet, VoiceCondition
from auto_voice.training.networks.loading import grow_converter, widen_content, widen_converter

NARROW, WIDE, FRAMES, REFERENCE = 6, 10, 40, 30


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


def test_a_content_encoder_keeps_its_features_and_adds_zeros() -> None:
    torch.manual_seed(0)
    net = ContentNet(NARROW, width=16, blocks=2).eval()
    mel = torch.randn(2, 80, 2 * FRAMES) * 4 - 9
    wide = widen_content(net, WIDE)(mel)
    assert torch.allclose(wide[..., :NARROW], net(mel), atol=1e-5)
    assert not wide[..., NARROW:].any()


def test_a_converter_answers_old_content_as_before_and_learns_from_new() -> None:
    torch.manual_seed(0)
    net = ConverterNet(NARROW, width=16, blocks=2, heads=2).eval()
    wide = widen_converter(net, WIDE).eval()
    content, pitch = torch.randn(1, FRAMES, NARROW), torch.randn(1, FRAMES, PITCH_SIZE)
    keys = torch.randn(1, REFERENCE, NARROW)

    def longer(values: torch.Tensor) -> torch.Tensor:
        return torch.cat([values, torch.zeros(1, values.shape[1], WIDE - NARROW)], dim=-1)

    before = net(content, pitch, _voice(keys))
    after = wide(longer(content), pitch, _voice(longer(keys)))
    assert torch.allclose(before, after, atol=1e-5)

    heard = torch.randn(1, FRAMES, WIDE)
    wide(heard, pitch, _voice(torch.randn(1, REFERENCE, WIDE))).square().sum().backward()
    assert wide.stem.weight.grad[:, NARROW:WIDE].abs().min() > 0
    assert wide.attention.project.grad[:, NARROW:, NARROW:].abs().max() > 0


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


def test_a_space_grows_by_what_it_missed() -> None:
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(4000, 12)) * np.geomspace(3, 0.3, 12)
    frames = [(mixed @ rng.normal(size=(12, 12))).astype(np.float32)]
    narrow = ContentSpace.fit([f[:1500] for f in frames], 4)
    wide = narrow.widened(frames, 9)
    content = wide.project(frames[0])
    assert np.allclose(content[:, :4], narrow.project(frames[0]), atol=1e-5)
    correlation = np.corrcoef(content.T)
    assert np.abs(correlation[4:, :4]).max() < 0.02
    assert np.abs(correlation[4:, 4:] - np.eye(5)).max() < 0.02
    assert np.allclose(content[:, 4:].std(0), 1, atol=0.02)
    assert np.isfinite(narrow.widened(frames, 12).projection).all()
