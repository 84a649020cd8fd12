"""Folders of volumes as one array on one grid and one intensity scale: what an evaluation compares.

The grid is that of the generated set; scans on another one (real scans, a peer's output) are brought to it by
`preprocess`. The scale is p0 -> 0, p99.5 -> 1, reached in one of three ways, counted in the record:
`sidecar` (a JSON file beside the volume names its "IntensityRange" [low, high]: x -> (x - low)/(high - low)),
`as stored` (the values already look like that scale) or `percentiles` (of the volume itself; this hides
differences of overall brightness, so it is said in the report).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, overload

import numpy as np

from neuromf.data.pairs import MASK_ENDING
from neuromf.data.preprocessing import Preprocessing, preprocess
from neuromf.data.restoration import restore_intensity
from neuromf.data.volumes import NIFTI_SUFFIXES, Volume, load_volume, nifti_stem, spacing_of
from neuromf.errors import ScanError, UserError
from neuromf.files import read_json

T = TypeVar("T")
Scale = Literal["sidecar", "as stored", "percentiles"]
Clean = Callable[[Volume, Path], Volume]
"""What is done to a scan, read from a file, before it is scaled and brought to the grid."""
Map = Callable[[Callable[[Path], "_Read"], Sequence[Path]], Iterable["_Read"]]
"""`map`, or processes that do the same."""

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
        array: (N, 1, I, J, K) float32; in a file, from which a volume is read at a time, when it exceeds 512 MiB.
        paths: where each came from.
        affines: (N, 4, 4), voxel index -> world mm, of the volumes as they are in `array`.
        keys: of each, a hash of its content in `array`.
        grid: of all of them.
        scales: how many volumes reached the intensity scale in which way.
        resampled: how many were brought to the grid.
        refused: `{"path", "reason"}` of the files that cannot be used.
    """

    array: np.ndarray | StoredVolumes
    paths: list[Path]
    affines: np.ndarray
    keys: list[str]
    grid: Grid
    scales: dict[str, int]
    resampled: int
    refused: list[dict[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def sha256(self) -> str:
        """Equal for sets of the same volumes, in whatever order and wherever they lie."""
        return hashlib.sha256("".join(sorted(self.keys)).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Plain values for a report."""
        return {
            "n": len(self),
            "sha256": self.sha256,
            "intensity_scale": self.scales,
            "brought_to_grid": self.resampled,
            "refused": self.refused,
        }


class StoredVolumes(Sequence[np.ndarray]):
    """N volumes (1, I, J, K) float32 in a file; each is read when asked for, so that none stays in memory.

    A memory map would do the same, but its pages count as memory of the process as long as there is room.
    """

    def __init__(self, file: Path, n: int, size: tuple[int, int, int]) -> None:
        self.file, self._size, self._n = file, size, n
        self._bytes = 4 * int(np.prod(size, dtype=np.int64))
        file.touch()

    def __len__(self) -> int:
        return self._n

    @overload
    def __getitem__(self, i: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, i: slice) -> list[np.ndarray]: ...

    def __getitem__(self, i: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not 0 <= i < len(self):
            raise IndexError(i)
        values = np.fromfile(self.file, np.float32, self._bytes // 4, offset=i * self._bytes)
        return values.reshape(1, *self._size)

    def __setitem__(self, i: int, volume: np.ndarray) -> None:
        with self.file.open("r+b") as handle:
            handle.seek(i * self._bytes)
            handle.write(np.ascontiguousarray(volume, dtype=np.float32).tobytes())

    def first(self, n: int) -> StoredVolumes:
        """The first n of them."""
        return StoredVolumes(self.file, n, self._size)


def find_volumes(source: str | Path | Sequence[str | Path]) -> list[Path]:
    """The NIfTI files in a folder and below it, sorted, without masks of lesions; or exactly the files listed.

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
        if not nifti_stem(path).endswith(MASK_ENDING)
    )
    if not found:
        raise UserError(
            f"{folder} holds no NIfTI volume (.nii or .nii.gz), neither itself nor below",
            "latents become volumes with `neuromf decode FOLDER`",
        )
    return found


def evenly(items: Sequence[T], limit: int | None) -> list[T]:
    """At most `limit` of the items, spread evenly over their order."""
    if limit is None or limit >= len(items):
        return list(items)
    if limit < 1:
        raise UserError(f"a limit of {limit} volumes", "at least 1, or none for all of them")
    return [items[i * len(items) // limit] for i in range(limit)]


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
    clean: Clean | None = None,
    strict_grid: bool = False,
    mapping: Map = map,
    progress: Callable[[int, int], None] | None = None,
) -> VolumeSet:
    """Read volumes onto `grid`; files that cannot be used are listed in `refused`, the rest is kept.

    Args:
        paths: NIfTI files.
        grid: of the result.
        scratch: an existing folder for the array when it does not fit in memory; the caller removes it.
        preprocessing: for volumes off the grid (its size and spacing are replaced by the grid's).
        clean: what comes before (skull stripping, N4).
        strict_grid: refuse the whole set when a volume lies on another grid (a generated set has one).
        mapping: reads the files, in this process or in others.
        progress: called with (files read, files in all).

    Raises:
        UserError: no file can be used, or `strict_grid` is broken.
    """
    array = _room(len(paths), grid.size, scratch)
    kept: list[Path] = []
    affines: list[np.ndarray] = []
    keys: list[str] = []
    refused: list[dict[str, str]] = []
    scales: Counter[str] = Counter()
    resampled = 0
    read = partial(_read, grid=grid, spec=_on_grid(preprocessing, grid), clean=clean, strict_grid=strict_grid)
    for done, (path, found) in enumerate(zip(paths, mapping(read, paths), strict=True), 1):
        if found.error is not None:
            refused.append({"path": str(path), "reason": found.error.message})
        elif strict_grid and found.moved:
            raise UserError(
                f"the generated volumes have different grids: {paths[0].name} {grid}, {path.name} {found.grid}",
                "evaluate sets of different grids one at a time",
            )
        else:
            array[len(kept)] = found.array
            kept.append(path)
            affines.append(found.affine)
            keys.append(content_key(found.array))
            scales[found.scale] += 1
            resampled += found.moved
        if progress is not None:
            progress(done, len(paths))
    if not kept:
        raise UserError(f"none of the {len(paths)} volumes can be used; the first: {refused[0]['reason']}")
    volumes = array.first(len(kept)) if isinstance(array, StoredVolumes) else array[: len(kept)]
    return VolumeSet(volumes, kept, np.stack(affines), keys, grid, dict(scales), resampled, refused)


def content_key(volume: np.ndarray) -> str:
    """A hash of a volume's shape and values."""
    array = np.ascontiguousarray(volume, dtype=np.float32)
    return hashlib.sha256(repr(array.shape).encode() + array.tobytes()).hexdigest()[:32]


class _Read(NamedTuple):
    """What became of a file: a volume (1, I, J, K) on the grid, or what is wrong with it."""

    array: np.ndarray
    affine: np.ndarray
    scale: Scale = "as stored"
    grid: Grid | None = None
    moved: bool = False
    error: ScanError | None = None


def _read(path: Path, grid: Grid, spec: Preprocessing, clean: Clean | None, strict_grid: bool) -> _Read:
    nothing = np.empty(0, dtype=np.float32)
    try:
        volume = load_volume(path)
        i, j, k = volume.array.shape
        found = Grid((i, j, k), spacing_of(volume.affine))
        moved = not grid.fits(found)
        if strict_grid and moved:
            return _Read(nothing, nothing, grid=found, moved=True)
        volume = clean(volume, path) if clean is not None else volume
        array, affine, scale = _onto(volume, path, moved, spec)
        return _Read(array, affine, scale, found, moved)
    except ScanError as error:
        return _Read(nothing, nothing, error=error)


def sidecar_of(path: str | Path) -> dict[str, Any]:
    """The JSON file of the same name beside a volume, or {} where there is none."""
    path = Path(path)
    sidecar = path.with_name(nifti_stem(path) + ".json")
    content = read_json(sidecar) if sidecar.is_file() else {}
    return content if isinstance(content, dict) else {}


def _onto(volume: Volume, path: Path, moved: bool, spec: Preprocessing) -> tuple[np.ndarray, np.ndarray, Scale]:
    """(array (1, I, J, K), affine, how the scale was reached)."""
    array, scale = _scaled(volume.array, path)
    if not moved and scale != "percentiles":
        return array[None], volume.affine, scale
    prepared = preprocess(volume._replace(array=array), spec)
    if scale == "percentiles":
        return prepared.array, prepared.affine, scale
    return restore_intensity(prepared.array, prepared.record), prepared.affine, scale


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


def _room(n: int, size: tuple[int, int, int], scratch: Path) -> np.ndarray | StoredVolumes:
    """A place for n volumes: in memory while they are small, else a file in `scratch`."""
    shape = (n, 1, *size)
    if 4 * int(np.prod(shape, dtype=np.int64)) <= _RAM_LIMIT_BYTES:
        return np.empty(shape, dtype=np.float32)
    number = sum(1 for _ in scratch.glob("volumes-*"))
    return StoredVolumes(scratch / f"volumes-{number}.f32", n, size)
