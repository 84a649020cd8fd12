"""How much memory a training run will need, counted on tensors that hold no data."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from neuromf.models.networks import parameter_count

GIB = 1 << 30


class Memory(NamedTuple):
    """Bytes. `state` is weights, gradients, AdamW's moments and the averages; `activations` what backward keeps."""

    parameters: int
    state: int
    activations: int

    @property
    def total(self) -> int:
        """State plus activations, plus a tenth for buffers and the allocator."""
        return int(1.1 * (self.state + self.activations))


def estimate(
    network: nn.Module, shape: Sequence[int], batch: int, averages: int, half: bool, v_head: bool = False
) -> Memory:
    """Estimate the memory of one process.

    The activations are counted, not guessed: a forward pass on the `meta` device with a hook on every tensor saved
    for backward.

    Args:
        network: any device; a copy on `meta` is evaluated.
        shape: (C, I, J, K) of a latent.
        batch: samples per micro-batch.
        averages: number of weight averages kept.
        half: activations in bf16.
        v_head: whether it has a second head, which is trained too.
    """
    ghost: Any = copy.deepcopy(network).to("meta")
    seen: dict[int, int] = {}
    kept: list[Any] = []  # keeps the tensors alive, so that an id is never given twice

    def count(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and id(tensor) not in seen:
            seen[id(tensor)] = tensor.numel() * tensor.element_size()
            kept.append(tensor)
        return tensor

    z, time = torch.zeros(batch, *shape, device="meta"), torch.zeros(batch, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        # A network with a second head is trained through both.
        ghost.heads(z, time, time) if v_head else ghost(z, time, time)
    parameters = parameter_count(network)
    return Memory(parameters, parameters * 4 * (4 + averages), sum(seen.values()) // (2 if half else 1))


def available(device: str) -> tuple[int, str]:
    """Memory of the device a run would use, in bytes, and its name."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory, torch.cuda.get_device_name(0)
    import psutil

    return psutil.virtual_memory().total, "this machine's memory"
