"""The MeanFlow objectives, one function per equation, one loss value per sample.

Sources: MeanFlow (Geng 2025a, arXiv 2505.13447), improved MeanFlow (Geng 2025b, arXiv 2512.02012), pixel MeanFlow
(Lu 2026, arXiv 2601.22158), alpha-Flow (arXiv 2510.20771), rectified flow (Liu 2023, Lipman 2023). `u` is a closure
u(z, r, t); conditions, guidance and averaging never appear here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from neuromf.losses.derivative import Derivative, Field, exact
from neuromf.losses.path import interpolate, per_sample, velocity, velocity_from_x

Reduction = Literal["sum", "mean"]
Tangent = Tensor | Callable[[Tensor], Tensor]
"""dz/dt of a whole batch, or a function that gives it for the samples of some indices."""
Heads = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(z, r, t) -> (u, v): the average velocity and the second head's instantaneous one."""


class Terms(NamedTuple):
    """What one evaluation of an objective is made of; each (B, C, I, J, K) unless said.

    V: compound velocity u + (t - r) sg[du/dt]; carries the gradient.
    target: what V is compared with: v_c = eps - x, guided or clipped where the objective says so.
    u: the field at (z_t, r, t).
    du_dt: total derivative, zero where r = t.
    tangent: dz/dt used for it; on samples with r = t the target stands in (it is not used there).
    z: z_t.
    moving: (B,) bool, r < t.
    v: the second head at (z_t, r, t), None without one.
    """

    V: Tensor
    target: Tensor
    u: Tensor
    du_dt: Tensor
    tangent: Tensor
    z: Tensor
    moving: Tensor
    v: Tensor | None = None


def compound_velocity(u: Tensor, du_dt: Tensor, r: Tensor, t: Tensor) -> Tensor:
    """V = u + (t - r) sg[du/dt] (Geng 2025b, eq. 8); equal to v for the true average velocity."""
    return u + per_sample(t - r, u) * du_dt.detach()


def compound_terms(
    u: Field,
    z: Tensor,
    r: Tensor,
    t: Tensor,
    target: Tensor,
    tangent: Tangent,
    *,
    derivative: Derivative = exact,
    u_moving: Field | None = None,
    heads: Heads | None = None,
) -> Terms:
    """The compound velocity against a target; the derivative is taken only where r < t.

    For r = t the correction (t - r) du/dt vanishes, so those samples cost one ordinary forward pass. The derivative
    and the tangent carry no gradient and no tape.

    Args:
        u: the field, evaluated once on the whole batch with gradients.
        z: z_t (B, C, I, J, K).
        r, t: (B,), r <= t.
        target: the velocity V should equal, same shape as z.
        tangent: dz/dt, for the batch or by indices of the samples with r < t.
        derivative: see `losses.derivative`.
        u_moving: the same field for the samples with r < t alone (their conditions); `u` by default.
        heads: evaluated instead of `u` in the pass with gradients, where a second head is trained too.
    """
    moving = r < t
    du_dt, direction = torch.zeros_like(z), target.detach().clone()
    if moving.any():
        at = moving.nonzero().squeeze(1)
        with torch.no_grad():
            along = tangent(at) if callable(tangent) else tangent[at]
        direction[at] = along.to(z.dtype)
        du_dt[at] = derivative(u_moving or u, z[at], r[at], t[at], direction[at]).to(z.dtype)
    value, v = heads(z, r, t) if heads else (u(z, r, t), None)
    return Terms(compound_velocity(value, du_dt, r, t), target.detach(), value, du_dt, direction, z, moving, v)


def meanflow_terms(
    u: Field,
    x: Tensor,
    eps: Tensor,
    r: Tensor,
    t: Tensor,
    *,
    v_g: Tensor | None = None,
    derivative: Derivative = exact,
    u_moving: Field | None = None,
) -> Terms:
    """MeanFlow: target and tangent are the conditional velocity (Geng 2025a, eqs. 10 and 11), or the guided one.

    |V - v_g|^2 has the value and the gradient of the paper's |u - sg[v_g - (t - r) du/dt]|^2.

    Args:
        x, eps: whitened data and noise, (B, C, I, J, K).
        v_g: see `losses.guidance`; v_c = eps - x when None.
        u, r, t, derivative, u_moving: see `compound_terms`.
    """
    target = velocity(x, eps) if v_g is None else v_g
    return compound_terms(u, interpolate(x, eps, t), r, t, target, target, derivative=derivative, u_moving=u_moving)


def imf_terms(
    u: Field,
    x: Tensor,
    eps: Tensor,
    r: Tensor,
    t: Tensor,
    *,
    tangent: Tangent | None = None,
    v_g: Tensor | None = None,
    derivative: Derivative = exact,
    u_moving: Field | None = None,
    heads: Heads | None = None,
) -> Terms:
    """Improved MeanFlow: the tangent is the network's own velocity, the target v_c (Geng 2025b, eqs. 8 to 12).

    Args:
        x, eps: whitened data and noise, (B, C, I, J, K).
        tangent: the second head's velocity or a guided one; the boundary value sg u(z_t, t, t) when None.
        v_g: guided target; v_c = eps - x when None.
        u, r, t, derivative, u_moving, heads: see `compound_terms`.
    """
    z = interpolate(x, eps, t)
    field = u_moving or u
    own = (lambda at: field(z[at], t[at], t[at])) if tangent is None else tangent
    target = velocity(x, eps) if v_g is None else v_g
    return compound_terms(u, z, r, t, target, own, derivative=derivative, u_moving=u_moving, heads=heads)


def pmf_target(x: Tensor, eps: Tensor, t: Tensor, t_min: float) -> Tensor:
    """(z_t - x) / max(t, t_min): pixel MeanFlow clips its target as it clips its prediction (Lu 2026).

    Above t_min it is v_c; below, (t / t_min) v_c.
    """
    return velocity_from_x(interpolate(x, eps, t), x, t, t_min)


def rectflow_terms(u: Field, x: Tensor, eps: Tensor, t: Tensor) -> Terms:
    """Flow matching: r = t always, V = u(z_t, t, t) against v_c (Lipman 2023, eq. 9)."""
    z = interpolate(x, eps, t)
    return compound_terms(u, z, t, t, velocity(x, eps), velocity(x, eps))


def alphaflow_terms(
    u: Field, x: Tensor, eps: Tensor, r: Tensor, t: Tensor, alpha: float, *, u_moving: Field | None = None
) -> Terms:
    """alpha-Flow, written so that its loss reads like MeanFlow's (arXiv 2510.20771).

    With s = alpha r + (1 - alpha) t and z_s = z_t - (t - s) v_c, the paper regresses u(z_t, r, t) on
    alpha v_c + (1 - alpha) sg u(z_s, r, s) with difference D. Then V = (u - (1 - alpha) sg u(z_s, r, s)) / alpha has
    V - v_c = D / alpha, and alpha `weighted`(|V - v_c|^2) is the paper's (|D|^2 / alpha) / sg(|D|^2 / alpha^2 + c)^p.
    At alpha = 1 it is trajectory flow matching, V = u; as alpha -> 0, V tends to u + (t - r) du/dt along v_c.

    Args:
        x, eps: whitened data and noise, (B, C, I, J, K).
        r, t: (B,), r <= t; where r = t the samples train the instantaneous velocity.
        alpha: flow_alpha in (0, 1].
        u, u_moving: see `compound_terms`.

    Returns:
        Terms whose `du_dt` is the finite difference (V - u) / (t - r).
    """
    z, v = interpolate(x, eps, t), velocity(x, eps)
    moving = r < t
    value = u(z, r, t)
    V, du_dt = value, torch.zeros_like(z)
    if moving.any() and alpha < 1:
        at = moving.nonzero().squeeze(1)
        s = alpha * r[at] + (1 - alpha) * t[at]
        z_s = z[at] - per_sample(t[at] - s, z[at]) * v[at]
        with torch.no_grad():
            ahead = (u_moving or u)(z_s, r[at], s).to(value.dtype)
        V = value.index_copy(0, at, (value[at] - (1 - alpha) * ahead) / alpha)
        du_dt[at] = ((V[at] - value[at]) / per_sample(t[at] - r[at], z[at])).detach().to(z.dtype)
    return Terms(V, v, value, du_dt, v, z, moving)


def flow_alpha(progress: float, start: float, end: float, slope: float = 25.0) -> float:
    """alpha falling from 1 to 0 along a sigmoid (arXiv 2510.20771): 1 - sigmoid(slope (p - 1/2)), p = progress from
    `start` to `end`; above 0.995 it is 1, and below 0.005 it is 0, MeanFlow itself.

    Args:
        progress: share of the training that is done.
        start, end: shares between which it falls.
        slope: of the sigmoid.
    """
    through = (progress - start) / (end - start)
    alpha = 1 - torch.sigmoid(torch.tensor(slope * (through - 0.5), dtype=torch.float64)).item()
    if alpha > 0.995:
        return 1.0
    return 0.0 if alpha < 0.005 else alpha


def channel_losses(
    prediction: Tensor, target: Tensor, *, lp: float | Sequence[float] = 2.0, reduction: Reduction = "sum"
) -> Tensor:
    """|V - target|^lp of each channel, scaled so that the channels add up to the raw loss of the sample.

    Args:
        prediction, target: (B, C, ...).
        lp: one exponent, or one per channel.
        reduction: `sum` over a sample's elements (the papers), or their `mean`.

    Returns:
        (B, C).

    Raises:
        ValueError: as many exponents as channels are needed.
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
    return power.sum(dim=2) if reduction == "sum" else power.mean(dim=2) / channels


def lp_loss(
    prediction: Tensor,
    target: Tensor,
    *,
    lp: float | Sequence[float] = 2.0,
    reduction: Reduction = "sum",
    channel_weights: Tensor | None = None,
) -> Tensor:
    """|V - target|^lp summed or averaged over everything but the batch, the channels weighted.

    Args:
        prediction, target, lp, reduction: see `channel_losses`.
        channel_weights: (C,) factors, or None.

    Returns:
        (B,), the raw loss of each sample.

    Raises:
        ValueError: as many exponents or weights as channels are needed.
    """
    losses = channel_losses(prediction, target, lp=lp, reduction=reduction)
    if channel_weights is None:
        return losses.sum(dim=1)
    if len(channel_weights) != losses.shape[1]:
        raise ValueError(f"{len(channel_weights)} channel weights for {losses.shape[1]} channels")
    return losses @ channel_weights.to(losses)


def adaptive_weight(raw: Tensor, norm_p: float, norm_eps: float) -> Tensor:
    """1 / sg(raw + norm_eps)^norm_p (Geng 2025a, eq. 22), (B,) -> (B,). With norm_p = 1 the weighted loss
    is near one whatever happens: always look at the raw loss."""
    return (raw.detach() + norm_eps) ** -norm_p


def weighted(raw: Tensor, norm_p: float, norm_eps: float) -> Tensor:
    """raw x `adaptive_weight`, (B,)."""
    return raw * adaptive_weight(raw, norm_p, norm_eps)


def uncertainty_weighted(raw: Tensor, log_variances: Tensor) -> Tensor:
    """sum_c exp(-s_c) L_c, the learned channel weights of Kendall 2018 (arXiv 1705.07115), eq. 7.

    The regulariser sum_c s_c is `log_variances.sum()`, added outside the adaptive weight: inside it would be scaled
    away with the loss.

    Args:
        raw: (B, C), raw loss of each channel.
        log_variances: (C,), s_c.

    Returns:
        (B,).
    """
    return (raw * torch.exp(-log_variances)).sum(dim=1)
