"""Folders of volumes as one array on one grid and one intensity scale: what an evaluation compares.

The grid is that of the generated set; scans on another one (real scans, a peer's output) are brought to it by
`preprocess`. The scale is p0 -> 0, p99.5 -> 1, reached in one of three ways, counted in the record:
`sidecar` (a JSON file beside the volume names its "IntensityRange" [low, high]: x -> (x - low)/(high - low)),
`as stored` (the values already look like that scale) or `percentiles` (of the volume itself; this hides
differences of overall brightness, so it is said in the report).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from neuromf.data.preprocessing import Preprocessing, preprocess, restore_intensity
from neuromf.data.volumes import NIFTI_SUFFIXES, Volume, load_volume, nifti_stem, spacing_of
from neuromf.errors import ScanError, UserError
from neuromf.files import read_json

Scale = Literal["sidecar", "as stored", "percentiles"]
_RAM_LIMIT_BYTES = 1 << 29
# Volumes scaled to p99.5 = 1 keep brighter voxels (vessels) of a few times that; raw scans go far beyond.
_UNIT_SCALE = (-1.0, 5.0)


class Grid(NamedTuple):
    """Voxels per axis and their size in mm, RAS+."""

    size: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]

    def fits(self, other: Grid) -> bool:
        """Same size, and spacing equal to a thousandth."""
        return self.size == other.size and np.allclose(self.spacing_mm, other.spacing_mm, rtol=1e-3)

    def __str__(self) -> str:
        size = " x ".join(map(str, self.size))
        return f"{size} voxels of {' x '.join(f'{s:.4g}' for s in self.spacing_mm)} mm"


@dataclass(frozen=True)
class VolumeSet:
    """Volumes of one grid and scale.

    Attributes:
        array: (N, 1, I, J, K) float32; on disk (memory-mapped) when it exceeds 512 MiB.
        paths: where each came from.
        grid: of all of them.
        scales: how many volumes reached the intensity scale in which way.
        resampled: how many were brought to the grid.
        refused: `{"path", "reason"}` of the files that cannot be used.
    """

    array: np.ndarray
    paths: list[Path]
    grid: Grid
    scales: dict[str, int]
    resampled: int
    refused: list[dict[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.array)

    def describe(self) -> dict[str, Any]:
        """Plain values for a report."""
        return {
            "n": len(self),
            "intensity_scale": self.scales,
            "brought_to_grid": self.resampled,
            "refused": self.refused,
        }


def find_volumes(source: str | Path | Sequence[str | Path]) -> list[Path]:
    """The NIfTI files in a folder and below it, sorted; or exactly the files listed.

    Raises:
        UserError: nothing there.
    """
    if not isinstance(source, str | Path):
        paths = [Path(path) for path in source]
        if not paths:
            raise UserError("an empty list of volumes", "name at least one NIfTI file")
        return paths
    folder = Path(source)
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist", "give a folder of NIfTI volumes (.nii or .nii.gz)")
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.name.lower().endswith(NIFTI_SUFFIXES) and not path.name.startswith(".") and path.is_file()
    )
    if not found:
        raise UserError(
            f"{folder} holds no NIfTI volume (.nii or .nii.gz), neither itself nor below",
            "latents become volumes with `neuromf decode FOLDER`",
        )
    return found


def evenly(paths: Sequence[Path], limit: int | None) -> list[Path]:
    """At most `limit` of the paths, spread evenly over their order."""
    if limit is None or limit >= len(paths):
        return list(paths)
    if limit < 1:
        raise UserError(f"a limit of {limit} volumes", "at least 1, or none for all of them")
    return [paths[i * len(paths) // limit] for i in range(limit)]


def first_grid(paths: Sequence[Path]) -> Grid:
    """The grid of the first volume that can be read.

    Raises:
        ScanError: none can.
    """
    reason: ScanError | None = None
    for path in paths:
        try:
            volume = load_volume(path)
        except ScanError as error:
            reason = reason or error
            continue
        i, j, k = volume.array.shape
        return Grid((i, j, k), spacing_of(volume.affine))
    assert reason is not None, "no path given"
    raise reason


def read_volume_set(
    paths: Sequence[Path],
    grid: Grid,
    *,
    scratch: Path,
    preprocessing: Preprocessing | None = None,
    strict_grid: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> VolumeSet:
    """Read volumes onto `grid`; files that cannot be used are listed in `refused`, the rest is kept.

    Args:
        paths: NIfTI files.
        grid: of the result.
        scratch: an existing folder for the array when it does not fit in memory; the caller removes it.
        preprocessing: for volumes off the grid (its size and spacing are replaced by the grid's).
        strict_grid: refuse the whole set when a volume lies on another grid (a generated set has one).
        progress: called with (files read, files in all).

    Raises:
        UserError: no file can be used, or `strict_grid` is broken.
    """
    spec = _on_grid(preprocessing, grid)
    array = _room(len(paths), grid.size, scratch)
    kept: list[Path] = []
    refused: list[dict[str, str]] = []
    scales: Counter[str] = Counter()
    resampled = 0
    for done, path in enumerate(paths, 1):
        try:
            volume = load_volume(path)
            found = Grid(volume.array.shape, spacing_of(volume.affine))
            if strict_grid and not grid.fits(found):
                raise UserError(
                    f"the generated volumes have different grids: {paths[0].name} {grid}, {path.name} {found}",
                    "evaluate sets of different grids one at a time",
                )
            array[len(kept)], scale = _onto(volume, path, grid, found, spec)
        except ScanError as error:
            refused.append({"path": str(path), "reason": error.message})
        else:
            kept.append(path)
            scales[scale] += 1
            resampled += not grid.fits(found)
        if progress is not None:
            progress(done, len(paths))
    if not kept:
        raise UserError(f"none of the {len(paths)} volumes can be used; the first: {refused[0]['reason']}")
    return VolumeSet(array[: len(kept)], kept, grid, dict(scales), resampled, refused)


def sidecar_of(path: str | Path) -> dict[str, Any]:
    """The JSON file of the same name beside a volume, or {} where there is none."""
    path = Path(path)
    sidecar = path.with_name(nifti_stem(path) + ".json")
    content = read_json(sidecar) if sidecar.is_file() else {}
    return content if isinstance(content, dict) else {}


def _onto(volume: Volume, path: Path, grid: Grid, found: Grid, spec: Preprocessing) -> tuple[np.ndarray, Scale]:
    array, scale = _scaled(volume.array, path)
    if grid.fits(found) and scale != "percentiles":
        return array, scale
    prepared = preprocess(volume._replace(array=array), spec)
    if scale == "percentiles":
        return prepared.array, scale
    return restore_intensity(prepared.array, prepared.record), scale


def _scaled(array: np.ndarray, path: Path) -> tuple[np.ndarray, Scale]:
    span = sidecar_of(path).get("IntensityRange")
    if span is not None:
        try:
            low, high = (float(v) for v in span)
        except (TypeError, ValueError) as error:
            raise ScanError(f"{path}: IntensityRange {span!r} of its sidecar is not [low, high]") from error
        if not (np.isfinite([low, high]).all() and high > low):
            raise ScanError(f"{path}: IntensityRange {span!r} of its sidecar is empty or not finite")
        return (array - np.float32(low)) / np.float32(high - low), "sidecar"
    if array.min() >= _UNIT_SCALE[0] and array.max() <= _UNIT_SCALE[1]:
        return array, "as stored"
    return array, "percentiles"


def _on_grid(preprocessing: Preprocessing | None, grid: Grid) -> Preprocessing:
    values = preprocessing.to_dict() if preprocessing is not None else {}
    return Preprocessing.from_dict(values | {"size": grid.size, "spacing_mm": grid.spacing_mm})


def _room(n: int, size: tuple[int, int, int], scratch: Path) -> np.ndarray:
    """An array for n volumes: in memory while small, else a file in `scratch`."""
    shape = (n, 1, *size)
    if 4 * int(np.prod(shape, dtype=np.int64)) <= _RAM_LIMIT_BYTES:
        return np.empty(shape, dtype=np.float32)
    number = sum(1 for _ in scratch.glob("volumes-*.npy"))
    return np.lib.format.open_memmap(scratch / f"volumes-{number}.npy", mode="w+", dtype=np.float32, shape=shape)
