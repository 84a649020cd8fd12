"""Forward-mode differentiation, with rules for the layers that torch's own make dear: convolutions, linear, group norm.

torch differentiates `conv(x, w)` as conv(dx, w) + conv(x, dw) and evaluates the second term on zeros where the weights
have no tangent: three convolutions where one over the doubled batch [x; dx] does. Its group norm falls apart into
some thirty passes over memory. Same numbers, less than half the time; every other operation keeps torch's rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def forward_mode(function: Callable[..., Tensor], at: Sequence[Tensor], along: Sequence[Tensor]) -> Tensor:
    """The derivative of a function along a direction, `torch.func.jvp(function, at, along)[1]`, by `LeanRules`.

    Args:
        function: of as many tensors as `at` has, to one tensor.
        at, along: the point and the direction, shape by shape alike.

    Returns:
        A tensor of the function's shape.
    """
    with forward_ad.dual_level(), LeanRules():
        moved = function(*(forward_ad.make_dual(x, dx) for x, dx in zip(at, along, strict=True)))
        value, derivative = forward_ad.unpack_dual(moved)
        return torch.zeros_like(value) if derivative is None else derivative


class LeanRules(TorchFunctionMode):
    """Within this context, and a `forward_ad.dual_level`, the layers of `_RULES` go by the rules below.

    Only for inputs that carry a tangent and weights that do not, which is what du/dt needs: anything else is torch's.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Hand a call to its rule, or on to torch."""
        rule = _RULES.get(func)
        if rule is not None:
            x, *rest = args
            value, tangent = forward_ad.unpack_dual(x)
            if tangent is not None and not any(_has_tangent(a) for a in (*rest, *(kwargs or {}).values())):
                return forward_ad.make_dual(*rule(func, value, tangent, *rest, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def _has_tangent(argument: Any) -> bool:
    return isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None


def _affine(
    layer: Callable[..., Tensor],
    x: Tensor,
    dx: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """y = layer(x) + b and dy = layer(dx), in one call over both."""
    y, dy = layer(torch.cat([x, dx]), weight, None, *args, **kwargs).tensor_split(2)
    if bias is not None:
        y = y + (bias if layer is F.linear else bias.view(-1, *[1] * (y.dim() - 2)))
    return y, dy


def _group_norm(
    _layer: Callable[..., Tensor],
    x: Tensor,
    dx: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """n = (x - mean) / s with s = sqrt(var + eps), so dn = (dx - mean(dx) - n mean(n dx)) / s; y = n w + b, dy = dn w.

    Means are over a sample's group. (d var = 2 mean((x - mean) dx), hence ds / s = mean(n dx) / s.)
    """
    y, mean, inverse = torch.native_group_norm(x, weight, bias, len(x), x.shape[1], x[0, 0].numel(), groups, eps)
    n = (x.reshape(len(x), groups, -1) - mean[..., None]) * inverse[..., None]
    dx = dx.reshape(n.shape)
    dn = (dx - dx.mean(-1, keepdim=True) - n * (n * dx).mean(-1, keepdim=True)) * inverse[..., None]
    dy = dn.view_as(y)
    return y, dy if weight is None else dy * weight.view(-1, *[1] * (y.dim() - 2))


_RULES: dict[Any, Callable[..., tuple[Tensor, Tensor]]] = {
    F.conv1d: _affine,
    F.conv2d: _affine,
    F.conv3d: _affine,
    F.linear: _affine,
    F.group_norm: _group_norm,
}
