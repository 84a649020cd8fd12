"""A plain network for points: what the toy problems train, and the smallest backbone there is.

Smooth throughout, as the exact derivative asks; times enter as they are (and need no sinusoids in [0, 1]).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neuromf.conditions import Condition

Conditioning = Literal["t+h", "r+t", "h"]


class MeanFlowMLP(nn.Module):
    """u(z, r, t) or x_hat(z, r, t) by `depth` SiLU layers of `width` on [z, times].

    Args:
        shape: (C, I, J, K) of a sample; it is flattened.
        width: of every hidden layer.
        depth: hidden layers.
        conditioning: `t+h`, `r+t`, or `h` alone, h = t - r.
        v_head_blocks: hidden layers of a second head, which predicts the instantaneous velocity; 0, no such head.
        classes: K, for labels 0 ... K - 1 and K for no class; 0 takes no labels.
        guidance: take a guidance scale and interval as inputs.

    Example:
        >>> net = MeanFlowMLP((4, 1, 1, 1), width=32, depth=2)
        >>> net(torch.randn(8, 4, 1, 1, 1), torch.zeros(8), torch.ones(8)).shape
        torch.Size([8, 4, 1, 1, 1])
    """

    ADAMW_MODULES: ClassVar[tuple[str, ...]] = ("first", "class_embedding", "out", "v_head.out")
    """Modules whose weights are not Muon's: embeddings, first and last layers."""

    V_HEAD_MODULES: ClassVar[tuple[str, ...]] = ("v_head",)
    """Modules that sampling does without."""

    def __init__(
        self,
        shape: Sequence[int],
        width: int = 256,
        depth: int = 4,
        conditioning: Conditioning = "t+h",
        v_head_blocks: int = 0,
        classes: int = 0,
        guidance: bool = False,
    ) -> None:
        super().__init__()
        self.conditioning, self.classes, self.guidance = conditioning, classes, guidance
        values = math.prod(shape)
        told = (1 if conditioning == "h" else 2) + (3 if guidance else 0)
        self.first = nn.Linear(values + told, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        self.out = nn.Linear(width, values)
        self.class_embedding = nn.Embedding(classes + 1, width) if classes else None
        self.v_head = VelocityHead(width, values, v_head_blocks) if v_head_blocks else None

    def features(self, z: Tensor, r: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """The last hidden layer (B, width), which the heads read."""
        label, omega, interval = condition or Condition()
        times = {"t+h": (t, t - r), "r+t": (t, r), "h": (t - r,)}[self.conditioning]
        told = [torch.stack(times, dim=1).to(z.dtype)]
        if self.guidance:
            told.append(_guidance_features(omega, interval, t).to(z.dtype))
        h = self.first(torch.cat([z.flatten(1), *told], dim=1))
        if self.class_embedding is not None:
            label = torch.full((len(t),), self.classes, device=t.device) if label is None else label
            h = h + self.class_embedding(label)
        h = F.silu(h)
        for layer in self.hidden:
            h = F.silu(layer(h))
        return h

    def forward(self, z: Tensor, r: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """The network's output at (z_t, r, t).

        Args:
            z: (B, C, I, J, K).
            r, t: (B,).
            condition: class and guidance; what the network was not built for is left alone.

        Returns:
            (B, C, I, J, K): u or x_hat, as the objective reads it.
        """
        return self.out(self.features(z, r, t, condition)).reshape(z.shape)

    def heads(self, z: Tensor, r: Tensor, t: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        """Both heads, (u or x_hat, v), from the same features; arguments as in `forward`.

        Raises:
            ValueError: the network has no v-head.
        """
        if self.v_head is None:
            raise ValueError("the network has no v-head: it was built with v_head_blocks=0")
        features = self.features(z, r, t, condition)
        return self.out(features).reshape(z.shape), self.v_head(features).reshape(z.shape)

    def without_v_head(self) -> MeanFlowMLP:
        """A copy for sampling: the same output to the last bit, and no v-head."""
        twin = copy.deepcopy(self)
        twin.v_head = None
        return twin


class VelocityHead(nn.Module):
    """The instantaneous velocity from the last hidden layer; training alone uses it (Geng 2025b).

    Args:
        width: of the hidden layers.
        values: of a sample.
        blocks: hidden layers of its own.
    """

    def __init__(self, width: int, values: int, blocks: int) -> None:
        super().__init__()
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.out = nn.Linear(width, values)

    def forward(self, features: Tensor) -> Tensor:
        """(B, width) -> (B, values)."""
        for layer in self.hidden:
            features = F.silu(layer(features))
        return self.out(features)


def _guidance_features(omega: Tensor | None, interval: Tensor | None, t: Tensor) -> Tensor:
    """1 - 1/omega and the interval's two ends, (B, 3); none given is omega = 1 in [0, 1]."""
    strength = torch.zeros_like(t) if omega is None else 1 - 1 / omega.to(t.dtype)
    low, high = (torch.zeros_like(t), torch.ones_like(t)) if interval is None else interval.to(t.dtype).unbind(1)
    return torch.stack([strength, low, high], dim=1)
