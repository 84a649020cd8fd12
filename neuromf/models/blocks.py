"""The blocks that a backbone is made of: units to recompute in the backward pass, and to spread over processes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

BLOCK_CLASSES = ("DiffusionUNetResnetBlock", "SpatialAttentionBlock", "_ResBlock", "_Block")
"""Class names of the blocks of `maisi-unet` (MONAI's two and the v-head's) and `mit`; `mlp` has none."""


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """Its blocks; they do not contain each other."""
    return [module for module in network.modules() if type(module).__name__ in BLOCK_CLASSES]


def recompute_blocks(network: nn.Module) -> int:
    """Keep no activations inside the blocks for the backward pass: it runs each block once more (Chen 2016).

    Passes without a tape, such as those of the derivative, are left alone.

    Returns:
        How many blocks there are.
    """
    found = blocks_of(network)
    for block in found:
        block.forward = partial(_recomputed, block.forward)
    return len(found)


def _recomputed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
