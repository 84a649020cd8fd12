"""The phantom: a plausible head for every seed, the same one at every size, each a little different."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from neuromf.data.label_table import NUMBERS, numbers_of
from neuromf.data.phantom import phantom, phantom_labels
from neuromf.data.shapes import chain, ellipsoid, folding_noise, sheet, signed_distance, union
from neuromf.errors import UserError

ML_4MM = 4.0**3 / 1000
SIZE = (48, 54, 48)


def volume_ml(labels: np.ndarray, *structures: str) -> float:
    return float(np.isin(labels, numbers_of(*structures)).sum() * ML_4MM)


@pytest.fixture(scope="module")
def heads() -> list[np.ndarray]:
    return [phantom_labels(seed, SIZE, 4.0).labels for seed in range(12)]


def test_the_same_seed_gives_the_same_head_and_another_seed_another(heads):
    assert np.array_equal(phantom_labels(0, SIZE, 4.0).labels, heads[0])
    assert (heads[0] != heads[1]).mean() > 0.1
    first, again = phantom(7, (24, 24, 24), 8.0), phantom(7, (24, 24, 24), 8.0)
    assert np.array_equal(first.volume, again.volume)


def test_labels_are_known_and_every_part_is_there(heads):
    parts = ("cerebral white matter", "cerebral cortex", "lateral ventricle", "thalamus", "caudate", "putamen",
             "cerebellar cortex", "cerebellar white matter", "brain stem", "csf", "cortical bone", "skin",
             "soft tissue", "background")  # fmt: skip
    for labels in heads:
        present = set(np.unique(labels).tolist())
        assert present <= set(NUMBERS.tolist())
        for part in parts:
            assert present & set(numbers_of(part)), part


def test_volumes_are_those_of_people(heads):
    for labels in heads:
        assert 350 < volume_ml(labels, "cerebral white matter") < 950
        assert 350 < volume_ml(labels, "cerebral cortex") < 950
        assert 80 < volume_ml(labels, "cerebellar cortex", "cerebellar white matter") < 250
        assert 4 < volume_ml(labels, "thalamus") < 25
        assert 3 < volume_ml(labels, "lateral ventricle") < 150


def test_heads_differ_in_ventricles_and_size(heads):
    ventricles = np.array([volume_ml(labels, "lateral ventricle") for labels in heads])
    sizes = np.array([(labels > 0).sum() * ML_4MM for labels in heads])
    assert ventricles.max() > 2 * ventricles.min()
    assert sizes.std() / sizes.mean() > 0.03


def test_left_and_right_are_alike_but_not_equal(heads):
    for labels in heads[:6]:
        left, right = (labels == 2).sum(), (labels == 41).sum()
        assert 0.75 < left / right < 1.33
        assert np.nonzero(labels == 2)[0].mean() < np.nonzero(labels == 41)[0].mean()
        assert not np.array_equal(labels == 2, (labels == 41)[::-1])


def test_one_seed_is_one_head_at_any_spacing(heads):
    fine = phantom_labels(0, (96, 108, 96), 2.0).labels
    for part in ("cerebral white matter", "thalamus", "lateral ventricle", "cerebellar cortex"):
        fine_ml = np.isin(fine, numbers_of(part)).sum() * 0.008
        assert volume_ml(heads[0], part) == pytest.approx(fine_ml, rel=0.12), part


def test_a_block_of_any_size_is_filled():
    labels = phantom_labels(1, (24, 32, 20), 1.0)
    assert labels.labels.shape == (24, 32, 20)
    assert np.isin(labels.labels, numbers_of("cerebral white matter", "thalamus")).any()
    assert np.allclose(labels.affine[:3, 3], [-11.5, -15.5, -9.5])


def test_the_skull_encloses_the_brain(heads):
    """From the middle outwards to the sides, bone comes after brain and skin after bone."""
    bone, skin = numbers_of("cortical bone", "cancellous bone"), numbers_of("skin", "soft tissue")
    for labels in heads[:6]:
        line = labels[:, SIZE[1] // 2, SIZE[2] // 2 + 6]
        first_bone, first_skin = (np.flatnonzero(np.isin(line, kind)) for kind in (bone, skin))
        cortex = np.flatnonzero(np.isin(line, numbers_of("cerebral cortex")))
        assert first_skin[0] < first_bone[0] < cortex[0] < cortex[-1] < first_bone[-1] < first_skin[-1]


def test_lesions_lie_in_white_matter_and_change_nothing_else(heads):
    for seed in range(3):
        drawn = phantom_labels(seed, SIZE, 4.0, lesion=True)
        assert drawn.lesion_mask is not None
        mask = drawn.lesion_mask
        assert mask.dtype == bool
        assert 0 < mask.sum() * ML_4MM < 20
        assert np.array_equal(mask, np.isin(drawn.labels, numbers_of("white matter lesion")))
        assert np.isin(heads[seed][mask], numbers_of("cerebral white matter")).all()
        assert np.array_equal(drawn.labels[~mask], heads[seed][~mask])


def test_lesions_are_bright_in_flair_and_dark_in_t1():
    flair = phantom(0, (64, 72, 64), 2.5, contrast="FLAIR", lesion=True)
    t1 = phantom(0, (64, 72, 64), 2.5, lesion=True)
    lesion = np.isin(t1.labels, numbers_of("white matter lesion"))
    # The bias field differs over the head, so the lesion is compared with white matter close to it;
    # in FLAIR it reaches the upper end of the grey scale.
    near = F.max_pool3d(torch.from_numpy(lesion)[None].float(), 7, stride=1, padding=3)[0].numpy() > 0
    white = near & np.isin(t1.labels, numbers_of("cerebral white matter"))
    assert np.median(flair.volume[0][lesion]) > 1.15 * np.median(flair.volume[0][white])
    assert np.median(t1.volume[0][lesion]) < 0.95 * np.median(t1.volume[0][white])


def test_stripped_phantoms_are_mostly_exact_zero():
    scan = phantom(2, (32, 36, 32), 6.0, stripped=True)
    assert (scan.volume == 0).mean() > 0.5
    assert scan.volume.shape == (1, 32, 36, 32)


def test_requests_that_make_no_sense_are_refused():
    with pytest.raises(UserError, match="size"):
        phantom_labels(0, (2, 64, 64))
    with pytest.raises(UserError, match="seed"):
        phantom_labels(-1)
    with pytest.raises(UserError, match="white matter"):
        phantom_labels(0, (4, 4, 4), 0.1, lesion=True)


def grid(n: int = 41, reach_mm: float = 40.0) -> torch.Tensor:
    axis = torch.linspace(-reach_mm, reach_mm, n)
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))


def test_depth_in_a_ball_is_radius_minus_distance():
    points = grid()
    distance = points.square().sum(dim=0).sqrt()
    depth = ellipsoid(points, (0, 0, 0), (20, 20, 20))
    assert torch.allclose(depth[distance > 0], 20 - distance[distance > 0], atol=1e-3)


def test_depth_in_a_chain_is_that_of_a_capsule():
    points = grid()
    depth = chain(points, [((-10, 0, 0), 8), ((10, 0, 0), 8)])
    beyond = (points[0].abs() - 10).clamp(min=0)
    expected = 8 - (beyond**2 + points[1] ** 2 + points[2] ** 2).sqrt()
    assert torch.allclose(depth, expected, atol=2e-2)


def test_a_union_contains_its_parts_and_a_sheet_ends_where_it_is_cut():
    points = grid()
    a, b = ellipsoid(points, (-8, 0, 0), (12, 12, 12)), ellipsoid(points, (8, 0, 0), (12, 12, 12))
    assert (union(a, b) >= torch.maximum(a, b) - 1e-4).all()
    distance = sheet(points[0], points[1] - 5)
    assert torch.allclose(distance[points[1] <= 5], points[0].abs()[points[1] <= 5])
    assert distance[20, -1, 0] == pytest.approx(35.0)


def test_folding_noise_has_its_period_and_its_zero_crossings_a_distance():
    noise = folding_noise(np.random.default_rng(0), 24.0)
    assert float(noise.std()) == pytest.approx(1.0, abs=1e-3)
    # The mean square slope of a field of wavelength p in three axes is (2 pi / p)^2.
    slope = sum(((noise.roll(-1, axis) - noise) / 3.75).square().mean() for axis in range(3))
    assert 2 * np.pi / float(slope) ** 0.5 == pytest.approx(24.0, rel=0.15)
    plane = grid()[0] * 0.01
    assert signed_distance(plane, 2.0)[30, 20, 20] == pytest.approx(20 / 1.25, rel=1e-3)
