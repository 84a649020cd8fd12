"""What reaches the objective: micro-batches with everything random about them, from any update on.

Samples carry running numbers counted over the whole run; number n lies in global micro-batch n // (batch x processes).
Every draw is keyed by these numbers, so that a run can be continued or split over processes exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from neuromf.conditions import Condition
from neuromf.config import TrainConfig
from neuromf.training.draws import draw_conditions, draw_corners, draw_noise, draw_times, numbered_order
from neuromf.training.objective import Draws

MINIMUM_EPOCH = 10


class LatentItems(Protocol):
    """A dataset of whitened latents (C, I, J, K); `labels` (N,) int64 are their classes, None without any."""

    labels: Tensor | None

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Tensor: ...


@dataclass(frozen=True)
class Clock:
    """Lengths of a run in updates; `batch` counts all processes and the accumulation."""

    samples: int
    batch: int
    config: TrainConfig

    @property
    def epoch_updates(self) -> int:
        """Updates of an epoch: one pass over the training split, at least `MINIMUM_EPOCH`."""
        return max(self.samples // self.batch, MINIMUM_EPOCH)

    @property
    def updates(self) -> int:
        """Updates of the whole run."""
        training = self.config.training
        return training.updates or (training.epochs or 1) * self.epoch_updates

    def progress(self, number: int) -> float:
        """Share of the training that is done when the sample of this running number is used."""
        return number // self.batch / self.updates


class Batch(NamedTuple):
    """One process's micro-batch: x (B, C, I, J, K) whitened, its draws, and the share of the training done."""

    x: Tensor
    draws: Draws
    progress: float


def labels_of(dataset: Dataset[Tensor] | LatentItems) -> Tensor | None:
    """The classes of a dataset's items, (N,) int64, None where it has none."""
    return getattr(dataset, "labels", None)


@dataclass(frozen=True)
class Feed:
    """The training batches of one process.

    Args:
        dataset: see `LatentItems`.
        clock: lengths of the run.
        device: where batches and noise are needed.
        rank, world: of this process.
    """

    dataset: Dataset[Tensor]
    clock: Clock
    device: torch.device
    rank: int = 0
    world: int = 1

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """(C, I, J, K) of an item."""
        return tuple(self.dataset[0].shape)

    def batches(self, update: int) -> Iterator[Batch]:
        """The micro-batches that follow `update` finished updates, to the end of the run."""
        training, size = self.clock.config.training, self.clock.config.training.batch_size
        order = numbered_order(training.seed, self.clock.samples, update * self.clock.batch)
        asked: list[list[tuple[int, int]]] = []  # (number, index) of the global micro-batches the loader was asked for

        def indices() -> Iterator[list[int]]:
            for _ in range((self.clock.updates - update) * training.accumulation):
                asked.append([next(order) for _ in range(size * self.world)])
                yield [index for _, index in asked[-1][self._mine]]

        for x in DataLoader(self.dataset, batch_sampler=indices(), num_workers=training.workers):
            whole = asked.pop(0)
            draws = self._draws([n for n, _ in whole], [index for _, index in whole])
            yield Batch(x.to(self.device, non_blocking=True), draws, self.clock.progress(whole[0][0]))

    @property
    def _mine(self) -> slice:
        """This process's places in a global micro-batch."""
        size = self.clock.config.training.batch_size
        return slice(self.rank * size, (self.rank + 1) * size)

    def _draws(self, numbers: list[int], indices: list[int]) -> Draws:
        """This process's share of the draws of one global micro-batch."""
        config, seed = self.clock.config, self.clock.config.training.seed
        labels = labels_of(self.dataset)
        small = draw_all(
            config, "train", numbers[0] // len(numbers), len(numbers), self.clock.progress(numbers[0]),
            label=None if labels is None else labels[torch.tensor(indices)],
        )  # fmt: skip
        noise = draw_noise(seed, "train", numbers[self._mine], self.shape, self.device)
        return select(small, torch.arange(len(numbers))[self._mine], noise)


class SmallDraws(NamedTuple):
    """The draws of a global micro-batch that cost nothing: all but the noise; on the CPU."""

    r: Tensor
    t: Tensor
    condition: Condition | None
    dropped: Tensor | None
    corner: Tensor | None


def draw_all(
    config: TrainConfig, role: str, micro_batch: int, size: int, progress: float, *, label: Tensor | None
) -> SmallDraws:
    """Times, conditions and crops of one global micro-batch of `size` samples, keyed by its number."""
    seed = config.training.seed
    r, t = draw_times(seed, role, micro_batch, size, config.times, config.objective, progress)
    condition, dropped = None, None
    if label is not None and config.network.classes:
        condition, dropped = draw_conditions(seed, role, micro_batch, label, r == t, config.guidance)
    corner = draw_corners(seed, role, micro_batch, size) if config.objective.perceptual_weight else None
    return SmallDraws(r, t, condition, dropped, corner)


def select(small: SmallDraws, at: Tensor, noise: Tensor) -> Draws:
    """The draws of some samples of a micro-batch, on the device of their noise."""
    r, t, condition, dropped, corner = small
    device = noise.device
    return Draws(
        noise,
        r[at].to(device),
        t[at].to(device),
        None if condition is None else condition.select(at).to(device),
        None if dropped is None else dropped[at].to(device),
        None if corner is None else corner[at].to(device),
    )
