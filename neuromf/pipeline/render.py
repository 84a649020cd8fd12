"""`neuromf render`: label maps or invented heads -> a folder of synthetic scans and a table of their sources."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from neuromf.data.fields import one_thread
from neuromf.data.label_maps import LabelMap, load_label_map
from neuromf.data.phantom import phantom
from neuromf.data.rendering import Rendering
from neuromf.data.rendering import render as render_label_map
from neuromf.data.sources import Scan, find_scans
from neuromf.data.volumes import save_volume
from neuromf.errors import UserError
from neuromf.files import read_json, remove_leftovers, sha256_file, write_json, write_text

TABLE = "renderings.csv"
MASKS = "masks"
_LESION_LABELS = (25, 57)
RECIPE = "recipe.json"
_COLUMNS = ("file", "source", "seed")
_GREY_LEVELS = 1000  # volumes are int16 with 1000 as the brightest: a third of the size of float32

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Recipe:
    """What every volume of a folder shares; `size` in voxels, `seed` that of the first volume.

    `lesions` is the size of lesions in invented heads (1: 7 to 20 mm across), 0 for none; their masks lie in masks/.
    """

    size: tuple[int, int, int] = (64, 64, 64)
    spacing_mm: float = 3.0
    contrast: Literal["T1", "FLAIR"] = "T1"
    stripped: bool = False
    seed: int = 0
    lesions: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """What recipe.json says; without lesions as it was before there were any."""
        values = {**asdict(self), "size": list(self.size)}
        return values if self.lesions else {key: value for key, value in values.items() if key != "lesions"}


@dataclass(frozen=True)
class RenderReport:
    """The result of `render`: counts, and the table that says where each volume came from."""

    out: Path
    rendered: int
    kept: int
    sources: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "out": str(self.out), "table": str(self.out / TABLE)}


@dataclass(frozen=True)
class _Job:
    """One volume: its number from 0, its seed, and its source (None: an invented head)."""

    index: int
    seed: int
    source: Scan | None

    @property
    def stem(self) -> str:
        return f"{'phantom' if self.source is None else 'rendering'}_{self.index + 1:04d}"

    @property
    def row(self) -> tuple[str, str, str]:
        source = f"phantom_seed_{self.seed}" if self.source is None else self.source.subject
        return f"{self.stem}.nii.gz", source, str(self.seed)


def render(
    label_maps: Sequence[str | Path],
    out: str | Path,
    *,
    n: int,
    recipe: Recipe | None = None,
    labels: bool = False,
    progress: Progress | None = None,
) -> RenderReport:
    """Render `n` volumes into `out`; volume i has seed `recipe.seed + i`, and the label maps take turns.

    The same call continues where it stopped, and a larger `n` adds volumes. `renderings.csv` names the source of
    each, so that a split can keep all volumes of one person together.

    Args:
        label_maps: NIfTI files, folders, globs in FreeSurfer/SynthSeg numbers; none draws an invented head each.
        out: the folder; other settings than those it was made with are refused.
        n: how many volumes.
        recipe: what they share.
        labels: also write the label map of each, `<out>/labels/<same name>`.
        progress: called with (description, done, total).

    Raises:
        UserError: no usable label map, a folder of something else, a full disk.
    """
    recipe, out = recipe or Recipe(), Path(out)
    if recipe.lesions and label_maps:
        raise UserError("lesions are drawn into invented heads alone", "leave out the label maps, or the lesions")
    sources: list[Scan | None] = [*find_scans(label_maps)] if label_maps else [None]
    _claim_folder(out, recipe, sources)
    jobs = [_Job(i, recipe.seed + i, sources[i % len(sources)]) for i in range(n)]
    missing = [job for job in jobs if not _is_done(out, job, labels, recipe)]
    done = n - len(missing)
    if progress is not None:
        progress("rendering", done, n)
    for job, rendering in _renderings(missing, recipe):
        _write(out, job, rendering, labels, recipe)
        done += 1
        if progress is not None:
            progress("rendering", done, n)
    _write_table(out, jobs)
    return RenderReport(out, len(missing), n - len(missing), len({job.row[1] for job in jobs}))


def _claim_folder(out: Path, recipe: Recipe, sources: Sequence[Scan | None]) -> None:
    """Take an empty folder, or one of the same recipe."""
    content: dict[str, Any] = {
        "recipe": recipe.to_dict(),
        "sources": {scan.subject: sha256_file(scan.path) for scan in sources if scan is not None},
    }
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file", "give a folder as --out")
    if (out / RECIPE).is_file():
        if read_json(out / RECIPE) != content:
            raise UserError(
                f"{out} holds renderings of other settings or label maps",
                f"give another --out; {out / RECIPE} says what is there",
            )
    elif out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise UserError(f"{out} is not empty and holds no renderings", "give a new folder as --out")
    else:
        write_json(out / RECIPE, content)
    for folder in (out, out / "labels", out / MASKS):
        remove_leftovers(folder)


def _is_done(out: Path, job: _Job, labels: bool, recipe: Recipe) -> bool:
    wanted = ["", *(["labels"] if labels else []), *([MASKS] if recipe.lesions else [])]
    return all((out / folder / job.row[0]).is_file() for folder in wanted)


def _renderings(jobs: Sequence[_Job], recipe: Recipe) -> Iterator[tuple[_Job, Rendering]]:
    """Render source by source (a label map takes 50 MB at 1 mm), a volume per core at a time.

    Threads do: nearly all of the work is in torch and numpy, which let others run meanwhile.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    by_source: dict[Scan | None, list[_Job]] = {}
    for job in jobs:
        by_source.setdefault(job.source, []).append(job)
    with one_thread(), ThreadPoolExecutor(cores) as pool:
        for source, members in by_source.items():
            make = partial(_render_one, None if source is None else load_label_map(source.path), recipe)
            for start in range(0, len(members), cores):  # few at a time: they are held until written
                some = members[start : start + cores]
                yield from zip(some, pool.map(make, some), strict=True)


def _render_one(label_map: LabelMap | None, recipe: Recipe, job: _Job) -> Rendering:
    size, spacing_mm, contrast, stripped = recipe.size, recipe.spacing_mm, recipe.contrast, recipe.stripped
    if label_map is None:
        return phantom(job.seed, size, spacing_mm, contrast=contrast, stripped=stripped, lesion=recipe.lesions)
    return render_label_map(label_map, job.seed, size=size, spacing_mm=spacing_mm, contrast=contrast, stripped=stripped)


def _write(out: Path, job: _Job, rendering: Rendering, labels: bool, recipe: Recipe) -> None:
    """Write the volume last: where it is, its label map and its mask are too."""
    name = job.row[0]
    text = f"neuromf synthetic, seed {job.seed}"
    if labels:
        save_volume(out / "labels" / name, rendering.labels, rendering.affine, dtype=np.int16, header_description=text)
    if recipe.lesions:
        mask = np.isin(rendering.labels, _LESION_LABELS)
        save_volume(out / MASKS / name, mask, rendering.affine, dtype=np.uint8, header_description=text)
    grey = rendering.volume * _GREY_LEVELS
    save_volume(out / name, grey, rendering.affine, dtype=np.int16, header_description=text)


def _write_table(out: Path, jobs: Sequence[_Job]) -> None:
    """One row per volume of this call, after the rows of others that an earlier, larger call left."""
    rows: dict[str, tuple[str, ...]] = {job.row[0]: job.row for job in jobs}
    if (out / TABLE).is_file():
        with (out / TABLE).open(newline="", encoding="utf-8") as handle:
            earlier = [tuple(row) for row in csv.reader(handle)][1:]
        rows = {row[0]: row for row in earlier if (out / row[0]).is_file()} | rows
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_COLUMNS, *(rows[name] for name in sorted(rows))])
    write_text(out / TABLE, text.getvalue())
