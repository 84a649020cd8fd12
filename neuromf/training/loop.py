"""The training loop: build, resume, then update after update until done.

The same function trains every objective and size; what differs comes in by configuration. Anything it shows (live
line, pictures) is a callback of the `Listener` it is handed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.data import Dataset

from neuromf.config import TrainConfig
from neuromf.devices import torch_device
from neuromf.errors import GuardError, Interrupted
from neuromf.files import write_json
from neuromf.training import checkpoint
from neuromf.training.diagnostics import StepProbe, describe_samples, expected_sampling, relative_distance
from neuromf.training.ema import WeightAverage, build_averages
from neuromf.training.feed import Batch, Clock, Feed
from neuromf.training.guards import Guards
from neuromf.training.interrupts import StopRequest
from neuromf.training.objective import Objective, Perceptual
from neuromf.training.optim import build_optimizer, learning_rate
from neuromf.training.telemetry import Epoch, Summaries, TensorBoard
from neuromf.training.validation import channel_raw_losses, fixed_samples, validate


class Listener(Protocol):
    """What wants to hear about a run while it goes."""

    def message(self, text: str) -> None:
        """A sentence for the user."""

    def step(self, record: dict[str, Any]) -> None:
        """One update: update, updates, epoch, raw_loss, loss, lr, images_per_s, eta_s."""

    def samples(self, epoch: int, samples: Mapping[int, Tensor]) -> None:
        """Whitened samples (B, C, I, J, K) from fixed noise, by their number of evaluations."""

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
    feed: Feed
    update: int = 0
    epoch: Epoch = field(default_factory=Epoch)

    @property
    def selected(self) -> WeightAverage:
        """The average that validation and samples use."""
        return self.averages[self.config.ema.selected]

    def closes_epoch(self, update: int) -> bool:
        """Whether an epoch ends with this update (the first is 1)."""
        return update % self.clock.epoch_updates == 0 or update == self.clock.updates

    def saves(self, update: int) -> bool:
        """Whether a checkpoint is due after this update."""
        every = (self.config.intervals.checkpoint_updates, self.config.intervals.keep_every)
        return update == self.clock.updates or any(n and update % n == 0 for n in every)


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
    classes: int = 0,
    perceptual: Perceptual | None = None,
) -> TrainResult:
    """Train `network` on whitened latents, or go on where the run folder's newest checkpoint stands.

    Args:
        config: resolved settings.
        folder: the run folder.
        network: maps (z, r, t) and, where there are any, a condition to (B, C, I, J, K).
        training_set, validation_set: see `feed.LatentItems`.
        listener: callbacks.
        device: auto, cpu, cuda or mps.
        channel_weights: (C,) or None.
        classes: K, where the network takes classes.
        perceptual: distance of decoded crops, where the objective gives it a weight.

    Raises:
        GuardError: divergence or too many non-finite updates; the last checkpoint is kept.
        Interrupted: a signal; the state was saved.
    """
    objective = Objective(
        network,
        config.objective,
        channel_weights,
        guidance=config.guidance,
        classes=classes,
        channels=training_set[0].shape[0],
        perceptual=perceptual,
    )
    run = _build(config, folder, objective, training_set, listener, device)
    _resume(run)
    started, first = time.perf_counter(), run.update
    summaries = Summaries(folder, run.update)
    board = TensorBoard(folder, run.update) if run.accelerator.is_main_process else None
    batches = run.feed.batches(run.update)
    with StopRequest() as stop:
        while run.update < run.clock.updates:
            began = time.perf_counter()
            record, norm = _update(run, batches)
            clipped = config.training.clip is not None and norm > config.training.clip
            run.epoch.add(record, norm, clipped, time.perf_counter() - began)
            _observe(run, record, started, first)
            if run.closes_epoch(run.update):
                _end_epoch(run, summaries, board, validation_set)
            if run.saves(run.update) or stop.signal:
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
    seconds, validation = time.perf_counter() - started, validated[-1] if validated else None
    return TrainResult(run.update, len(summaries.epochs), last.get("raw_loss_mean"), validation, seconds)


def _build(
    config: TrainConfig,
    folder: Path,
    objective: Objective,
    training_set: Dataset[Tensor],
    listener: Listener,
    device: str,
) -> Run:
    accelerator = make_accelerator(device, config.training.precision)
    samples = len(training_set)  # type: ignore[arg-type]
    batch = config.training.batch_size * config.training.accumulation * accelerator.num_processes
    clock = Clock(samples, batch, config)
    objective.to(accelerator.device)
    averages = build_averages(objective.network, config.ema)
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
        feed=Feed(training_set, clock, accelerator.device, accelerator.process_index, accelerator.num_processes),
    )


def _resume(run: Run) -> None:
    newest, damaged = checkpoint.newest(run.folder)
    for folder in damaged:
        run.listener.message(f"warning: {folder.name} is damaged and is passed over")
    if newest is None:
        return
    saved = checkpoint.load(newest)
    run.bare.network.load_state_dict(saved.model)
    run.bare.load_state_dict(saved.state.get("objective", {}), strict=False)
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
                "objective": run.bare.own_state(),
                "guards": run.guards.state(),
                "epoch": run.epoch.state(),
            },
        ),
        keep=run.config.intervals.keep_checkpoints,
        keep_every=run.config.intervals.keep_every,
    )


def _update(run: Run, batches: Iterator[Batch]) -> tuple[dict[str, Tensor], float]:
    """One optimiser update over `accumulation` micro-batches; returns the record and the gradient norm."""
    training = run.config.training
    lr = learning_rate(run.update, run.clock.updates, training)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.objective.train()
    run.optimizer.zero_grad(set_to_none=True)
    records: list[dict[str, Tensor]] = []
    for micro in range(training.accumulation):
        x, draws, progress = next(batches)
        last = micro == training.accumulation - 1
        with _synchronising(run, last):
            loss = run.objective(x, *draws, progress=progress)
            run.accelerator.backward(loss.value / training.accumulation)
        records.append(loss.record)
    clip = training.clip if training.clip is not None else math.inf
    probe = StepProbe(run.bare.network) if run.closes_epoch(run.update + 1) else None
    norm = float(run.accelerator.clip_grad_norm_(run.objective.parameters(), clip))
    run.update += 1
    record = {name: torch.cat([r[name] for r in records]) for name in records[0]}
    if math.isfinite(norm) and bool(torch.isfinite(record["raw"]).all()):
        run.optimizer.step()
    else:
        run.listener.message("warning: " + run.guards.skip_nonfinite(run.update))
    if probe is not None:
        run.epoch.close(probe.figures())
    for average in run.averages.values():  # after a skipped update too, or an average would lose a whole period
        average.update(run.bare.network, run.update, run.clock.batch)
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
        write_json(run.folder / "diagnostics/halted.json", _figures(run))


def _figures(run: Run) -> dict[str, Any]:
    """The epoch's figures that cost next to nothing."""
    config, epoch = run.config, math.ceil(run.update / run.clock.epoch_updates)
    figures: dict[str, Any] = {"epoch": epoch, "global_step": run.update, **run.epoch.summary()}
    progress = (run.update - len(run.epoch.records) / 2) / run.clock.updates  # the middle of the epoch
    figures["sampling"]["expected"] = expected_sampling(config.times, config.objective, progress)
    figures["ema_divergence"] = relative_distance(run.selected.weights.values(), run.bare.network.parameters())
    figures["learning_rate"] = run.optimizer.param_groups[0]["lr"]
    figures["guards"] = {"warned": run.guards.warned, "skipped_updates": run.guards.nonfinite}
    return figures


def _end_epoch(run: Run, summaries: Summaries, board: TensorBoard | None, validation_set: Dataset[Tensor]) -> None:
    config, device, summary = run.config, run.accelerator.device, _figures(run)
    number, last = summary["epoch"], run.update == run.clock.updates
    summary |= {"val_loss": None, "val_raw_loss": None, "per_channel_loss": None}
    if last or number % config.intervals.validation == 0:
        summary |= validate(run.bare, run.selected, validation_set, config, device)
    if last or number % config.intervals.diagnostics == 0:
        summary["per_channel_loss"] = channel_raw_losses(run.bare, validation_set, config, device)
    if run.accelerator.is_main_process:
        due = last or number % config.intervals.samples == 0
        samples = fixed_samples(run.bare, run.selected, config, run.feed.shape, device) if due else None
        summary["generated_samples"] = describe_samples(samples) if samples else None
        checkpoint.keep_best(run.folder, run.update, config.ema.selected, summary["val_raw_loss"], run.selected.weights)
        summaries.add(summary)
        if board:
            board.write(summary)
        run.listener.epoch(summaries.epochs)
        if samples:
            run.listener.samples(number, samples)
    run.epoch = Epoch()
