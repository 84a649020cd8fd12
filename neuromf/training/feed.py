"""What reaches the objective: micro-batches with everything random about them, from any update on.

Samples carry running numbers counted over the whole run; number n belongs to update n // batch, with the batch of all
processes and micro-batches. Every draw is keyed by these numbers, so that a run can be continued, or its updates
split over any number of processes and micro-batches, exactly.
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
        training = self.clock.config.training
        asked: list[_Asked] = []  # the micro-batches that the loader was asked for and has not given yet

        def indices() -> Iterator[list[int]]:
            for micro in self._asked(update):
                asked.append(micro)
                yield micro.indices

        for x in DataLoader(self.dataset, batch_sampler=indices(), num_workers=training.workers):
            numbers, _, small, at, progress = asked.pop(0)
            noise = draw_noise(training.seed, "train", numbers, self.shape, self.device)
            yield Batch(x.to(self.device, non_blocking=True), select(small, at, noise), progress)

    def _asked(self, update: int) -> Iterator[_Asked]:
        """This process's micro-batches from `update` on, before anything costly is read or drawn."""
        config, batch = self.clock.config, self.clock.batch
        order = numbered_order(config.training.seed, self.clock.samples, update * batch)
        labels, parts = labels_of(self.dataset), self.world * config.training.accumulation
        for u in range(update, self.clock.updates):
            pairs = [next(order) for _ in range(batch)]
            label = None if labels is None else labels[torch.tensor([index for _, index in pairs])]
            small = draw_all(config, "train", u, batch, u / self.clock.updates, label=label)
            shares = deal(small.r < small.t, parts)
            for at in shares[self.rank :: self.world]:
                numbers, indices = zip(*(pairs[i] for i in at.tolist()), strict=True)
                yield _Asked(list(numbers), list(indices), small, at, u / self.clock.updates)


def deal(moving: Tensor, parts: int) -> list[Tensor]:
    """Places of a batch in equal parts, each with its share of r < t samples: those cost twice the others.

    Args:
        moving: (B,) bool, r < t.
        parts: processes times micro-batches; divides B.

    Returns:
        One (B / parts,) tensor of ascending places per part.
    """
    ranked = moving.long().argsort(stable=True)
    return [ranked[part::parts].sort().values for part in range(parts)]


class _Asked(NamedTuple):
    """A micro-batch to come: running numbers, dataset indices, the draws of its update and its places in them."""

    numbers: list[int]
    indices: list[int]
    small: SmallDraws
    at: Tensor
    progress: float


class SmallDraws(NamedTuple):
    """The draws of an update that cost nothing: all but the noise; on the CPU."""

    r: Tensor
    t: Tensor
    condition: Condition | None
    dropped: Tensor | None
    corner: Tensor | None


def draw_all(
    config: TrainConfig, role: str, update: int, size: int, progress: float, *, label: Tensor | None
) -> SmallDraws:
    """Times, conditions and crops of the `size` samples of one update, keyed by its number."""
    seed = config.training.seed
    r, t = draw_times(seed, role, update, size, config.times, config.objective, progress)
    condition, dropped = None, None
    if label is not None and config.network.classes:
        condition, dropped = draw_conditions(seed, role, update, label, r == t, config.guidance)
    corner = draw_corners(seed, role, update, size) if config.objective.perceptual_weight else None
    return SmallDraws(r, t, condition, dropped, corner)


def select(small: SmallDraws, at: Tensor, noise: Tensor) -> Draws:
    """The draws of some samples of an update, on the device of their noise."""
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
