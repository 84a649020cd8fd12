from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from neuromf.reporting.overview import overview
from neuromf.reporting.paper_figures import Group, by_evaluations, sweep, two_ways

GROUPS = [Group("1.5", [3.0, 3.2], 3.1, 1.8, 4.4), Group("2", [2.0, 2.4], 2.2, -0.3, 4.7), Group("3", [5.0], 5.0)]


def written(files: list[Path]) -> np.ndarray:
    """Both formats are there and whole; the PNG's pixels."""
    png, pdf = files
    content = pdf.read_bytes()
    assert content.startswith(b"%PDF")
    assert content.rstrip().endswith(b"%%EOF")
    return np.asarray(Image.open(png).convert("RGB"))


def test_the_overview_is_drawn_in_vectors_and_the_same_each_time(tmp_path: Path) -> None:
    files = overview(tmp_path / "one", prediction="x", latent="8 x 8 x 8 x 8", volume="32 x 32 x 32")
    written(files)
    pdf = files[1].read_bytes()
    assert b"/Subtype /Image" not in pdf
    assert (
        overview(tmp_path / "two", prediction="x", latent="8 x 8 x 8 x 8", volume="32 x 32 x 32")[1].read_bytes() == pdf
    )
    assert overview(tmp_path / "three", prediction="u")[1].read_bytes() != pdf


def test_quality_by_evaluations_has_a_line_for_each_model(tmp_path: Path) -> None:
    models = {"MeanFlow": {1: [2.0, 2.1], 10: [1.8]}, "rectified flow": {1: [40.0], 10: [3.0]}}
    both = written(by_evaluations(models, "frechet_builtin", tmp_path / "both"))
    one = written(by_evaluations({"MeanFlow": models["MeanFlow"]}, "frechet_builtin", tmp_path / "one"))
    red = np.array([0xD1, 0x49, 0x5B])
    assert (np.abs(both.astype(int) - red).max(-1) < 8).any()
    assert not (np.abs(one.astype(int) - red).max(-1) < 8).any()


def test_a_sweep_and_two_ways_are_drawn_with_and_without_intervals(tmp_path: Path) -> None:
    written(sweep(GROUPS, "frechet_builtin", "p", tmp_path / "sweep"))
    written(sweep([g._replace(name=f"level {g.name}") for g in GROUPS], "m", "variant", tmp_path / "named"))
    curves = {"1.5": [([1, 2, 3], [3.0, 2.0, 1.0])], "2": [([1, 2], [2.0, 1.5]), ([1, 2], [2.1, 1.4])]}
    written(two_ways(GROUPS[:2], curves, "m", "prediction", tmp_path / "ways"))
    written(two_ways(GROUPS[:2], {}, "m", "prediction", tmp_path / "without"))
