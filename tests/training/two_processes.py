"""What each of two processes does for `test_processes`: two_processes.py OUT, with RANK and WORLD_SIZE set."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from neuromf.config import TrainConfig
from neuromf.errors import Interrupted
from neuromf.models.networks import build_network
from neuromf.training.feed import Clock, Feed
from neuromf.training.loop import train
from neuromf.training.objective import Objective
from neuromf.training.optim import build_optimizer
from neuromf.training.processes import make_accelerator, prepare

SHAPE, UPDATES, STOP = (2, 8, 8, 8), 8, 5
EVERYTHING = 4
"""Samples of an update, over all processes and micro-batches."""


class Latents(Dataset[Tensor]):
    """Smooth latents, the same in every process."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.items = torch.nn.functional.avg_pool3d(torch.randn(count, *SHAPE, generator=generator), 3, 1, 1)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Tensor:
        return self.items[index]


class Listener:
    """Hears nothing; sends its own process a signal after a given update."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop, self.messages, self.raw = stop, [], []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def step(self, record: dict) -> None:
        self.raw.append(record["raw_loss"])
        if record["update"] == self.stop:
            os.kill(os.getpid(), signal.SIGUSR1)

    def samples(self, epoch: int, samples: dict) -> None: ...

    def epoch(self, summaries: list) -> None: ...


def settings(batch: int, accumulation: int = 1) -> TrainConfig:
    """A small U-Net with everything that several processes could trip over: two heads, and learned weights."""
    return TrainConfig(
        _environment=False,
        network={
            "channels": (8, 16), "attention_levels": (False, True), "head_channels": 8, "norm_groups": 8,
            "res_blocks": 1, "v_head_blocks": 1,
        },
        objective={"tangent": "v-head", "channel_weights": "learned"},
        times={"data_proportion": 0.75},
        training={"updates": UPDATES, "batch_size": batch, "accumulation": accumulation, "warmup_steps": 0, "lr": 1e-3},
        ema={"decays": (0.5,), "select": 0.5},
        intervals={"validation": 1, "samples": 1, "sample_count": 2, "diagnostics": 1, "checkpoint_updates": 4},
    )  # fmt: skip


def learn(config: TrainConfig, folder: Path, stop: int | None = None) -> Listener:
    """A training from fixed weights."""
    torch.manual_seed(0)
    network, listener = build_network(config.network.model_dump(), SHAPE), Listener(stop)
    accelerator = make_accelerator("cpu", "fp32")
    train(config, folder, network, Latents(9), Latents(3), listener, accelerator=accelerator)
    return listener


def gradients(config: TrainConfig) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of the first update, through whatever Accelerate makes of the objective."""
    torch.manual_seed(0)
    objective = Objective(build_network(config.network.model_dump(), SHAPE), config.objective, channels=SHAPE[0])
    accelerator = make_accelerator("cpu", "fp32")
    world, rank = accelerator.num_processes, accelerator.process_index
    optimizer = build_optimizer(objective, config.training)
    module, _ = prepare(accelerator, objective, objective.network, optimizer)
    batch = config.training.batch_size * world
    x, draws, progress = next(Feed(Latents(9), Clock(9, batch, config), torch.device("cpu"), rank, world).batches(0))
    loss = module(x, *draws, progress=progress)
    accelerator.backward(loss.value)
    mean = accelerator.reduce(loss.value.detach(), reduction="mean")
    grads = {}
    for name, p in objective.named_parameters():
        grads[name] = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
    return float(mean), grads


def stopped(folder: Path, config: TrainConfig, stop: int | None) -> str:
    """How a run ends in which this process is told to stop after an update."""
    try:
        learn(config, folder, stop)
    except Interrupted as error:
        return error.message
    return "finished"


def main(out: Path) -> None:
    """Everything in one start: importing torch is what costs."""
    rank, config = int(os.environ["RANK"]), settings(EVERYTHING // 2)
    found: dict = {}
    found["loss"], grads = gradients(config)
    torch.save(grads, out / f"gradients_{rank}.pt")
    found["raw"] = learn(config, out / "two").raw
    found["stopped"] = stopped(out / "stopped", config, STOP if rank == 1 else None)
    found["folder"] = sorted(path.name for path in (out / "stopped/checkpoints").glob("step_*"))
    if rank == 0:
        shutil.copytree(out / "stopped", out / "resumed-as-one")
    make_accelerator("cpu", "fp32").wait_for_everyone()
    found["messages"] = learn(config, out / "stopped").messages
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    found["fsdp_loss"], grads = gradients(config)
    torch.save(grads, out / f"fsdp_gradients_{rank}.pt")
    found["fsdp_stopped"] = stopped(out / "fsdp", config, STOP if rank == 0 else None)
    if rank == 0:
        shutil.copytree(out / "fsdp", out / "fsdp-resumed-as-one")
    make_accelerator("cpu", "fp32").wait_for_everyone()
    found["fsdp_raw"] = learn(config, out / "fsdp").raw
    (out / f"found_{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
