"""A tiny chain that later steps start from: heads of 16^3, Haar latents, a run of 12 updates."""

from __future__ import annotations

from pathlib import Path

import pytest

SMALL = [
    "network.channels=[16,32]",
    "network.attention_levels=[false,true]",
    "network.norm_groups=8",
    "network.res_blocks=1",
    "training.updates=12",
    "training.batch_size=4",
    "training.accumulation=1",
    "ema.decays=[0.5]",
    "ema.select=0.5",
]

ADAPT = ["training.updates=12", "training.batch_size=4", "ema.decays=[0.5]", "ema.select=0.5"]
"""Overrides that let a `lora` preset run in seconds on `run`."""


@pytest.fixture(scope="session")
def small() -> list[str]:
    """Overrides that let any preset run in seconds."""
    return list(SMALL)


@pytest.fixture(scope="session")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from neuromf.pipeline.render import Recipe, render

    folder = tmp_path_factory.mktemp("chain") / "heads"
    render([], folder, n=12, recipe=Recipe(size=(16, 16, 16), spacing_mm=12.0))
    return folder


@pytest.fixture(scope="session")
def latents(heads: Path) -> Path:
    from neuromf.data.preprocessing import Preprocessing
    from neuromf.models.autoencoder import load_autoencoder
    from neuromf.pipeline.encode import encode

    spec = Preprocessing(size=(16, 16, 16), spacing_mm=12.0, centre="grid")
    folder = heads.parent / "latents"
    encode([heads], folder, autoencoder=load_autoencoder("haar"), preprocessing=spec, fractions=(0.6, 0.2, 0.2))
    return folder


@pytest.fixture(scope="session")
def run(latents: Path) -> Path:
    from neuromf import config
    from neuromf.pipeline.train import train

    folder = latents.parent / "runs" / "tiny"
    train(config.load("imf-xpred", SMALL), latents, folder, device="cpu")
    return folder


@pytest.fixture(scope="session")
def lesions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six heads as `heads` are, with large lesions, and their masks in masks/."""
    from neuromf.pipeline.render import Recipe, render

    folder = tmp_path_factory.mktemp("lesions") / "heads"
    render([], folder, n=6, recipe=Recipe(size=(16, 16, 16), spacing_mm=12.0, seed=100, lesions=3.0))
    return folder


@pytest.fixture(scope="session")
def adapted(run: Path, lesions: Path) -> Path:
    """A run of `lora` on `run`, 12 updates on six pairs."""
    from neuromf.pipeline import lora
    from neuromf.pipeline.pairs import PairSource

    folder = run.parent.parent / "joint/adapted"
    config = lora.resolve(str(run), "lora-joint", ADAPT)
    source = PairSource(lesions, lesions / "masks", fractions=(0.6, 0.2, 0.2))
    config, _ = lora.prepare(config, run.parent.parent / "pairs", source, device="cpu")
    lora.lora(config, run.parent.parent / "pairs", folder, device="cpu")
    return folder
