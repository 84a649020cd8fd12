"""Weights that FSDP has spread over processes: as this process holds them, and whole.

Everything here leaves ordinary tensors as they are, so that the loop does not ask which ones it has. Making tensors
whole is a collective operation: every process must take part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of it only."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part that this process holds, on the same storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it, on every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_tree(tree: Any) -> Any:
    """Nested dicts and lists with every sharded tensor made whole."""
    if isinstance(tree, Tensor):
        return whole(tree)
    if isinstance(tree, Mapping):
        return {key: whole_tree(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(whole_tree(value) for value in tree)
    return tree


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor spread as another one of its shape is."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def exchange_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put weights, spread as the network's own are, in their place.

    Returns:
        The network's own, to be put back the same way.
    """
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # or it would go on using what it has gathered
    former: dict[str, Tensor] = {}
    for name, p in network.named_parameters():
        if is_sharded(p):
            former[name] = p.detach().clone()
            local(p.detach()).copy_(local(weights[name]))
        else:
            former[name] = p.data
            p.data = weights[name].to(p.dtype)
    return former


@torch.no_grad()
def load_weights(module: nn.Module, weights: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """`load_state_dict` of whole weights into a module that may be sharded."""
    own = module.state_dict()
    module.load_state_dict(
        {name: shard_like(value, own[name]) if name in own else value for name, value in weights.items()}, strict=strict
    )


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """`load_state_dict` of an optimiser's whole state where its parameters may be sharded."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    spread = {
        index: {
            name: shard_like(value, parameters[index]) if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": spread})
