"""`neuromf train --time-step`: a few updates of the planned run, to see what it will take; nothing is written."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from neuromf.config import TrainConfig
from neuromf.data.latents import class_names
from neuromf.models.blocks import recompute_blocks
from neuromf.models.networks import build_network
from neuromf.pipeline.plan import Plan, refuse_too_large
from neuromf.pipeline.train import TrainingData, channel_weights_of, perceptual_of, plan, training_data
from neuromf.training import memory
from neuromf.training.adapter_file import adapters_of
from neuromf.training.ema import WeightAverage, build_averages
from neuromf.training.feed import Batch, Clock, Feed
from neuromf.training.objective import Objective
from neuromf.training.optim import build_optimizer
from neuromf.training.processes import make_accelerator, peak_memory, prepare
from neuromf.training.validation import fixed_samples, validate

WARM_UP, FEWEST, MOST, LONG_ENOUGH_S = 2, 3, 20, 10.0
Progress = Callable[[str, int, int], None]


class StepTimes(NamedTuple):
    """Seconds, each measured: the median and the mean update, the median update with r = t throughout (plain flow
    matching), one validation, one drawing of samples; how many updates were timed; most memory that was held."""

    update_s: float
    mean_update_s: float
    plain_update_s: float
    validation_s: float
    samples_s: float
    timed: int
    memory_bytes: int | None


@dataclass(frozen=True)
class TimedPlan:
    """A plan, and what a few of its updates took."""

    plan: Plan
    times: StepTimes

    @property
    def total_s(self) -> float:
        """Expected time of the whole run, the writing of checkpoints and pictures left out."""
        plan, times = self.plan, self.times
        looks = plan.validations * times.validation_s + plan.drawn * times.samples_s
        return plan.updates * times.mean_update_s + looks

    @property
    def ratio(self) -> float:
        """An update against one of plain flow matching."""
        return self.times.update_s / self.times.plain_update_s

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        measured = {**self.times._asdict(), "ratio_to_plain": self.ratio, "expected_total_s": self.total_s}
        return {**self.plan.to_dict(), "time_step": measured}

    def lines(self) -> list[str]:
        """The plan's table with the measured rows below."""
        times, need = self.times, self.plan.memory.total
        held = times.memory_bytes
        compared = "" if held is None else f", {held / need:.2f} of the estimate" if held else ", too little to see"
        rows = {
            "an update": f"{_seconds(times.update_s)} (median of {times.timed}); {_seconds(times.plain_update_s)} with "
            f"r = t throughout: MeanFlow costs {self.ratio:.2f} times plain flow matching",
            "a look": f"validation {_seconds(times.validation_s)}, samples {_seconds(times.samples_s)}",
            "measured": f"{'unknown' if held is None else f'{held / 2**20:,.0f} MiB'} of memory{compared}",
            "whole run": f"about {_duration(self.total_s)}",
        }
        table = self.plan.lines()
        first = next((i for i, line in enumerate(table) if line.startswith("warning: ")), len(table))
        return [*table[:first], *(f"{name:<12}{text}" for name, text in rows.items()), *table[first:]]


@dataclass
class Session:
    """The parts of a run that make updates and looks, without a folder."""

    config: TrainConfig
    data: TrainingData
    accelerator: Accelerator
    objective: nn.Module
    bare: Objective
    optimizer: torch.optim.Optimizer
    averages: dict[str, WeightAverage]

    def feed(self, config: TrainConfig) -> Iterator[Batch]:
        """Micro-batches from the beginning of a run with these settings."""
        here, training = self.accelerator, config.training
        batch = training.batch_size * training.accumulation * here.num_processes
        clock = Clock(len(self.data.training_set), batch, config)  # type: ignore[arg-type]
        return Feed(self.data.training_set, clock, here.device, here.process_index, here.num_processes).batches(0)

    def update(self, batches: Iterator[Batch]) -> None:
        """One update as the loop makes it, guards and records aside; the rate is left at its peak."""
        training = self.config.training
        self.objective.train()
        self.optimizer.zero_grad(set_to_none=True)
        for _ in range(training.accumulation):
            x, draws, progress = next(batches)
            with self.accelerator.autocast():
                loss = self.objective(x, *draws, progress=progress)
            self.accelerator.backward(loss.value / training.accumulation)
        self.accelerator.clip_grad_norm_(self.objective.parameters(), training.clip or float("inf"))
        self.optimizer.step()
        for average in self.averages.values():
            average.update(self.bare.network, 1, training.batch_size)

    def timed(self, action: Callable[[], Any]) -> float:
        """Seconds that an action takes, to its end on the device."""
        began = time.perf_counter()
        action()
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began


def time_step(config: TrainConfig, data: Path, *, device: str = "auto", progress: Progress | None = None) -> TimedPlan:
    """Plan a run, make a few of its updates on its network, latents and device, and forget them.

    Args:
        config: resolved settings.
        data: written by `neuromf encode`.
        device: auto, cpu, cuda or mps.
        progress: callback (description, done, total).

    Raises:
        UserError: as `train`; too little memory among them.
    """
    expected = plan(config, data, device=device)
    refuse_too_large(expected)
    accelerator = make_accelerator(device, config.training.precision)
    sets = training_data(config, data)
    before = memory.resident() if accelerator.device.type == "cpu" else 0
    session = _begin(config, sets, accelerator, device)
    mixed = _times(session, config, "timing updates", progress)
    peak = peak_memory(accelerator.device)
    plain = _times(session, _plain(config), "timing r = t", progress)
    average = session.averages[config.ema.selected]
    where, shape = accelerator.device, tuple(sets.training_set[0].shape)
    times = StepTimes(
        update_s=statistics.median(mixed),
        mean_update_s=statistics.mean(mixed),
        plain_update_s=statistics.median(plain),
        validation_s=session.timed(lambda: validate(session.bare, average, sets.validation_set, config, where)),
        samples_s=session.timed(lambda: fixed_samples(session.bare, average, config, shape, where)),
        timed=len(mixed),
        memory_bytes=None if peak is None else max(peak - before, 0),
    )
    return TimedPlan(expected, times)


def _begin(config: TrainConfig, data: TrainingData, accelerator: Accelerator, device: str) -> Session:
    torch.manual_seed(config.training.seed)
    description = data.description
    classes = len(class_names(description)) if config.network.classes else 0
    adapters = adapters_of(config, description)
    network = build_network(config.network.model_dump(), description["latent_shape"], classes, adapters)
    if config.training.recompute:
        recompute_blocks(network)
    objective = Objective(
        network,
        config.objective,
        channel_weights_of(config, description),
        guidance=config.guidance,
        classes=classes,
        channels=description["latent_shape"][0],
        perceptual=perceptual_of(config, description, device),
    ).to(accelerator.device)
    optimizer = build_optimizer(objective, config.training)
    prepared, optimizer = prepare(accelerator, objective, network, optimizer)
    averages = build_averages(network, config.ema)
    return Session(config, data, accelerator, prepared, objective, optimizer, averages)


def _plain(config: TrainConfig) -> TrainConfig:
    """The same run with r = t for every sample: no derivative is taken."""
    return config.model_copy(update={"times": config.times.model_copy(update={"data_proportion": 1.0})})


def _times(session: Session, config: TrainConfig, description: str, progress: Progress | None) -> list[float]:
    """Seconds of a few updates each, after some that are not counted.

    At least 3 and at most 20, and no more than fit into ten seconds.
    """
    # A short run has fewer updates than are timed here, and its feed ends with it.
    longer = config.model_copy(
        update={"training": config.training.model_copy(update={"updates": WARM_UP + MOST, "epochs": None})}
    )
    batches, seconds = session.feed(longer), list[float]()
    for _ in range(WARM_UP):
        session.update(batches)
    while len(seconds) < FEWEST or (len(seconds) < MOST and sum(seconds) < LONG_ENOUGH_S):
        seconds.append(session.timed(lambda: session.update(batches)))
        if progress is not None:
            progress(description, len(seconds), MOST)
    if progress is not None and len(seconds) < MOST:
        progress(description, MOST, MOST)
    return seconds


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    hours = seconds / 3600
    return f"{seconds / 60:.0f} min" if hours < 2 else f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.1f} days"
