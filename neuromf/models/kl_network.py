"""The KL autoencoder network of MAISI (Guo et al., arXiv 2409.11169), at any width and without its traps.

MONAI's `AutoencoderKlMaisi` without two of its traps, the maths and the weight names as they are: its group norm
loops over groups in Python (replaced by torch's, which is several times faster), and what it has against want of memory
crops volumes in silence (`num_splits`) or fails off CUDA (`norm_float16`); `slabs` does that job instead.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi, MaisiGroupNorm3D
from torch import nn


@dataclass(frozen=True)
class KLArchitecture:
    """Shape of the network: one entry of `channels` and `res_blocks` per level, fine to coarse.

    Each level but the last halves the grid. `transposed` upsamples by a strided transposed convolution instead
    of interpolation and convolution, which costs an eighth.
    """

    latent_channels: int = 8
    channels: tuple[int, ...] = (16, 32, 96)
    res_blocks: tuple[int, ...] = (0, 2, 2)
    norm_groups: int = 1
    transposed: bool = True

    @property
    def factor(self) -> int:
        """How many times coarser the latent grid is than the volume, per axis."""
        return int(2 ** (len(self.channels) - 1))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> KLArchitecture:
        """The inverse of `to_dict`."""
        lists: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**lists)


MAISI = KLArchitecture(
    latent_channels=4, channels=(64, 128, 256), res_blocks=(2, 2, 2), norm_groups=32, transposed=False
)


def build_kl_network(architecture: KLArchitecture) -> AutoencoderKlMaisi:
    """The network with fresh weights; `MAISI` is the published one, 20.94 M parameters."""
    network = AutoencoderKlMaisi(
        spatial_dims=3,
        in_channels=1,
        out_channels=1,
        num_res_blocks=architecture.res_blocks,
        num_channels=architecture.channels,
        attention_levels=(False,) * len(architecture.channels),
        latent_channels=architecture.latent_channels,
        norm_num_groups=architecture.norm_groups,
        norm_eps=1e-6,
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
        use_convtranspose=architecture.transposed,
        num_splits=1,
        dim_split=1,
        norm_float16=False,
        save_mem=False,
    )
    _replace_norms(network)
    return network


def _replace_norms(module: nn.Module) -> None:
    """Replace every `MaisiGroupNorm3D` by torch's group norm, keeping its parameters."""
    for name, child in module.named_children():
        if isinstance(child, MaisiGroupNorm3D):
            norm = nn.GroupNorm(child.num_groups, child.num_channels, child.eps)
            norm.weight, norm.bias = child.weight, child.bias
            setattr(module, name, norm)
        else:
            _replace_norms(child)


def parameter_count(module: nn.Module) -> int:
    """Number of weights."""
    return sum(parameter.numel() for parameter in module.parameters())


def posterior(network: AutoencoderKlMaisi, volume: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log sigma, (B, C, I/f, J/f, K/f) each, of volumes (B, 1, I, J, K); differentiable.

    MONAI's `encode` returns sigma = exp(clamp(log variance, -30, 20) / 2); the logarithm is kept here.
    """
    features = network.encoder(volume)
    log_variance = network.quant_conv_log_sigma(features).clamp(-30.0, 20.0)
    return network.quant_conv_mu(features), log_variance / 2
