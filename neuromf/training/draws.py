"""Everything random in a training step, drawn from keys so that a run can be continued or split exactly.

The noise of sample number n (counted over the whole run) depends on (seed, role, n) alone, its times and conditions on
(seed, role, update, place in the update): however many processes and micro-batches share an update, they see the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from neuromf.conditions import Condition
from neuromf.config import GuidanceConfig, ObjectiveConfig, TimesConfig
from neuromf.losses.guidance import interval_from_uniform, scale_from_uniform
from neuromf.losses.times import clamp_times, equal_mask, limit_gap, logit_normal, mix_uniform, pair
from neuromf.sampling.noise import keyed_generator

BLOCK_ELEMENTS = 4096


def draw_noise(seed: int, role: str, numbers: Sequence[int], shape: Sequence[int], device: torch.device) -> Tensor:
    """eps ~ N(0, I) for the samples of these running numbers, (B, C, I, J, K), on the device that uses it.

    One generator serves a block of small samples, so that points cost no more than volumes per number drawn; the
    noise of a number is the same whichever others are asked for.
    """
    block = max(1, BLOCK_ELEMENTS // math.prod(shape))
    if block == 1:
        return torch.stack(
            [torch.randn(*shape, device=device, generator=_noise_of(seed, role, n, device)) for n in numbers]
        )
    rows = []
    for number, members in groupby(numbers, lambda n: n // block):
        whole = torch.randn(block, *shape, device=device, generator=_noise_of(seed, role, number, device))
        rows.append(whole[torch.tensor([n % block for n in members], device=device)])
    return torch.cat(rows)


def _noise_of(seed: int, role: str, number: int, device: torch.device) -> torch.Generator:
    return keyed_generator(seed, role, "eps", number, device=device)


def largest_gap(progress: float, times: TimesConfig) -> float:
    """The largest t - r at this share of the training: from `gap_start` straight up to 1."""
    if times.gap_curriculum == 0:
        return 1.0
    return times.gap_start + (1 - times.gap_start) * min(progress / times.gap_curriculum, 1.0)


def draw_times(
    seed: int,
    role: str,
    update: int,
    size: int,
    times: TimesConfig,
    objective: ObjectiveConfig,
    progress: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The pairs (r, t) of the `size` samples of one update, each (size,), float32 on the CPU."""
    generator = keyed_generator(seed, role, "times", update)
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
    if times.gap_curriculum:
        r = limit_gap(r, t, largest_gap(progress, times))
    clips_its_target = objective.name == "pmf"
    return clamp_times(r, t, objective.t_min if objective.prediction == "x" and not clips_its_target else 0.0)


def draw_conditions(
    seed: int, role: str, update: int, label: Tensor, equal: Tensor, guidance: GuidanceConfig
) -> tuple[Condition, Tensor]:
    """The conditions of one update and which labels are dropped, independently of everything else.

    Args:
        label: (B,) classes.
        equal: (B,) bool, r = t; such samples get the whole guidance interval.
        guidance: shares and ranges; scales and intervals are drawn where it is enabled.

    Returns:
        The condition before dropping, and (B,) bool.
    """
    uniform = torch.rand(4, len(label), generator=keyed_generator(seed, role, "conditions", update))
    dropped = uniform[0] < guidance.label_drop
    if not guidance.enabled:
        return Condition(label), dropped
    omega = scale_from_uniform(uniform[1], guidance.omega_max, guidance.omega_beta)
    return Condition(label, omega, interval_from_uniform(uniform[2], uniform[3], equal)), dropped


def draw_corners(seed: int, role: str, update: int, size: int) -> Tensor:
    """Where the decoded crops of one update begin, (size, 3) in [0, 1)."""
    return torch.rand(size, 3, generator=keyed_generator(seed, role, "corners", update))


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
