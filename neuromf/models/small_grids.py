"""3^3 convolutions on grids of one or two cells per axis, as one matrix product each.

There every output cell sees every input cell, most taps of a kernel fall on padding, and the backward passes of CPU
libraries take five to ten times as long as the forward one. Laying the kernel out as a matrix costs as much as dozens
of samples, so that only large batches (the toy problems) go this way. The weights, their names and the function stay
the same.
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LARGEST = 2
_ENOUGH = 64
"""Samples from which on the matrix pays; measured with 16 channels: a step of 256 in 133 ms for 203, and with 128
channels a step of 16 in 0.48 s for 0.34."""
_KERNEL, _ONE = (3, 3, 3), (1, 1, 1)


class SmallGridConv3d(nn.Conv3d):
    """A 3^3 convolution with padding 1 that is a matrix product on cubes of one or two cells per axis on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, n, n, n) -> (B, O, n, n, n), or any other grid as `nn.Conv3d` does it."""
        n = x.shape[-1]
        if x.device.type != "cpu" or len(x) < _ENOUGH or n > _LARGEST or x.shape[2:] != (n, n, n):
            return super().forward(x)
        cells, (outputs, inputs) = n**3, self.weight.shape[:2]
        taps = self.weight.flatten(2).index_select(2, _taps(n))  # (O, C, cells in, cells out)
        matrix = taps.reshape(outputs, inputs, cells, cells).permute(0, 3, 1, 2).reshape(outputs * cells, -1)
        bias = None if self.bias is None else self.bias.repeat_interleave(cells)
        return F.linear(x.flatten(1), matrix, bias).reshape(len(x), outputs, n, n, n)


def for_small_grids(module: nn.Module) -> None:
    """Have every 3^3 convolution with padding 1 in a module take the short way where the grid is small."""
    for part in module.modules():
        shape = (part.kernel_size, part.stride, part.padding) if type(part) is nn.Conv3d else None
        if shape == (_KERNEL, _ONE, _ONE) and part.groups == 1 and part.dilation == _ONE:
            part.__class__ = SmallGridConv3d


@functools.cache
def _taps(n: int) -> Tensor:
    """Which of the 27 taps leads from an input cell to an output cell, (n^3 x n^3,), input cells first."""
    cells = list(itertools.product(range(n), repeat=3))
    pairs = itertools.product(cells, cells)
    # What is first asked for while sampling is used in training, too.
    with torch.inference_mode(False):
        return torch.tensor([_tap([i - o + 1 for i, o in zip(inner, outer, strict=True)]) for inner, outer in pairs])


def _tap(offset: list[int]) -> int:
    return offset[0] * 9 + offset[1] * 3 + offset[2]
