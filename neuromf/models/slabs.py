"""The KL autoencoder on volumes that do not fit a device: layer by layer, each in slabs, exactly.

Cutting a volume into overlapping tiles and blending them, as the peers do, changes the result: every group norm then
has another mean and variance in each tile, and the seams show. Here a layer's whole output is put together on the
host before the next layer begins: norms look at all slabs first, convolutions see rows beyond their slab. What remains
is rounding.

The device holds a slab of one layer's input, its output and what the layer makes between them; the host holds two
whole feature maps, three inside a residual block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import (
    AutoencoderKlMaisi,
    MaisiConvolution,
    MaisiDownsample,
    MaisiResBlock,
    MaisiUpsample,
)
from torch import Tensor, nn
from torch.nn import functional as F

from neuromf.errors import UserError

HALO = 2
"""Input rows beyond a slab: a trilinear upsampling and the convolution after it need two, everything else fewer."""
FEATURE_MAPS = 6
"""How many feature maps a layer holds at once, at most: input, norm, activation, padding, output, workspace."""


class Slabs:
    """Runs the parts of a KL autoencoder on whole volumes, a slab of rows (first axis) at a time.

    Args:
        network: in evaluation mode, without attention.
        device: where slabs are computed.
        budget: bytes that a slab may take there; halved, again and again, when the device runs out of memory.
        dtype: of the convolutions, under autocast; feature maps are kept on the host in it.

    Raises:
        UserError: (of its methods) not even one row fits.
    """

    def __init__(
        self, network: AutoencoderKlMaisi, device: torch.device, budget: int, dtype: torch.dtype = torch.float32
    ) -> None:
        self.network, self.device, self.budget, self.dtype = network, device, budget, dtype

    @torch.inference_mode()
    def encode(self, volume: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1, I, J, K) on the host -> mean and log sigma, (B, C, I/f, J/f, K/f) each, as `kl_network.posterior`."""
        features = self._through(self.network.encoder, volume)
        mean = self._layer(self.network.quant_conv_mu, features)
        log_variance = self._layer(self.network.quant_conv_log_sigma, features).float().clamp(-30.0, 20.0)
        return mean.float(), log_variance / 2

    @torch.inference_mode()
    def decode(self, latent: Tensor) -> Tensor:
        """(B, C, i, j, k) on the host -> (B, 1, f i, f j, f k), float32."""
        return self._through(self.network.decoder, self._layer(self.network.post_quant_conv, latent)).float()

    def _through(self, part: nn.Module, x: Tensor) -> Tensor:
        blocks: Any = part.blocks
        pending: nn.GroupNorm | None = None
        for block in blocks:
            if isinstance(block, nn.GroupNorm):
                pending = block  # applied by the convolution that follows it
            elif isinstance(block, MaisiResBlock):
                x = self._residual(block, x)
            elif isinstance(block, MaisiConvolution | MaisiDownsample | MaisiUpsample):
                x = self._layer(
                    block if pending is None else self._normed(pending, x, block, activate=False), x, like=block
                )
                pending = None
            else:
                raise TypeError(f"{type(block).__name__} cannot be computed in slabs")
        return x

    def _residual(self, block: Any, x: Tensor) -> Tensor:
        """x + conv2(silu(norm2(conv1(silu(norm1(x))))))."""
        h = self._layer(self._normed(block.norm1, x, block.conv1), x, like=block.conv1)
        second = self._normed(block.norm2, h, block.conv2)
        return self._layer(lambda h, x: block.nin_shortcut(x) + second(h), h, x, like=block.conv2)

    def _normed(
        self, norm: nn.GroupNorm, x: Tensor, layer: nn.Module, *, activate: bool = True
    ) -> Callable[[Tensor], Tensor]:
        """The layer after a group norm with the statistics of all of `x`, and after SiLU."""
        mean, scale = self._statistics(norm, x)

        def forward(slab: Tensor) -> Tensor:
            normed = (slab.float() - mean) * scale + norm.bias.reshape(1, -1, 1, 1, 1)
            return layer(F.silu(normed) if activate else normed)

        return forward

    def _statistics(self, norm: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and weight / standard deviation per sample and channel, (B, C, 1, 1, 1) each, over all rows."""
        batch, groups = len(x), norm.num_groups
        total = torch.zeros(2, batch, groups, dtype=torch.float64, device=self.device)
        for start, stop in self._slabs(x.shape[2], self._rows(x, x)):
            values = x[:, :, start:stop].to(self.device, torch.float64).reshape(batch, groups, -1)
            total += torch.stack([values.sum(-1), values.square().sum(-1)])
        count = x[0].numel() // groups
        mean, square = total / count
        deviation = (square - mean.square()).clamp(min=0).add(norm.eps).sqrt()
        each = norm.num_channels // groups
        spread = [v.float().repeat_interleave(each, dim=1)[..., None, None, None] for v in (mean, deviation)]
        return spread[0], norm.weight.reshape(1, -1, 1, 1, 1) / spread[1]

    # --- one layer ---------------------------------------------------------------------------------------------

    def _layer(self, forward: Callable[..., Tensor], *inputs: Tensor, like: nn.Module | None = None) -> Tensor:
        """Every slab of a layer's output, put together on the host.

        Args:
            forward: the layer, of slabs of the inputs.
            inputs: (B, C, I, J, K) on the host, of one size.
            like: the module whose kind says how sizes change; `forward` itself by default.
        """
        x, scale = inputs[0], _scale(forward if like is None else like)
        size = [math.ceil(n * scale.up / scale.down) for n in x.shape[2:]]
        out: Tensor | None = None
        rows = max(1, self._rows(*inputs) // scale.down)
        done = 0
        while done < size[0]:
            stop = min(done + rows, size[0])
            try:
                slab = self._slab(forward, inputs, done, stop, scale)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                if rows == 1:
                    row = " x ".join(map(str, size[1:]))
                    raise UserError(
                        f"a single row of {row} voxels does not fit the memory of {self.device}",
                        "end what else runs there, take one volume at a time, or use --device cpu",
                    ) from error
                rows, self.budget = max(1, rows // 2), self.budget // 2
                torch.cuda.empty_cache()
                continue
            if out is None:
                out = torch.empty(len(x), slab.shape[1], *size, dtype=self.dtype)
            out[:, :, done:stop] = slab.to("cpu", self.dtype)
            done = stop
        assert out is not None
        return out

    def _slab(
        self, forward: Callable[..., Tensor], inputs: Sequence[Tensor], start: int, stop: int, scale: _Scale
    ) -> Tensor:
        """Output rows start to stop: the layer on the rows they need and a halo, without what the halo spoils."""
        first = start * scale.down // scale.up - HALO
        last = math.ceil(stop * scale.down / scale.up) + HALO
        first = max(first - first % scale.down, 0)  # strides count from an even row
        slabs = [x[:, :, first : min(last, x.shape[2])].to(self.device) for x in inputs]
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            computed = forward(*slabs)
        offset = start - first * scale.up // scale.down
        return computed[:, :, offset : offset + stop - start]

    def _rows(self, *tensors: Tensor) -> int:
        """Rows that fit the budget."""
        row = sum(t[:, :, 0].numel() for t in tensors) * 4 * FEATURE_MAPS
        return max(1, self.budget // row)

    @staticmethod
    def _slabs(length: int, rows: int) -> Iterator[tuple[int, int]]:
        for start in range(0, length, rows):
            yield start, min(start + rows, length)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or the host, had no more memory to give."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


class _Scale(NamedTuple):
    """A layer makes `up` rows of every `down`."""

    up: int = 1
    down: int = 1


def _scale(layer: Any) -> _Scale:
    if isinstance(layer, MaisiUpsample):
        return _Scale(up=2)
    return _Scale(down=2) if isinstance(layer, MaisiDownsample) else _Scale()
