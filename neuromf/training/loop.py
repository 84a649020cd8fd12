"""The training loop: build, resume, then update after update until done.

The same function trains every objective and size; what differs comes in by configuration. Anything it shows (live
line, pictures) is a callback of the `Listener` it is handed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from neuromf.config import TrainConfig
from neuromf.devices import torch_device
from neuromf.errors import GuardError, Interrupted
from neuromf.files import write_json
from neuromf.losses.path import average_velocity
from neuromf.sampling.noise import noise_batch
from neuromf.sampling.solvers import jump, time_grid
from neuromf.training import checkpoint
from neuromf.training.draws import Draws, draw_noise, draw_times, numbered_order
from neuromf.training.ema import WeightAverage, averaged_weights
from neuromf.training.guards import Guards
from neuromf.training.interrupts import StopRequest
from neuromf.training.objective import Objective
from neuromf.training.optim import build_optimizer, learning_rate
from neuromf.training.telemetry import Epoch, Summaries, TensorBoard

MINIMUM_EPOCH = 10
VALIDATION_SAMPLES = 64


class Listener(Protocol):
    """What wants to hear about a run while it goes."""

    def message(self, text: str) -> None:
        """A sentence for the user."""

    def step(self, record: dict[str, Any]) -> None:
        """One update: update, updates, epoch, raw_loss, loss, lr, images_per_s, eta_s."""

    def samples(self, epoch: int, latents: Tensor) -> None:
        """Whitened one-step samples (B, C, I, J, K) from fixed noise."""

    def epoch(self, summaries: list[dict[str, Any]]) -> None:
        """An epoch ended; all summaries so far."""


class TrainResult(NamedTuple):
    """How a run ended."""

    updates: int
    epochs: int
    raw_loss: float | None
    val_raw_loss: float | None
    seconds: float


@dataclass
class Clock:
    """Lengths of a run in updates."""

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


@dataclass
class Run:
    """The parts of a run in progress."""

    config: TrainConfig
    folder: Path
    accelerator: Accelerator
    objective: nn.Module
    bare: Objective  # without Accelerate's wrapping; `unwrap_model` would strip the autocast for good
    optimizer: torch.optim.Optimizer
    averages: dict[str, WeightAverage]
    guards: Guards
    clock: Clock
    listener: Listener
    shape: tuple[int, ...]
    update: int = 0
    epoch: Epoch = field(default_factory=Epoch)

    @property
    def selected(self) -> WeightAverage:
        """The average that validation and samples use."""
        return self.averages[f"{self.config.ema.select:g}"]


def make_accelerator(device: str, precision: str) -> Accelerator:
    """Accelerate for `auto`, `cpu`, `cuda` or `mps`; `auto` precision is bf16 on CUDA, float32 elsewhere.

    Raises:
        UserError: the device is not there.
    """
    where = torch_device(device)
    half = precision == "bf16" or (precision == "auto" and where.type == "cuda")
    AcceleratorState._reset_state()  # a second run in one process may use another precision
    return Accelerator(mixed_precision="bf16" if half else "no", cpu=where.type == "cpu")


def train(
    config: TrainConfig,
    folder: Path,
    network: nn.Module,
    training_set: Dataset[Tensor],
    validation_set: Dataset[Tensor],
    listener: Listener,
    *,
    device: str = "auto",
    channel_weights: Tensor | None = None,
) -> TrainResult:
    """Train `network` on whitened latents, or go on where the run folder's newest checkpoint stands.

    Args:
        config: resolved settings.
        folder: the run folder.
        network: maps (z, r, t) to (B, C, I, J, K).
        training_set, validation_set: items (C, I, J, K), whitened.
        listener: callbacks.
        device: auto, cpu, cuda or mps.
        channel_weights: (C,) or None.

    Raises:
        GuardError: divergence or too many non-finite updates; the last checkpoint is kept.
        Interrupted: a signal; the state was saved.
    """
    run = _build(config, folder, network, training_set, listener, device, channel_weights)
    _resume(run)
    started, first = time.perf_counter(), run.update
    summaries = Summaries(folder, run.update)
    board = TensorBoard(folder, run.update) if run.accelerator.is_main_process else None
    batches = _batches(run, training_set)
    with StopRequest() as stop:
        while run.update < run.clock.updates:
            began = time.perf_counter()
            record, norm = _update(run, batches)
            clipped = config.training.clip is not None and norm > config.training.clip
            run.epoch.add(record, norm, clipped, time.perf_counter() - began)
            _observe(run, record, started, first)
            if run.update % run.clock.epoch_updates == 0 or run.update == run.clock.updates:
                _end_epoch(run, summaries, board, validation_set)
            due = run.update % config.intervals.checkpoint_updates == 0 or run.update == run.clock.updates
            if due or stop.signal:
                _save(run)
            if stop.signal and run.update < run.clock.updates:
                raise Interrupted(
                    f"{stop.signal} after update {run.update:,} of {run.clock.updates:,}; the run is saved",
                    "run the same command again to continue",
                )
    if board:
        board.close()
    last = summaries.epochs[-1] if summaries.epochs else {}
    validated = [e["val_raw_loss"] for e in summaries.epochs if e.get("val_raw_loss") is not None]
    return TrainResult(
        run.update,
        len(summaries.epochs),
        last.get("raw_loss_mean"),
        validated[-1] if validated else None,
        time.perf_counter() - started,
    )


def _build(
    config: TrainConfig,
    folder: Path,
    network: nn.Module,
    training_set: Dataset[Tensor],
    listener: Listener,
    device: str,
    channel_weights: Tensor | None,
) -> Run:
    accelerator = make_accelerator(device, config.training.precision)
    samples = len(training_set)  # type: ignore[arg-type]
    batch = config.training.batch_size * config.training.accumulation * accelerator.num_processes
    clock = Clock(samples, batch, config)
    objective = Objective(network.to(accelerator.device), config.objective, channel_weights)
    averages = {f"{decay:g}": WeightAverage(network, decay) for decay in config.ema.decays}
    prepared, optimizer = accelerator.prepare(objective, build_optimizer(objective, config.training))
    return Run(
        config=config,
        folder=folder,
        accelerator=accelerator,
        objective=prepared,
        bare=objective,
        optimizer=optimizer,
        averages=averages,
        guards=Guards(config.guards),
        clock=clock,
        listener=listener,
        shape=tuple(training_set[0].shape),
    )


def _resume(run: Run) -> None:
    newest, damaged = checkpoint.newest(run.folder)
    for folder in damaged:
        run.listener.message(f"warning: {folder.name} is damaged and is passed over")
    if newest is None:
        return
    saved = checkpoint.load(newest)
    run.bare.network.load_state_dict(saved.model)
    for decay, average in run.averages.items():
        average.load(saved.averages[decay])
    run.optimizer.load_state_dict(saved.state["optimizer"])
    run.guards.restore(saved.state["guards"])
    run.epoch.restore(saved.state["epoch"])
    run.update = saved.update
    run.listener.message(f"resumed after update {run.update:,} of {run.clock.updates:,}")


def _save(run: Run) -> None:
    if not run.accelerator.is_main_process:
        return
    checkpoint.save(
        run.folder,
        checkpoint.Checkpoint(
            update=run.update,
            model=run.bare.network.state_dict(),
            averages={decay: average.weights for decay, average in run.averages.items()},
            state={
                "optimizer": run.optimizer.state_dict(),
                "guards": run.guards.state(),
                "epoch": run.epoch.state(),
            },
        ),
        keep=run.config.intervals.keep_checkpoints,
    )


def _batches(run: Run, dataset: Dataset[Tensor]) -> Iterator[tuple[list[int], Tensor]]:
    """(running sample numbers, whitened latents) of this process's micro-batches, from the present update on."""
    size, world = run.config.training.batch_size, run.accelerator.num_processes
    start = run.update * run.clock.batch
    rank = run.accelerator.process_index
    order = numbered_order(run.config.training.seed, run.clock.samples, start)
    plan: list[list[int]] = []  # numbers of the micro-batches the loader has been asked for, oldest first

    def indices() -> Iterator[list[int]]:
        for _ in range((run.clock.updates - run.update) * run.config.training.accumulation):
            pairs = [next(order) for _ in range(size * world)][rank * size : (rank + 1) * size]
            plan.append([number for number, _ in pairs])
            yield [index for _, index in pairs]

    loader = DataLoader(dataset, batch_sampler=indices(), num_workers=run.config.training.workers)
    for x in loader:
        yield plan.pop(0), x.to(run.accelerator.device, non_blocking=True)


def _draws(run: Run, numbers: list[int]) -> Draws:
    """The draws of this process's samples of one global micro-batch."""
    seed, world = run.config.training.seed, run.accelerator.num_processes
    size, device = len(numbers), run.accelerator.device
    rank = run.accelerator.process_index
    r, t = draw_times(seed, "train", numbers[0] // (size * world), size * world, run.config.times, run.config.objective)
    mine = slice(rank * size, (rank + 1) * size)
    eps = draw_noise(seed, "train", numbers, run.shape, device)
    return Draws(eps, r[mine].to(device), t[mine].to(device))


def _update(run: Run, batches: Iterator[tuple[list[int], Tensor]]) -> tuple[dict[str, Tensor], float]:
    """One optimiser update over `accumulation` micro-batches; returns the record and the gradient norm."""
    training = run.config.training
    lr = learning_rate(run.update, run.clock.updates, training)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.objective.train()
    run.optimizer.zero_grad(set_to_none=True)
    records: list[dict[str, Tensor]] = []
    for micro in range(training.accumulation):
        numbers, x = next(batches)
        last = micro == training.accumulation - 1
        with _synchronising(run, last):
            loss = run.objective(x, *_draws(run, numbers))
            run.accelerator.backward(loss.value / training.accumulation)
        records.append(loss.record)
    clip = training.clip if training.clip is not None else math.inf
    norm = float(run.accelerator.clip_grad_norm_(run.objective.parameters(), clip))
    run.update += 1
    record = {name: torch.cat([r[name] for r in records]) for name in records[0]}
    if math.isfinite(norm) and bool(torch.isfinite(record["raw"]).all()):
        run.optimizer.step()
        for average in run.averages.values():
            average.update(run.bare.network)
    else:
        run.listener.message("warning: " + run.guards.skip_nonfinite(run.update))
    return record, norm


def _synchronising(run: Run, last: bool) -> Any:
    """Gradients are exchanged between processes on the last micro-batch only."""
    return nullcontext() if last else run.accelerator.no_sync(run.objective)


def _observe(run: Run, record: dict[str, Tensor], started: float, first: int) -> None:
    moving = record["moving"].bool()
    fm, mf = record["raw"][~moving], record["raw"][moving]
    try:
        warning = run.guards.observe(float(fm.mean()) if len(fm) else None, float(mf.mean()) if len(mf) else None)
    except GuardError:
        _save_failure(run)
        raise
    if warning:
        run.listener.message(f"warning: {warning}")
    seconds, done = time.perf_counter() - started, run.update - first
    run.listener.step(
        {
            "update": run.update,
            "updates": run.clock.updates,
            "epoch": (run.update - 1) // run.clock.epoch_updates + 1,
            "raw_loss": float(record["raw"].mean()),
            "loss": float(record["weighted"].mean()),
            "lr": run.optimizer.param_groups[0]["lr"],
            "images_per_s": done * run.clock.batch / max(seconds, 1e-9),
            "eta_s": seconds / done * (run.clock.updates - run.update),
        }
    )


def _save_failure(run: Run) -> None:
    """Keep the epoch's figures of a run that a guard ends; its weights are not worth a checkpoint."""
    if run.accelerator.is_main_process and run.epoch.records:
        write_json(run.folder / "diagnostics/halted.json", {"global_step": run.update, **run.epoch.summary()})


def _end_epoch(run: Run, summaries: Summaries, board: TensorBoard | None, validation_set: Dataset[Tensor]) -> None:
    number, final = math.ceil(run.update / run.clock.epoch_updates), run.update == run.clock.updates
    summary: dict[str, Any] = {"epoch": number, "global_step": run.update, **run.epoch.summary()}
    summary["learning_rate"] = run.optimizer.param_groups[0]["lr"]
    summary["val_loss"] = summary["val_raw_loss"] = None
    if number % run.config.intervals.validation == 0 or final:
        summary.update(_validate(run, validation_set))
    if run.accelerator.is_main_process:
        summaries.add(summary)
        if board:
            board.write(summary)
        run.listener.epoch(summaries.epochs)
        if number % run.config.intervals.samples == 0 or final:
            run.listener.samples(number, _fixed_samples(run))
    run.epoch = Epoch()


@torch.no_grad()
def _validate(run: Run, dataset: Dataset[Tensor]) -> dict[str, float | None]:
    """Raw and weighted loss of the selected average at fixed (t, r, eps), over at most 64 validation latents."""
    count = min(len(dataset), VALIDATION_SAMPLES)  # type: ignore[arg-type]
    if count == 0:
        return {"val_loss": None, "val_raw_loss": None}
    objective, seed = run.bare.eval(), run.config.training.seed
    r, t = draw_times(seed, "validation", 0, count, run.config.times, run.config.objective)
    raw, weighted = [], []
    with averaged_weights(objective.network, run.selected):
        for at in torch.arange(count).split(run.config.training.batch_size):
            x = torch.stack([dataset[int(i)] for i in at]).to(run.accelerator.device)
            eps = draw_noise(seed, "validation", at.tolist(), run.shape, x.device)
            loss = objective(x, eps, r[at].to(x.device), t[at].to(x.device))
            raw.append(loss.record["raw"])
            weighted.append(loss.record["weighted"])
    return {"val_loss": float(torch.cat(weighted).mean()), "val_raw_loss": float(torch.cat(raw).mean())}


@torch.no_grad()
def _fixed_samples(run: Run) -> Tensor:
    """One-evaluation samples of the selected average from the run's fixed noise, whitened (B, C, I, J, K)."""
    objective, config = run.bare.eval(), run.config.objective
    noise = noise_batch(run.config.training.seed, range(run.config.intervals.sample_count), run.shape)
    with averaged_weights(objective.network, run.selected):
        data = objective.network if config.prediction == "x" else None
        return jump(
            lambda z, r, t: average_velocity(objective.network(z, r, t), z, t, config.prediction, config.t_min),
            noise.to(run.accelerator.device),
            time_grid(1),
            data,
        ).cpu()
