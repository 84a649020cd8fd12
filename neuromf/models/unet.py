"""The MAISI U-Net as an average-velocity network: MONAI's layers, conditioned on two times.

The network is `DiffusionModelUNetMaisi` with its own weights' names; only what the layers are told is ours. Times are
real numbers, never quantised, and embedded in the input's precision so that float64 checks are float64.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
from torch import Tensor, nn
from torch.nn import functional as F

from neuromf.conditions import Condition
from neuromf.models.small_grids import for_small_grids

Conditioning = Literal["t+h", "r+t", "h", "t", "decoupled"]

_SPACING_SCALE = 100.0  # NVIDIA's networks are told the spacing in hundredths of a millimetre
_NORM_EPS = 1e-6


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


class MaisiUNet(nn.Module):
    """u(z, r, t) or x_hat(z, r, t) by the MAISI U-Net (SPEC: 178.57 M parameters with `h`, 178.65 M with two times).

    Args:
        latent_channels: C of the latent.
        channels: per level, finest first; the published network has 64, 128, 256, 512.
        attention_levels: which levels attend.
        head_channels: channels per attention head on those levels.
        res_blocks: residual blocks per level.
        norm_groups: groups of the group norms; divides every entry of `channels`.
        conditioning: `t+h` (two embeddings, summed), `r+t`, or `h` alone; `t` for flow models, which know no r;
            `decoupled` (Lee 2025, arXiv 2510.24474): the one embedding tells the encoder t and the decoder r.
        time_scale: factor on all times before their embedding.
        t_scale: another factor on the times of the first embedding (t; in `decoupled` r, too): 1000 for NVIDIA's.
        v_head_blocks: residual blocks of the v-head; none, no v-head.
        classes: K, for labels 0 ... K - 1 and K for no class; 0 takes no labels.
        guidance: take a guidance scale and interval as inputs.
        spacing_mm: of the volumes, for networks that are told it (NVIDIA's).
        grid: I, J, K of the latents, to add a learned value per place after the first convolution; convolutions
            alone learn where they are from the border inwards, and slowly.

    Example:
        >>> net = MaisiUNet(4, channels=(32, 64), attention_levels=(False, True), res_blocks=1)
        >>> z, r, t = torch.randn(2, 4, 8, 8, 8), torch.zeros(2), torch.ones(2)
        >>> net(z, r, t).shape
        torch.Size([2, 4, 8, 8, 8])
    """

    ADAMW_MODULES: ClassVar[tuple[str, ...]] = (
        "net.time_embed",
        "second_embed",
        "guidance_embed",
        "net.class_embedding",
        "net.spacing_layer",
        "net.conv_in",
        "places",
        "net.out",
        "v_head.out",
    )
    """Modules whose weights are not Muon's: embeddings, first and last layers."""

    V_HEAD_MODULES: ClassVar[tuple[str, ...]] = ("v_head",)
    """Modules that sampling does without."""

    ENDS: ClassVar[tuple[str, str]] = ("net.conv_in.conv", "net.out.2.conv")
    """The layers by which latent channels enter and leave."""

    ADAPTED: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": ("to_q", "to_k", "to_v", "out_proj"),
        "blocks": ("conv1.conv", "conv2.conv"),
    }
    """Layers that adapters may stand beside, by how their names end: of attention, and of the residual blocks."""

    spacing: Tensor

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
        t_scale: float = 1.0,
        v_head_blocks: int = 0,
        classes: int = 0,
        guidance: bool = False,
        spacing_mm: Sequence[float] | None = None,
        grid: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if conditioning == "h" and t_scale != 1:
            raise ValueError("t_scale is a factor of t, which conditioning 'h' does not embed: use time_scale")
        self.conditioning, self.time_scale, self.t_scale = conditioning, time_scale, t_scale
        self.levels, self.classes, self.guidance = len(channels), classes, guidance
        self.net = DiffusionModelUNetMaisi(
            spatial_dims=3,
            in_channels=latent_channels,
            out_channels=latent_channels,
            num_res_blocks=res_blocks,
            num_channels=tuple(channels),
            attention_levels=tuple(attention_levels),
            norm_num_groups=norm_groups,
            norm_eps=_NORM_EPS,
            num_head_channels=head_channels,  # of every level: the middle block attends whatever the levels do
            resblock_updown=True,
            include_fc=True,
            num_class_embeds=classes + 1 if classes else None,
            include_spacing_input=spacing_mm is not None,
            # The fused kernel refuses to be built without CUDA and has no forward-mode derivative; keys are equal.
            use_flash_attention=False,
        )
        if classes:
            nn.init.normal_(self.net.class_embedding.weight, std=0.02)  # 1 would drown the time at the start
        if spacing_mm is not None:
            self.register_buffer("spacing", torch.tensor([_SPACING_SCALE * mm for mm in spacing_mm]), persistent=False)
        self.places = nn.Parameter(torch.zeros(channels[0], *grid)) if grid is not None else None
        self.width, embedding = channels[0], channels[0] * 4
        if conditioning in ("t+h", "r+t"):
            self.second_embed = _embedder(self.width, embedding)
        if guidance:
            self.guidance_embed = _embedder(3 * self.width, embedding)
            _zero(self.guidance_embed[-1])
        self.v_head = VelocityHead(channels[0], latent_channels, v_head_blocks, norm_groups) if v_head_blocks else None
        for_small_grids(self)

    def embed(self, r: Tensor, t: Tensor, condition: Condition | None, dtype: torch.dtype) -> Tensor:
        """What every residual block is told: times, class and guidance summed, the spacing beside them.

        Args:
            r, t: (B,).
            condition: None is no class and no guidance.
            dtype: of the network's input.

        Returns:
            (B, 4 x channels[0]), or twice as many with a spacing.
        """
        first, second = {"t+h": (t, t - r), "r+t": (t, r), "h": (t - r, None)}.get(self.conditioning, (t, None))
        embedding = self.net.time_embed(sinusoid(first * (self.time_scale * self.t_scale), self.width).to(dtype))
        if second is not None:
            embedding = embedding + self.second_embed(sinusoid(second * self.time_scale, self.width).to(dtype))
        label, omega, interval = condition or Condition()
        if self.classes:
            label = torch.full((len(t),), self.classes, device=t.device) if label is None else label
            embedding = embedding + self.net.class_embedding(label)
        if self.guidance:
            embedding = embedding + self.guidance_embed(_guidance_features(omega, interval, t, self.width).to(dtype))
        if self.net.include_spacing_input:
            spacing = self.net.spacing_layer(self.spacing.to(dtype))
            embedding = torch.cat([embedding, spacing.expand(len(t), -1)], dim=1)
        return embedding

    def features(self, z: Tensor, r: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """The last feature map (B, channels[0], I, J, K), which the heads read."""
        told_encoder = told_decoder = self.embed(r, t, condition, z.dtype)
        if self.conditioning == "decoupled":
            told_decoder = self.embed(r, r, condition, z.dtype)
        h = self.net.conv_in(z)
        if self.places is not None:
            h = h + self.places
        h, skips = self.net._apply_down_blocks(h, told_encoder, None, None)
        h = self.net.middle_block(h, told_encoder, None)
        return self.net._apply_up_blocks(h, told_decoder, None, skips)

    def forward(self, z: Tensor, r: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """The network's output at (z_t, r, t).

        Args:
            z: (B, C, I, J, K), each axis a multiple of 2^(levels - 1).
            r, t: (B,).
            condition: class and guidance; what the network was not built for is left alone.

        Returns:
            (B, C, I, J, K): u or x_hat, as the objective reads it.
        """
        return self.net.out(self.features(z, r, t, condition))

    def heads(self, z: Tensor, r: Tensor, t: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        """Both heads, (u or x_hat, v), from the same features; arguments as in `forward`.

        Raises:
            ValueError: the network has no v-head.
        """
        if self.v_head is None:
            raise ValueError("the network has no v-head: it was built with v_head_blocks=0")
        features = self.features(z, r, t, condition)
        return self.net.out(features), self.v_head(features)

    def without_v_head(self) -> MaisiUNet:
        """A copy for sampling: the same output to the last bit, and no v-head."""
        twin = copy.deepcopy(self)
        twin.v_head = None
        return twin


class VelocityHead(nn.Module):
    """The instantaneous velocity from the U-Net's last features; training alone uses it (Geng 2025b).

    Args:
        channels: of the features.
        latent_channels: C.
        blocks: residual blocks, 221,568 parameters each at 64 channels.
        norm_groups: divides `channels`.
    """

    def __init__(self, channels: int, latent_channels: int, blocks: int, norm_groups: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_ResBlock(channels, norm_groups) for _ in range(blocks))
        self.out = nn.Sequential(
            nn.GroupNorm(norm_groups, channels, eps=_NORM_EPS),
            nn.SiLU(),
            _zero(nn.Conv3d(channels, latent_channels, kernel_size=3, padding=1)),
        )

    def forward(self, features: Tensor) -> Tensor:
        """(B, channels, I, J, K) -> (B, C, I, J, K)."""
        for block in self.blocks:
            features = block(features)
        return self.out(features)


class _ResBlock(nn.Module):
    """x + conv(SiLU(GN(conv(SiLU(GN(x)))))), the identity at first, as MONAI's blocks are."""

    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, channels, eps=_NORM_EPS)
        self.conv1 = nn.Conv3d(channels, channels, kernel_size=3, padding=1)
        self.norm2 = nn.GroupNorm(norm_groups, channels, eps=_NORM_EPS)
        self.conv2 = _zero(nn.Conv3d(channels, channels, kernel_size=3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


def _embedder(inputs: int, embedding: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, embedding), nn.SiLU(), nn.Linear(embedding, embedding))


def _zero(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _guidance_features(omega: Tensor | None, interval: Tensor | None, t: Tensor, width: int) -> Tensor:
    """Sinusoids of 1 - 1/omega and the interval's two ends, (B, 3 width); none given is omega = 1 in [0, 1]."""
    strength = torch.zeros_like(t) if omega is None else 1 - 1 / omega.to(t.dtype)
    low, high = (torch.zeros_like(t), torch.ones_like(t)) if interval is None else interval.to(t.dtype).unbind(1)
    return torch.cat([sinusoid(value, width) for value in (strength, low, high)], dim=1)
