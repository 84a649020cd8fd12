"""A procedural head: seeded anatomy drawn as labels in FreeSurfer/SynthSeg numbers, no data needed.

Large shapes are depth fields on a 4 mm lattice, interpolated to the voxels. The cortex is a ribbon of constant
thickness below the surface of the hemispheres and along sheets that cut into them: sulci (zero crossings of
band-limited noise), the fissures and the insula. Fluid spaces, cortex and nuclei vary together, as with age.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from neuromf.data import anatomy
from neuromf.data.anatomy import Anatomy, Surfaces
from neuromf.data.fields import Size, Window, apply_matrices, normal, one_thread, rotation, spline_weights, upsample
from neuromf.data.label_maps import LabelMap, with_rows
from neuromf.data.label_table import LABELS, MIRROR_ROWS, NUMBERS, Contrast
from neuromf.data.rendering import Rendering, check_grid, render
from neuromf.data.shapes import ellipsoid, folding_noise, look_up, sheet, signed_distance, union
from neuromf.errors import UserError

_ANATOMY, _POSE, _FOLDS, _LESION = 10, 11, 12, 13  # the random streams of one seed
_LATTICE_MM = 4.0
_LESION_TRIES = 30
_WHOLE: Window = (slice(None), slice(None), slice(None))
_ROW = {label.name: row for row, label in reversed(list(enumerate(LABELS)))}  # of the left or only side


class _Space:
    """The voxels to fill, and head coordinates (3, i, j, k) on a coarse lattice over the same block."""

    def __init__(
        self, rng: np.random.Generator, size: Size, spacing_mm: float, scale: tuple[float, float, float]
    ) -> None:
        self.size = size
        extent = [n * spacing_mm for n in size]
        coarse = [max(4, round(length / _LATTICE_MM)) for length in extent]
        axes = [(torch.arange(n) - (n - 1) / 2) * (length / n) for n, length in zip(coarse, extent, strict=True)]
        self.step_mm = extent[0] / coarse[0]
        points = torch.stack(torch.meshgrid(*axes, indexing="ij")).float()
        # Knots are fixed in the scanner, so that a seed gives one head whatever the grid.
        knots = normal(rng, 3, 13, 13, 13)
        bent = apply_matrices(knots, [spline_weights(axis.float().clamp(-170, 170) / 36 + 5, 13) for axis in axes])
        turn = np.diag(1 / np.array(scale)) @ rotation(rng.uniform(-5, 5, 3))
        points = torch.einsum("ab,bijk->aijk", torch.from_numpy(turn).float(), points + 1.6 * bent)
        self.points = points + torch.from_numpy(rng.uniform(-3, 3, 3)).float().view(3, 1, 1, 1)

    def window(self, depth: torch.Tensor) -> Window:
        """Voxels of the box around depth > 0."""
        slices = []
        for axis, (coarse, fine) in enumerate(zip(depth.shape, self.size, strict=True)):
            others = [other for other in range(3) if other != axis]
            inside = (depth > 0).any(dim=others[1]).any(dim=others[0]).nonzero().flatten().tolist() or [0]
            low, high = max(0, inside[0] - 1), min(coarse, inside[-1] + 2)
            slices.append(slice(low * fine // coarse, -(-high * fine // coarse)))
        return slices[0], slices[1], slices[2]

    def fine(self, field: torch.Tensor, window: Window = _WHOLE) -> torch.Tensor:
        """Interpolate a lattice field to the voxels of `window`."""
        return upsample(field, self.size, window)


@one_thread()
def phantom_labels(seed: int, size: Size = (64, 64, 64), spacing_mm: float = 3.0, lesion: float = 0) -> LabelMap:
    """Draw the labels of a head; the same seed gives the same head at any size and spacing.

    Args:
        seed: any whole number >= 0.
        size: voxels (I, J, K); the middle of the block is the middle of the brain, at 0 mm.
        spacing_mm: edge of the cubic voxels.
        lesion: add white matter lesions (labels 25, 57) and their `lesion_mask`; the rest stays as it is. 1 draws
            blobs of 7 to 20 mm across, another number scales them.

    Raises:
        UserError: a size, spacing or seed that makes no sense, or no white matter to put a lesion in.
    """
    check_grid(seed, size, spacing_mm)
    a = Anatomy.draw(np.random.default_rng([_ANATOMY, seed]))
    space = _Space(np.random.default_rng([_POSE, seed]), size, spacing_mm, a.scale)
    rng = np.random.default_rng([_FOLDS, seed])
    shapes = anatomy.surfaces(space.points, a)
    rows = _head_rows(space, shapes, a, folding_noise(rng, 26.0))
    window = space.window(torch.stack([shapes.cerebrum, shapes.cerebellum, shapes.stem]).amax(dim=0))
    rows[window] = _brain_rows(rng, space, shapes, a, rows[window], window)
    _deep_rows(space, a, rows)
    on_right = space.fine(space.points[0]) > 0
    rows = torch.where(on_right, torch.from_numpy(MIRROR_ROWS)[rows.int()], rows)
    mask = _add_lesion(np.random.default_rng([_LESION, seed]), space, rows, float(lesion)) if lesion else None
    affine = np.diag([spacing_mm] * 3 + [1.0])
    affine[:3, 3] = -(np.array(size) - 1) / 2 * spacing_mm
    return with_rows(NUMBERS[rows.numpy()], affine, rows.numpy(), mask)


def _head_rows(space: _Space, shapes: Surfaces, a: Anatomy, noise: torch.Tensor) -> torch.Tensor:
    """Everything outside the brain: scalp, face, skull of uneven thickness, and fluid in its cavity."""
    head, cavity = space.fine(shapes.head), space.fine(shapes.cavity)
    rows = torch.zeros(space.size, dtype=torch.uint8)
    _paint(rows, head > 0, "skin")
    _paint(rows, head > 2.5, "soft tissue")
    below = int((space.points[2] < -12).any(dim=1).any(dim=0).sum())
    if below:
        lower = space.points[..., :below]
        for name, part in anatomy.face(lower, look_up(noise, lower * 1.4), a).items():
            depth = F.pad(part, (0, space.points.shape[-1] - below), value=-50.0)
            window = space.window(depth)
            _paint(rows[window], (space.fine(depth, window) > 0) & (head[window] > 3), name)
    thin_base = 0.5 + 0.5 * ((space.points[2] + 25) / 30).clamp(0, 1)
    thickness = a.skull_mm * thin_base * (1 + 0.2 * look_up(noise, space.points * 0.5))
    bone = cavity + space.fine(thickness)
    _paint(rows, (bone > 0) & (head > 2), "cortical bone")
    _paint(rows, (bone > 2) & (cavity < -2.2) & (head > 2), "cancellous bone")
    _paint(rows, cavity > 0, "csf")
    return rows


def _brain_rows(
    rng: np.random.Generator, space: _Space, shapes: Surfaces, a: Anatomy, outside: torch.Tensor, window: Window
) -> torch.Tensor:
    """The brain in its window: cerebrum, cerebellum, stem, nuclei and ventricles."""
    rows = outside.clone()
    wave = look_up(folding_noise(rng, 45.0), space.points)
    _cerebrum(rng, rows, space, shapes, a, wave, window)
    _cerebellum(rng, rows, space, shapes, window)
    z = space.fine(space.points[2], window)
    stem = space.fine(shapes.stem, window)
    inside = space.fine(shapes.cerebrum, window) > 0
    _paint(rows, (stem > 0) & ((z < -4) | ~inside), "brain stem")
    _paint(rows, (stem > 0) & (z >= -4) & inside, "cerebral white matter")
    return rows


def _cerebrum(
    rng: np.random.Generator,
    rows: torch.Tensor,
    space: _Space,
    shapes: Surfaces,
    a: Anatomy,
    wave: torch.Tensor,
    window: Window,
) -> None:
    """Hemispheres: the distance to the nearest surface or cleft decides fluid, cortex or white matter."""
    points = space.points
    folds = look_up(folding_noise(rng, a.fold_period_mm), anatomy.fold_coordinates(points))
    sulcus = space.fine(signed_distance(folds, space.step_mm), window)
    # The middle of the base has no cortex: the ribbon follows a surface that is deeper there.
    rind = space.fine(union(shapes.cerebrum, anatomy.core(points), softness_mm=3), window)
    x, y, z = space.fine(points, window)
    wave = space.fine(wave, window)
    fissure = sheet(x + 0.8 * wave, anatomy.fissure_limit(y, z))
    below = torch.minimum(rind, fissure)
    width = a.sulcus_mm + 0.3 * (4 - below).clamp(min=0)
    sulci = sheet(sulcus, below - a.sulcus_depth_mm - 3 * wave) - width
    line, deep, ends, insula, up, front = anatomy.sylvian(torch.stack([x, y, z]), wave)
    lateral = torch.minimum(sheet(line, deep, ends), sheet(insula, up, front)) - (0.6 + 1.2 * a.sulcus_mm)
    surface = torch.minimum(torch.minimum(rind, fissure - 0.5 - 0.5 * a.sulcus_mm), torch.minimum(sulci, lateral))
    inside = space.fine(shapes.cerebrum, window) > 0
    _paint(rows, inside & (surface > 0), "cerebral cortex")
    _paint(rows, inside & (surface <= 0), "csf")
    _paint(rows, inside & (surface > a.cortex_mm), "cerebral white matter")


def _cerebellum(rng: np.random.Generator, rows: torch.Tensor, space: _Space, shapes: Surfaces, window: Window) -> None:
    """Cerebellum: a folded cortex around a branching white core, parted from the cerebrum by fluid."""
    folia = look_up(folding_noise(rng, 17.0), anatomy.folia_coordinates(space.points))
    depth = space.fine(torch.minimum(shapes.cerebellum, -1.5 - shapes.cerebrum), window)
    fold = space.fine(signed_distance(folia, space.step_mm), window).abs()
    _paint(rows, depth > 0, "cerebellar cortex")
    _paint(rows, (depth > 0) & (depth < 8) & (fold < 0.35), "csf")
    _paint(rows, (depth > 12) | ((depth > 3) & (fold > 2.3)), "cerebellar white matter")


def _deep_rows(space: _Space, a: Anatomy, rows: torch.Tensor) -> None:
    """Corpus callosum, nuclei and ventricles, written over white matter and brain stem."""
    x, y, z = anatomy.folded(space.points)
    window = space.window(torch.stack([52 - x, 48 - y, 66 + y, 40 - z, 46 + z]).amin(dim=0))
    points, part = space.fine(space.points, window), rows[window]
    brain = (part > 0) & (part < _ROW["artery"])
    _paint(part, brain & (anatomy.callosum(points, a) > 0), "cerebral white matter")
    for name, depth in (anatomy.deep_grey(points, a) | anatomy.ventricles(points, a)).items():
        _paint(part, brain & (depth > 0), name)


def _add_lesion(rng: np.random.Generator, space: _Space, rows: torch.Tensor, scale: float) -> np.ndarray:
    """Turn one to three uneven blobs of white matter into lesion; returns their mask (I, J, K) bool."""
    left = rows == _ROW["cerebral white matter"]
    right = rows == int(MIRROR_ROWS[_ROW["cerebral white matter"]])
    mask = torch.zeros(space.size, dtype=torch.bool)
    blobs, rough = int(rng.integers(1, 4)), look_up(folding_noise(rng, 16.0), space.points)
    for _ in range(_LESION_TRIES):
        side = rng.choice([-1.0, 1.0])
        centre = (side * rng.uniform(16, 34), rng.uniform(-42, 36), rng.uniform(12, 34))
        a, b, c = scale * rng.uniform(3.5, 10.0, 3)
        depth = ellipsoid(space.points, centre, (a, b, c)) + 1.5 * rough
        # Noise alone would also reach the surface somewhere far away.
        depth = torch.minimum(depth, ellipsoid(space.points, centre, (1.4 * a, 1.4 * b, 1.4 * c)))
        blob = (space.fine(depth) > 0) & (left | right)
        if bool(blob.any()):
            mask |= blob
            blobs -= 1
        if blobs == 0:
            break
    if not bool(mask.any()):
        raise UserError("there is no white matter in this block for a lesion", "choose a larger size or spacing")
    lesion = _ROW["white matter lesion"]
    rows[mask & left], rows[mask & right] = lesion, int(MIRROR_ROWS[lesion])
    return mask.numpy()


def _paint(rows: torch.Tensor, mask: torch.Tensor, name: str) -> None:
    rows.masked_fill_(mask, _ROW[name])


def phantom(
    seed: int,
    size: Size = (64, 64, 64),
    spacing_mm: float = 3.0,
    contrast: Contrast = "T1",
    stripped: bool = False,
    lesion: float = 0,
) -> Rendering:
    """Draw a head and render it: `phantom_labels` on voxels half as large, then `render` without further bending."""
    i, j, k = size
    fine = phantom_labels(seed, (2 * i, 2 * j, 2 * k), spacing_mm / 2, lesion)
    return render(
        fine,
        seed,
        size=size,
        spacing_mm=spacing_mm,
        contrast=contrast,
        stripped=stripped,
        deform=False,
        affine_jitter=False,
        centre_mm=(0.0, 0.0, 0.0),
    )
