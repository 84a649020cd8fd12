"""What a run is judged by while it goes: the raw loss at draws that never change, and samples from noise that never
changes, both with the selected average of the weights."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.utils.data import Dataset

from neuromf.conditions import Condition
from neuromf.config import TrainConfig
from neuromf.sampling.noise import noise_batch
from neuromf.sampling.solvers import euler, jump, time_grid
from neuromf.training.draws import draw_noise
from neuromf.training.ema import WeightAverage, averaged_weights
from neuromf.training.feed import draw_all, labels_of, select
from neuromf.training.objective import Objective

VALIDATION_SAMPLES = 64


@torch.no_grad()
def validate(
    objective: Objective, average: WeightAverage, dataset: Dataset[Tensor], config: TrainConfig, device: torch.device
) -> dict[str, float | None]:
    """Raw and weighted loss at fixed (t, r, eps), over at most 64 validation latents.

    Schedules stand where the training ends, so that the figure means the same in every epoch.
    """
    count = min(len(dataset), VALIDATION_SAMPLES)  # type: ignore[arg-type]
    if count == 0:
        return {"val_loss": None, "val_raw_loss": None}
    labels = labels_of(dataset)
    small = draw_all(config, "validation", 0, count, 1.0, label=None if labels is None else labels[:count])
    raw, weighted = [], []
    objective.eval()
    with averaged_weights(objective.network, average):
        for at in torch.arange(count).split(config.training.batch_size):
            x = torch.stack([dataset[int(i)] for i in at]).to(device)
            eps = draw_noise(config.training.seed, "validation", at.tolist(), x.shape[1:], device)
            loss = objective(x, *select(small, at, eps), progress=1.0)
            raw.append(loss.record["raw"])
            weighted.append(loss.record["weighted"])
    return {"val_loss": float(torch.cat(weighted).mean()), "val_raw_loss": float(torch.cat(raw).mean())}


@torch.no_grad()
def fixed_samples(
    objective: Objective, average: WeightAverage, config: TrainConfig, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """One-evaluation samples from the run's fixed noise, whitened (B, C, I, J, K); classes take turns."""
    count = config.intervals.sample_count
    noise = noise_batch(config.training.seed, range(count), shape).to(device)
    condition = Condition(torch.arange(count, device=device) % objective.classes) if objective.classes else None
    objective.eval()
    with averaged_weights(objective.network, average):
        x_hat = partial(objective.x_hat, condition=condition) if config.objective.prediction == "x" else None
        step = euler if config.objective.name == "rectflow" else jump  # a flow model knows no r < t
        return step(partial(objective.u, condition=condition), noise, time_grid(1), x_hat).cpu()
