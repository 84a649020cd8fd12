"""A perceptual distance of decoded crops, pixel MeanFlow's second term (Lu 2026), in three dimensions.

Its authors compare photographs by LPIPS and ConvNeXt. Here the frozen autoencoder's own encoder looks at the decoded
crops: no foreign weights, volumes instead of slices, and the form of LPIPS (Zhang 2018, eq. 1) with equal weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor


class PerceptualAutoencoder(Protocol):
    """What is needed of an autoencoder: a decoder and encoder features that gradients pass through."""

    def decode_with_gradient(self, latent: Tensor, /) -> Tensor:
        """(B, C, i, j, k) -> (B, 1, I, J, K)."""

    def encoder_features(self, volume: Tensor, /) -> Sequence[Tensor]:
        """(B, 1, I, J, K) -> one tensor (B, D, ...) per depth."""


class DecodedCrops:
    """Distance of x_hat and x as their decoded crops look.

    Args:
        autoencoder: frozen.
        unwhiten: whitened latents to the autoencoder's own, (B, C, I, J, K).
        edge: of a crop, in latent cells; cut to the latent where that is smaller.
    """

    def __init__(self, autoencoder: PerceptualAutoencoder, unwhiten: Callable[[Tensor], Tensor], edge: int) -> None:
        self.autoencoder, self.unwhiten, self.edge = autoencoder, unwhiten, edge

    def __call__(self, x_hat: Tensor, x: Tensor, corner: Tensor) -> Tensor:
        """(B, C, I, J, K) twice, (B, 3) in [0, 1) -> (B,): mean absolute difference plus `feature_distance`."""
        with torch.autocast(x.device.type, enabled=False):
            found = self.autoencoder.decode_with_gradient(self.unwhiten(crop(x_hat.float(), corner, self.edge)))
            with torch.no_grad():
                expected = self.autoencoder.decode_with_gradient(self.unwhiten(crop(x.float(), corner, self.edge)))
                wanted = self.autoencoder.encoder_features(expected)
            seen = self.autoencoder.encoder_features(found)
        return (found - expected).abs().flatten(1).mean(1) + feature_distance(seen, wanted)


def crop(latent: Tensor, corner: Tensor, edge: int) -> Tensor:
    """One cube of `edge` cells of each sample: (B, C, I, J, K), (B, 3) in [0, 1) -> (B, C, e, e, e) with e <= edge.

    The corner is a share of the places where a cube fits.
    """
    size = torch.tensor(latent.shape[2:])
    edges = size.clamp(max=edge)
    starts = (corner.cpu() * (size - edges + 1)).long()
    pieces = []
    for sample, (i, j, k) in zip(latent, starts.tolist(), strict=True):
        pieces.append(sample[:, i : i + edges[0], j : j + edges[1], k : k + edges[2]])
    return torch.stack(pieces)


def feature_distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> Tensor:
    """Mean over depths and places of |f - g|^2 with f, g of unit length along the channels (Zhang 2018), (B,)."""
    distances = []
    for f, g in zip(found, expected, strict=True):
        difference = torch.nn.functional.normalize(f, dim=1) - torch.nn.functional.normalize(g, dim=1)
        distances.append(difference.square().sum(1).flatten(1).mean(1))
    return torch.stack(distances).mean(0)
