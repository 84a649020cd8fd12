"""What `evaluate --pairs` says of generated masks."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from neuromf.data.latents import load_latent_folder_info
from neuromf.data.volume_sets import find_volumes
from neuromf.data.volumes import load_volume
from neuromf.errors import UserError
from neuromf.models.autoencoder import load_autoencoder
from neuromf.pipeline.decode import Decoding
from neuromf.pipeline.evaluate import evaluate
from neuromf.pipeline.evaluate_pairs import contrast, measure_pairs, read_real
from neuromf.pipeline.evaluation_report import Results
from neuromf.pipeline.evaluation_sets import held_back
from neuromf.pipeline.pairs import mask_path
from neuromf.pipeline.sample import sample


@pytest.fixture
def pairs(adapted: Path) -> Path:
    return adapted.parent.parent / "pairs"


def measured(pairs: Path, folder: Path, masks: dict[str, Path], lesions: Path) -> Results:
    """Measure generated pairs whose masks are copies of files, and whose images are those of the real pairs."""
    folder.mkdir()
    images = []
    for name, mask in masks.items():
        image = shutil.copy(lesions / f"{name}.nii.gz", folder / f"{name}.nii.gz")
        shutil.copy(mask, folder / f"{name}_label-lesion_mask.nii.gz")
        images.append(Path(image))
    arrays = np.stack([load_volume(path).array[None] / 1000 for path in images])
    sets = {name: SimpleNamespace(array=arrays, paths=images) for name in ("generated", "real")}
    run: Any = SimpleNamespace(sets=sets, results=Results(), seed=0, tell=lambda *_: None)
    measure_pairs(run, pairs)
    return run.results


def test_copies_of_training_masks_are_told_by_their_dice(pairs: Path, lesions: Path, tmp_path: Path) -> None:
    train = load_latent_folder_info(pairs).splits["train"]
    copied = {subject: mask_path(pairs, subject) for subject in train}
    found = measured(pairs, tmp_path / "generated", copied, lesions).metrics
    assert found["mask_dice_nearest_generated"]["value"] == 1.0
    assert found["mask_dice_nearest_real"]["value"] < 1.0
    assert found["mask_empty_share"]["value"] == 0


def test_the_real_pairs_themselves_are_distributed_as_they_are(pairs: Path, lesions: Path, tmp_path: Path) -> None:
    everyone = {subject: mask_path(pairs, subject) for subject in read_real(pairs).by_subject}
    found = measured(pairs, tmp_path / "generated", everyone, lesions).metrics
    assert found["lesion_volume_ks"]["value"] == 0
    assert found["lesion_place_ks_left_right"]["value"] == 0
    assert found["lesion_volume_ml_generated"]["value"] == found["lesion_volume_ml_real"]["value"]
    assert found["lesion_contrast_generated"]["value"] == found["lesion_contrast_real"]["value"]


def test_contrast_is_the_step_from_the_mask_to_its_surroundings() -> None:
    image, mask = np.full((9, 9, 9), 0.25, dtype=np.float32), np.zeros((9, 9, 9), dtype=bool)
    mask[3:6, 3:6, 3:6] = True
    image[mask] = 1.0
    assert contrast(image, mask) == pytest.approx(0.75)
    assert np.isnan(contrast(image, np.zeros_like(mask)))


def test_volumes_without_masks_and_latents_without_pairs_are_refused(
    pairs: Path, lesions: Path, latents: Path, tmp_path: Path
) -> None:
    run: Any = SimpleNamespace(sets={"generated": SimpleNamespace(paths=[lesions / "phantom_0001.nii.gz"])})
    with pytest.raises(UserError, match="no mask beside them"):
        measure_pairs(run, pairs)
    with pytest.raises(UserError, match="images without masks"):
        measure_pairs(run, latents)
    incomplete = shutil.copytree(pairs, tmp_path / "pairs")
    shutil.rmtree(incomplete / "masks")
    with pytest.raises(UserError, match="is missing"):
        read_real(incomplete)


@pytest.mark.slow
def test_an_evaluation_of_pairs_has_both_families(adapted: Path, pairs: Path, lesions: Path, tmp_path: Path) -> None:
    made = sample(str(adapted), 4, out=tmp_path / "gen", decoding=Decoding(), device="cpu")
    assert len(find_volumes(made.out / "volumes")) == 4
    sets = held_back(lesions, pairs)
    done = evaluate(
        made.out / "volumes",
        sets.real,
        preprocessing=sets.preprocessing,
        pairs=pairs,
        autoencoder=load_autoencoder("haar", device="cpu"),
    )
    found = {*done.content["metrics"], *done.content["not_computed"]}
    assert {"mask_dice_nearest_generated", "mask_empty_share", "ssim_nearest"} <= found
