"""A critic of predicted mels, trained against the converter that makes them.

The mean distance is least for a mel that is the average of all that could have been said: blurred.
A critic learns to tell such mels from real ones, and the converter to pass (least squares, Mao et
al. 2017; for mels: Yang et al. 2021).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MelCritic(nn.Module):
    """Real or made, patch by patch of a mel.

    Args:
        channels: of the layers, each of which halves time and frequency.
    """

    def __init__(self, channels: Sequence[int] = (24, 48, 96)) -> None:
        super().__init__()
        layers, before = [], 1
        for width in channels:
            layers.append(nn.Conv2d(before, width, (3, 5), stride=2, padding=(1, 2)))
            before = width
        self.layers = nn.ModuleList(layers)
        self.head = nn.Conv2d(before, 1, 3, padding=1)

    def forward(self, mel: Tensor) -> list[Tensor]:
        """Standardised mel ``(batch, frames, bands)`` to what each layer saw, then the verdict."""
        x = mel[:, None]
        seen = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
            seen.append(x)
        return [*seen, self.head(x)]


class Adversary:
    """A critic in training, and what it says to the converter (least squares, Mao et al. 2017).

    Args:
        settings: arguments of ``MelCritic``.
        learning_rate: of its Adam.
    """

    def __init__(
        self, settings: Mapping[str, Any] | None = None, learning_rate: float = 2e-4
    ) -> None:
        self.critic = MelCritic(**(settings or {}))
        self.learning_rate = learning_rate
        self.optimizer = self._optimiser()

    def to(self, device: torch.device) -> None:
        """Moves the critic before it learns; what it had learnt so far is loaded afterwards."""
        if next(self.critic.parameters()).device != device:
            self.critic.to(device)
            self.optimizer = self._optimiser()

    def _optimiser(self) -> torch.optim.Adam:
        return torch.optim.Adam(self.critic.parameters(), lr=self.learning_rate, betas=(0.5, 0.9))

    def learn(self, predicted: Tensor, target: Tensor) -> Tensor:
        """One step of the critic; its loss: 0.5 where it cannot tell, 0 where it always can."""
        real, made = self.critic(target)[-1], self.critic(predicted.detach())[-1]
        loss: Tensor = (real - 1).square().mean() + made.square().mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.detach()

    def complain(self, predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """How far ``predicted`` is from passing as real, and from what the critic saw in
        ``target``."""
        self.critic.requires_grad_(False)
        seen = self.critic(predicted)
        with torch.no_grad():
            wanted = self.critic(target)
        self.critic.requires_grad_(True)
        parts = [
            (ours - theirs).abs().mean() / (theirs.abs().mean() + 1e-6)
            for ours, theirs in zip(seen[:-1], wanted[:-1], strict=True)
        ]
        return (seen[-1] - 1).square().mean(), torch.stack(parts).mean()

    def suspicion(self, mel: Tensor) -> Tensor:
        """How far ``mel``, which has no original, is from passing as real."""
        self.critic.requires_grad_(False)
        verdict = self.critic(mel)[-1]
        self.critic.requires_grad_(True)
        loss: Tensor = (verdict - 1).square().mean()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Network and optimiser."""
        return {"critic": self.critic.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What ``state_dict`` gave."""
        self.critic.load_state_dict(state["critic"])
        self.optimizer.load_state_dict(state["optimizer"])
