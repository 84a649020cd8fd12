from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from neuromf.models import small_grids
from neuromf.models.small_grids import SmallGridConv3d, for_small_grids


def pair(**settings: object) -> tuple[nn.Conv3d, nn.Conv3d]:
    torch.manual_seed(0)
    plain = nn.Conv3d(3, 5, 3, padding=1, **settings).double()
    short = copy.deepcopy(plain)
    for_small_grids(short)
    assert isinstance(short, SmallGridConv3d)
    return plain, short


@pytest.mark.parametrize("grid", [(1, 1, 1), (2, 2, 2), (1, 2, 2), (3, 3, 3)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [4, 64])
def test_values_gradients_and_derivative_are_those_of_the_convolution(grid, bias, batch) -> None:
    plain, short = pair(bias=bias)
    x, along = torch.randn(2, batch, 3, *grid, dtype=torch.float64)
    torch.testing.assert_close(short(x), plain(x), rtol=1e-12, atol=1e-12)
    weighing = torch.randn(batch, 5, *grid, dtype=torch.float64)
    for conv in (short, plain):
        (conv(x) * weighing).sum().backward()
    for a, b in zip(short.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)
    a, b = (torch.func.jvp(conv, (x,), (along,))[1] for conv in (short, plain))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_strided_grouped_and_pointwise_convolutions_are_left_alone() -> None:
    parts = nn.ModuleList(
        [nn.Conv3d(4, 4, 3, padding=1, stride=2), nn.Conv3d(4, 4, 3, padding=1, groups=2), nn.Conv3d(4, 4, 1)]
    )
    for_small_grids(parts)
    assert {type(part) for part in parts} == {nn.Conv3d}


def test_a_network_that_sampled_first_can_be_trained() -> None:
    small_grids._taps.cache_clear()
    layer = SmallGridConv3d(2, 2, 3, padding=1)
    x = torch.randn(small_grids._ENOUGH, 2, 2, 2, 2)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
