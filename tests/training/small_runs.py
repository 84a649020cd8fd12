"""Runs of a second: a tiny network on latents near one pattern, and a listener that can interrupt them."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from neuromf.config import TrainConfig
from neuromf.files import read_json
from neuromf.training import checkpoint
from neuromf.training.loop import train
from neuromf.training.processes import make_accelerator
from neuromf.training.telemetry import SUMMARY

UPDATES = 12
SHAPE = (2, 4, 4, 4)
ONCE = {"training": {"updates": UPDATES, "batch_size": 4, "lr": 1e-2, "warmup_steps": 2}}


class Small(nn.Module):
    """Two convolutions that know the times."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inside, self.outside = nn.Conv3d(2, 6, 3, padding=1), nn.Conv3d(6, 2, 3, padding=1)
        self.times = nn.Linear(2, 6)
        self.autocast: list[bool] = []

    def forward(self, z, r, t):
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        times = self.times(torch.stack([r, t], dim=1).to(z.dtype))
        return self.outside(torch.tanh(self.inside(z) + times.reshape(*times.shape, 1, 1, 1)))


class Latents(Dataset):
    """`count` latents near one pattern; the broken ones are NaN."""

    def __init__(self, count: int, broken: tuple[int, ...] = ()) -> None:
        generator = torch.Generator().manual_seed(1)
        pattern = torch.randn(SHAPE, generator=generator)
        self.items = [pattern + 0.1 * torch.randn(SHAPE, generator=generator) for _ in range(count)]
        for index in broken:
            self.items[index] = torch.full(SHAPE, math.nan)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.items[index]


class Ears:
    """A listener that remembers, and does something after a given update."""

    def __init__(self, after: int | None = None, action: Callable[[], None] | None = None) -> None:
        self.after, self.action = after, action
        self.messages: list[str] = []
        self.steps: list[dict] = []
        self.drawn: list[tuple[int, dict[int, torch.Tensor]]] = []
        self.epochs: list[dict] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def step(self, record: dict) -> None:
        self.steps.append(record)
        if record["update"] == self.after and self.action:
            self.action()

    def samples(self, epoch: int, samples: dict[int, torch.Tensor]) -> None:
        self.drawn.append((epoch, samples))

    def epoch(self, summaries: list[dict]) -> None:
        self.epochs = list(summaries)


def settings(**sections) -> TrainConfig:
    base = {
        **ONCE,
        "times": {"data_proportion": 0.5},
        "ema": {"decays": (0.5, 0.9), "select": 0.9},
        "intervals": {"validation": 1, "samples": 1, "sample_count": 3, "checkpoint_updates": 5, "keep_checkpoints": 2},
    }
    merged = {name: {**base.get(name, {}), **sections.get(name, {})} for name in base.keys() | sections.keys()}
    return TrainConfig(_environment=False, **merged)


def learn(config: TrainConfig, *rest, **options) -> None:
    train(config, *rest, accelerator=make_accelerator("cpu", config.training.precision), **options)


def run(folder: Path, config: TrainConfig, ears: Ears | None = None, broken: tuple[int, ...] = ()) -> Ears:
    ears = ears or Ears()
    learn(config, folder, Small(), Latents(6, broken), Latents(3), ears)
    return ears


def last(folder: Path) -> checkpoint.Checkpoint:
    newest, damaged = checkpoint.newest(folder)
    assert newest is not None
    assert not damaged
    return checkpoint.load(newest)


def same(a: object, b: object) -> bool:
    """Bit for bit equality of nested containers of tensors."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def untimed(folder: Path) -> list[dict]:
    return [{k: v for k, v in e.items() if k != "epoch_time_sec"} for e in read_json(folder / SUMMARY)]


class CrashError(Exception):
    pass


def crash() -> None:
    raise CrashError


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
