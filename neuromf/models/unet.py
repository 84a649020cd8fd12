"""The MAISI U-Net as an average-velocity network: MONAI's layers, conditioned on two times.

The network is `DiffusionModelUNetMaisi` with its own weights' names; only the time embedding is ours. Times are real
numbers, never quantised, and embedded in the input's precision so that float64 checks are float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
from torch import Tensor, nn
from torch.nn import functional as F

from neuromf.errors import UserError

Conditioning = Literal["t+h", "r+t", "h"]


def sinusoid(times: Tensor, dimension: int, max_period: float = 10_000.0) -> Tensor:
    """[cos(t f_k), sin(t f_k)] with f_k = max_period^(-k / (dimension / 2)) (Ho 2020), in the dtype of `times`.

    Args:
        times: (B,).
        dimension: even.

    Returns:
        (B, dimension).
    """
    half = dimension // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=times.dtype, device=times.device) / half)
    angles = times[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class _TwoTimeUNet(DiffusionModelUNetMaisi):
    """MONAI's U-Net whose time embedding is computed by its owner and handed in as `timesteps`."""

    def _get_time_and_class_embedding(self, x: Tensor, timesteps: Tensor, class_labels: Tensor | None) -> Tensor:
        return timesteps.to(x.dtype)


class MaisiUNet(nn.Module):
    """u(z, r, t) or x_hat(z, r, t) by the MAISI U-Net (SPEC: 178.57 M parameters with `h`, 178.65 M with two times).

    Args:
        latent_channels: C of the latent.
        channels: per level, finest first; the published network has 64, 128, 256, 512.
        attention_levels: which levels attend.
        head_channels: channels per attention head on those levels.
        res_blocks: residual blocks per level.
        norm_groups: groups of the group norms; divides every entry of `channels`.
        conditioning: `t+h` (two embeddings, summed), `r+t`, or `h` alone.
        time_scale: factor on the times before their embedding.

    Example:
        >>> net = MaisiUNet(4, channels=(32, 64), attention_levels=(False, True), res_blocks=1)
        >>> z, r, t = torch.randn(2, 4, 8, 8, 8), torch.zeros(2), torch.ones(2)
        >>> net(z, r, t).shape
        torch.Size([2, 4, 8, 8, 8])
    """

    def __init__(
        self,
        latent_channels: int = 4,
        *,
        channels: Sequence[int] = (64, 128, 256, 512),
        attention_levels: Sequence[bool] = (False, False, True, True),
        head_channels: int = 32,
        res_blocks: int = 2,
        norm_groups: int = 32,
        conditioning: Conditioning = "t+h",
        time_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.latent_channels, self.conditioning, self.time_scale = latent_channels, conditioning, time_scale
        self.levels = len(channels)
        self.net = _TwoTimeUNet(
            spatial_dims=3,
            in_channels=latent_channels,
            out_channels=latent_channels,
            num_res_blocks=res_blocks,
            num_channels=tuple(channels),
            attention_levels=tuple(attention_levels),
            norm_num_groups=norm_groups,
            num_head_channels=head_channels,  # of every level: the middle block attends whatever the levels do
            resblock_updown=True,
            include_fc=True,
            # The fused kernel refuses to be built without CUDA and has no forward-mode derivative; keys are equal.
            use_flash_attention=False,
        )
        width, embedding = channels[0], channels[0] * 4
        if conditioning != "h":
            self.second_embed = nn.Sequential(nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))

    def embed(self, r: Tensor, t: Tensor, dtype: torch.dtype) -> Tensor:
        """(B,), (B,) -> (B, 4 x channels[0]): the sum of the configured time embeddings."""
        width = self.net.block_out_channels[0]
        first, second = {"t+h": (t, t - r), "r+t": (t, r), "h": (t - r, None)}[self.conditioning]
        embedding = self.net.time_embed(sinusoid(first * self.time_scale, width).to(dtype))
        if second is not None:
            embedding = embedding + self.second_embed(sinusoid(second * self.time_scale, width).to(dtype))
        return embedding

    def forward(self, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        """The network's output at (z_t, r, t).

        Args:
            z: (B, C, I, J, K), each axis a multiple of 2^(levels - 1).
            r, t: (B,).

        Returns:
            (B, C, I, J, K): u or x_hat, as the objective reads it.
        """
        return self.net(z, self.embed(r, t, z.dtype))


def size_rule(levels: int, patch: int = 1) -> int:
    """What every axis of a latent must be a multiple of."""
    return int(patch * 2 ** (levels - 1))


def check_latent_size(size: Sequence[int], levels: int, factor: int = 4, patch: int = 1) -> None:
    """Refuse latents the U-Net cannot halve often enough.

    Args:
        size: latent I, J, K.
        levels: resolutions of the network.
        factor: voxels per latent cell along an axis.
        patch: see `Patched`.

    Raises:
        UserError: naming the nearest sizes, in latent cells and in voxels.
    """
    rule = size_rule(levels, patch)
    if all(n % rule == 0 and n > 0 for n in size):
        return
    below = [max(n // rule * rule, rule) for n in size]
    above = [-(-n // rule) * rule for n in size]
    raise UserError(
        f"latents of {tuple(size)} do not fit a network of {levels} levels: each axis must be a multiple of {rule}",
        f"nearest latent sizes: {tuple(below)} or {tuple(above)}, volumes of {tuple(n * factor for n in below)} or "
        f"{tuple(n * factor for n in above)}; encode again with --size, use a preset with fewer levels, or set "
        "network.pad=true",
    )


class Padded(nn.Module):
    """A network on latents padded with zeros to the next allowed size and cropped back.

    Args:
        network: takes (z, r, t).
        rule: each axis is padded up to a multiple of this.
    """

    def __init__(self, network: nn.Module, rule: int) -> None:
        super().__init__()
        self.network, self.rule = network, rule

    def forward(self, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        """(B, C, I, J, K) -> the same shape."""
        extra = [(-n) % self.rule for n in z.shape[2:]]
        before = [n // 2 for n in extra]
        pads = [amount for b, e in zip(reversed(before), reversed(extra), strict=True) for amount in (b, e - b)]
        output = self.network(F.pad(z, pads), r, t)
        inside = tuple(slice(b, b + n) for b, n in zip(before, z.shape[2:], strict=True))
        return output[(slice(None), slice(None), *inside)]


class Patched(nn.Module):
    """A network on latents whose blocks of patch^3 cells are folded into channels, as transformers do.

    On a CPU this is the cheapest way to a wide network: half the grid along each axis costs an eighth per channel.

    Args:
        network: takes C patch^3 channels on the coarser grid.
        patch: cells per axis of a block.
    """

    def __init__(self, network: nn.Module, patch: int) -> None:
        super().__init__()
        self.network, self.patch = network, patch

    def forward(self, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        """(B, C, I, J, K) -> the same shape; each axis a multiple of `patch`."""
        p = self.patch
        b, c, *grid = z.shape
        i, j, k = (n // p for n in grid)
        folded = z.reshape(b, c, i, p, j, p, k, p).permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(b, c * p**3, i, j, k)
        output = self.network(folded, r, t).reshape(b, c, p, p, p, i, j, k)
        return output.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(z.shape)


def parameter_count(module: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def build_network(name: str, latent_channels: int, *, pad: bool = False, patch: int = 1, **settings: Any) -> nn.Module:
    """The network a configuration names.

    Args:
        name: `maisi-unet`.
        latent_channels: C.
        pad: wrap it so that any latent size works.
        patch: fold blocks of patch^3 cells into channels.
        settings: the network's own keyword arguments.
    """
    if name != "maisi-unet":
        raise UserError(f"no network '{name}'", "available: maisi-unet")
    try:
        unet = MaisiUNet(latent_channels * patch**3, **settings)
    except ValueError as error:
        raise UserError(f"the network cannot be built: {error}", "see the `network` section of the preset") from error
    network = unet if patch == 1 else Patched(unet, patch)
    return Padded(network, size_rule(unet.levels, patch)) if pad else network
