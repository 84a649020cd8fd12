"""What a run is judged by while it goes: losses at draws, and samples from noise, that never change."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import Dataset

from neuromf.conditions import Condition
from neuromf.config import TrainConfig
from neuromf.losses.meanflow import channel_losses
from neuromf.sampling.noise import noise_batch
from neuromf.sampling.solvers import euler, jump, time_grid
from neuromf.training.diagnostics import finite, mean
from neuromf.training.draws import draw_noise
from neuromf.training.ema import WeightAverage, averaged_weights
from neuromf.training.feed import draw_all, labels_of, select
from neuromf.training.objective import Draws, Objective

VALIDATION_SAMPLES = 64
COLLECTED_NFE = (1, 2, 5, 10)


def _fixed_batches(
    dataset: Dataset[Tensor], config: TrainConfig, device: torch.device
) -> Iterator[tuple[Tensor, Draws]]:
    """At most 64 validation latents in batches, each with the same draws in every epoch.

    Schedules stand where the training ends, so that a figure means the same in every epoch.
    """
    count = min(len(dataset), VALIDATION_SAMPLES)  # type: ignore[arg-type]
    if count == 0:
        return
    labels = labels_of(dataset)
    small = draw_all(config, "validation", 0, count, 1.0, label=None if labels is None else labels[:count])
    for at in torch.arange(count).split(config.training.batch_size):
        x = torch.stack([dataset[int(i)] for i in at]).to(device)
        eps = draw_noise(config.training.seed, "validation", at.tolist(), x.shape[1:], device)
        yield x, select(small, at, eps)


@torch.no_grad()
def validate(
    objective: Objective, average: WeightAverage, dataset: Dataset[Tensor], config: TrainConfig, device: torch.device
) -> dict[str, float | None]:
    """Raw and weighted loss of the averaged weights at fixed (t, r, eps); null without validation latents."""
    raw, weighted = [], []
    objective.eval()
    with averaged_weights(objective.network, average):
        for x, draws in _fixed_batches(dataset, config, device):
            loss = objective(x, *draws, progress=1.0)
            raw.append(loss.record["raw"])
            weighted.append(loss.record["weighted"])
    if not raw:
        return {"val_loss": None, "val_raw_loss": None}
    return {"val_loss": finite(torch.cat(weighted).mean()), "val_raw_loss": finite(torch.cat(raw).mean())}


@torch.no_grad()
def channel_raw_losses(
    objective: Objective, dataset: Dataset[Tensor], config: TrainConfig, device: torch.device
) -> list[float | None] | None:
    """The raw loss by channel at the same fixed draws; before channel weights, the channels add up to the raw loss.

    The weights are the trained ones, not their average: a channel that runs away shows there first.

    Returns:
        C numbers, None without validation latents.
    """
    settings, each = config.objective, []
    objective.eval()
    for x, draws in _fixed_batches(dataset, config, device):
        terms = objective.terms(x, draws, objective.flow_alpha(1.0))
        each.append(channel_losses(terms.V, terms.target, lp=settings.lp, reduction=settings.loss_reduction))
    return [mean(channel) for channel in torch.cat(each).cpu().unbind(dim=1)] if each else None


@torch.no_grad()
def fixed_samples(
    objective: Objective, average: WeightAverage, config: TrainConfig, shape: tuple[int, ...], device: torch.device
) -> dict[int, Tensor]:
    """Samples of the averaged weights from the run's fixed noise, with 1, 2, 5 and 10 evaluations.

    Returns:
        Evaluations -> whitened (B, C, I, J, K) on the CPU; classes take turns.
    """
    count = config.intervals.sample_count
    noise = noise_batch(config.training.seed, range(count), shape).to(device)
    condition = Condition(torch.arange(count, device=device) % objective.classes) if objective.classes else None
    objective.eval()
    with averaged_weights(objective.network, average):
        x_hat = partial(objective.x_hat, condition=condition) if config.objective.prediction == "x" else None
        step = euler if config.objective.name == "rectflow" else jump  # a flow model knows no r < t
        u = partial(objective.u, condition=condition)
        return {nfe: step(u, noise, time_grid(nfe), x_hat).cpu() for nfe in COLLECTED_NFE}
