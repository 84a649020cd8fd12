"""The 3-D orthonormal Haar wavelet, one step of which halves each axis and makes eight channels of one.

The setting of wavelet diffusion models (WDM, Friedrich et al., arXiv 2402.19043): nothing is learned and
nothing is lost. Channel order of one level: for the axes (I, J, K), L low and H high,
LLL, LLH, LHL, LHH, HLL, HLH, HHL, HHH.
"""

from __future__ import annotations

import torch
from torch import Tensor


def haar_matrix(dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
    """The orthonormal transform (8, 8) of a 2 x 2 x 2 block, the Kronecker cube of [[1, 1], [1, -1]] / sqrt 2."""
    one = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / 2**0.5
    cube = torch.kron(torch.kron(one, one), one)
    return cube.to(device=device, dtype=dtype)


def haar_forward(volume: Tensor, levels: int = 1) -> Tensor:
    """Transform (B, C, I, J, K) to (B, 8^levels C, I/2^levels, J/2^levels, K/2^levels); norms are kept.

    Every band is split again at the next level (a full wavelet packet), so that all channels share one grid.
    """
    for _ in range(levels):
        b, c, i, j, k = volume.shape
        assert i % 2 == j % 2 == k % 2 == 0, f"each axis must be even at every level, got {(i, j, k)}"
        blocks = volume.reshape(b, c, i // 2, 2, j // 2, 2, k // 2, 2).permute(0, 1, 3, 5, 7, 2, 4, 6)
        blocks = blocks.reshape(b, c, 8, i // 2, j // 2, k // 2)
        matrix = haar_matrix(volume.dtype, volume.device)
        volume = torch.einsum("fe,bceijk->bcfijk", matrix, blocks).flatten(1, 2)
    return volume


def haar_inverse(bands: Tensor, levels: int = 1) -> Tensor:
    """The inverse of `haar_forward`: (B, 8^levels C, I, J, K) to (B, C, 2^levels I, 2^levels J, 2^levels K)."""
    for _ in range(levels):
        b, c, i, j, k = bands.shape
        assert c % 8 == 0, f"channels come in eights, got {c}"
        matrix = haar_matrix(bands.dtype, bands.device)
        blocks = torch.einsum("fe,bcfijk->bceijk", matrix, bands.reshape(b, c // 8, 8, i, j, k))
        blocks = blocks.reshape(b, c // 8, 2, 2, 2, i, j, k).permute(0, 1, 5, 2, 6, 3, 7, 4)
        bands = blocks.reshape(b, c // 8, 2 * i, 2 * j, 2 * k)
    return bands
