"""Training volumes of the built-in autoencoder: label maps, templates and random shapes in any contrast.

An autoencoder must code scans it has never seen, so the pool is broader than any data set: real anatomy in
random contrasts (the idea of SynthSeg, Billot et al. 2023), T1-like renderings, templates with random grey
scales, 1/f texture, and shapes without any meaning; voxels of 0.8 to 3.2 mm, with and without skull.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from neuromf.data.fields import bending, blur, normal, smooth_field, upsample
from neuromf.data.label_maps import LabelMap
from neuromf.data.label_table import IS_BRAIN, IS_HEAD, NUMBERS, TISSUE_OF_ROW, TISSUES
from neuromf.data.rendering import render
from neuromf.data.volumes import Volume
from neuromf.files import atomic_path

_T1_LEVEL = np.array([tissue.t1 for tissue in TISSUES], dtype=np.float32)[TISSUE_OF_ROW] / 165.0
_AIR = int(np.flatnonzero(NUMBERS == 0)[0])


@dataclass(frozen=True)
class PoolSettings:
    """What a training volume is drawn from.

    Attributes:
        size: voxels per axis of each (cubic) training volume.
        spacing_mm: range of voxel sizes, drawn log-uniformly.
        renderings, random_contrast, templates, shapes: weights of the four kinds.
        stripped_share: share of label-map volumes without skull and skin.
        max_noise: largest Rician noise (share of the white level).
        padded_share: share of volumes with a blank border, as cropped scans have on a common grid.
    """

    size: int = 64
    spacing_mm: tuple[float, float] = (0.8, 3.2)
    renderings: float = 0.3
    random_contrast: float = 0.35
    templates: float = 0.25
    shapes: float = 0.1
    stripped_share: float = 0.5
    max_noise: float = 0.04
    padded_share: float = 0.2


class Sources(NamedTuple):
    """Anatomy to draw from: label maps and template volumes (any spacing, RAS+)."""

    label_maps: Sequence[LabelMap]
    templates: Sequence[Volume]


def draw_volume(sources: Sources, seed: int, settings: PoolSettings) -> Tensor:
    """Draw one training volume (I, J, K) float32, >= 0 with the 99.5th percentile near 1; seed decides all."""
    rng = np.random.default_rng([7, seed])
    n = (settings.size,) * 3
    spacing = float(np.exp(rng.uniform(*np.log(settings.spacing_mm))))
    kinds = {
        "renderings": settings.renderings * bool(sources.label_maps),
        "random_contrast": settings.random_contrast * bool(sources.label_maps),
        "templates": settings.templates * bool(sources.templates),
        "shapes": settings.shapes,
    }
    weights = np.array(list(kinds.values()))
    kind = rng.choice(list(kinds), p=weights / weights.sum())
    if kind == "renderings":
        volume = _rendering(rng, sources.label_maps, n, spacing, settings.stripped_share)
    elif kind == "random_contrast":
        volume = _random_contrast(rng, sources.label_maps, n, spacing, settings.stripped_share)
    elif kind == "templates":
        volume = _template(rng, sources.templates, n, spacing)
    else:
        volume = _shapes(rng, n, spacing)
    return _scan(rng, volume, spacing, settings)


def _rendering(
    rng: np.random.Generator, maps: Sequence[LabelMap], n: tuple[int, int, int], spacing: float, stripped_share: float
) -> Tensor:
    """A T1- or FLAIR-like rendering around a random place of the head."""
    label_map = maps[int(rng.integers(len(maps)))]
    scan = render(
        label_map,
        int(rng.integers(2**31)),
        size=n,
        spacing_mm=spacing,
        contrast="T1" if rng.random() < 0.8 else "FLAIR",
        stripped=bool(rng.random() < stripped_share),
        centre_mm=_centre(rng, label_map, n[0] * spacing).tolist(),
    )
    return torch.from_numpy(scan.volume[0])


def _random_contrast(
    rng: np.random.Generator, maps: Sequence[LabelMap], n: tuple[int, int, int], spacing: float, stripped_share: float
) -> Tensor:
    """Real anatomy, every label with a random grey value and grain; partial volume by averaging 2^3 voxels."""
    label_map = maps[int(rng.integers(len(maps)))]
    fine = (2 * n[0], 2 * n[1], 2 * n[2])
    rows = _labels_at(rng, label_map, fine, spacing / 2, _centre(rng, label_map, n[0] * spacing))
    levels = rng.uniform(0, 1, len(NUMBERS)).astype(np.float32)
    if rng.random() < 0.4:  # T1-like order of the tissues, but a wide spread
        levels = _T1_LEVEL * rng.uniform(0.75, 1.3, len(NUMBERS)).astype(np.float32)
    levels[_AIR] = rng.uniform(0, 0.04)
    if rng.random() < stripped_share:
        levels = np.where(IS_HEAD, levels[_AIR], levels)
    grain = rng.uniform(0, 0.16, len(NUMBERS)) ** 1.5 * 2 * np.where(IS_BRAIN, 1.0, 1.6)
    grain[_AIR] = 0
    index = rows.view(-1).int()
    texture = _fractal(rng, fine).view(-1)
    volume = torch.from_numpy(levels)[index] + texture * torch.from_numpy(grain.astype(np.float32))[index]
    volume = volume.view(fine).clamp(min=0)
    volume = blur(volume, float(rng.uniform(0.4, 1.0)))  # hides the steps of 1 mm labels
    return F.avg_pool3d(volume[None, None], 2)[0, 0]


def _template(rng: np.random.Generator, templates: Sequence[Volume], n: tuple[int, int, int], spacing: float) -> Tensor:
    """A template, moved, sharpened, with texture in its tissue and often another grey scale."""
    template = templates[int(rng.integers(len(templates)))]
    array = torch.from_numpy(np.ascontiguousarray(template.array, dtype=np.float32))
    array = array / max(float(np.percentile(template.array, 99.5)), 1e-6)
    shape = np.array(array.shape)
    spacing = max(spacing, 0.9 * float(np.linalg.norm(template.affine[:3, 0])))
    reach = np.maximum(0, (shape - 1) / 2 - 0.25 * n[0] * spacing / np.linalg.norm(template.affine[:3, :3], axis=0))
    centre_voxel = (shape - 1) / 2 + rng.uniform(-1, 1, 3) * reach * 0.8
    centre = template.affine[:3, :3] @ centre_voxel + template.affine[:3, 3]
    position = _positions(rng, template.affine, n, spacing, centre)
    unit = [2 * p / (length - 1) - 1 for p, length in zip(position, shape, strict=True)]
    grid = torch.stack(unit[::-1], dim=-1)[None]
    volume = F.grid_sample(array[None, None], grid, padding_mode="zeros", align_corners=True)[0, 0]
    if rng.random() < 0.7:
        volume = volume + float(rng.uniform(0, 1.6)) * (volume - blur(volume, 1.0))
    volume = volume.clamp(min=0)
    tissue = (volume / 0.2).clamp(max=1)
    if rng.random() < 0.4:  # another contrast: a random curve through 0
        knots = np.concatenate([[0.0], rng.uniform(0, 1, 6), [0.5]]).astype(np.float32)
        x = (volume * 5).clamp(0, 5.999)
        low = x.floor().long()
        curve = torch.from_numpy(knots)
        volume = curve[low] + (curve[low + 1] - curve[low]) * (x - low)
    return (volume + tissue * float(rng.uniform(0, 0.1)) * _fractal(rng, n)).clamp(min=0)


def _shapes(rng: np.random.Generator, n: tuple[int, int, int], spacing: float) -> Tensor:
    """Blobs of random size and grey value, cut from a few smooth random fields."""
    fine = (2 * n[0], 2 * n[1], 2 * n[2])
    extent = [m * 1.0 for m in fine]
    knot = float(np.exp(rng.uniform(np.log(6), np.log(30))))
    fields = smooth_field(rng, fine, extent, knot, channels=int(rng.integers(3, 8)))
    levels = torch.from_numpy(rng.uniform(0, 1, len(fields)).astype(np.float32))
    levels[0] = 0.0
    volume = levels[fields.argmax(0)]
    volume = volume + (volume > 0) * float(rng.uniform(0, 0.15)) * _fractal(rng, fine)
    volume = blur(volume.clamp(min=0), float(rng.uniform(0.4, 1.2)))
    return F.avg_pool3d(volume[None, None], 2)[0, 0]


def _scan(rng: np.random.Generator, volume: Tensor, spacing: float, settings: PoolSettings) -> Tensor:
    """Blur, bias field, noise, grey scale and blank borders."""
    n = (volume.shape[0], volume.shape[1], volume.shape[2])
    if rng.random() < 0.5:
        volume = blur(volume, float(rng.uniform(0.2, 0.7)))
    extent = [m * spacing for m in n]
    volume = volume * (smooth_field(rng, n, extent, 60.0)[0] * float(rng.uniform(0, 0.25))).exp()
    top = max(float(np.percentile(volume.numpy(), 99.5)), 1e-3)
    sigma = settings.max_noise * float(rng.uniform()) ** 2
    blank = volume <= 0.0
    volume = torch.hypot(volume / top + sigma * normal(rng, *n), sigma * normal(rng, *n))
    if rng.random() < 0.5:  # as after skull stripping: nothing outside, not even noise
        volume = volume.masked_fill(blank, 0.0)
    volume = volume.clamp(min=0) ** float(np.exp(rng.uniform(-0.3, 0.3)))
    if rng.random() < settings.padded_share:
        for axis in range(3):
            low, high = rng.integers(0, n[axis] // 4, 2)
            volume.narrow(axis, 0, int(low)).zero_()
            volume.narrow(axis, n[axis] - int(high), int(high)).zero_()
    return (volume * float(rng.uniform(0.8, 1.1))).clamp(max=2.0)


def _centre(rng: np.random.Generator, label_map: LabelMap, extent_mm: float) -> np.ndarray:
    """A random place: anywhere in the brain's box for small fields of view, near its middle for large ones."""
    low, high = label_map.brain_box_mm
    reach = np.maximum(8.0, (high - low) / 2 + 15.0 - extent_mm / 4)
    return label_map.brain_centre_mm + rng.uniform(-1, 1, 3) * reach


def _positions(
    rng: np.random.Generator, affine: np.ndarray, n: tuple[int, int, int], step: float, centre: np.ndarray
) -> list[Tensor]:
    """Voxel coordinates, one (I, J, K) array per axis, of a turned, mirrored and bent grid around `centre`."""
    turn = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(rng.uniform(-20, 20, 3))):
        a, b = [other for other in range(3) if other != axis]
        one = np.eye(3)
        one[a, a] = one[b, b] = np.cos(angle)
        one[a, b], one[b, a] = -np.sin(angle), np.sin(angle)
        turn = turn @ one
    turn = turn @ np.diag(rng.uniform(0.92, 1.08, 3) * rng.choice([-1.0, 1.0], 3))
    to_voxel = np.linalg.inv(affine)
    matrix = torch.from_numpy(to_voxel[:3, :3] @ turn).float()
    offset = to_voxel[:3, :3] @ centre + to_voxel[:3, 3]
    extent = [m * step for m in n]
    bend = bending(rng, extent, float(rng.uniform(0, 2.0)))
    bend = upsample(torch.einsum("ab,bijk->aijk", matrix, bend), n)
    x, y, z = ((torch.arange(m, dtype=torch.float32) - (m - 1) / 2) * step for m in n)
    result = []
    for axis in range(3):
        m = matrix[axis]
        plane = (m[1] * y)[:, None] + m[2] * z
        result.append((m[0] * x + float(offset[axis]))[:, None, None] + plane + bend[axis])
    return result


def _labels_at(
    rng: np.random.Generator, label_map: LabelMap, n: tuple[int, int, int], step: float, centre: np.ndarray
) -> Tensor:
    """Nearest label row at each voxel of a random pose; air outside the map."""
    flat = torch.zeros(n, dtype=torch.int32)
    inside = torch.ones(n, dtype=torch.bool)
    for position, length in zip(_positions(rng, label_map.affine, n, step, centre), label_map.rows.shape, strict=True):
        index = position.round().int()
        inside &= (index >= 0) & (index < length)
        flat = flat * length + index.clamp_(0, length - 1)
    rows = torch.from_numpy(label_map.rows.reshape(-1))[flat.view(-1)].view(n)
    return torch.where(inside, rows, torch.tensor(_AIR, dtype=rows.dtype))


def _fractal(rng: np.random.Generator, n: tuple[int, int, int]) -> Tensor:
    """Noise with spectrum |k|^(-beta), beta drawn from 0 (white) to 2 (cloudy), unit variance."""
    spectrum = torch.fft.rfftn(normal(rng, *n))
    squares = [torch.fft.fftfreq(m).square() for m in n[:2]] + [torch.fft.rfftfreq(n[2]).square()]
    k2 = squares[0][:, None, None] + squares[1][:, None] + squares[2]
    k2[0, 0, 0] = 1.0
    noise = torch.fft.irfftn(spectrum * k2 ** (-float(rng.uniform(0, 2.0)) / 2), s=n)
    return noise / noise.std()


def build_pool(sources: Sources, path: Path, count: int, seed: int, settings: PoolSettings, *, first: int = 0) -> None:
    """Write volumes `first` to `first + count` of a seed as one float16 array (count, I, J, K), whole or not at all."""
    n = settings.size
    with atomic_path(path, suffix=".npy") as temporary:
        pool = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float16, shape=(count, n, n, n))
        for index in range(count):
            pool[index] = draw_volume(sources, seed * 1_000_000 + first + index, settings).numpy()
        pool.flush()
