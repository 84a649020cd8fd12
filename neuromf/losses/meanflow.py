"""The MeanFlow objectives, one function per equation, one loss value per sample.

Sources: MeanFlow (Geng 2025a, arXiv 2505.13447), improved MeanFlow (Geng 2025b, arXiv 2512.02012), rectified flow
(Liu 2023, Lipman 2023). `u` is a closure u(z, r, t); conditioning, guidance and averaging never appear here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from neuromf.losses.derivative import Derivative, Field, exact
from neuromf.losses.path import interpolate, per_sample, velocity

Reduction = Literal["sum", "mean"]
Tangent = Literal["boundary", "velocity"]


class Terms(NamedTuple):
    """What one evaluation of the objective is made of; each (B, C, I, J, K) unless said.

    V: compound velocity u + (t - r) sg[du/dt]; carries the gradient.
    target: v_c = eps - x.
    u: the field at (z_t, r, t).
    du_dt: total derivative, zero where r = t.
    tangent: dz/dt used for it; on samples with r = t the conditional velocity stands in (it is not used there).
    z: z_t.
    moving: (B,) bool, r < t.
    """

    V: Tensor
    target: Tensor
    u: Tensor
    du_dt: Tensor
    tangent: Tensor
    z: Tensor
    moving: Tensor


def compound_velocity(u: Tensor, du_dt: Tensor, r: Tensor, t: Tensor) -> Tensor:
    """V = u + (t - r) sg[du/dt] (Geng 2025b, eq. 8); equal to v for the true average velocity."""
    return u + per_sample(t - r, u) * du_dt.detach()


def meanflow_terms(
    u: Field,
    x: Tensor,
    eps: Tensor,
    r: Tensor,
    t: Tensor,
    *,
    tangent: Tangent = "boundary",
    derivative: Derivative = exact,
    u_moving: Field | None = None,
) -> Terms:
    """The compound velocity and its target; the derivative is taken only where r < t.

    For r = t the correction (t - r) du/dt vanishes, so those samples cost one ordinary forward pass. The
    derivative and the boundary tangent carry no gradient and no tape.

    Args:
        u: the field, evaluated once on the whole batch with gradients.
        x, eps: whitened data and noise, (B, C, I, J, K).
        r, t: (B,), r <= t.
        tangent: `boundary` (iMF: sg u(z_t, t, t)) or `velocity` (MeanFlow: v_c).
        derivative: see `losses.derivative`.
        u_moving: the same field for the samples with r < t alone (their conditioning); `u` by default.
    """
    z, v = interpolate(x, eps, t), velocity(x, eps)
    moving = r < t
    du_dt, direction = torch.zeros_like(z), v.clone()
    if moving.any():
        at = moving.nonzero().squeeze(1)
        field = u_moving or u
        z_m, r_m, t_m = z[at], r[at], t[at]
        if tangent == "boundary":
            with torch.no_grad():
                direction[at] = field(z_m, t_m, t_m).to(v.dtype)
        du_dt[at] = derivative(field, z_m, r_m, t_m, direction[at]).to(v.dtype)
    value = u(z, r, t)
    return Terms(compound_velocity(value, du_dt, r, t), v, value, du_dt, direction, z, moving)


def rectflow_terms(u: Field, x: Tensor, eps: Tensor, t: Tensor) -> Terms:
    """Flow matching: r = t always, V = u(z_t, t, t) against v_c (Lipman 2023, eq. 9)."""
    z, v = interpolate(x, eps, t), velocity(x, eps)
    value = u(z, t, t)
    return Terms(value, v, value, torch.zeros_like(z), v, z, torch.zeros_like(t, dtype=torch.bool))


def lp_loss(
    prediction: Tensor,
    target: Tensor,
    *,
    lp: float | Sequence[float] = 2.0,
    reduction: Reduction = "sum",
    channel_weights: Tensor | None = None,
) -> Tensor:
    """|V - target|^lp summed or averaged over everything but the batch.

    Args:
        prediction, target: (B, C, ...).
        lp: one exponent, or one per channel.
        reduction: `sum` (the papers) or `mean`.
        channel_weights: (C,) factors, or None.

    Returns:
        (B,), the raw loss of each sample.

    Raises:
        ValueError: as many exponents or weights as channels are needed.
    """
    difference = prediction - target.detach()
    if difference.dtype in (torch.bfloat16, torch.float16):
        difference = difference.float()
    difference = difference.abs().reshape(*difference.shape[:2], -1)
    channels = difference.shape[1]
    if isinstance(lp, Sequence):
        if len(lp) != channels:
            raise ValueError(f"lp has {len(lp)} exponents for {channels} channels")
        power = torch.stack([difference[:, c] ** p for c, p in enumerate(lp)], dim=1)
    else:
        power = difference.square() if lp == 2 else difference**lp
    if channel_weights is not None:
        if len(channel_weights) != channels:
            raise ValueError(f"{len(channel_weights)} channel weights for {channels} channels")
        power = power * channel_weights.to(power).reshape(1, -1, 1)
    return power.sum(dim=(1, 2)) if reduction == "sum" else power.mean(dim=(1, 2))


def adaptive_weight(raw: Tensor, norm_p: float, norm_eps: float) -> Tensor:
    """1 / sg(raw + norm_eps)^norm_p (Geng 2025a, eq. 22), (B,) -> (B,). With norm_p = 1 the weighted loss
    is near one whatever happens: always look at the raw loss."""
    return (raw.detach() + norm_eps) ** -norm_p


def weighted(raw: Tensor, norm_p: float, norm_eps: float) -> Tensor:
    """raw x `adaptive_weight`, (B,)."""
    return raw * adaptive_weight(raw, norm_p, norm_eps)
