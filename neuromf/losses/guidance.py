"""Classifier-free guidance as a training target, so that one evaluation is already guided.

The network's velocities under different conditions are arguments; nothing is evaluated or drawn here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from neuromf.losses.path import per_sample


def mixed_velocity(v: Tensor, v_null: Tensor, v_cond: Tensor, omega: float, kappa: float) -> Tensor:
    """v_g = omega v + (1 - omega - kappa) v_null + kappa v_cond (Geng 2025a, eq. 21); effective scale omega/(1-kappa).

    Args:
        v: conditional velocity eps - x, (B, C, I, J, K).
        v_null, v_cond: the network's instantaneous velocities without and with the class, same shape.
        omega, kappa: the paper's weights; 1 and 0 leave v.
    """
    return omega * v + (1 - omega - kappa) * v_null + kappa * v_cond


def guided_velocity(v: Tensor, v_cond: Tensor, v_null: Tensor, omega: Tensor) -> Tensor:
    """v_g = v + (1 - 1/omega) (v_cond - v_null) (Geng 2025b, eq. 17), one scale per sample.

    Args:
        v: conditional velocity, (B, C, I, J, K).
        v_cond, v_null: the network's instantaneous velocities with and without the class, same shape.
        omega: (B,), at least 1; 1 leaves v.
    """
    return v + per_sample(1 - 1 / omega, v) * (v_cond - v_null)


def inside(t: Tensor, interval: Tensor) -> Tensor:
    """Whether each time lies in its guidance interval, ends included: (B,), (B, 2) -> (B,) bool."""
    return (interval[:, 0] <= t) & (t <= interval[:, 1])


def scale_from_uniform(uniform: Tensor, omega_max: float = 8.0, omega_beta: float = 1.0) -> Tensor:
    """Scales in [1, omega_max] with density proportional to omega^-omega_beta, by the inverse of their distribution.

    For beta = 1 this is omega_max^U (Geng 2025b).
    """
    log_max = math.log(omega_max)
    if omega_beta == 1:
        return torch.exp(uniform * log_max)
    power = 1 - omega_beta
    return torch.exp(torch.log1p(uniform * math.expm1(power * log_max)) / power)


def interval_from_uniform(low: Tensor, high: Tensor, equal: Tensor) -> Tensor:
    """Guidance intervals [low / 2, 1/2 + high / 2], and [0, 1] where r = t (Geng 2025b): (B,) each -> (B, 2)."""
    start = torch.where(equal, torch.zeros_like(low), 0.5 * low)
    end = torch.where(equal, torch.ones_like(high), 0.5 + 0.5 * high)
    return torch.stack([start, end], dim=1)
