"""The forward-mode rules are torch's own derivatives, by fewer evaluations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from neuromf.losses.forward_mode import LeanRules, forward_mode


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LAYERS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "conv3d": (nn.Conv3d(4, 6, 3, padding=1), (2, 4, 5, 4, 3)),
    "conv3d, strided, grouped, no bias": (nn.Conv3d(4, 6, 3, stride=2, groups=2, bias=False), (2, 4, 5, 5, 5)),
    "conv3d, padded by reflection": (nn.Conv3d(4, 4, 3, padding=1, padding_mode="reflect"), (1, 4, 4, 4, 4)),
    "conv2d, dilated": (nn.Conv2d(3, 5, 3, dilation=2), (2, 3, 7, 8)),
    "conv1d": (nn.Conv1d(3, 5, 3), (2, 3, 7)),
    "linear": (nn.Linear(5, 3), (4, 5)),
    "linear on tokens, no bias": (nn.Linear(5, 3, bias=False), (2, 7, 5)),
    "group norm": (nn.GroupNorm(2, 6, eps=1e-6), (3, 6, 4, 4, 3)),
    "group norm on two axes": (nn.GroupNorm(3, 6), (3, 6)),
    "group norm, not affine": (nn.GroupNorm(3, 6, affine=False), (3, 6, 5)),
    "bias by keyword": (lambda x: F.linear(x, random(3, 5, seed=7), bias=random(3, seed=8)), (4, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_has_its_own_value_and_derivative(name: str) -> None:
    layer, shape = LAYERS[name]
    if isinstance(layer, nn.Module):
        layer = layer.double()
        for index, parameter in enumerate(layer.parameters()):
            parameter.data.copy_(random(*parameter.shape, seed=index + 10))
    x, dx = random(*shape), random(*shape, seed=1)
    value, derivative = torch.func.jvp(layer, (x,), (dx,))
    with forward_ad.dual_level(), LeanRules():
        y, dy = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, dx)))
    torch.testing.assert_close(y, value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dy, derivative, rtol=1e-12, atol=1e-12)


def test_weights_that_move_are_left_to_torch() -> None:
    x, w, dx, dw = random(2, 3, 6), random(4, 3, 3, seed=1), random(2, 3, 6, seed=2), random(4, 3, 3, seed=3)
    expected = torch.func.jvp(F.conv1d, (x, w), (dx, dw))[1]
    with forward_ad.dual_level(), LeanRules():
        moved = F.conv1d(forward_ad.make_dual(x, dx), forward_ad.make_dual(w, dw))
        torch.testing.assert_close(forward_ad.unpack_dual(moved).tangent, expected)


def test_an_input_that_does_not_move_passes_through() -> None:
    x, w = random(2, 3, 6), random(4, 3, 3, seed=1)
    with forward_ad.dual_level(), LeanRules():
        y = F.conv1d(x, w)
        assert forward_ad.unpack_dual(y).tangent is None
    assert torch.equal(y, F.conv1d(x, w))


class Counted(TorchDispatchMode):
    """Counts the convolutions that are really computed."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


def test_a_convolution_is_computed_once() -> None:
    x, w, dx = random(2, 3, 6), random(4, 3, 3, seed=1), random(2, 3, 6, seed=2)
    with forward_ad.dual_level(), Counted() as counted, LeanRules():
        F.conv1d(forward_ad.make_dual(x, dx), w)
    assert counted.calls == 1


def test_a_function_that_does_not_move_has_the_derivative_zero() -> None:
    x = random(2, 3)
    assert torch.equal(forward_mode(lambda x: random(2, 3, seed=5), (x,), (x,)), torch.zeros_like(x))


def test_a_composition_has_the_derivative_that_torch_gives_it() -> None:
    net = nn.Sequential(nn.Conv1d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv1d(4, 3, 3)).double()
    x, dx = random(2, 3, 6), random(2, 3, 6, seed=1)
    expected = torch.func.jvp(net, (x,), (dx,))[1]
    torch.testing.assert_close(forward_mode(net, (x,), (dx,)), expected, rtol=1e-12, atol=1e-12)
