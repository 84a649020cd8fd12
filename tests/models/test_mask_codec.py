"""Masks become latent channels and come back."""

from __future__ import annotations

import pytest
import torch

from neuromf.errors import UserError
from neuromf.models.autoencoder import load_autoencoder
from neuromf.models.mask_codec import PairLayout, decode_mask, encode_mask, mask_channels


def cube(start: int, stop: int, size: int = 32) -> torch.Tensor:
    mask = torch.zeros(1, 1, size, size, size)
    mask[..., start:stop, start:stop, start:stop] = 1
    return mask


def test_block_means_are_the_share_of_each_cell() -> None:
    haar = load_autoencoder("haar", device="cpu")
    latent = encode_mask(cube(8, 19), "downsample", haar)
    assert latent.shape == (1, mask_channels("downsample", haar), 16, 16, 16)
    assert float(latent.sum()) * haar.factor**3 == 11**3
    assert float(latent[0, 0, 9, 9, 9]) == 0.5**3


def test_an_exact_autoencoder_gives_the_mask_back() -> None:
    haar = load_autoencoder("haar", device="cpu")
    latent = encode_mask(cube(5, 9), "autoencoder", haar)
    assert latent.shape[1] == mask_channels("autoencoder", haar) == haar.latent_channels
    torch.testing.assert_close(decode_mask(latent, "autoencoder", haar), cube(5, 9), atol=1e-5, rtol=0)


def test_a_layout_takes_a_latent_apart() -> None:
    haar = load_autoencoder("haar", device="cpu")
    image, mask = torch.randn(1, haar.latent_channels, 16, 16, 16), encode_mask(cube(8, 24), "downsample", haar)
    layout = PairLayout(haar.latent_channels, 1, "downsample", threshold=0.5)
    both = torch.cat([image, mask], dim=1)
    assert torch.equal(layout.image(both), image)
    assert torch.equal(layout.image(both[0]), image[0])
    assert torch.equal(layout.mask(both), mask)
    found = layout.decode_mask(both, haar)
    assert found.dtype == torch.bool
    assert 0.9 < 2 * float((found & cube(8, 24).bool()).sum()) / float(found.sum() + 16**3) <= 1


def test_a_description_holds_a_layout_or_none() -> None:
    layout = PairLayout(8, 1, "downsample", 0.35, "FLAIR")
    assert PairLayout.of({"pair": layout.to_dict()}) == layout
    assert PairLayout.of({}) is None
    with pytest.raises(UserError, match="no mask strategy 'magic'"):
        PairLayout.from_dict({**layout.to_dict(), "strategy": "magic"})
    with pytest.raises(UserError, match="threshold"):
        PairLayout.from_dict({"image_channels": 8, "mask_channels": 1, "strategy": "downsample", "suffix": "T1w"})
