"""Networks as larger ones that do what they did before, until training finds more to do.

Those of a narrow content space become networks of a wider one that begins with it, and a converter
takes further blocks, or more hidden values in each.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from auto_voice.models.converter_model import PITCH_SIZE
from auto_voice.training.networks.content import ContentNet
from auto_voice.training.networks.converter import ConverterNet

# Arguments of ``ConverterNet`` that a trained one can be given more of, and what to call them.
GROWS = {"blocks": "{} blocks", "expansion": "an expansion of {}"}
# What the lookup makes of a new feature at first: with nothing it would never learn to look.
INITIAL_ATTENTION = 0.3


def widen_content(net: ContentNet, dims: int) -> ContentNet:
    """``net`` with ``dims`` features, of which the new ones are zero."""
    wide = ContentNet(**{**net.arguments, "dims": dims})
    weights = _on_cpu(net)
    for name in ("head.weight", "head.bias"):
        weights[name] = _longer(weights[name], dims)
    wide.load_state_dict(weights)
    return wide.eval()


def widen_converter(net: ConverterNet, dims: int, cepstra: bool = False) -> ConverterNet:
    """``net`` for content of ``dims`` features, deaf to the new ones but in its lookup.

    The new features follow all that ``net`` knows.

    Args:
        cepstra: whether the content ends with them.
    """
    wide = ConverterNet(**{**net.arguments, "dims": dims, "cepstra": cepstra})
    weights = _on_cpu(net)
    stem = weights["stem.weight"]
    known = stem.shape[1] - PITCH_SIZE
    unheard = torch.zeros(stem.shape[0], dims - known, stem.shape[2])
    weights["stem.weight"] = torch.cat([stem[:, :known], unheard, stem[:, known:]], dim=1)
    if wide.attention is not None:
        project = INITIAL_ATTENTION * torch.eye(dims).repeat(wide.attention.heads, 1, 1)
        project[:, :known, :known] = weights["attention.project"]
        weights["attention.project"] = project
    wide.load_state_dict(weights)
    return wide


def grow_converter(net: ConverterNet, blocks: int, expansion: int) -> ConverterNet:
    """``net`` with ``blocks`` blocks, whose perceptrons have ``expansion`` times its width.

    Neither is less than its own. The further blocks, spread among its own, and the further hidden
    values add nothing yet.
    """
    large = ConverterNet(**{**net.arguments, "blocks": blocks, "expansion": expansion})
    weights = {
        name: torch.zeros_like(values) if ".project." in name else values.clone()
        for name, values in large.state_dict().items()
    }
    for name, values in _on_cpu(net).items():
        place = name
        if name.startswith("blocks."):
            _, index, part = name.split(".", 2)
            place = f"blocks.{-(-int(index) * blocks // len(net.blocks))}.{part}"
        # The first of the hidden values are its own; nothing else differs in size.
        weights[place][tuple(slice(size) for size in values.shape)] = values
    large.load_state_dict(weights)
    return large


def _on_cpu(net: nn.Module) -> dict[str, Tensor]:
    """Copies: the network may be one that a registry lends, on its own device."""
    return {name: values.detach().cpu().clone() for name, values in net.state_dict().items()}


def _longer(values: Tensor, rows: int) -> Tensor:
    return torch.cat([values, torch.zeros(rows - len(values), *values.shape[1:])])
