"""Labels in, MRI out: paint a label map with T1- or FLAIR-like grey values and what a scanner adds.

The idea of SynthSeg (Billot et al., Medical Image Analysis 2023) for two known contrasts: bend the anatomy, give
each tissue a mean and a grain, average to the voxel size, then add blur, bias field, noise and a grey scale.
Geometry and appearance have their own random streams: one seed gives the same head in both contrasts,
whole or stripped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from neuromf.data.fields import Size, bending, blur, normal, one_thread, rotation, smooth_field, upsample
from neuromf.data.label_maps import LabelMap, load_label_map
from neuromf.data.label_table import (
    CONTRASTS,
    IS_BRAIN,
    IS_HEAD,
    LABELS,
    MIRROR_ROWS,
    NUMBERS,
    TISSUE_OF_ROW,
    TISSUES,
    Contrast,
)
from neuromf.errors import UserError, did_you_mean

__all__ = ["LabelMap", "Rendering", "check_grid", "load_label_map", "render"]

_GEOMETRY, _APPEARANCE = 0, 1  # the random streams of one seed
_WHITE_T1 = next(tissue.t1 for tissue in TISSUES if tissue.name == "white")
_BEND_KNOT_MM, _BEND_MAX_SD_MM = 27.0, 2.0
_BIAS_KNOT_MM, _GRAIN_KNOT_MM = 64.0, 12.0
_GRAIN_MAX = np.where(IS_HEAD, 24.0, 14.0)  # the head outside the brain mixes fat and muscle in one label


class Rendering(NamedTuple):
    """A synthetic scan: `volume` (1, I, J, K) float32 in [0, 1], `labels` (I, J, K) int16, `affine` (4, 4) to mm."""

    volume: np.ndarray
    labels: np.ndarray
    affine: np.ndarray


class _Grid(NamedTuple):
    """Output voxels: their count, edge, and the scanner position of the middle of the block."""

    size: Size
    spacing_mm: float
    centre_mm: np.ndarray

    @property
    def extent_mm(self) -> tuple[float, float, float]:
        i, j, k = (n * self.spacing_mm for n in self.size)
        return i, j, k

    @property
    def affine(self) -> np.ndarray:
        affine = np.diag([self.spacing_mm] * 3 + [1.0])
        affine[:3, 3] = self.centre_mm - (np.array(self.size) - 1) / 2 * self.spacing_mm
        return affine


class _Pose(NamedTuple):
    """How the head lies in the scanner: matrix (3, 3) with shift (3,) in mm, bending (3, i, j, k) in mm, mirrored."""

    matrix: np.ndarray
    shift_mm: np.ndarray
    bend_mm: torch.Tensor | None
    mirrored: bool


@one_thread()
def render(
    label_map: LabelMap,
    seed: int,
    *,
    size: Size = (64, 64, 64),
    spacing_mm: float = 3.0,
    contrast: Contrast = "T1",
    stripped: bool = False,
    supersample: int = 2,
    deform: bool = True,
    affine_jitter: bool = True,
    centre_mm: Sequence[float] | None = None,
) -> Rendering:
    """Render one synthetic scan of a label map; the same seed gives the same bits.

    Args:
        label_map: FreeSurfer/SynthSeg numbers, RAS+ (see `load_label_map`).
        seed: any whole number >= 0; decides pose, bending, grey values, grain, bias field and noise.
        size: voxels (I, J, K) of the result.
        spacing_mm: edge of its cubic voxels.
        contrast: "T1", or "FLAIR" (dark fluid, bright lesions; means in `label_table.TISSUES`).
        stripped: keep the brain and one voxel around it; everything else is exactly 0.
        supersample: fine voxels per output voxel and axis; averaging them makes partial volume.
        deform: bend the anatomy smoothly and without folds.
        affine_jitter: turn, scale, shear, shift, and mirror half of the heads.
        centre_mm: scanner position (3,) of the middle of the result; by default the middle of the brain.

    Raises:
        UserError: a contrast, size, spacing, seed or supersampling that makes no sense.

    Example:
        >>> scan = render(load_label_map("seg.nii.gz"), seed=0, size=(48, 64, 48), spacing_mm=1.0)
        >>> scan.volume.shape
        (1, 48, 64, 48)
    """
    check_grid(seed, size, spacing_mm)
    if contrast not in CONTRASTS:
        raise UserError(f"no contrast '{contrast}'", did_you_mean(contrast, CONTRASTS))
    if supersample < 1:
        raise UserError(f"supersample {supersample} is not usable", "give 1 or more fine voxels per voxel")
    centre = label_map.brain_centre_mm if centre_mm is None else np.asarray(centre_mm, dtype=np.float64)
    grid = _Grid(size, spacing_mm, centre)
    pose = _draw_pose(np.random.default_rng([_GEOMETRY, seed]), grid, deform, affine_jitter)
    fine = _fetch_rows(label_map, grid, pose, supersample)
    rows = _fetch_rows(label_map, grid, pose, 1)
    if stripped:
        is_head = torch.from_numpy(IS_HEAD)
        fine, rows = fine * ~is_head[fine.int()], rows * ~is_head[rows.int()]

    rng = np.random.default_rng([_APPEARANCE, seed])
    means, grain = _draw_grey_values(rng, contrast)
    volume = _paint(rng, fine, means, grain, grid, supersample)
    volume = _scan(rng, volume, grid, white=float(means[NUMBERS == 2][0]))
    volume = _grey_scale(rng, volume, rows > 0)
    if stripped:
        near_brain = _dilate(torch.from_numpy(IS_BRAIN)[rows.int()])
        volume, rows = volume * near_brain, rows * near_brain
    return Rendering(volume[None].numpy(), NUMBERS[rows.numpy()], grid.affine)


def check_grid(seed: int, size: Size, spacing_mm: float) -> None:
    """Refuse a seed, size or spacing that makes no sense.

    Raises:
        UserError: saying what is allowed.
    """
    if len(size) != 3 or min(size) < 4:
        raise UserError(f"size {tuple(size)} is not usable", "give three numbers of voxels, each 4 or more")
    if not 0 < spacing_mm < float("inf"):
        raise UserError(f"spacing {spacing_mm} mm is not usable", "give a voxel edge above 0 mm")
    if seed < 0:
        raise UserError(f"seed {seed} is not usable", "give a whole number of 0 or more")


def _draw_pose(rng: np.random.Generator, grid: _Grid, deform: bool, affine_jitter: bool) -> _Pose:
    """Draw how the head lies; both parts are always drawn, so that switching one off keeps the other."""
    turn = rotation(rng.uniform(-8, 8, 3))
    scale = np.diag((1 + rng.uniform(-0.08, 0.08)) * (1 + rng.uniform(-0.03, 0.03, 3)))
    shear = np.eye(3)
    shear[[0, 0, 1], [1, 2, 2]] = rng.uniform(-0.02, 0.02, 3)
    shift_mm = rng.uniform(-4, 4, 3)
    mirrored = bool(rng.random() < 0.5)
    sd_mm = rng.uniform(0, _BEND_MAX_SD_MM)
    bend_mm = bending(rng, grid.extent_mm, sd_mm, _BEND_KNOT_MM) if deform else None
    if not affine_jitter:
        return _Pose(np.eye(3), np.zeros(3), bend_mm, False)
    mirror = np.diag([-1.0 if mirrored else 1.0, 1.0, 1.0])
    return _Pose(turn @ scale @ shear @ mirror, shift_mm, bend_mm, mirrored)


def _fetch_rows(label_map: LabelMap, grid: _Grid, pose: _Pose, supersample: int) -> torch.Tensor:
    """Nearest label row (uint8) at each of the `supersample`-times finer voxels; air outside the map."""
    i, j, k = (n * supersample for n in grid.size)
    step = grid.spacing_mm / supersample
    to_voxel = np.linalg.inv(label_map.affine)
    matrix = torch.from_numpy(to_voxel[:3, :3] @ pose.matrix).float()
    offset = to_voxel[:3, :3] @ (grid.centre_mm + pose.shift_mm) + to_voxel[:3, 3]
    x, y, z = ((torch.arange(n, dtype=torch.float32) - (n - 1) / 2) * step for n in (i, j, k))
    bend = None
    if pose.bend_mm is not None:
        bend = upsample(torch.einsum("ab,bijk->aijk", matrix, pose.bend_mm), (i, j, k))
    flat = torch.zeros((i, j, k), dtype=torch.int32)
    inside = torch.ones((i, j, k), dtype=torch.bool)
    for axis, length in enumerate(label_map.labels.shape):
        m, o = matrix[axis], float(offset[axis])
        position = (m[0] * x + o)[:, None, None] + ((m[1] * y)[:, None] + m[2] * z)
        if bend is not None:
            position += bend[axis]
        index = position.round_().int()
        inside &= (index >= 0) & (index < length)
        flat = flat * length + index.clamp_(0, length - 1)
    rows = torch.from_numpy(label_map.rows.reshape(-1))[flat.view(-1)].view(i, j, k) * inside
    return torch.from_numpy(MIRROR_ROWS)[rows.int()] if pose.mirrored else rows


def _draw_grey_values(rng: np.random.Generator, contrast: Contrast) -> tuple[np.ndarray, np.ndarray]:
    """Draw mean and grain of each label row, on the 0..255 scale of the label table."""
    strong = np.array([tissue.t1 for tissue in TISSUES])
    flat = np.array([tissue.t1_flat * _WHITE_T1 or tissue.t1 for tissue in TISSUES])
    flair = np.array([tissue.flair * _WHITE_T1 for tissue in TISSUES])
    spread = np.array([tissue.t1_sd for tissue in TISSUES])
    weight = rng.uniform(0, 0.8)
    level = (1 - weight) * strong + weight * flat
    if contrast == "FLAIR":
        spread, level = spread * flair / strong / 2, flair
    level = level + 0.5 * spread * rng.standard_normal(len(TISSUES))
    means = level[TISSUE_OF_ROW] + 1.5 * rng.standard_normal(len(LABELS))
    is_fluid = np.array([label.tissue == "csf" for label in LABELS])
    means = np.where(is_fluid, np.minimum(means, 60 - rng.uniform(0, 10)), means).clip(min=0)
    grain = np.array([tissue.grain for tissue in TISSUES])[TISSUE_OF_ROW] * 0.35
    grain = np.minimum(grain * rng.uniform(0.7, 1.3, len(LABELS)), _GRAIN_MAX)
    return means.astype(np.float32), grain.astype(np.float32)


def _paint(
    rng: np.random.Generator,
    rows: torch.Tensor,
    means: np.ndarray,
    grain: np.ndarray,
    grid: _Grid,
    supersample: int,
) -> torch.Tensor:
    """Give each fine voxel its grey value, then average down to (I, J, K): partial volume."""
    flat = rows.view(-1).int()
    i, j, k = rows.shape
    slow = upsample(smooth_field(rng, grid.size, grid.extent_mm, _GRAIN_KNOT_MM), (i, j, k))
    texture = normal(rng, i * j * k).mul_(0.65).add_(slow.view(-1), alpha=0.56)
    texture.mul_(torch.from_numpy(grain)[flat]).add_(torch.from_numpy(means)[flat])
    return F.avg_pool3d(texture.view(1, 1, i, j, k), supersample)[0, 0]


def _scan(rng: np.random.Generator, volume: torch.Tensor, grid: _Grid, white: float) -> torch.Tensor:
    """Blur by the coil and sequence, a slowly varying gain, and Rician noise."""
    volume = blur(volume, rng.uniform(0.25, 0.6))
    bias = smooth_field(rng, grid.size, grid.extent_mm, _BIAS_KNOT_MM)[0] * rng.uniform(0, 0.2)
    real, imaginary = normal(rng, 2, *grid.size) * (rng.uniform(0, 0.015) * white)
    return torch.hypot(volume * bias.exp() + real, imaginary)


def _grey_scale(rng: np.random.Generator, volume: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Divide by the 99.5th percentile inside the head, clip to [0, 1], and apply a mild gamma."""
    values = volume[inside].numpy() if bool(inside.any()) else volume.numpy()
    top = max(float(np.percentile(values, 99.5)), 1e-6)
    return (volume / top).clamp(0, 1) ** float(np.exp(rng.uniform(-0.12, 0.12)))


def _dilate(mask: torch.Tensor) -> torch.Tensor:
    """Grow a mask (I, J, K) by one voxel in every direction."""
    return F.max_pool3d(mask[None, None].float(), 3, stride=1, padding=1)[0, 0] > 0
