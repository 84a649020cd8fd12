"""Every shipped objective goes through the one loop: its preset, on a small network, for a few updates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from neuromf import config, generator
from neuromf.data.preprocessing import Preprocessing
from neuromf.errors import UserError
from neuromf.models.autoencoder import load_autoencoder
from neuromf.pipeline.encode import encode
from neuromf.pipeline.train import train

UNET = ["channels=[8,16]", "attention_levels=[false,true]", "head_channels=8", "res_blocks=1", "norm_groups=4"]
SMALL = {
    "maisi-unet": [f"network.{setting}" for setting in UNET],
    "mit": ["network.size=null", "network.depth=2", "network.width=24", "network.heads=2", "network.patch=2"],
    "mlp": ["network.width=16", "network.depth=2"],
}
PRESETS = sorted(set(config.preset_files()) - {"toy-torus", "toy-volume", "lora-joint", "lora-small"})


def small(preset: str, *more: str) -> config.TrainConfig:
    """The preset with a network of a few thousand weights, for three updates of four samples."""
    whole = config.load(preset)
    overrides = [
        *SMALL[whole.network.name],
        "training.updates=3", "training.batch_size=4", "training.accumulation=1", "training.warmup_steps=1",
        "intervals.sample_count=2",
    ]  # fmt: skip
    if whole.network.name == "mit" and whole.network.v_head_blocks:
        overrides.append("network.v_head_blocks=1")
    return config.load(preset, [*overrides, *more])


@pytest.fixture(scope="module")
def latents_of_two_contrasts(latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The latents of the small heads, every other one called FLAIR."""
    folder = tmp_path_factory.mktemp("contrasts") / "latents"
    folder.mkdir()
    for path in latents.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    dataset = json.loads((folder / "dataset.json").read_text())
    subjects = sorted(path.stem for path in folder.glob("*.pt"))
    of = {subject: ("T1", "FLAIR")[i % 2] for i, subject in enumerate(subjects)}
    dataset["classes"] = {"column": "contrast", "names": ["FLAIR", "T1"], "of": of}
    (folder / "dataset.json").write_text(json.dumps(dataset))
    return folder


@pytest.fixture(scope="module")
def flow(latents_of_two_contrasts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the preset rectflow, which two others start from."""
    run = tmp_path_factory.mktemp("flow") / "rectflow"
    train(small("rectflow", "training.lr=1e-3"), latents_of_two_contrasts, run, device="cpu")
    return run


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_trains_and_samples(preset: str, latents_of_two_contrasts: Path, flow: Path, tmp_path: Path):
    starts_from = [f"training.init_from={flow}"] if config.load(preset).training.init_from else []
    settings = small(preset, *starts_from)
    result = train(settings, latents_of_two_contrasts, tmp_path / "run", device="cpu")
    assert result.updates == 3
    assert result.raw_loss is not None
    assert result.val_raw_loss is not None
    model = generator.load(tmp_path / "run", device="cpu")
    latents = model.sample_latents(range(2))
    assert latents.shape == (2, *model.latent_shape)
    assert torch.isfinite(latents).all()


def perceptual(*more: str) -> config.TrainConfig:
    return small("pmf", "objective.perceptual_weight=0.4", "objective.perceptual_crop=2", "times.mean=-1.0", *more)


def test_the_perceptual_term_of_pmf_looks_through_the_latents_own_autoencoder(heads: Path, tmp_path: Path):
    spec = Preprocessing(size=(16, 16, 16), spacing_mm=12.0, centre="grid")
    encode([heads], tmp_path / "latents", autoencoder=load_autoencoder("builtin"), preprocessing=spec)
    assert train(perceptual(), tmp_path / "latents", tmp_path / "run", device="cpu").updates == 3


def test_the_perceptual_term_needs_an_encoder_with_features(latents: Path, tmp_path: Path):
    with pytest.raises(UserError, match="'haar' has none"):
        train(perceptual(), latents, tmp_path / "run", device="cpu")


def test_a_guided_model_follows_its_class_and_scale(latents_of_two_contrasts: Path, tmp_path: Path):
    settings = small("imf-guided", "training.lr=1e-2", "ema.decays=[0.1]", "ema.select=0.1")
    train(settings, latents_of_two_contrasts, tmp_path / "run", device="cpu")
    model = generator.load(tmp_path / "run", device="cpu")
    ask = lambda **how: model.sample_latents(range(2), **how)
    assert not torch.equal(ask(where={"contrast": "T1"}), ask(where={"contrast": "FLAIR"}))
    assert not torch.equal(ask(where={"contrast": "T1"}), ask())
    strong = ask(where={"contrast": "T1"}, guidance=4.0)
    assert not torch.equal(strong, ask(where={"contrast": "T1"}))
    assert not torch.equal(strong, ask(where={"contrast": "T1"}, guidance=4.0, interval=(0.2, 0.8)))
