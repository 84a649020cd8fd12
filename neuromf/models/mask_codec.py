"""Masks as latent channels beside an image's, and back.

Two ways. *autoencoder*: the mask, 0 and 1, goes through the autoencoder as an image would, and has as many channels.
*downsample*: one channel, the share of each latent cell that the mask covers; back by trilinear interpolation. Either
way a level per voxel comes back, and the mask is where it reaches a threshold that was found on training masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from neuromf.errors import UserError

Strategy = Literal["autoencoder", "downsample"]
STRATEGIES: tuple[Strategy, ...] = ("autoencoder", "downsample")
PAIR = "pair"
"""Where dataset.json, data.json and manifests describe what is beside the image."""


class MaskAutoencoder(Protocol):
    """What of an `Autoencoder` is needed here."""

    factor: int
    latent_channels: int

    @property
    def device(self) -> Any:
        """Where it computes."""

    def encode(self, volume: Tensor) -> Any:
        """(B, 1, I, J, K) -> posterior with a mean."""

    def decode(self, latent: Tensor) -> Tensor:
        """(B, C, i, j, k) -> (B, 1, I, J, K)."""


def mask_channels(strategy: Strategy, autoencoder: MaskAutoencoder) -> int:
    """How many channels a mask takes."""
    return autoencoder.latent_channels if strategy == "autoencoder" else 1


@torch.no_grad()
def encode_mask(mask: Tensor, strategy: Strategy, autoencoder: MaskAutoencoder) -> Tensor:
    """(B, 1, I, J, K) of 0 and 1 -> (B, m, I/f, J/f, K/f) float32 on the CPU."""
    if strategy == "autoencoder":
        return autoencoder.encode(mask.float().to(autoencoder.device)).mean.float().cpu()
    return F.avg_pool3d(mask.float(), autoencoder.factor)


@torch.no_grad()
def decode_mask(latent: Tensor, strategy: Strategy, autoencoder: MaskAutoencoder) -> Tensor:
    """(B, m, i, j, k) -> levels (B, 1, I, J, K), about 1 inside the mask and 0 outside, float32 on the CPU."""
    if strategy == "autoencoder":
        return autoencoder.decode(latent.to(autoencoder.device)).float().cpu()
    return F.interpolate(latent.float(), scale_factor=autoencoder.factor, mode="trilinear", align_corners=False).cpu()


@dataclass(frozen=True)
class PairLayout:
    """What the channels of a pair latent are: the image's, then the mask's.

    Attributes:
        image_channels, mask_channels: how many.
        strategy: how masks became channels.
        threshold: level from which on a voxel belongs to the mask.
        suffix: of the images by BIDS, T1w or FLAIR.
    """

    image_channels: int
    mask_channels: int
    strategy: Strategy
    threshold: float = 0.5
    suffix: str = "T1w"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PairLayout:
        """The layout stored by `to_dict`; other keys are ignored.

        Raises:
            UserError: a key is missing, or a strategy that this program does not know.
        """
        try:
            found = cls(**{name: values[name] for name in cls.__dataclass_fields__})
        except KeyError as error:
            raise UserError(f"a description of pairs without {error}", "run `neuromf lora` again") from error
        if found.strategy not in STRATEGIES:
            raise UserError(f"no mask strategy '{found.strategy}'", f"available: {', '.join(STRATEGIES)}")
        return found

    @classmethod
    def of(cls, description: Mapping[str, Any]) -> PairLayout | None:
        """That of latents, by their dataset.json, data.json or manifest; None where they are images alone."""
        values = description.get(PAIR)
        return None if values is None else cls.from_dict(values)

    def image(self, latent: Tensor) -> Tensor:
        """(..., C + m, i, j, k) -> (..., C, i, j, k)."""
        return latent.narrow(-4, 0, self.image_channels)

    def mask(self, latent: Tensor) -> Tensor:
        """(..., C + m, i, j, k) -> (..., m, i, j, k)."""
        return latent.narrow(-4, self.image_channels, self.mask_channels)

    def decode_mask(self, latent: Tensor, autoencoder: MaskAutoencoder) -> Tensor:
        """Pair latents (B, C + m, i, j, k) -> masks (B, 1, I, J, K) bool on the CPU."""
        return decode_mask(self.mask(latent), self.strategy, autoencoder) >= self.threshold
