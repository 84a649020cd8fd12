from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib.image import imread

from neuromf.reporting.torus import torus_figure

LOSSES = {"validation": ([1, 2, 3], [3.0, 2.0, 1.0]), "training": ([1, 2, 3], [3.5, 2.5, 1.5])}


def draw(path, points, truth, angles=None):
    generator = np.random.default_rng(0)
    angles = generator.uniform(-math.pi, math.pi, (200, 2)) if angles is None else angles
    torus_figure(
        path, losses=LOSSES, angles=angles, distance=np.full(len(angles), 0.03), points=points, truth=truth, heading="x"
    )
    assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    return imread(path)


@pytest.fixture
def circle():
    turn = np.linspace(0, 2 * math.pi, 100)
    pair = np.stack([np.cos(turn), np.sin(turn)], 1) * math.sqrt(0.5)
    return np.concatenate([pair, pair], 1).reshape(-1, 4, 1, 1, 1)


def test_points_off_the_torus_are_seen(tmp_path, circle):
    on, off = draw(tmp_path / "on.png", circle, circle), draw(tmp_path / "off.png", 0.5 * circle, circle)
    assert on.shape == off.shape
    third = slice(on.shape[1] // 2, 3 * on.shape[1] // 4)
    assert np.abs(on[:, third] - off[:, third]).mean() > 0.001


def test_uneven_angles_are_seen(tmp_path, circle):
    even = draw(tmp_path / "even.png", circle, circle)
    uneven = draw(tmp_path / "uneven.png", circle, circle, np.zeros((200, 2)))
    last = slice(3 * even.shape[1] // 4, None)
    assert np.abs(even[:, last] - uneven[:, last]).mean() > 0.05


@pytest.mark.parametrize("count", [1, 4])
def test_volumes_are_drawn_as_slices(tmp_path, count):
    volumes = np.random.default_rng(1).uniform(size=(count, 4, 8, 8, 8))
    same, other = draw(tmp_path / "a.png", volumes, volumes), draw(tmp_path / "b.png", 0 * volumes, volumes)
    assert np.abs(same - other).mean() > 0.002
