"""The straight path from data to noise, and the two ways of naming a velocity on it.

t = 0 is data, t = 1 is noise, 0 <= r <= t <= 1; h = t - r. Nothing here is drawn: x, eps, r and t are arguments.
(NVIDIA's rectified-flow target has the opposite sign: x - eps.)
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Prediction = Literal["u", "x"]


def per_sample(scalars: Tensor, like: Tensor) -> Tensor:
    """Append axes to one scalar per sample until it broadcasts against `like`.

    Args:
        scalars: (B,).
        like: (B, ...) of any rank; the scalars meet its batch axis, never its channels.
    """
    return scalars.reshape(scalars.shape + (1,) * (like.ndim - scalars.ndim))


def interpolate(x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """z_t = (1 - t) x + t eps.

    Args:
        x: data (B, C, I, J, K), whitened.
        eps: noise of the same shape.
        t: (B,) in [0, 1].
    """
    t = per_sample(t, x)
    return (1 - t) * x + t * eps


def velocity(x: Tensor, eps: Tensor) -> Tensor:
    """v_c = eps - x, the conditional velocity dz/dt of `interpolate`."""
    return eps - x


def velocity_from_x(z: Tensor, x_hat: Tensor, t: Tensor, t_min: float) -> Tensor:
    """u = (z_t - x_hat) / max(t, t_min): the average velocity an x-prediction stands for.

    Args:
        z: (B, C, I, J, K) at time t.
        x_hat: the network's estimate of the data, same shape.
        t: (B,).
        t_min: the clamp; its slope below t_min is zero in the derivative.
    """
    return (z - x_hat) / per_sample(t.clamp(min=t_min), z)


def average_velocity(output: Tensor, z: Tensor, t: Tensor, prediction: Prediction, t_min: float) -> Tensor:
    """The average velocity u that a network output means: itself (u) or `velocity_from_x` (x)."""
    return output if prediction == "u" else velocity_from_x(z, output, t, t_min)


def data_estimate(output: Tensor, z: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
    """The data estimate x_hat that a network output means: itself (x) or z_t - t u (u)."""
    return output if prediction == "x" else z - per_sample(t, z) * output


def step(u: Tensor, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
    """z_r = z_t - (t - r) u(z_t, r, t), exact for the true average velocity (Geng 2025a, eq. 12)."""
    return z - per_sample(t - r, z) * u
