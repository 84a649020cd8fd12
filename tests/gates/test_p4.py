"""P4: training on latents made from phantoms (SPEC section 12). The latents are block means, so that nothing but
the loop is on trial; the full forms, with the shipped autoencoder and real scans, are marked slow elsewhere."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import Dataset

from neuromf.config import TrainConfig
from neuromf.data.phantom import phantom
from neuromf.errors import Interrupted
from neuromf.files import read_json
from neuromf.models.unet import MaisiUNet
from neuromf.training import checkpoint
from neuromf.training.loop import train
from neuromf.training.processes import make_accelerator
from neuromf.training.telemetry import SUMMARY

SUBJECTS, HELD_BACK, SIDE, BLOCK = 12, 4, 32, 4
STATISTICS = {"mean": torch.mean, "std": torch.std}


class Recorder:
    """A listener that keeps what it hears, and stops the run after `stop` updates if asked."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop, self.losses, self.samples_seen = stop, [], []

    def message(self, text: str) -> None: ...

    def epoch(self, summaries: list[dict]) -> None: ...

    def step(self, record: dict) -> None:
        self.losses.append(record["raw_loss"])
        if record["update"] == self.stop:
            os.kill(os.getpid(), signal.SIGTERM)

    def samples(self, epoch: int, samples: Mapping[int, torch.Tensor]) -> None:
        self.samples_seen.append(samples[1])


class Items(Dataset):
    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.values[index]


class Trained(NamedTuple):
    folder: Path
    recorder: Recorder
    latents: torch.Tensor


@pytest.fixture(scope="module")
def latents() -> torch.Tensor:
    """(16, 1, 8, 8, 8): block means of phantoms, whitened by the training ones."""
    volumes = [torch.from_numpy(phantom(seed, (SIDE,) * 3, 192 / SIDE).volume) for seed in range(SUBJECTS + HELD_BACK)]
    blocks = F.avg_pool3d(torch.stack(volumes), BLOCK)
    return (blocks - blocks[:SUBJECTS].mean()) / blocks[:SUBJECTS].std()


def settings(epochs: int) -> TrainConfig:
    return TrainConfig(
        _environment=False,
        training={"epochs": epochs, "batch_size": 4, "lr": 5e-3, "warmup_steps": 10},
        times={"data_proportion": 0.5},
        ema={"decays": (0.95,), "select": 0.95},
        intervals={"validation": 1, "samples": 100, "sample_count": 16, "checkpoint_updates": 50},
    )


def run(folder: Path, latents: torch.Tensor, epochs: int, stop: int | None = None) -> Recorder:
    torch.manual_seed(0)
    network = MaisiUNet(
        1, channels=(8, 16), attention_levels=(False, False), head_channels=8, res_blocks=1, norm_groups=4
    )
    recorder, training, held_back = Recorder(stop), Items(latents[:SUBJECTS]), Items(latents[SUBJECTS:])
    accelerator = make_accelerator("cpu", "fp32")
    train(settings(epochs), folder, network, training, held_back, recorder, accelerator=accelerator)
    return recorder


@pytest.fixture(scope="module")
def short(tmp_path_factory, latents) -> Trained:
    """Ten epochs of ten updates: the hundred steps of the gate."""
    folder = tmp_path_factory.mktemp("p4")
    return Trained(folder, run(folder, latents, 10), latents)


def validated(folder: Path) -> list[float]:
    return [e["val_raw_loss"] for e in read_json(folder / SUMMARY)]


@pytest.mark.gate("P4-T1")
def test_a_hundred_steps_run(short):
    assert len(short.recorder.losses) == 100
    assert checkpoint.newest(short.folder)[0].name == "step_00000100"


@pytest.mark.gate("P4-T2")
def test_the_raw_validation_loss_falls(short):
    losses = validated(short.folder)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.gate("P4-T3")
def test_nothing_is_nan(short):
    assert all(math.isfinite(loss) for loss in short.recorder.losses)
    saved = checkpoint.load(checkpoint.newest(short.folder)[0])
    assert all(torch.isfinite(value).all() for value in saved.model.values())
    assert saved.state["guards"]["nonfinite"] == 0


@pytest.mark.gate("P4-T7")
def test_the_statistics_of_generated_latents_are_reported(short, record_property):
    (generated,) = short.recorder.samples_seen
    real = short.latents[:SUBJECTS]
    report = {name: [float(f(values)) for values in (generated, real)] for name, f in STATISTICS.items()}
    record_property("P4-T7 generated, real", json.dumps(report))
    assert torch.isfinite(generated).all()


@pytest.mark.gate("P4-T8")
def test_a_stopped_run_continues_to_the_same_weights(short, tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, short.latents, 10, stop=63)
    resumed = run(tmp_path, short.latents, 10)
    assert resumed.losses == short.recorder.losses[63:]
    ours, theirs = (checkpoint.load(checkpoint.newest(folder)[0]) for folder in (tmp_path, short.folder))
    assert all(torch.equal(ours.model[name], theirs.model[name]) for name in theirs.model)


@pytest.mark.slow
@pytest.mark.gate("P4-T2")
def test_the_raw_validation_loss_falls_over_fifty_epochs(tmp_path, latents):
    run(tmp_path, latents, 50)
    losses = validated(tmp_path)
    assert len(losses) == 50
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert all(math.isfinite(loss) for loss in losses)
