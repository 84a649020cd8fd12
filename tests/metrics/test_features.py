from __future__ import annotations

import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from neuromf.metrics.features import EncoderFeatures, descriptor, extract


class _Identity:
    """An autoencoder whose latent is the volume and its negative."""

    sha256 = "ab" * 32

    def encode(self, volume):
        return SimpleNamespace(mean=torch.cat([volume, -volume], dim=1))


class _Corners:
    """Two planes of different numbers of slices; counts the volumes it is given."""

    name, sha256, preprocessing, planes = "corners", "cd" * 32, "none", ("axial", "coronal")

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, volumes):
        self.seen += len(volumes)
        return {"axial": volumes[:, 0, :2, :3, 0], "coronal": volumes[:, 0, :1, :3, 1]}


def _volumes(n: int = 5) -> np.ndarray:
    return np.random.default_rng(0).random((n, 1, 8, 8, 8), dtype=np.float32)


def test_the_descriptor_is_mean_and_deviation_of_each_cell() -> None:
    latent = torch.randn(3, 4, 6, 8, 4, generator=torch.Generator().manual_seed(0))
    out = descriptor(latent, grid=2)
    assert out.shape == (3, 2 * 4 * 8)
    assert out.dtype == torch.float64
    cell = latent[1, 2, 3:, :4, 2:].double()  # cell (1, 0, 1) of channel 2
    assert float(out[1, 2 * 8 + 5]) == pytest.approx(float(cell.mean()), rel=1e-6)
    assert float(out[1, 32 + 2 * 8 + 5]) == pytest.approx(float(cell.std(correction=0)), rel=1e-6)


def test_features_do_not_depend_on_the_batch_size_and_take_mirrored_views(tmp_path: Path) -> None:
    volumes, extractor = _volumes(), EncoderFeatures(_Identity())
    one = extract(volumes, extractor, tmp_path / "a", batch_size=1).vectors()
    torch.testing.assert_close(extract(volumes, extractor, tmp_path / "b", batch_size=3).vectors(), one)
    torch.testing.assert_close(extract(torch.tensor(volumes), extractor, tmp_path / "c").vectors(), one)
    mirrored = extract(volumes[:, :, ::-1], extractor, tmp_path / "a").vectors()
    assert not torch.allclose(mirrored, one)
    torch.testing.assert_close(mirrored[:, :4], one[:, 4:8])  # cells swap sides


def test_planes_are_slices_and_vectors_their_means_side_by_side(tmp_path: Path) -> None:
    volumes = _volumes()
    features = extract(volumes, _Corners(), tmp_path)
    assert features.plane("axial").shape == (5, 2, 3)
    np.testing.assert_array_equal(features.plane("coronal"), volumes[:, 0, :1, :3, 1])
    expected = np.concatenate([volumes[:, 0, :2, :3, 0].mean(1), volumes[:, 0, 0, :3, 1]], axis=1)
    np.testing.assert_allclose(features.vectors(), expected, rtol=1e-6)


def test_progress_counts_volumes(tmp_path: Path) -> None:
    seen = []
    extract(_volumes(), _Corners(), tmp_path, batch_size=2, progress=lambda *a: seen.append(a))
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_only_a_batch_of_volumes_is_in_memory(tmp_path: Path) -> None:
    alive: set[int] = set()
    most = 0

    class _Lazy(list):
        def __getitem__(self, i):
            nonlocal most
            volume = np.full((1, 8, 8, 8), i, dtype=np.float32)
            alive.add(i)
            weakref.finalize(volume, alive.discard, i)
            most = max(most, len(alive))
            return volume

    features = extract(_Lazy(range(40)), _Corners(), tmp_path, batch_size=4)
    assert len(features) == 40
    assert most <= 5


def test_stored_features_are_used_and_a_stopped_extraction_goes_on(tmp_path: Path) -> None:
    volumes, extractor = _volumes(), _Corners()
    extract(volumes[:3], extractor, tmp_path)
    again = extract(volumes[::-1], extractor, tmp_path)  # the order and the neighbours do not matter
    assert extractor.seen == 5
    np.testing.assert_array_equal(again.plane("axial")[4], volumes[0, 0, :2, :3, 0])


def test_other_volumes_weights_and_preprocessing_are_never_mistaken(tmp_path: Path) -> None:
    volumes, extractor = _volumes(1), _Corners()
    for change in ({}, {"sha256": "ef" * 32}, {"preprocessing": "clip"}, {"name": "edges"}):
        for key, value in change.items():
            setattr(extractor, key, value)
        extract(volumes, extractor, tmp_path)
        extract(volumes + np.float32(1e-6), extractor, tmp_path)
    assert extractor.seen == 8


@pytest.mark.parametrize("damage", ["flipped byte", "cut short", "not an archive", "a plane absent", "not finite"])
def test_damaged_features_are_computed_anew(damage: str, tmp_path: Path) -> None:
    volumes, extractor = _volumes(2), _Corners()
    whole = extract(volumes, extractor, tmp_path).plane("axial")
    file = sorted(tmp_path.rglob("*.npz"))[0]
    content = bytearray(file.read_bytes())
    if damage == "flipped byte":
        content[content.index(b"\x93NUMPY") + 140] ^= 1
    elif damage == "cut short":
        content = content[: len(content) // 2]
    elif damage == "not an archive":
        content = bytearray(b"<html>")
    if damage == "a plane absent":
        np.savez(file, axial=np.ones((2, 3)))
    elif damage == "not finite":
        np.savez(file, axial=np.full((2, 3), np.nan), coronal=np.ones((1, 3)))
    else:
        file.write_bytes(content)
    np.testing.assert_array_equal(extract(volumes, extractor, tmp_path).plane("axial"), whole)
    assert extractor.seen == 3
