"""Networks around a network: latents of any size, latents on a coarser grid, a preconditioned data estimate."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn
from torch.nn import functional as F

from neuromf.conditions import Condition


class Backbone(Protocol):
    """What every backbone offers: MaisiUNet, MeanFlowTransformer, MeanFlowMLP, and the wrappers below."""

    @property
    def ADAMW_MODULES(self) -> tuple[str, ...]:  # noqa: N802 (a class constant of most)
        """Name prefixes of the modules Muon leaves to AdamW: embeddings, first and last layers."""

    def __call__(self, z: Tensor, r: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """u or x_hat at (z_t, r, t), the shape of z."""

    def heads(self, z: Tensor, r: Tensor, t: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        """The output of `__call__`, and the v-head's at the same place."""

    def without_v_head(self) -> nn.Module:
        """A copy for sampling: the same output, and no v-head."""


class _Wrapper(nn.Module):
    """Calls a network inside: the latents are reshaped on the way in, every output on the way out."""

    network: Backbone

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network  # type: ignore[assignment]

    @property
    def ADAMW_MODULES(self) -> tuple[str, ...]:  # noqa: N802
        """The network's own, as they are called from here."""
        return tuple(f"network.{name}" for name in self.network.ADAMW_MODULES)

    def _inwards(self, z: Tensor) -> Tensor:
        raise NotImplementedError

    def _outwards(self, output: Tensor, z: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, z: Tensor, r: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """(B, C, I, J, K) -> the same shape."""
        return self._outwards(self.network(self._inwards(z), r, t, condition), z)

    def heads(self, z: Tensor, r: Tensor, t: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        """The output of `forward`, and the v-head's at the same place."""
        u, v = self.network.heads(self._inwards(z), r, t, condition)
        return self._outwards(u, z), self._outwards(v, z)


class Padded(_Wrapper):
    """A network on latents padded with zeros to the next allowed size and cropped back.

    Args:
        network: takes (z, r, t, condition).
        rule: each axis is padded up to a multiple of this.
    """

    def __init__(self, network: nn.Module, rule: int) -> None:
        super().__init__(network)
        self.rule = rule

    def without_v_head(self) -> Padded:
        """A copy around a network without v-head."""
        return Padded(self.network.without_v_head(), self.rule)

    def _before(self, z: Tensor) -> list[int]:
        return [(-n) % self.rule // 2 for n in z.shape[2:]]

    def _inwards(self, z: Tensor) -> Tensor:
        pads: list[int] = []
        for before, n in zip(self._before(z), z.shape[2:], strict=True):
            pads = [before, (-n) % self.rule - before, *pads]  # F.pad counts from the last axis
        return F.pad(z, pads)

    def _outwards(self, output: Tensor, z: Tensor) -> Tensor:
        inside = (slice(b, b + n) for b, n in zip(self._before(z), z.shape[2:], strict=True))
        return output[(slice(None), slice(None), *inside)]


class Patched(_Wrapper):
    """A network on latents whose blocks of patch^3 cells are folded into channels, as transformers do.

    On a CPU this is the cheapest way to a wide network: half the grid along each axis costs an eighth per channel.

    Args:
        network: takes C patch^3 channels on the coarser grid.
        patch: cells per axis of a block; each axis of the latents is a multiple of it.
    """

    def __init__(self, network: nn.Module, patch: int) -> None:
        super().__init__(network)
        self.patch = patch

    def without_v_head(self) -> Patched:
        """A copy around a network without v-head."""
        return Patched(self.network.without_v_head(), self.patch)

    def _inwards(self, z: Tensor) -> Tensor:
        p = self.patch
        b, c, *grid = z.shape
        i, j, k = (n // p for n in grid)
        return z.reshape(b, c, i, p, j, p, k, p).permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(b, c * p**3, i, j, k)

    def _outwards(self, output: Tensor, z: Tensor) -> Tensor:
        p = self.patch
        b, c = z.shape[:2]
        i, j, k = output.shape[2:]
        return output.reshape(b, c, p, p, p, i, j, k).permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(z.shape)


class Preconditioned(_Wrapper):
    """x_hat = c_skip z + c_out F(c_in z, r, t), so that F sees and answers values of size one at every time.

    EDM's choice (Karras 2022, arXiv 2206.00364, table 1) on the path z = (1 - t) x + t eps for whitened data: with
    s^2 = (1 - t)^2 + t^2, c_skip = (1 - t) / s^2, c_out = t / s, c_in = 1 / s. A bare x-prediction has to copy z
    through the network where t is small, and its velocity (z - x_hat) / t multiplies what it loses on the way; here
    u = (2t - 1) z / s^2 - F / s. At t = 1, where one evaluation starts, x_hat = F.

    Args:
        network: takes (z, r, t, condition).
    """

    def without_v_head(self) -> Preconditioned:
        """A copy around a network without v-head."""
        return Preconditioned(self.network.without_v_head())

    def forward(self, z: Tensor, r: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """(B, C, I, J, K) -> x_hat, the same shape."""
        skip, out, into = _coefficients(t, z)
        return skip * z + out * self.network(into * z, r, t, condition)

    def heads(self, z: Tensor, r: Tensor, t: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        """Both data estimates."""
        skip, out, into = _coefficients(t, z)
        u, v = self.network.heads(into * z, r, t, condition)
        return skip * z + out * u, skip * z + out * v


def _coefficients(t: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(c_skip, c_out, c_in), each (B, 1, ...) against z."""
    t = t.reshape(-1, *(1,) * (z.ndim - 1))
    square = (1 - t) ** 2 + t**2
    return (1 - t) / square, t * square.rsqrt(), square.rsqrt()
