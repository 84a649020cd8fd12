"""du/dt, the total derivative of the average velocity along (dz, dr, dt) = (tangent, 0, 1).

It enters the objective under stop-gradient, so it is computed without a tape, in float32 whatever the rest of
the step uses, and with attention on the math kernel (the fused kernels have no forward-mode derivative).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from neuromf.losses.forward_mode import forward_mode

Field = Callable[[Tensor, Tensor, Tensor], Tensor]
"""An average velocity u(z, r, t): (B, C, I, J, K), (B,), (B,) -> (B, C, I, J, K)."""

Derivative = Callable[[Field, Tensor, Tensor, Tensor, Tensor], Tensor]
Strategy = Literal["exact", "finite-difference"]


@torch.no_grad()
def exact(u: Field, z: Tensor, r: Tensor, t: Tensor, tangent: Tensor) -> Tensor:
    """du/dt = (d_z u) tangent + d_t u by one forward-mode pass (Geng 2025a, eq. 8).

    Args:
        u: the field; evaluated with autocast off.
        z, tangent: (B, C, I, J, K).
        r, t: (B,).

    Returns:
        (B, C, I, J, K).
    """
    with torch.autocast(z.device.type, enabled=False), sdpa_kernel(SDPBackend.MATH), _whole_float32():
        return forward_mode(lambda z_, t_: u(z_, r, t_), (z, t), (tangent, torch.ones_like(t)))


@contextmanager
def _whole_float32() -> Iterator[None]:
    """Convolutions and products in all 24 bits: cuDNN's default, TF32, keeps 11 and would be the largest error left."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def finite_difference(fd_step: float) -> Derivative:
    """The forward difference (u(z + d tangent, r, t + d) - u(z, r, t)) / d of the historic runs, d = fd_step.

    Kept to reproduce them. In float32 with unscaled times it is off by 0.3 %; under bf16 it is noise.
    """

    @torch.no_grad()
    def difference(u: Field, z: Tensor, r: Tensor, t: Tensor, tangent: Tensor) -> Tensor:
        return (u(z + fd_step * tangent, r, t + fd_step) - u(z, r, t)) / fd_step

    return difference


def derivative(strategy: Strategy, fd_step: float = 1e-3) -> Derivative:
    """The derivative by its configured name."""
    return exact if strategy == "exact" else finite_difference(fd_step)
