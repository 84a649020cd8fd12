"""Everything random in a training step, drawn from keys so that a run can be continued or split exactly.

The draws of sample number n (counted over the whole run) depend on (seed, role, n) alone, and the choice of r = t
samples on (seed, role, micro-batch): one process with batch 2B sees what two with batch B see together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from neuromf.config import ObjectiveConfig, TimesConfig
from neuromf.losses.times import clamp_times, equal_mask, logit_normal, mix_uniform, pair
from neuromf.sampling.noise import keyed_generator


class Draws(NamedTuple):
    """Arguments of the objective: eps (B, C, I, J, K), r (B,), t (B,)."""

    eps: Tensor
    r: Tensor
    t: Tensor


def draw_noise(seed: int, role: str, numbers: Sequence[int], shape: Sequence[int], device: torch.device) -> Tensor:
    """eps ~ N(0, I) for the samples of these running numbers, (B, C, I, J, K), on the device that uses it."""
    return torch.stack(
        [
            torch.randn(*shape, device=device, generator=keyed_generator(seed, role, "eps", n, device=device))
            for n in numbers
        ]
    )


def draw_times(
    seed: int, role: str, micro_batch: int, size: int, times: TimesConfig, objective: ObjectiveConfig
) -> tuple[Tensor, Tensor]:
    """The pairs (r, t) of one global micro-batch of `size` samples, each (size,), float32 on the CPU."""
    generator = keyed_generator(seed, role, "times", micro_batch)
    normal, other = torch.randn(2, size, generator=generator)
    uniform = torch.rand(7, size, generator=generator)
    if times.distribution == "uniform":
        first, second = uniform[0], uniform[1]
    else:
        r_mean = times.mean if times.r_mean is None else times.r_mean
        r_std = times.std if times.r_std is None else times.r_std
        first, second = logit_normal(normal, times.mean, times.std), logit_normal(other, r_mean, r_std)
        first = mix_uniform(first, uniform[0], uniform[2], times.uniform_share)
        second = mix_uniform(second, uniform[1], uniform[2], times.uniform_share)
    share = 1.0 if objective.name == "rectflow" else times.data_proportion
    equal = equal_mask(size, share, uniform[3, 0], uniform[4])
    r, t = pair(first, second, equal, times.order)
    whole = ~equal & (uniform[5] < times.one_step_share)
    r, t = torch.where(whole, 0.0, r), torch.where(whole, 1.0, t)
    return clamp_times(r, t, objective.t_min if objective.prediction == "x" else 0.0)


def numbered_order(seed: int, samples: int, start: int) -> Iterator[tuple[int, int]]:
    """(running number, dataset index) without end, one keyed permutation of the dataset after another.

    Args:
        seed: of the permutations.
        samples: size of the dataset; running number n lies in pass n // samples.
        start: the first running number.
    """
    number = start
    while True:
        permutation = torch.randperm(samples, generator=keyed_generator(seed, "order", number // samples)).tolist()
        for index in permutation[number % samples :]:
            yield number, index
            number += 1
