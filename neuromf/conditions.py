"""What a sample is conditioned on: a class, and the guidance it asks the network to have built in.

Networks, objective and sampler meet in this record; each leaves what it does not use alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Condition(NamedTuple):
    """Conditions of a batch; None where there are none.

    label: (B,) int64, 0 ... K - 1, or K for "no class".
    omega: (B,) guidance scale; 1 is no guidance.
    interval: (B, 2), the times [low, high] inside which guidance acts.
    """

    label: Tensor | None = None
    omega: Tensor | None = None
    interval: Tensor | None = None

    def select(self, at: Tensor) -> Condition:
        """The conditions of the samples with these indices."""
        return Condition(*(None if value is None else value[at] for value in self))

    def to(self, device: torch.device) -> Condition:
        """The same conditions on another device."""
        return Condition(*(None if value is None else value.to(device) for value in self))
