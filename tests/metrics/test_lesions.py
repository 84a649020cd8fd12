"""Overlap, volume and place of masks, against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from neuromf.metrics.lesions import agreement, describe_masks, dice, nearest_dice

AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])
AFFINE[:3, 3] = -10


def box(start: int, stop: int) -> np.ndarray:
    mask = np.zeros((12, 12, 12), dtype=bool)
    mask[start:stop, 2:4, 2:4] = True
    return mask


def test_dice_is_twice_the_overlap_over_the_sum() -> None:
    assert dice(box(0, 4), box(2, 6)) == 0.5
    assert dice(box(0, 4), box(0, 4)) == 1
    assert dice(box(0, 4), box(6, 8)) == 0
    nothing = np.zeros((2, 2, 2), dtype=bool)
    assert dice(nothing, nothing) == 1


def test_masks_are_measured_in_ml_and_mm() -> None:
    found = describe_masks(np.stack([box(0, 4), box(0, 2) | box(6, 8), np.zeros_like(box(0, 1))]), AFFINE)
    assert found.volume_ml.tolist() == pytest.approx([16 * 0.008, 16 * 0.008, 0])
    assert found.parts.tolist() == [1, 2, 0]
    assert found.centre_mm[0].tolist() == [2 * 1.5 - 10, 2 * 2.5 - 10, 2 * 2.5 - 10]
    assert np.isnan(found.centre_mm[2]).all()


def test_the_nearest_is_the_one_with_most_overlap() -> None:
    masks, known = np.stack([box(0, 4), box(8, 10)]), np.stack([box(0, 2), box(1, 5), box(6, 7)])
    assert nearest_dice(masks, known).tolist() == pytest.approx([0.75, 0.0])


def test_agreement_goes_mask_by_mask() -> None:
    assert agreement(np.stack([box(0, 4), box(0, 4)]), np.stack([box(0, 4), box(2, 6)])).tolist() == [1.0, 0.5]
