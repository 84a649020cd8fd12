"""The training loop: build, resume, then update after update until done.

The same function trains every objective and size; what differs comes in by configuration. Anything it shows (live
line, pictures) is a callback of the `Listener` it is handed.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset

from neuromf.config import TrainConfig
from neuromf.errors import GuardError, Interrupted, UserError
from neuromf.files import write_json
from neuromf.models.blocks import recompute_blocks
from neuromf.sampling.noise import keyed_seed
from neuromf.training import checkpoint
from neuromf.training.diagnostics import StepProbe, describe_samples, expected_sampling, relative_distance, step_figures
from neuromf.training.ema import WeightAverage, build_averages
from neuromf.training.feed import Batch, Clock, Feed
from neuromf.training.guards import Guards
from neuromf.training.interrupts import StopRequest
from neuromf.training.objective import Objective, Perceptual
from neuromf.training.optim import build_optimizer, learning_rate
from neuromf.training.processes import Heard, exchange, peak_memory, prepare, shared_out
from neuromf.training.sharding import load_optimizer, load_weights, whole, whole_tree
from neuromf.training.telemetry import Epoch, Summaries
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


def train(
    config: TrainConfig,
    folder: Path,
    network: nn.Module,
    training_set: Dataset[Tensor],
    validation_set: Dataset[Tensor],
    listener: Listener,
    *,
    accelerator: Accelerator,
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
        listener: callbacks; of the main process alone.
        accelerator: see `processes.make_accelerator`.
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
    if config.training.recompute and not recompute_blocks(network):
        raise UserError(f"{type(network).__name__} has no blocks to recompute", "set training.recompute=false")
    saved = _saved(folder, listener)
    config = shared_out(config, saved.batch if saved else None, accelerator.num_processes)
    run = _build(config, folder, accelerator, objective, training_set, listener)
    if saved is not None:
        _resume(run, saved)
        if accelerator.is_main_process:  # a kill may have come between the last checkpoint and this
            checkpoint.rotate(
                checkpoint.folder_of(folder, saved.update),
                config.intervals.keep_checkpoints,
                config.intervals.keep_every,
            )
    started, first = time.perf_counter(), run.update
    summaries = Summaries(folder, run.update)
    batches = run.feed.batches(run.update)
    with StopRequest(patient=accelerator.num_processes > 1) as stop:
        while run.update < run.clock.updates:
            began = time.perf_counter()
            with _halting(run):
                heard, norm = _update(run, batches, stop.number)
                clipped = config.training.clip is not None and norm > config.training.clip
                run.epoch.add(heard.record, norm, clipped, time.perf_counter() - began)
                _observe(run, heard.record, norm, started, first)
            if run.closes_epoch(run.update):
                _end_epoch(run, summaries, validation_set)
            # Alone there is nobody to agree with: a signal counts at once.
            asked = heard.signal or (stop.number if accelerator.num_processes == 1 else 0)
            if run.saves(run.update) or asked:
                _save(run)
            if asked and run.update < run.clock.updates:
                raise Interrupted(
                    f"{signal.Signals(asked).name} after update {run.update:,} of {run.clock.updates:,}; "
                    "the run is saved",
                    "run the same command again to continue",
                )
    last = summaries.epochs[-1] if summaries.epochs else {}
    validated = [e["val_raw_loss"] for e in summaries.epochs if e.get("val_raw_loss") is not None]
    seconds, validation = time.perf_counter() - started, validated[-1] if validated else None
    return TrainResult(run.update, len(summaries.epochs), last.get("raw_loss_mean"), validation, seconds)


def _saved(folder: Path, listener: Listener) -> checkpoint.Checkpoint | None:
    """The newest whole checkpoint of a run folder."""
    newest, damaged = checkpoint.newest(folder)
    for passed in damaged:
        listener.message(f"warning: {passed.name} is damaged and is passed over")
    return None if newest is None else checkpoint.load(newest)


def _build(
    config: TrainConfig,
    folder: Path,
    accelerator: Accelerator,
    objective: Objective,
    training_set: Dataset[Tensor],
    listener: Listener,
) -> Run:
    samples = len(training_set)  # type: ignore[arg-type]
    clock = Clock(
        samples, config.training.batch_size * config.training.accumulation * accelerator.num_processes, config
    )
    objective.to(accelerator.device)
    prepared, optimizer = prepare(
        accelerator, objective, objective.network, build_optimizer(objective, config.training)
    )
    return Run(
        config=config,
        folder=folder,
        accelerator=accelerator,
        objective=prepared,
        bare=objective,
        optimizer=optimizer,
        averages=build_averages(objective.network, config.ema),
        guards=Guards(config.guards),
        clock=clock,
        listener=listener,
        feed=Feed(training_set, clock, accelerator.device, accelerator.process_index, accelerator.num_processes),
    )


def _resume(run: Run, saved: checkpoint.Checkpoint) -> None:
    load_weights(run.bare.network, saved.model)
    load_weights(run.bare, saved.state.get("objective", {}), strict=False)
    for decay, average in run.averages.items():
        average.load(saved.averages[decay])
    load_optimizer(run.optimizer, saved.state["optimizer"])
    run.guards.restore(saved.state["guards"])
    run.epoch.restore(saved.state["epoch"])
    run.update = saved.update
    run.listener.message(f"resumed after update {run.update:,} of {run.clock.updates:,}")


def _save(run: Run) -> None:
    """Write a checkpoint; the other processes wait, or one that ends would have the launcher end this one."""
    state = whole_tree(
        {
            "model": run.bare.network.state_dict(),
            "averages": {decay: average.weights for decay, average in run.averages.items()},
            "optimizer": run.optimizer.state_dict(),
            "objective": run.bare.own_state(),
        }
    )
    if run.accelerator.is_main_process:
        checkpoint.save(
            run.folder,
            checkpoint.Checkpoint(
                update=run.update,
                batch=run.clock.batch,
                healthy=run.guards.healthy,
                model=state["model"],
                averages=state["averages"],
                state={
                    "optimizer": state["optimizer"],
                    "objective": state["objective"],
                    "guards": run.guards.state(),
                    "epoch": run.epoch.state(),
                },
            ),
            keep=run.config.intervals.keep_checkpoints,
            keep_every=run.config.intervals.keep_every,
        )
    run.accelerator.wait_for_everyone()


def _update(run: Run, batches: Iterator[Batch], signal_number: int) -> tuple[Heard, float]:
    """One update over `accumulation` micro-batches; returns what all processes heard, and the gradient norm."""
    training = run.config.training
    lr = learning_rate(run.update, run.clock.updates, training)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.objective.train()
    run.optimizer.zero_grad(set_to_none=True)
    records: list[dict[str, Tensor]] = []
    for micro in range(training.accumulation):
        x, draws, progress = next(batches)
        # For what a network draws itself; after `next`, for a loader that starts takes a number, too.
        torch.manual_seed(keyed_seed(training.seed, "network", run.update, micro, run.accelerator.process_index))
        last = micro == training.accumulation - 1
        with _synchronising(run, last):
            with run.accelerator.autocast():
                loss = run.objective(x, *draws, progress=progress)
            run.accelerator.backward(loss.value / training.accumulation)
        records.append(loss.record)
    clip = training.clip if training.clip is not None else math.inf
    probe = StepProbe(run.bare.network) if run.closes_epoch(run.update + 1) else None
    norm = float(whole(run.accelerator.clip_grad_norm_(run.objective.parameters(), clip)))
    run.update += 1
    record = {name: torch.cat([r[name] for r in records]) for name in records[0]}
    heard = exchange(run.accelerator, record, signal_number)
    if math.isfinite(norm) and bool(torch.isfinite(heard.record["raw"]).all()):
        run.optimizer.step()
        run.guards.accept()
    else:
        run.listener.message("warning: " + run.guards.skip_nonfinite(run.update))
    if probe is not None:
        run.epoch.close(probe.figures())
    for average in run.averages.values():  # after a skipped update too, or an average would lose a whole period
        average.update(run.bare.network, run.update, run.clock.batch)
    return heard, norm


def _synchronising(run: Run, last: bool) -> Any:
    """Gradients are exchanged between processes on the last micro-batch only."""
    return nullcontext() if last else run.accelerator.no_sync(run.objective)


def _observe(run: Run, record: dict[str, Tensor], norm: float, started: float, first: int) -> None:
    """Show an update to the guards and to the listener."""
    shown = step_figures(record)
    if warning := run.guards.observe(shown["raw_fm"], shown["raw_mf"]):
        run.listener.message(f"warning: {warning}")
    seconds, done = time.perf_counter() - started, run.update - first
    run.listener.step(
        {
            "update": run.update,
            "updates": run.clock.updates,
            "epoch": (run.update - 1) // run.clock.epoch_updates + 1,
            **shown,
            "grad_norm": norm,
            "lr": run.optimizer.param_groups[0]["lr"],
            "images_per_s": done * run.clock.batch / max(seconds, 1e-9),
            "seconds_per_update": seconds / done,
            "eta_s": seconds / done * (run.clock.updates - run.update),
            "memory_bytes": peak_memory(run.accelerator.device),
            "guards": run.guards.figures(),
        }
    )


@contextmanager
def _halting(run: Run) -> Iterator[None]:
    """Where a guard ends the run, keep the epoch's figures, not the weights, and name the last good ones."""
    try:
        yield
    except GuardError as error:
        figures = _figures(run) if run.epoch.records else None
        if figures and run.accelerator.is_main_process:
            write_json(run.folder / "diagnostics/halted.json", figures)
        raise GuardError(f"{error.message}; {checkpoint.last_good(run.folder)}", error.hint) from error


def _figures(run: Run) -> dict[str, Any]:
    """The epoch's figures that cost next to nothing."""
    config, epoch = run.config, math.ceil(run.update / run.clock.epoch_updates)
    figures: dict[str, Any] = {"epoch": epoch, "global_step": run.update, **run.epoch.summary()}
    progress = (run.update - len(run.epoch.records) / 2) / run.clock.updates  # the middle of the epoch
    figures["sampling"]["expected"] = expected_sampling(config.times, config.objective, progress)
    figures["ema_divergence"] = relative_distance(run.selected.weights.values(), run.bare.network.parameters())
    figures["learning_rate"] = run.optimizer.param_groups[0]["lr"]
    figures["guards"] = run.guards.figures()
    return figures


def _end_epoch(run: Run, summaries: Summaries, validation_set: Dataset[Tensor]) -> None:
    config, device, summary = run.config, run.accelerator.device, _figures(run)
    number, last = summary["epoch"], run.update == run.clock.updates
    summary |= {"val_loss": None, "val_raw_loss": None, "per_channel_loss": None}
    if last or number % config.intervals.validation == 0:
        summary |= validate(run.bare, run.selected, validation_set, config, device)
    if last or number % config.intervals.diagnostics == 0:
        summary["per_channel_loss"] = channel_raw_losses(run.bare, validation_set, config, device)
    due = last or number % config.intervals.samples == 0
    samples = fixed_samples(run.bare, run.selected, config, run.feed.shape, device) if due else None
    summary["generated_samples"] = describe_samples(samples) if samples else None
    weights = whole_tree(run.selected.weights) if summary["val_raw_loss"] is not None else {}
    if run.accelerator.is_main_process:
        checkpoint.keep_best(run.folder, run.update, config.ema.selected, summary["val_raw_loss"], weights)
        summaries.add(summary)
        run.listener.epoch(summaries.epochs)
        if samples:
            run.listener.samples(number, samples)
    run.epoch = Epoch()
