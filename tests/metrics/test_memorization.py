from __future__ import annotations

import pytest
import torch

from neuromf.errors import UserError
from neuromf.metrics.memorization import audit, nearest_neighbours, pixel_codes


def _volumes(n: int, seed: int) -> torch.Tensor:
    coarse = torch.rand(n, 1, 6, 6, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=24, mode="trilinear")


def test_code_distances_are_root_mean_square_intensity_differences() -> None:
    a = torch.full((1, 1, 20, 24, 30), 0.25)
    plain, mirrored = pixel_codes(torch.cat([a, a + 0.5]))
    assert plain.shape == (2, 16**3)
    assert float((plain[0] - plain[1]).norm()) == pytest.approx(0.5, rel=1e-5)
    torch.testing.assert_close(plain, mirrored)


def test_copies_and_mirrored_copies_are_found_and_flagged() -> None:
    train, held_back, fresh = _volumes(60, 0), _volumes(100, 1), _volumes(30, 2)
    noise = 0.02 * torch.randn(10, 1, 24, 24, 24, generator=torch.Generator().manual_seed(3))
    copies = train[:10] + noise
    copies[5:] = copies[5:].flip(2)
    reference, _ = pixel_codes(train)
    neighbours = nearest_neighbours(*pixel_codes(torch.cat([copies, fresh])), reference)
    assert neighbours.nearest[:10].tolist() == list(range(10))
    assert neighbours.mirrored[:10].tolist() == [False] * 5 + [True] * 5

    result = audit(neighbours, nearest_neighbours(*pixel_codes(held_back), reference), pairs=10)
    assert result.share == pytest.approx(10 / 40, abs=2 / 40)
    assert {(i, j) for i, j, _ in result.closest} == {(i, i) for i in range(10)}
    assert set(range(10)) <= set(result.flagged)
    assert len(result.flagged) == round(40 * result.share)
    assert result.n_baseline == 100


def test_fresh_volumes_are_rarely_flagged() -> None:
    reference, _ = pixel_codes(_volumes(60, 0))
    fresh, held_back = (nearest_neighbours(*pixel_codes(_volumes(100, s)), reference) for s in (4, 5))
    assert audit(fresh, held_back).share <= 0.05


def test_a_baseline_inside_the_training_set_is_refused() -> None:
    reference, mirrored = pixel_codes(_volumes(10, 0))
    inside = nearest_neighbours(reference, mirrored, reference)
    with pytest.raises(UserError, match="also in the training"):
        audit(inside, inside)
