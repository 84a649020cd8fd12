from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from neuromf.errors import UserError
from neuromf.reporting import figures
from neuromf.reporting.figures import (
    comparison_sheet,
    curves,
    histograms,
    montage,
    plane_image,
    spectrum_plot,
    three_planes,
)


def _marked(index: tuple[int, int, int]) -> np.ndarray:
    """A RAS+ volume (8, 10, 12) with one bright voxel."""
    volume = np.zeros((8, 10, 12), dtype=np.float32)
    volume[index] = 1
    return volume


def _where(image: np.ndarray) -> tuple[int, int]:
    row, column = np.unravel_index(image.argmax(), image.shape)
    return int(row), int(column)


def test_superior_is_up_anterior_left_in_sagittal_planes() -> None:
    image = plane_image(_marked((4, 9, 11)), "sagittal")  # most anterior, most superior
    assert image.shape == (12, 10)
    assert _where(image) == (0, 0)


def test_superior_is_up_and_left_is_left_in_coronal_planes() -> None:
    image = plane_image(_marked((0, 5, 11)), "coronal")  # leftmost, most superior
    assert image.shape == (12, 8)
    assert _where(image) == (0, 0)


def test_anterior_is_up_and_left_is_left_in_axial_planes() -> None:
    image = plane_image(_marked((0, 9, 6)), "axial")  # leftmost, most anterior
    assert image.shape == (10, 8)
    assert _where(image) == (0, 0)


def test_anisotropic_voxels_keep_their_proportions() -> None:
    assert plane_image(np.zeros((8, 10, 12)), "coronal", spacing_mm=(1, 1, 2.5)).shape == (30, 8)


def test_three_planes_lie_side_by_side_on_black() -> None:
    image = three_planes(np.ones((1, 8, 10, 12)))
    assert image.shape == (12, 10 + 8 + 8 + 2 * 2)
    assert image[0, -1] == 0  # the axial plane is lower
    assert image[6, -1] == 1


def test_a_grey_window_is_shared_by_all_panels(tmp_path) -> None:
    dim, bright = np.full((16, 16, 16), 0.25), np.full((16, 16, 16), 1.0)
    path = comparison_sheet({"dim": [dim], "bright": [bright]}, tmp_path / "sheet.png")
    pixels = np.asarray(Image.open(path).convert("L"))
    half = pixels.shape[0] // 2
    right = pixels[:, 3 * pixels.shape[1] // 4 :]
    assert 55 < np.median(right[:half]) < 75  # 0.25 of 255
    assert np.median(right[half:]) == 255


def test_pictures_are_written_and_named_png(tmp_path) -> None:
    volume = np.random.default_rng(0).random((8, 10, 12))
    paths = [
        montage([volume] * 5, list("abcde"), tmp_path / "m.png", columns=2, heading="five"),
        comparison_sheet({"real": [volume] * 2, "MeanFlow: 1 NFE": [volume]}, tmp_path / "s.png", heading="x"),
        curves(
            {"loss": {"train": ([1, 2, 3], [1.0, float("nan"), 0.1])}, "lr": {}}, tmp_path / "c.png", log_y=["loss"]
        ),
        spectrum_plot([0.1, 0.2], {"real": np.ones((3, 2)), "zero": np.zeros((1, 2))}, tmp_path / "p.png"),
        histograms({"a": volume, "constant": np.ones(4)}, tmp_path / "h.png"),
    ]
    for path in paths:
        with Image.open(path) as image:
            assert image.format == "PNG"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.png", "h.png", "m.png", "p.png", "s.png"]


def test_curves_take_a_logarithmic_axis_where_it_shows_more(tmp_path, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    values = {"wide": [1, 100], "narrow": [1, 2], "negative": [-1, 100], "none": [], "not asked": [1, 100]}
    panels = {title: {"a": (range(len(y)), y), "b": (range(len(y)), y)} for title, y in values.items()}
    curves(panels, tmp_path / "c.png", log_y=["wide", "narrow", "negative", "none"], levels={"narrow": 1.5})
    axes = drawn[0].axes
    assert [one.get_yscale() for one in axes[:5]] == ["log", "linear", "linear", "linear", "linear"]
    assert [len(one.lines) for one in axes[:5]] == [2, 3, 2, 2, 2]
    assert not axes[5].get_visible()


def test_nothing_to_draw_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="at least one"):
        montage([], [], tmp_path / "m.png")
    with pytest.raises(ValueError, match="at least one"):
        comparison_sheet({"real": []}, tmp_path / "s.png")
    with pytest.raises(ValueError, match="three axes"):
        plane_image(np.zeros((4, 4)), "axial")


def test_an_unwritable_place_is_the_users_error(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not write"):
        histograms({"a": np.arange(4)}, tmp_path / "file" / "h.png")
