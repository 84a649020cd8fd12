"""Weights of one run as the start of another: the same network, or the same with more inputs and heads.

Every conversion preserves the function: the new network's output is the old one's, bit for bit. A flow model, which
knows t alone, becomes an average-velocity network in one of two ways: *decoupled* (its decoder is told r instead of
t: equal at r = t; arXiv 2510.24474), or with a *second time* whose branch ends in zeros (equal at every r and t).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from neuromf.errors import UserError
from neuromf.models.state import refuse_differences
from neuromf.models.wrappers import Padded, Patched, Preconditioned

# Where a setting adds modules: their prefix, and the prefix of what must be zero for them to have no effect.
_ADDED = {
    "maisi-unet": {
        "conditioning": ("second_embed.", "second_embed.2."),
        "classes": ("net.class_embedding.", "net.class_embedding."),
        "guidance": ("guidance_embed.", "guidance_embed.2."),
    },
    "mlp": {"classes": ("class_embedding.", "class_embedding.")},
    "mit": {},  # its conditions are tokens, which are felt by being there
}
_WRAPPED = re.compile(r"^(network\.)+")
_ALLOWED = (
    "a run may start from the same network; a maisi-unet of conditioning 't' may become 't+h', 'r+t' or 'decoupled'; "
    "a v-head may be added or left out, classes added to maisi-unet and mlp, guidance to maisi-unet"
)


def convert(
    state: Mapping[str, Tensor], source: Mapping[str, Any], target_network: nn.Module, target: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The state dict that starts `target_network` from the weights of another run.

    Args:
        state: weights of the source.
        source: its `network` settings.
        target_network: freshly built; what the source lacks keeps its values, or gets zeros where it would be felt.
        target: the target's `network` settings.

    Returns:
        What `target_network.load_state_dict` takes.

    Raises:
        UserError: the networks differ in more than may be converted; everything that differs is listed.
    """
    changed = {key for key in source.keys() | target.keys() if _plain(source.get(key)) != _plain(target.get(key))}
    _refuse_settings(changed, source, target)
    prefix, network = _unwrap(target_network)
    modules = [_ADDED[target["name"]][key] for key in changed if key in _ADDED[target["name"]]]
    added = tuple(prefix + start for start, _ in modules)
    silent = tuple(prefix + start for _, start in modules)
    found = {prefix + _WRAPPED.sub("", name): value for name, value in state.items()}
    if "v_head_blocks" in changed:
        v_head = tuple(f"{prefix}{name}." for name in network.V_HEAD_MODULES)
        found = {name: value for name, value in found.items() if not name.startswith(v_head)}
        added += v_head
    fresh = target_network.state_dict()
    for name, value in fresh.items():
        if name not in found and name.startswith(added):
            found[name] = torch.zeros_like(value) if name.startswith(silent) else value.clone()
    refuse_differences("these weights do not fit the network", found, fresh, _ALLOWED)
    return found


def _refuse_settings(changed: set[str], source: Mapping[str, Any], target: Mapping[str, Any]) -> None:
    if "name" in changed:
        changed = {"name"}  # the other settings of two kinds of network have nothing to do with each other
    lines = [
        f"{key}: {source.get(key)!r} there, {target.get(key)!r} here"
        for key in sorted(changed)
        if not _convertible(key, source.get(key), target.get(key), _ADDED[target["name"]])
    ]
    if lines:
        raise UserError("these weights are of another network:\n  " + "\n  ".join(lines), _ALLOWED)


def _convertible(key: str, old: Any, new: Any, added: Mapping[str, Any]) -> bool:
    """Whether a setting may change this way."""
    if key == "conditioning":
        return old == "t" and new in ("t+h", "r+t", "decoupled")
    if key == "v_head_blocks":
        return not (old and new)
    return key == "pad" or (key in ("classes", "guidance") and key in added and bool(new))


def _plain(value: Any) -> Any:
    """Settings read from YAML hold lists where others hold tuples."""
    return list(value) if isinstance(value, tuple) else value


def _unwrap(network: Any) -> tuple[str, Any]:
    """What a backbone's names are called from outside its wrappers, and the backbone."""
    prefix = ""
    while isinstance(network, Padded | Patched | Preconditioned):
        prefix, network = prefix + "network.", network.network
    return prefix, network
