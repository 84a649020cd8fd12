from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from neuromf.errors import UserError
from neuromf.reporting.sprites import Sprite, embedded, sprites


def _grey(sprite: Sprite) -> np.ndarray:
    """(I, J, K) as a page unpacks it."""
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(sprite.data.partition(",")[2]))), dtype=float)
    i, j, k = sprite.size
    width, height = sprite.tile
    tiles = [divmod(n, sprite.columns) for n in range(k)]
    slices = [sheet[row * height : row * height + j, column * width : column * width + i].T for row, column in tiles]
    return np.stack(slices, axis=-1) / 255


def _smooth(shape: tuple[int, int, int]) -> np.ndarray:
    """A volume that differs along every axis, from 0 to 1."""
    i, j, k = np.meshgrid(*[np.linspace(0, 1, n) for n in shape], indexing="ij")
    return (0.5 * i + 0.3 * j**2 + 0.2 * k).astype(np.float32)


def test_a_volume_comes_back_from_its_picture() -> None:
    volume = _smooth((20, 27, 13))
    carried = sprites([volume, volume[None]], 10**6, spacing_mm=(1, 1, 2))
    assert carried.note == ""
    for sprite in carried.items:
        assert sprite.size == (20, 27, 13)
        assert sprite.mm == (20.0, 27.0, 26.0)
        assert np.abs(_grey(sprite) - volume).max() < 0.03


def test_neighbouring_slices_do_not_run_into_one_another() -> None:
    volume = np.zeros((9, 9, 4), dtype=np.float32)
    volume[:, :, 1::2] = 1
    grey = _grey(sprites([volume], 10**6).items[0])
    assert np.abs(grey - volume).max() < 0.02


def test_what_exceeds_the_budget_is_carried_coarser_and_that_is_said() -> None:
    volume = np.random.default_rng(0).random((40, 40, 40)).astype(np.float32)
    whole = sprites([volume] * 2, 10**7).items
    budget = sum(len(sprite.data) for sprite in whole) // 6
    carried = sprites([volume] * 2, budget)
    assert sum(len(sprite.data) for sprite in carried.items) <= budget
    assert carried.items[0].size == (20, 20, 20)
    assert carried.items[0].mm == (40.0, 40.0, 40.0)
    assert "1/2 of the resolution" in carried.note


def test_a_budget_that_nothing_fits_is_refused() -> None:
    with pytest.raises(UserError, match="do not fit"):
        sprites([_smooth((32, 32, 32))], 200)


def test_values_outside_the_window_and_not_finite_are_black_or_white() -> None:
    volume = np.zeros((8, 8, 8), dtype=np.float32)
    volume[:, :, 2:], volume[:, :, :2] = 7, np.nan
    grey = _grey(sprites([volume], 10**6).items[0])
    assert grey[..., 2:].min() > 0.97
    assert grey[..., :2].max() < 0.03


def test_a_large_picture_is_made_to_fit_and_a_small_one_is_kept_as_it_is(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (900, 1800, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    Image.fromarray(noise[:20, :20]).save(tmp_path / "small.png")
    small = embedded(tmp_path / "small.png", 100_000)
    assert base64.b64decode(small.partition(",")[2]) == (tmp_path / "small.png").read_bytes()
    large = embedded(tmp_path / "large.png", 300_000)
    assert large.startswith("data:image/jpeg")
    assert len(large) <= 300_000


def test_a_damaged_picture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="not a readable picture"):
        embedded(tmp_path / "a.png", 1000)
