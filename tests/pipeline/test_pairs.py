"""Images with masks become an ordinary folder of latents."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neuromf.data.latents import LatentDataset, load_latent
from neuromf.data.volumes import load_volume, save_volume
from neuromf.errors import UserError
from neuromf.files import read_json
from neuromf.models.autoencoder import load_autoencoder
from neuromf.models.mask_codec import PairLayout
from neuromf.pipeline.mask_strategy import LEAST_DICE, compare_strategies
from neuromf.pipeline.pairs import PairReport, PairSource, encode_pairs

HAAR_CHANNELS = 8


@pytest.fixture(scope="module")
def base(run: Path) -> dict[str, Any]:
    return read_json(run / "data.json")


@pytest.fixture
def source(lesions: Path, tmp_path: Path) -> PairSource:
    shutil.copytree(lesions, tmp_path / "heads")
    return PairSource(tmp_path / "heads", tmp_path / "heads/masks", fractions=(0.6, 0.2, 0.2))


def encode(source: PairSource, out: Path, base: dict[str, Any]) -> PairReport:
    return encode_pairs(source, out, autoencoder=load_autoencoder("haar", device="cpu"), base=base)


@pytest.mark.gate("P7-T1")
def test_pairs_are_latents_with_the_mask_s_channels_last(source: PairSource, base: dict, tmp_path: Path) -> None:
    done = encode(source, tmp_path / "pairs", base)
    assert (done.pairs, done.kept) == (6, 0)
    assert done.layout == PairLayout(HAAR_CHANNELS, HAAR_CHANNELS, "autoencoder", threshold=0.5)
    data = LatentDataset(tmp_path / "pairs")
    assert data.shape == (2 * HAAR_CHANNELS, 8, 8, 8)
    haar = load_autoencoder("haar", device="cpu")
    for path in sorted((tmp_path / "pairs").glob("*.pt")):
        z = load_latent(path)["z"][None]
        stored = load_volume(source.images / f"masks/{path.stem}.nii.gz").array > 0
        assert np.array_equal(done.layout.decode_mask(z, haar)[0, 0].numpy(), stored)
    report = read_json(tmp_path / "pairs/mask_vae_test.json")
    assert report["round_trips"]["autoencoder"]["dice_mean"] == 1.0
    assert report["round_trips"]["downsample"]["dice_mean"] < 1.0
    assert str(LEAST_DICE) in report["explanation"]


def test_the_same_call_keeps_all_and_a_changed_mask_is_encoded_again(
    source: PairSource, base: dict, tmp_path: Path
) -> None:
    out = tmp_path / "pairs"
    encode(source, out, base)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.pt")}
    assert encode(source, out, base).kept == 6
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.pt")} == before
    changed = source.images / "masks/phantom_0002.nii.gz"
    mask = load_volume(changed)
    save_volume(changed, np.roll(mask.array, 1, axis=0), mask.affine, dtype=np.uint8)
    assert encode(source, out, base).kept == 5
    assert {n for n, t in before.items() if (out / n).stat().st_mtime_ns != t} == {"phantom_0002.pt"}


def test_block_means_are_taken_where_they_are_asked_for(source: PairSource, base: dict, tmp_path: Path) -> None:
    done = encode(replace(source, mask="downsample"), tmp_path / "pairs", base)
    assert (done.layout.strategy, done.layout.mask_channels) == ("downsample", 1)
    assert "asked for" in done.test["explanation"]
    with pytest.raises(UserError, match=r"pairs\.mask downsample there, auto now"):
        encode(source, tmp_path / "pairs", base)


def test_pairs_that_cannot_be_used_stop_all_and_are_all_named(source: PairSource, base: dict, tmp_path: Path) -> None:
    masks = source.images / "masks"
    for name, change in (("phantom_0001", lambda m: 0 * m), ("phantom_0003", lambda m: m[:-2])):
        found = load_volume(masks / f"{name}.nii.gz")
        save_volume(masks / f"{name}.nii.gz", change(found.array), found.affine, dtype=np.uint8)
    with pytest.raises(UserError) as error:
        encode(source, tmp_path / "pairs", base)
    assert "2 of 6 pairs cannot be used" in error.value.message
    assert "phantom_0001.nii.gz: the mask is empty" in error.value.message
    assert "phantom_0003.nii.gz: the mask has 14 x 16 x 16 voxels" in error.value.message
    assert not list((tmp_path / "pairs").glob("*.pt"))


def test_a_pair_that_went_is_refused(source: PairSource, base: dict, tmp_path: Path) -> None:
    encode(source, tmp_path / "pairs", base)
    for path in (source.images / "phantom_0004.nii.gz", source.images / "masks/phantom_0004.nii.gz"):
        path.unlink()
    with pytest.raises(UserError, match=r"1 pairs that are not among the inputs, the first is phantom_0004\.pt"):
        encode(source, tmp_path / "pairs", base)


# --- the mask test ---------------------------------------------------------------------------------------------------


class Blurring:
    """An autoencoder that forgets everything below `cells` cells."""

    factor, latent_channels, device = 4, 2, "cpu"

    def __init__(self, cells: int) -> None:
        self.cells = cells

    def encode(self, volume: torch.Tensor) -> Any:
        pooled = torch.nn.functional.avg_pool3d(volume, self.cells)
        return type("Posterior", (), {"mean": pooled})()

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return latent.repeat_interleave(self.cells, 2).repeat_interleave(self.cells, 3).repeat_interleave(self.cells, 4)


def cubes(edge: int) -> list[np.ndarray]:
    masks = []
    for start in (3, 5, 8):
        mask = np.zeros((1, 24, 24, 24), dtype=bool)
        mask[:, start : start + edge, start : start + edge, start : start + edge] = True
        masks.append(mask)
    return masks


def test_a_good_autoencoder_is_chosen_and_a_bad_one_is_not() -> None:
    good = compare_strategies(cubes(6), Blurring(1))  # type: ignore[arg-type]
    assert (good.strategy, good.chosen.mean) == ("autoencoder", 1.0)
    bad = compare_strategies(cubes(6), Blurring(8))  # type: ignore[arg-type]
    assert bad.strategy == "downsample"
    assert bad.trips["autoencoder"].mean < bad.trips["downsample"].mean
    assert "does not reach 0.85" in bad.explanation


def test_below_the_limit_the_better_way_is_taken_and_the_loss_is_said() -> None:
    small = compare_strategies(cubes(2), Blurring(2))  # type: ignore[arg-type]
    assert small.strategy == "autoencoder"
    assert small.trips["downsample"].mean < small.chosen.mean < LEAST_DICE
    assert "cannot be sharper" in small.explanation


def test_the_threshold_is_the_one_that_gives_masks_back() -> None:
    """A mask of a third of a cell never reaches one half as a block mean."""
    found = compare_strategies(cubes(3), Blurring(1), "downsample")  # type: ignore[arg-type]
    assert found.chosen.threshold < 0.5
    assert found.to_dict()["round_trips"]["downsample"]["dice_mean"] > 0
