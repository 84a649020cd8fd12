"""P7: joint image and lesion mask (SPEC section 12), on heads of 8^3 cells with a bright lesion.

The base is trained on heads without lesions, the adapters on twenty pairs. T1 (Dice of masks there and back), T2 (what
is injected) and T3 (what trains) are with `pairs` and `adapters`; the measured forms on phantoms and on real scans
are in docs/lora.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from neuromf.config import TrainConfig
from neuromf.files import read_json
from neuromf.metrics.lesions import agreement
from neuromf.models.adapters import Adapters, load_base
from neuromf.models.networks import build_network
from neuromf.pipeline.recorder import Silent
from neuromf.training import checkpoint
from neuromf.training.loop import train
from neuromf.training.processes import make_accelerator
from neuromf.training.telemetry import SUMMARY

HEADS, PAIRS, HELD_BACK, SIDE = 64, 20, 8, 8
BRIGHT = 2.5
"""How much a lesion adds to a head of 1."""
NETWORK = {
    "channels": (16, 32),
    "attention_levels": (False, True),
    "head_channels": 16,
    "res_blocks": 1,
    "norm_groups": 8,
}


class Items(Dataset):
    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> Tensor:
        return self.values[index]


class Problem(NamedTuple):
    """Whitened heads (N, 1, ...) and pairs (M, 2, ...); `low` and `high` are a lesion-free head's range."""

    heads: Tensor
    pairs: Tensor
    mask_scale: tuple[float, float]
    detection: float


def distances(centres: Tensor) -> Tensor:
    """(N, 3) -> distance of each cell from each centre, (N, 8, 8, 8)."""
    axis = torch.arange(SIDE) - (SIDE - 1) / 2
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)
    return torch.linalg.vector_norm(grid - centres[:, None, None, None], dim=-1)


@pytest.fixture(scope="module")
def problem() -> Problem:
    torch.manual_seed(0)
    n = HEADS + PAIRS + HELD_BACK
    radius = 3.2 + 0.3 * torch.randn(n, 1, 1, 1)
    heads = torch.sigmoid((radius - distances(0.3 * torch.randn(n, 3))) / 0.4) + 0.05 * torch.randn(n, 8, 8, 8)
    healthy, own = heads[:HEADS, None], heads[HEADS:, None]
    lesion = 1.1 + 0.5 * torch.rand(len(own), 1, 1, 1)
    masks = torch.sigmoid((lesion - distances(2.4 * (torch.rand(len(own), 3) - 0.5))) / 0.25)[:, None]
    mean, std = healthy.mean(), healthy.std()
    low, spread = masks[:PAIRS].mean(), masks[:PAIRS].std()
    pairs = torch.cat([(own + BRIGHT * masks - mean) / std, (masks - low) / spread], dim=1)
    half = float((1 + BRIGHT / 2 - mean) / std)
    return Problem((healthy - mean) / std, pairs, (float(low), float(spread)), half)


def settings(updates: int, validation: int = 3, batch: int = 16, **objective: Any) -> TrainConfig:
    return TrainConfig(
        _environment=False,
        network=NETWORK,
        objective=objective,
        training={"updates": updates, "batch_size": batch, "lr": 5e-3, "warmup_steps": 10, "weight_decay": 0},
        times={"data_proportion": 0.5, "uniform_share": 1.0, "one_step_share": 0.25},
        ema={"decays": (0.95,), "select": 0.95},
        intervals={"validation": validation, "samples": 1000, "sample_count": 2, "checkpoint_updates": updates},
    )


def learn(folder: Path, network: nn.Module, config: TrainConfig, latents: Tensor, held_back: Tensor) -> None:
    """Train, and put the averaged weights into the network."""
    accelerator = make_accelerator("cpu", "fp32")
    train(config, folder, network, Items(latents), Items(held_back), Silent(), accelerator=accelerator)
    newest, _ = checkpoint.newest(folder)
    assert newest is not None
    network.load_state_dict(checkpoint.load_average(newest, "0.95"))


@pytest.fixture(scope="module")
def base(problem: Problem, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    torch.manual_seed(0)
    config = settings(200)
    network = build_network(config.network.model_dump(), (1, SIDE, SIDE, SIDE))
    learn(tmp_path_factory.mktemp("base"), network, config, problem.heads[:-HELD_BACK], problem.heads[-HELD_BACK:])
    return network


def adapt(
    folder: Path, base: nn.Module, problem: Problem, updates: int, lp: Any = (1.5, 2.0), **often: int
) -> nn.Module:
    torch.manual_seed(1)
    config = settings(updates, **often, lp=lp)
    kinds = ("attention", "blocks")
    shape = (2, SIDE, SIDE, SIDE)
    network = build_network(config.network.model_dump(), shape, adapters=Adapters(1, 8, 16.0, kinds))
    load_base(network, base.state_dict())
    learn(folder, network, config, problem.pairs[:PAIRS], problem.pairs[PAIRS:])
    return network


@pytest.fixture(scope="module")
def adapted(base: nn.Module, problem: Problem, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    folder = tmp_path_factory.mktemp("adapted")
    return folder, adapt(folder, base, problem, 200)


def generated(network: nn.Module, n: int = 64) -> Tensor:
    """Pairs (n, 2, 8, 8, 8) in one evaluation."""
    eps = torch.randn(n, 2, SIDE, SIDE, SIDE, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return network.eval()(eps, torch.zeros(n), torch.ones(n))


def marked(problem: Problem, pairs: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(n, 8, 8, 8) bool twice: what the masks mark, and what is as bright as half a lesion in the images."""
    low, spread = problem.mask_scale
    return (pairs[:, 1] * spread + low > 0.5).numpy(), (pairs[:, 0] > problem.detection).numpy()


def contrasts(problem: Problem, pairs: Tensor) -> list[float]:
    """Mean image inside the mask less that outside, of pairs whose mask marks anything."""
    masks, _ = marked(problem, pairs)
    images = pairs[:, 0].numpy()
    return [float(i[m].mean() - i[~m].mean()) for i, m in zip(images, masks, strict=True) if m.any()]


def dices(problem: Problem, pairs: Tensor) -> Sequence[float]:
    return agreement(*marked(problem, pairs)).tolist()


@pytest.mark.gate("P7-T4")
def test_thirty_updates_of_adapters_lower_the_raw_loss(problem: Problem, tmp_path: Path) -> None:
    """The smoke version: on a base that knows nothing yet, the mask's channel is learned."""
    fresh = build_network(settings(30).network.model_dump(), (1, SIDE, SIDE, SIDE))
    adapt(tmp_path, fresh, problem, 30, validation=1, batch=4)
    validated = [e["val_raw_loss"] for e in read_json(tmp_path / SUMMARY)]
    assert validated[-1] < validated[0]


@pytest.mark.slow
@pytest.mark.gate("P7-T4")
def test_the_raw_loss_falls(adapted: tuple[Path, nn.Module]) -> None:
    validated = [e["val_raw_loss"] for e in read_json(adapted[0] / SUMMARY) if e["val_raw_loss"] is not None]
    assert all(math.isfinite(loss) for loss in validated)
    assert validated[-1] < 0.6 * validated[0]


@pytest.mark.slow
@pytest.mark.gate("P7-T5")
def test_lesions_are_visible_where_the_mask_is(adapted: tuple[Path, nn.Module], problem: Problem) -> None:
    real, made = contrasts(problem, problem.pairs), contrasts(problem, generated(adapted[1]))
    assert len(made) > 32
    assert np.median(made) > 0.5 * np.median(real)


@pytest.mark.slow
@pytest.mark.gate("P7-T6")
def test_the_mask_agrees_with_what_a_detector_finds(
    adapted: tuple[Path, nn.Module], problem: Problem, record_property: Any
) -> None:
    found = {name: np.median(dices(problem, pairs)) for name, pairs in _sets(adapted[1], problem).items()}
    record_property("P7-T6 median Dice", json.dumps(found))
    assert found["real"] > 0.8, "the detector itself must find real lesions"
    assert found["generated"] > 0.3


def _sets(network: nn.Module, problem: Problem) -> dict[str, Tensor]:
    return {"real": problem.pairs, "generated": generated(network)}


@pytest.mark.slow
@pytest.mark.gate("P7-T7")
def test_exponents_by_channel_are_reported_against_l2(
    base: nn.Module, problem: Problem, tmp_path: Path, record_property: Any
) -> None:
    report = {}
    for name, lp in (("1.5 / 2.0", (1.5, 2.0)), ("2.0", 2.0)):
        made = generated(adapt(tmp_path / name.replace("/", "-"), base, problem, 600, lp))
        masks, _ = marked(problem, made)
        report[name] = {
            "dice": float(np.median(dices(problem, made))),
            "contrast": float(np.median(contrasts(problem, made))),
            "empty": float(np.mean([not mask.any() for mask in masks])),
        }
        assert torch.isfinite(made).all()
    record_property("P7-T7", json.dumps(report))
