from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from neuromf.data.volumes import Volume, save_volume
from neuromf.errors import UserError
from neuromf.metrics.similarity import psnr
from neuromf.models.autoencoder import load_autoencoder
from neuromf.models.kl_network import KLArchitecture, posterior
from neuromf.pipeline import autoencoder as pipeline
from neuromf.pipeline.autoencoder_data import PoolSettings, Sources, draw_volume
from neuromf.pipeline.autoencoder_fit import AutoencoderSettings, Training, draw_patches, fit, learning_rate
from neuromf.pipeline.autoencoder_init import wavelet_start
from neuromf.pipeline.autoencoder_quality import latent_summary, linear_code, measure

NARROW = KLArchitecture(channels=(12, 12, 16), res_blocks=(0, 1, 1))
TINY = AutoencoderSettings(
    architecture=NARROW,
    updates=6,
    stages=((1.0, 8, 2),),
    warmup_steps=2,
    pool_volumes=3,
    phantom_volumes=0,
    pool=PoolSettings(size=16),
    bfloat16=False,
)


def blobs(n: int, size: int, seed: int = 0) -> torch.Tensor:
    """Smooth volumes in [0, 1], (n, 1, size, size, size)."""
    noise = torch.randn(n, 1, size, size, size, generator=torch.Generator().manual_seed(seed))
    return (F.avg_pool3d(noise, 5, stride=1, padding=2) * 4 + 0.4).clamp(0, 1)


def test_training_starts_at_the_code_of_block_means() -> None:
    volume = blobs(2, 16)
    network = wavelet_start(NARROW, volume, seed=0)
    with torch.no_grad():
        decoded = network.decode(posterior(network, volume)[0])
    means = F.interpolate(F.avg_pool3d(volume, 2), scale_factor=2)
    assert psnr(means, decoded).min() > 30
    torch.testing.assert_close(psnr(volume, decoded), psnr(volume, means), atol=0.5, rtol=0)


def test_a_patch_is_coded_as_within_its_volume() -> None:
    """The anchored norms do not see the field of view; only the border differs."""
    volume = blobs(1, 48)
    network = wavelet_start(NARROW, volume[..., :24, :24, :24], seed=0)
    with torch.no_grad():
        whole = posterior(network, volume)[0][..., 5:7, 5:7, 5:7]
        patch = posterior(network, volume[..., 12:36, 12:36, 12:36])[0][..., 2:4, 2:4, 2:4]
    assert (whole - patch).abs().max() < 0.1 * whole.std()


def test_anchors_do_not_move_in_training() -> None:
    training = Training(TINY, blobs(4, 8))
    before = {name: value.clone() for name, value in training.network.state_dict().items()}
    volume = blobs(2, 16)
    loss = (training.network.decode(posterior(training.network, volume)[0]) - volume).square().mean()
    loss.backward()
    training.optimiser.step()
    after = training.network.state_dict()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert any(name.startswith("encoder") for name in moved)
    first = "encoder.blocks.0.conv.conv"
    assert torch.equal(after[f"{first}.bias"][-2:], torch.tensor([20.0, -20.0]))
    assert torch.equal(after[f"{first}.weight"][-2:], torch.zeros(2, 1, 3, 3, 3))


def test_training_lowers_the_error(tmp_path: Path) -> None:
    pool = blobs(4, 16)[:, 0].numpy()
    settings = replace(TINY, updates=60, warmup_steps=10, stages=((1.0, 16, 2),))
    lines: list[str] = []
    start = Training(settings, blobs(16, 16))
    training = fit([pool], settings, tmp_path / "c.pt", log=lines.append)
    volume = torch.from_numpy(pool[:, None])

    def error(network: torch.nn.Module) -> float:
        with torch.no_grad():
            return float((network.decode(posterior(network, volume)[0]) - volume).square().mean())

    assert error(training.network) < 0.8 * error(start.network)
    assert any("PSNR" in line for line in lines)


def test_an_interrupted_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    pool = [blobs(4, 16)[:, 0].numpy()]
    whole = fit(pool, TINY, tmp_path / "whole.pt")

    class StopError(Exception):
        pass

    def stop_at_three(description: str, done: int, total: int) -> None:
        if done >= total / 2:
            raise StopError

    with pytest.raises(StopError):
        fit(pool, TINY, tmp_path / "part.pt", progress=stop_at_three, checkpoint_every_s=0)
    resumed = fit(pool, TINY, tmp_path / "part.pt")
    for name, value in whole.ema.items():
        assert torch.equal(value, resumed.ema[name]), name


def test_an_update_with_gradients_that_are_not_finite_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(float("nan")))
    training = fit([blobs(4, 16)[:, 0].numpy()], TINY, tmp_path / "c.pt")
    fresh = Training(TINY, draw_patches([blobs(4, 16)[:, 0].numpy()], 16, 16, torch.Generator().manual_seed(0)))
    assert training.update == TINY.updates
    for name, value in fresh.network.state_dict().items():
        assert torch.equal(value, training.network.state_dict()[name]), name


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    settings = replace(TINY, lr=1.0, warmup_steps=4)
    assert learning_rate(0, 0.0, settings) == 0.25
    assert learning_rate(100, 0.5, settings) == pytest.approx(0.5)
    assert learning_rate(100, 1.0, settings) == pytest.approx(0.0)


def test_patches_follow_their_generator_and_are_mostly_not_blank() -> None:
    pool = np.zeros((2, 16, 16, 16), np.float16)
    pool[1] = 0.5
    crops = draw_patches([pool], 8, 32, torch.Generator().manual_seed(0))
    again = draw_patches([pool], 8, 32, torch.Generator().manual_seed(0))
    assert crops.shape == (32, 1, 8, 8, 8)
    assert torch.equal(crops, again)
    assert (crops.flatten(1).mean(1) > 0.1).float().mean() > 0.7


@pytest.mark.parametrize("kind", ["renderings", "random_contrast", "templates", "shapes"])
def test_every_kind_of_training_volume_is_seeded_finite_and_on_scale(kind: str, small_label_maps: Path) -> None:
    from neuromf.data.label_maps import load_label_map

    template = Volume(blobs(1, 24)[0, 0].numpy(), np.diag([6.0, 6.0, 6.0, 1.0]), {})
    sources = Sources([load_label_map(path) for path in sorted(small_label_maps.glob("*.nii.gz"))], [template])
    weights = dict.fromkeys(("renderings", "random_contrast", "templates", "shapes"), 0.0)
    settings = PoolSettings(size=16, spacing_mm=(3.0, 6.0), **{**weights, kind: 1.0})
    volumes = [draw_volume(sources, seed, settings) for seed in range(4)]
    assert torch.equal(volumes[0], draw_volume(sources, 0, settings))
    for volume in volumes:
        assert volume.shape == (16, 16, 16)
        assert torch.isfinite(volume).all()
        assert volume.min() >= 0
        assert volume.max() <= 2
    assert not torch.equal(volumes[0], volumes[1])


def test_linear_code_is_the_projection_on_principal_components() -> None:
    volumes = blobs(3, 16)
    torch.testing.assert_close(linear_code(volumes, 64), volumes, atol=1e-5, rtol=0)
    mean = torch.full_like(volumes, float(volumes.mean()))
    errors = [float((linear_code(volumes, k) - volumes).square().mean()) for k in (1, 4, 8, 32)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < float((mean - volumes).square().mean())
    # The mean of 4^3 voxels is one linear code with one coefficient; the best one is at least as good.
    pooled = F.interpolate(F.avg_pool3d(volumes, 4), scale_factor=4)
    assert errors[0] <= float((pooled - volumes).square().mean())


def test_quality_of_an_exact_code_is_perfect() -> None:
    row = measure(load_autoencoder("haar"), {"blobs": blobs(2, 16)})[0]
    assert row.n == 2
    assert row.ssim == pytest.approx(1.0, abs=1e-5)
    assert row.psnr_db > 60


def test_latents_whitened_by_themselves_have_mean_0_and_std_1() -> None:
    volumes = blobs(2, 16)
    summary = latent_summary(load_autoencoder("haar"), volumes, volumes)
    assert summary["held_back_whitened_mean"] == pytest.approx([0.0] * 8, abs=1e-3)
    assert summary["held_back_whitened_std"] == pytest.approx([1.0] * 8, abs=1e-3)


def test_training_from_label_maps_gives_weights_that_load(small_label_maps: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.nii.gz"
    save_volume(template, blobs(1, 24)[0].numpy(), np.diag([6.0, 6.0, 6.0, 1.0]))
    out = tmp_path / "run"
    seen: list[str] = []
    done = pipeline.train_autoencoder(
        [small_label_maps],
        out,
        templates=[template],
        settings=TINY,
        tests={"blobs": blobs(2, 16)},
        progress=lambda description, i, n: seen.append(description),
    )
    autoencoder = load_autoencoder(done.weights)
    assert autoencoder.latent_channels == 8
    assert done.recipe["sha256"] == autoencoder.sha256
    assert set(done.recipe["data"]["label_maps"]) == {"anna.nii.gz", "bela.nii.gz"}
    assert [row["name"] for row in done.recipe["quality"]] == ["fresh training-like volumes", "blobs"]
    assert json.loads((out / "recipe.json").read_text())["updates"] == TINY.updates
    assert {"drawing pool", "training"} <= set(seen)
    again = pipeline.train_autoencoder([small_label_maps], out, templates=[template], settings=TINY)
    assert again.recipe["sha256"] == done.recipe["sha256"]
    with pytest.raises(UserError, match="other settings or data"):
        pipeline.train_autoencoder([small_label_maps], out, settings=TINY)


def test_nothing_to_train_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to train on"):
        pipeline.train_autoencoder([], tmp_path / "run", settings=TINY)


def test_builtin_recipe_belongs_to_the_shipped_weights() -> None:
    from neuromf.models.autoencoder import BUILTIN_WEIGHTS

    recipe = json.loads(BUILTIN_WEIGHTS.with_suffix(".json").read_text())
    autoencoder = load_autoencoder("builtin")
    assert recipe["sha256"] == autoencoder.sha256
    for row in recipe["quality"]:
        assert row["gain_db"] >= 2.5, row["name"]
        assert row["ssim"] > 0.90, row["name"]
