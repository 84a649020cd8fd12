"""The backbone that the `network` settings name, and the latent sizes it can take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from neuromf.errors import UserError, did_you_mean
from neuromf.models.adapters import Adapters, adapt
from neuromf.models.wrappers import Padded, Patched, Preconditioned

NETWORKS = ("maisi-unet", "mit", "mlp")


def build_network(
    settings: Mapping[str, Any], latent_shape: Sequence[int], classes: int = 0, adapters: Adapters | None = None
) -> nn.Module:
    """The network a configuration describes, with fresh weights.

    Args:
        settings: the `network` section, its `name` included.
        latent_shape: (C, I, J, K).
        classes: K, how many the latents carry; used if the settings ask for classes.
        adapters: freeze the network and add these; the last of the C channels are theirs.

    Raises:
        UserError: unknown name, sizes that do not fit, or classes asked for where there are none.
    """
    chosen = dict(settings)
    name, conditioned = chosen.pop("name", None), chosen.pop("classes", False)
    if conditioned and not classes:
        raise UserError(
            "network.classes=true needs latents that carry classes, and these do not",
            "set network.classes=false, or encode with a table that has a class column",
        )
    chosen["classes"] = classes if conditioned else 0
    preconditioned = chosen.pop("precondition", False)
    builders = {"maisi-unet": _unet, "mit": _mit, "mlp": _mlp}
    if name not in builders:
        raise UserError(f"no network '{name}'", did_you_mean(str(name), NETWORKS))
    added = adapters.channels if adapters else 0
    try:
        network = builders[name]((latent_shape[0] - added, *latent_shape[1:]), **chosen)
    except ValueError as error:
        raise UserError(f"the network cannot be built: {error}", "see the `network` section of the preset") from error
    network = Preconditioned(network) if preconditioned else network
    return adapt(network, adapters) if adapters else network


def _unet(
    latent_shape: Sequence[int], *, pad: bool = False, patch: int = 1, places: bool = False, **settings: Any
) -> nn.Module:
    from neuromf.models.unet import MaisiUNet

    rule = _size_rule(len(settings["channels"]), patch)
    grid = [(-(-n // rule) * rule if pad else n) // patch for n in latent_shape[1:]] if places else None
    unet = MaisiUNet(latent_shape[0] * patch**3, grid=grid, **settings)
    network = unet if patch == 1 else Patched(unet, patch)
    return Padded(network, rule) if pad else network


def _mit(latent_shape: Sequence[int], *, size: str | None = None, **settings: Any) -> nn.Module:
    from neuromf.models.mit import SIZES, MeanFlowTransformer

    if size:
        settings |= SIZES[size]
    return MeanFlowTransformer(latent_shape[0], latent_shape[1:], **settings)


def _mlp(latent_shape: Sequence[int], **settings: Any) -> nn.Module:
    from neuromf.models.mlp import MeanFlowMLP

    return MeanFlowMLP(tuple(latent_shape), **settings)


def parameter_count(module: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def check_latent_size(settings: Mapping[str, Any], size: Sequence[int], factor: int = 4) -> None:
    """Refuse latents the network cannot halve often enough, or cannot cut into blocks.

    Args:
        settings: the `network` section.
        size: latent I, J, K.
        factor: voxels per latent cell along an axis.

    Raises:
        UserError: naming the nearest sizes, in latent cells and in voxels.
    """
    if settings["name"] == "mit":
        from neuromf.models.mit import check_token_grid

        check_token_grid(size, settings["patch"], factor)
    if settings["name"] != "maisi-unet" or settings["pad"]:
        return
    levels = len(settings["channels"])
    rule = _size_rule(levels, settings["patch"])
    if all(n % rule == 0 and n > 0 for n in size):
        return
    below = tuple(max(n // rule * rule, rule) for n in size)
    above = tuple(-(-n // rule) * rule for n in size)
    raise UserError(
        f"latents of {tuple(size)} do not fit a network of {levels} levels: each axis must be a multiple of {rule}",
        f"nearest latent sizes: {below} or {above}, volumes of {tuple(n * factor for n in below)} or "
        f"{tuple(n * factor for n in above)}; encode again with --size, use a preset with fewer levels, or set "
        "network.pad=true",
    )


def _size_rule(levels: int, patch: int) -> int:
    """What every axis of a latent must be a multiple of."""
    return int(patch * 2 ** (levels - 1))
