"""From noise to data with few evaluations: MeanFlow's jump, and Euler and Heun for its instantaneous limit.

`u(z, r, t)` is a closure; `x_hat(z, r, t)`, where given, is the network's own data estimate: an x-prediction's last
step returns it unchanged, because dividing by the clamp max(t, t_min) and multiplying by t again would leave a
part of the noise in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from neuromf.errors import UserError

Field = Callable[[Tensor, Tensor, Tensor], Tensor]


def time_grid(nfe: int) -> list[float]:
    """nfe + 1 times from 1 (noise) to 0 (data), equally spaced.

    Raises:
        UserError: fewer than one evaluation.
    """
    if nfe < 1:
        raise UserError(f"nfe is {nfe}, at least one network evaluation is needed", "try --nfe 1")
    return torch.linspace(1, 0, nfe + 1, dtype=torch.float64).tolist()


def jump(u: Field, z: Tensor, times: Sequence[float], x_hat: Field | None = None) -> Tensor:
    """z_r = z_t - (t - r) u(z_t, r, t) along `times`: one evaluation per interval (Geng 2025a, eq. 12).

    Args:
        u: average velocity.
        z: noise (B, C, I, J, K).
        times: decreasing from 1 to 0; [1, 0] is the one-step sample eps - u(eps, 0, 1).
        x_hat: data estimate of an x-prediction, used for the step that ends at 0.
    """
    for t, r in pairwise(times):
        t_, r_ = z.new_full((len(z),), t), z.new_full((len(z),), r)
        z = x_hat(z, r_, t_) if x_hat is not None and r == 0 else z - (t - r) * u(z, r_, t_)
    return z


def one_step(u: Field, eps: Tensor, x_hat: Field | None = None) -> Tensor:
    """z_0 = eps - u(eps, r=0, t=1): one network evaluation."""
    return jump(u, eps, (1.0, 0.0), x_hat)


def euler(u: Field, z: Tensor, times: Sequence[float], x_hat: Field | None = None) -> Tensor:
    """Euler on the instantaneous velocity u(z, t, t): the flow-matching sampler, one evaluation a step."""
    return jump(lambda z_, r, t: u(z_, t, t), z, times, None if x_hat is None else lambda z_, r, t: x_hat(z_, t, t))


def heun(u: Field, z: Tensor, times: Sequence[float], x_hat: Field | None = None) -> Tensor:
    """Heun's second-order rule on u(z, t, t); the last step is Euler, so N intervals cost 2N - 1 evaluations."""
    for t, r in pairwise(times):
        t_, r_ = z.new_full((len(z),), t), z.new_full((len(z),), r)
        if r == 0:
            return x_hat(z, t_, t_) if x_hat is not None else z - t * u(z, t_, t_)
        slope = u(z, t_, t_)
        ahead = u(z - (t - r) * slope, r_, r_)
        z = z - (t - r) * (slope + ahead) / 2
    return z


SOLVERS = {"meanflow": jump, "euler": euler, "heun": heun}


def evaluations(solver: str, steps: int) -> int:
    """Network evaluations that `steps` intervals of a solver cost."""
    return 2 * steps - 1 if solver == "heun" else steps
