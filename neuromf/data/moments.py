"""Statistics of many latents in one pass: memory does not grow with the number of files, sums are float64."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 50


class ChannelMoments:
    """Central moments up to the fourth and cross-channel co-moments, merged file by file.

    Pairwise updates of Chan et al. (1979) and Pebay (2008, eqs. 2.1, 3.1): no difference of large sums, so a
    mean far from zero costs no digits.
    """

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self.m2, self.m3, self.m4 = (torch.zeros(channels, dtype=torch.float64) for _ in range(3))
        self.cross = torch.zeros(channels, channels, dtype=torch.float64)
        self.sigma2 = torch.zeros(channels, dtype=torch.float64)

    def update(self, z: Tensor, log_sigma: Tensor) -> None:
        """Add one latent.

        Args:
            z, log_sigma: (C, I, J, K), posterior mean and log of its standard deviation.
        """
        values = z.double().flatten(1)
        mean = values.mean(1)
        d = values - mean[:, None]
        square = d * d
        m2, m3, m4 = square.sum(1), (square * d).sum(1), (square * square).sum(1)
        variance = torch.exp(2 * log_sigma.double()).flatten(1).mean(1)
        self._merge(values.shape[1], mean, m2, m3, m4, d @ d.T, variance)

    def _merge(self, n_b: int, mean: Tensor, m2: Tensor, m3: Tensor, m4: Tensor, cross: Tensor, sigma2: Tensor) -> None:
        n_a = self.count
        n = n_a + n_b
        d = mean - self.mean
        # M4 needs the old M2 and M3, M3 the old M2: updated in this order.
        self.m4 += m4 + d**4 * (n_a * n_b * (n_a**2 - n_a * n_b + n_b**2) / n**3)
        self.m4 += 6 * d**2 * (n_a**2 * m2 + n_b**2 * self.m2) / n**2 + 4 * d * (n_a * m3 - n_b * self.m3) / n
        self.m3 += m3 + d**3 * (n_a * n_b * (n_a - n_b) / n**2) + 3 * d * (n_a * m2 - n_b * self.m2) / n
        self.m2 += m2 + d**2 * (n_a * n_b / n)
        self.cross += cross + torch.outer(d, d) * (n_a * n_b / n)
        self.sigma2 += (sigma2 - self.sigma2) * (n_b / n)
        self.mean += d * (n_b / n)
        self.count = n

    @property
    def std(self) -> Tensor:
        """(C,) standard deviation over all voxels of all files (divided by n)."""
        return (self.m2 / self.count).sqrt()

    @property
    def skewness(self) -> Tensor:
        """(C,) m3 / m2^1.5, 0 for a Gaussian."""
        return (self.m3 / self.count) / self.std**3

    @property
    def kurtosis(self) -> Tensor:
        """(C,) m4 / m2^2, 3 for a Gaussian."""
        return (self.m4 / self.count) / self.std**4

    @property
    def correlation(self) -> Tensor:
        """(C, C) Pearson correlation between channels."""
        return self.cross / self.count / torch.outer(self.std, self.std)


class IncrementalPCA:
    """Explained variance of the leading principal components of whole latents, file by file.

    Ross et al. (2008): after each block of 50 latents only the 50 leading directions are kept, so memory is
    about 100 flattened latents. Exact up to 50 latents; beyond, what an early block left out is lost (ratios
    come out slightly low). The total variance is exact.
    """

    def __init__(self, components: int = _BLOCK) -> None:
        self.components = components
        self.count = 0
        self._mean: Tensor | None = None
        self._basis: Tensor | None = None  # rows: direction times singular value
        self._block: list[Tensor] = []
        self._total = 0.0

    def update(self, z: Tensor) -> None:
        """Add one latent, any shape (the same for all)."""
        self._block.append(z.detach().float().flatten())
        if len(self._block) == self.components:
            self._absorb()

    def explained_variance_ratio(self) -> list[float]:
        """Share of the variance between latents along each component, at most 50 and at most N - 1."""
        self._absorb()
        if self._basis is None or self._total <= 0:
            return []
        energy = self._basis.double().square().sum(1) / self._total
        return [float(e) for e in energy[: min(self.components, self.count - 1)]]

    def _absorb(self) -> None:
        """Fold the waiting block into the basis; Gram matrices, as latents are far longer than many."""
        if not self._block:
            return
        block, self._block = torch.stack(self._block), []
        mean = block.mean(0)
        rows = block - mean
        self._total += float(rows.double().square().sum())
        n_a, n_b = self.count, len(block)
        if self._mean is None or self._basis is None:
            self._mean = mean
        else:
            shift = mean - self._mean
            weight = n_a * n_b / (n_a + n_b)
            self._total += weight * float(shift.double().square().sum())
            rows = torch.cat([self._basis, rows, weight**0.5 * shift[None]])
            self._mean = self._mean + shift * (n_b / (n_a + n_b))
        gram = (rows @ rows.T).double()
        keep = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, : self.components]
        self._basis = keep.float().T @ rows
        self.count = n_a + n_b
