"""What `neuromf encode --check` tells: one row per scan, then what is true of all of them together."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from neuromf import __version__
from neuromf.data.preprocessing import Preprocessing
from neuromf.data.sources import some
from neuromf.pipeline.check_scan import ScanCheck
from neuromf.pipeline.cohort import Cohort

VERDICTS = ("used", "changed", "refused")
_GIB = 1 << 30
_COLUMNS = ("scan", "verdict", "axes", "voxels", "mm", "type", "what")
_OBLIQUE_DEG = 1.0


class Disk(NamedTuple):
    """What the latents would take: shape (C, I, J, K), files, bytes of each, bytes free (None: unknown)."""

    latent_shape: tuple[int, ...]
    files: int
    bytes_each: int
    bytes_free: int | None


class Duplicate(NamedTuple):
    """Scans that hold the same voxels; `leaks` if they could come into two splits."""

    subjects: list[str]
    leaks: bool


@dataclass(frozen=True)
class CheckReport:
    """The result of a check; `complaints` is what makes its exit status 4.

    Attributes:
        splits: how the usable scans would be divided.
        disk: what the latents would take, None where the autoencoder cannot be loaded.
        problems: what would stop `encode`, beside refused scans.
    """

    cohort: Cohort
    preprocessing: Preprocessing
    scans: tuple[ScanCheck, ...]
    splits: dict[str, list[str]]
    disk: Disk | None
    problems: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """Verdict -> how many scans."""
        return {verdict: sum(scan.verdict == verdict for scan in self.scans) for verdict in VERDICTS}

    @property
    def complaints(self) -> list[str]:
        """One line per scan that cannot be used, with what to do, and per other problem."""
        refused = [f"{s.path}: {s.reason}; {s.hint}" for s in self.scans if s.verdict == "refused"]
        return [*self.problems, *refused]

    @property
    def duplicates(self) -> list[Duplicate]:
        """The same image under several names."""
        same: dict[str, list[str]] = defaultdict(list)
        for scan in self.scans:
            if scan.content:
                same[scan.content].append(scan.subject)
        groups = self.cohort.groups
        return [Duplicate(s, len({groups[subject] for subject in s}) > 1) for s in same.values() if len(s) > 1]

    @property
    def warnings(self) -> list[str]:
        """What is worth a look before encoding, over all scans."""
        return [*self._of_tables(), *self._of_duplicates(), *self._of_grids(), *self._of_disk()]

    def lines(self) -> list[str]:
        """The table and what follows from it, for a terminal."""
        lines = _aligned([_COLUMNS, *(_row(scan) for scan in self.scans)])
        counts = ", ".join(f"{n} {verdict}" for verdict, n in self.counts.items() if n)
        people = len({scan.participant for scan in self.scans})
        lines += ["", f"{len(self.scans)} scans of {people} participants: {counts}"]
        if self.splits:
            given = " (as given)" if self.cohort.recorded["splits"]["given"] else ""
            lines.append("splits: " + ", ".join(f"{k} {len(v)}" for k, v in self.splits.items()) + given)
        if self.cohort.classes:
            lines.append(f"classes: {_counts(self.cohort.classes.values())}")
        lines += [f"covariate {name}: {_column(column)}" for name, column in self.cohort.columns.items()]
        if self.disk:
            shape = " x ".join(map(str, self.disk.latent_shape))
            total = self.disk.files * self.disk.bytes_each
            lines.append(
                f"latents: {self.disk.files} of {shape}, {self.disk.bytes_each / 1e6:.2f} MB each, {_size(total)}"
            )
        lines += [f"warning: {text}" for text in self.warnings]
        if not self.complaints:
            lines.append("next: the same command without --check")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Everything, for `--json`."""
        sources = self.cohort.sources
        return {
            "neuromf_version": __version__,
            "preprocessing": self.preprocessing.to_dict(),
            "counts": self.counts,
            "participants": len({scan.participant for scan in self.scans}),
            "splits": {name: len(members) for name, members in self.splits.items()},
            "covariates": self.cohort.columns,
            "tables": [table._asdict() for table in sources.tables],
            "overlooked": list(sources.overlooked),
            "duplicates": [duplicate._asdict() for duplicate in self.duplicates],
            "disk": self.disk._asdict() if self.disk else None,
            "warnings": self.warnings,
            "problems": list(self.problems),
            "scans": [asdict(scan) for scan in self.scans],
        }

    def _of_tables(self) -> list[str]:
        lines = []
        for table in self.cohort.sources.tables:
            if table.absent:
                lines.append(f"{table.path.name} lists {len(table.absent)} without a scan: {some(table.absent)}")
            if table.unlisted:
                lines.append(f"{len(table.unlisted)} are not listed in {table.path.name}: {some(table.unlisted)}")
        overlooked = [str(path) for path in self.cohort.sources.overlooked]
        if overlooked:
            lines.append(f"{len(overlooked)} files are not named by the rules of BIDS and left out: {some(overlooked)}")
        return lines

    def _of_duplicates(self) -> list[str]:
        leak = "; they may come into two splits, and what is tested was trained on"
        return [
            f"the same image: {some(subjects)}{leak if leaks else ' (never in two splits)'}"
            for subjects, leaks in self.duplicates
        ]

    def _of_grids(self) -> list[str]:
        usable = [scan for scan in self.scans if scan.verdict != "refused"]
        spacings = Counter(_by([_rounded(mm) for mm in _in_ras(scan, scan.spacing_mm)]) for scan in usable)
        shapes = Counter(_by(_in_ras(scan, scan.shape)) for scan in usable)
        lines = []
        if self.preprocessing.spacing is None and len(spacings) > 1:
            listed = some([f"{mm} mm ({n})" for mm, n in spacings.most_common()])
            lines.append(f"mixed voxel sizes and no --spacing: {listed}; heads would come in different scales")
        if len(shapes) > 1:
            listed = some([f"{shape} ({n})" for shape, n in shapes.most_common()])
            size = _by(self.preprocessing.size)
            lines.append(f"mixed shapes: {listed}; after resampling all are cropped or padded to {size}")
        return lines

    def _of_disk(self) -> list[str]:
        if self.disk is None or self.disk.bytes_free is None:
            return []
        needed = self.disk.files * self.disk.bytes_each
        free = self.disk.bytes_free
        return [f"the latents need {_size(needed)}, {_size(free)} are free"] if needed > free else []


def _row(scan: ScanCheck) -> tuple[str, ...]:
    what = [scan.reason] if scan.reason else [*scan.changes, *scan.notes]
    oblique = (scan.oblique_deg or 0) > _OBLIQUE_DEG and (scan.shear_deg or 0) < _OBLIQUE_DEG
    if oblique and not scan.reason:
        what.append(f"oblique {scan.oblique_deg:.1f} deg, kept so")
    cells = (scan.orientation, _by(scan.shape), _by(scan.spacing_mm), scan.dtype)
    return (scan.subject, scan.verdict, *(cell or "-" for cell in cells), "; ".join(what))


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows]


def _column(column: Mapping[str, Any]) -> str:
    missing = f", {column['missing']} missing" if column["missing"] else ""
    if column["type"] == "number":
        return f"number, {column['minimum']:g} to {column['maximum']:g}{missing}"
    shown = some([f"{value} ({n})" for value, n in column["counts"].items()])
    return f"class, {shown}{missing}"


def _counts(values: Iterable[str]) -> str:
    return some([f"{value} ({n})" for value, n in sorted(Counter(values).items())], limit=20)


def _in_ras(scan: ScanCheck, values: Sequence[float]) -> list[float]:
    """One value per stored axis, as one per axis to the right, the front and the top."""
    axes = ["RLAPSI".index(letter) // 2 for letter in scan.orientation]
    return [value for _, value in sorted(zip(axes, values, strict=False))]


def _rounded(mm: float) -> float:
    """To a hundredth, so that the rounding of headers makes no second voxel size."""
    return round(mm, 2)


def _by(values: Sequence[float]) -> str:
    return "x".join(f"{value:.4g}" for value in values)


def _size(n_bytes: float) -> str:
    return f"{n_bytes / _GIB:.1f} GiB" if n_bytes >= _GIB else f"{n_bytes / 1e6:.1f} MB"
