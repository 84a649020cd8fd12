"""P5: many samples, fast, and close to real ones. A small model of a few seconds stands in for the trained one."""

from __future__ import annotations

from pathlib import Path

import pytest

from neuromf import config
from neuromf.data.preprocessing import Preprocessing
from neuromf.models.autoencoder import load_autoencoder
from neuromf.pipeline.encode import encode
from neuromf.pipeline.render import Recipe, render
from neuromf.pipeline.sample import sample
from neuromf.pipeline.sample_folder import load_sample, sample_path
from neuromf.pipeline.train import train

SMALL = [
    "network.channels=[16,32]",
    "network.attention_levels=[false,true]",
    "network.norm_groups=8",
    "network.res_blocks=1",
    "training.updates=20",
    "training.batch_size=4",
    "training.accumulation=1",
    "ema.decays=[0.5]",
    "ema.select=0.5",
]


@pytest.mark.gate("P5-T1")
@pytest.mark.gate("P5-T6")
def test_two_thousand_samples_with_the_command_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`neuromf train --preset imf-xpred`, then `neuromf sample --nfe 1 --n 2000`, in a folder with ./latents."""
    from typer.testing import CliRunner

    from neuromf_cli.app import app

    monkeypatch.chdir(tmp_path)
    render([], tmp_path / "heads", n=10, recipe=Recipe(size=(16, 16, 16), spacing_mm=12.0))
    spec = Preprocessing(size=(16, 16, 16), spacing_mm=12.0, centre="grid")
    encode([tmp_path / "heads"], tmp_path / "latents", autoencoder=load_autoencoder("builtin"), preprocessing=spec)
    trained = CliRunner().invoke(app, ["train", "--preset", "imf-xpred", "--device", "cpu", "-q", *SMALL])
    assert trained.exit_code == 0, trained.output
    sampled = CliRunner().invoke(app, ["sample", "--nfe", "1", "--n", "2000", "-q"])
    assert sampled.exit_code == 0, sampled.output
    folder = tmp_path / "runs/imf-xpred/generated"
    assert len(list((folder / "latents").glob("sample_*.pt"))) == 2000
    assert load_sample(sample_path(folder, 1999))[0] == 1999


@pytest.mark.slow
@pytest.mark.gate("P5-T2")
@pytest.mark.gate("P6-T5")
def test_one_evaluation_of_meanflow_is_nearer_to_real_heads_than_of_rectflow(tmp_path: Path) -> None:
    """The demo's comparison, a fifth of its length."""
    import torch

    from neuromf.data.latents import LatentDataset
    from neuromf.metrics.distances import frechet_distance
    from neuromf.metrics.features import descriptor

    render([], tmp_path / "heads", n=120, recipe=Recipe(size=(32, 32, 32), spacing_mm=6.0))
    spec = Preprocessing(size=(32, 32, 32), spacing_mm=6.0, centre="grid")
    autoencoder = load_autoencoder("builtin")
    encode(
        [tmp_path / "heads"],
        tmp_path / "latents",
        autoencoder=autoencoder,
        preprocessing=spec,
        fractions=(0.6, 0.0, 0.4),
    )
    held_back = LatentDataset(tmp_path / "latents", "test")
    real = torch.stack([held_back.statistics.unwhiten(held_back[i]) for i in range(len(held_back))])
    distance = {}
    for preset in ("demo", "demo-rectflow"):
        run = tmp_path / preset
        train(config.load(preset, ["training.updates=300"]), tmp_path / "latents", run, device="cpu")
        sample(str(run), len(real), out=tmp_path / f"{preset}-samples")
        paths = [sample_path(tmp_path / f"{preset}-samples", i) for i in range(len(real))]
        fake = torch.stack([load_sample(path)[1] for path in paths])
        distance[preset] = frechet_distance(descriptor(fake), descriptor(real), shrinkage="ledoit-wolf")
    print(f"\nFrechet (builtin), 1 evaluation, N = {len(real)}: {distance}")
    assert distance["demo-rectflow"] > 1.3 * distance["demo"]
