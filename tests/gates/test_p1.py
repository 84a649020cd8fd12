"""P1: real scans become latents that can be trusted. Run on hippocampus crops and whole heads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from neuromf.data.latents import LatentDataset, load_latent, load_latent_folder_info
from neuromf.data.preprocessing import Preprocessing, preprocess
from neuromf.data.volumes import load_volume
from neuromf.metrics.similarity import ssim
from neuromf.models.autoencoder import Autoencoder, load_autoencoder
from neuromf.pipeline.encode import EncodeReport, encode

CROPS = Preprocessing(size=(48, 64, 48), spacing_mm=1.0)
HEADS = Preprocessing(size=(96, 112, 96), spacing_mm=2.0)
SCANS = 40


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    return load_autoencoder("builtin")


@pytest.fixture(scope="module")
def crops(
    shared_data: Path, autoencoder: Autoencoder, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, EncodeReport]:
    folder = tmp_path_factory.mktemp("crops")
    paths = sorted((shared_data / "hippocampus/images").glob("*.nii.gz"))[:SCANS]
    report = encode(
        paths,
        folder,
        autoencoder=autoencoder,
        preprocessing=CROPS,
        groups_csv=shared_data / "hippocampus/subjects.csv",
        group_column="scan_group",
        fractions=(0.7, 0.0, 0.3),
    )
    return folder, report


@pytest.mark.gate("P1-T1")
def test_every_scan_is_encoded(crops: tuple[Path, EncodeReport]) -> None:
    assert (crops[1].encoded, crops[1].refused) == (SCANS, 0)


@pytest.mark.gate("P1-T2")
@pytest.mark.gate("P1-T5")
def test_latents_have_one_shape_and_are_finite(crops: tuple[Path, EncodeReport]) -> None:
    for path in crops[0].glob("*.pt"):
        latent = load_latent(path)
        assert latent["z"].shape == (8, 12, 16, 12)
        assert torch.isfinite(latent["z"]).all()
        assert torch.isfinite(latent["log_sigma"]).all()


@pytest.mark.gate("P1-T3")
def test_raw_latent_statistics_are_stated(crops: tuple[Path, EncodeReport]) -> None:
    """Reported for the built-in autoencoder; the limits of this gate are MAISI's."""
    statistics = load_latent_folder_info(crops[0]).statistics
    print(f"\nraw latents: mean {np.round(statistics.mean, 2)}, std {np.round(statistics.std, 2)}")
    assert min(statistics.std) > 0


@pytest.mark.gate("P1-T4")
def test_held_back_latents_are_whitened_by_training_statistics(crops: tuple[Path, EncodeReport]) -> None:
    held_back = LatentDataset(crops[0], "test")
    values = torch.stack([held_back[i] for i in range(len(held_back))]).transpose(0, 1).flatten(1)
    mean, std = values.mean(1), values.std(1)
    print(f"\nwhitened, held back, N = {len(held_back)}: mean {mean.numpy().round(3)}, std {std.numpy().round(3)}")
    assert mean.abs().max() < 0.2
    assert std.min() > 0.8
    assert std.max() < 1.25


@pytest.mark.gate("P1-T6")
def test_dataset_loads(crops: tuple[Path, EncodeReport]) -> None:
    dataset = LatentDataset(crops[0], "train")
    assert dataset[0].shape == (8, 12, 16, 12)
    assert len(set(dataset.subjects)) == len(dataset)


@pytest.mark.gate("P1-T7")
def test_decoding_a_loaded_latent_is_the_direct_round_trip(
    crops: tuple[Path, EncodeReport], autoencoder: Autoencoder, shared_data: Path
) -> None:
    subject = sorted(path.stem for path in crops[0].glob("*.pt"))[0]
    scan = load_volume(shared_data / "hippocampus/images" / f"{subject}.nii.gz")
    volume = torch.from_numpy(preprocess(scan, CROPS).array)[None]
    stored = autoencoder.decode(load_latent(crops[0] / f"{subject}.pt")["z"][None])
    assert torch.equal(stored, autoencoder.reconstruct(volume))


@pytest.mark.gate("P1-T7")
def test_whole_head_round_trip(autoencoder: Autoencoder, shared_data: Path) -> None:
    scan = load_volume(shared_data / "wholebrain/chris_t1.nii.gz")
    volume = torch.from_numpy(preprocess(scan, HEADS).array)[None]
    value = float(ssim(volume, autoencoder.reconstruct(volume)))
    print(f"\nwhole head at 2 mm, N = 1: SSIM {value:.3f}")
    assert value > 0.89
