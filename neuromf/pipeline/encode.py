"""`neuromf encode`: scans -> a folder of latents with statistics, splits and a report.

Resumable: a finished latent is kept when its scan, the preprocessing and the autoencoder are the same.
One bad scan is listed in the report and never stops the rest.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from neuromf import __version__
from neuromf.data.latents import (
    DATASET_FILE,
    FORMAT,
    FORMAT_VERSION,
    SPLITS_FILE,
    STATISTICS_FILE,
    compute_statistics,
    latent_path,
    load_latent,
    save_latent,
)
from neuromf.data.preprocessing import Prepared, Preprocessing, preprocess
from neuromf.data.sources import Scan, find_scans, read_groups
from neuromf.data.splits import make_splits, split_hash
from neuromf.data.volumes import load_volume
from neuromf.errors import ScanError, UserError
from neuromf.files import read_json, remove_leftovers, sha256_file, write_json
from neuromf.metrics.similarity import psnr, ssim
from neuromf.pipeline.encode_report import EncodeReport, ScanReport

if TYPE_CHECKING:
    from neuromf.models.autoencoder import Autoencoder

REPORT_FILE = "encode_report.json"
_MUCH_LOST = 0.05

Progress = Callable[[str, int, int], None]


def encode(
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    autoencoder: Autoencoder,
    preprocessing: Preprocessing,
    groups_csv: str | Path | None = None,
    group_column: str | None = None,
    class_column: str | None = None,
    fractions: Sequence[float] = (0.8, 0.1, 0.1),
    seed: int = 0,
    report: bool = False,
    strict: bool = False,
    dry_run: bool = False,
    flip_copies: bool = False,
    progress: Progress | None = None,
) -> EncodeReport:
    """Encode scans into `<out>/<subject>.pt`, and write statistics, splits and a report beside them.

    Args:
        inputs: NIfTI files, folders, globs.
        out: the latent folder; the same settings resume it, other settings are refused.
        autoencoder: frozen; its hash travels with every latent.
        preprocessing: the grid and the intensity scale.
        groups_csv: table of the subjects.
        group_column: its column that says which of them belong together.
        class_column: its column that says what each scan shows (contrast, sex, site): training can be told.
        fractions: of train, val, test.
        seed: of the split.
        report: also measure SSIM and PSNR of each reconstruction.
        strict: stop at the first scan that cannot be used.
        dry_run: check the inputs and the folder, write nothing.
        flip_copies: also encode each scan mirrored left to right, into `<out>/flipped/`.
        progress: called with (description, done, total).

    Raises:
        UserError: no usable scan, a folder of other settings, a full disk.
        ScanError: with `strict`, the first scan that cannot be used.
    """
    scans = find_scans(inputs)
    groups = _column(scans, groups_csv, group_column)
    classes = _column(scans, groups_csv, class_column)
    if groups_csv and not (groups or classes):
        raise UserError(f"no column of {groups_csv} was named", "add --group-column NAME, or --class-column NAME")
    # A fault in the fractions should show before hours of encoding.
    make_splits([scan.subject for scan in scans], groups, fractions, seed)
    autoencoder.check_size(preprocessing.size)
    job = _Job(Path(out), autoencoder, preprocessing, report, flip_copies)
    _check_folder(job, scans)
    if dry_run:
        planned = tuple(_plan(job, scan) for scan in scans)
        return EncodeReport(job.out, planned, job.latent_shape)

    if not (job.out / DATASET_FILE).exists():
        write_json(job.out / DATASET_FILE, job.identity | {"complete": False})
    remove_leftovers(job.out)
    encoded = EncodeReport(job.out, _encode_all(job, scans, strict, progress), job.latent_shape)
    # Written before and after the statistics: the reasons of refused scans are there even if those fail.
    write_json(job.out / REPORT_FILE, encoded.to_dict())
    splitting = {"seed": seed, "fractions": list(fractions), "group_column": group_column}
    finished = _finish(job, encoded, groups, _classes(encoded, class_column, classes), splitting, progress)
    write_json(job.out / REPORT_FILE, finished.to_dict())
    return finished


@dataclass(frozen=True)
class _Job:
    """What is the same for every scan of a run."""

    out: Path
    autoencoder: Autoencoder
    preprocessing: Preprocessing
    report: bool
    flip_copies: bool

    @property
    def identity(self) -> dict[str, Any]:
        """What must agree for latents to share a folder."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "autoencoder": self.autoencoder_record,
            "preprocessing": self.preprocessing.to_dict(),
            "latent_shape": list(self.latent_shape),
        }

    @property
    def autoencoder_record(self) -> dict[str, Any]:
        a = self.autoencoder
        return {"name": a.name, "sha256": a.sha256, "latent_channels": a.latent_channels, "factor": a.factor}

    @property
    def latent_shape(self) -> tuple[int, ...]:
        size = tuple(n // self.autoencoder.factor for n in self.preprocessing.size)
        return (self.autoencoder.latent_channels, *size)


def _column(scans: Sequence[Scan], table: str | Path | None, column: str | None) -> dict[str, str] | None:
    if column is None:
        return None
    if table is None:
        raise UserError(
            f"the column '{column}' needs its table",
            "give both, for instance --groups subjects.csv --group-column scan_group",
        )
    return read_groups(Path(table), column, [scan.subject for scan in scans])


def _classes(encoded: EncodeReport, column: str | None, of: Mapping[str, str] | None) -> dict[str, Any] | None:
    """What dataset.json says of the classes: their column, their names in the order of their numbers, and whose."""
    if of is None:
        return None
    usable = {scan.subject: of[scan.subject] for scan in encoded.scans if scan.status != "refused"}
    return {"column": column, "names": sorted(set(usable.values())), "of": usable}


def _check_folder(job: _Job, scans: Sequence[Scan]) -> None:
    """Refuse a folder that holds something else, so that nothing is mixed or lost."""
    if job.out.exists() and not job.out.is_dir():
        raise UserError(f"{job.out} is a file", "give a folder as --out")
    if not job.out.is_dir():
        return
    present = [path for path in job.out.iterdir() if not path.name.startswith(".")]
    if not (job.out / DATASET_FILE).is_file():
        if present:
            raise UserError(
                f"{job.out} is not a folder of latents and not empty (it holds {present[0].name})",
                "give a new folder as --out",
            )
        return
    different = _differences(read_json(job.out / DATASET_FILE), job.identity)
    if different:
        raise UserError(
            f"{job.out} holds latents of other settings: " + "; ".join(different),
            "give another --out, or the settings it was made with",
        )
    subjects = {scan.subject for scan in scans}
    foreign = sorted(path.name for path in present if path.suffix == ".pt" and path.stem not in subjects)
    if foreign:
        raise UserError(
            f"{job.out} holds {len(foreign)} latents of scans that are not among the inputs, the first is {foreign[0]}",
            "name all scans of the dataset in one command, give another --out, or delete those files",
        )


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """One phrase per setting that differs, innermost names joined by dots."""
    phrases = []
    for key, value in wanted.items():
        there = found.get(key)
        if isinstance(value, Mapping) and isinstance(there, Mapping):
            phrases += [f"{key}.{phrase}" for phrase in _differences(there, value)]
        elif there != value:
            phrases.append(f"{key} is {there} there and {value} here")
    return phrases


def _plan(job: _Job, scan: Scan) -> ScanReport:
    try:
        sha256 = _input_hash(scan)
    except ScanError as error:
        return ScanReport(
            scan.subject, str(scan.path), "refused", error.message.removeprefix(f"{scan.path}: "), error.hint
        )
    kept = _finished_metadata(job, scan, sha256) is not None
    return ScanReport(scan.subject, str(scan.path), "kept" if kept else "planned", sha256=sha256)


def _encode_all(job: _Job, scans: Sequence[Scan], strict: bool, progress: Progress | None) -> tuple[ScanReport, ...]:
    results = []
    for done, scan in enumerate(scans):
        if progress is not None:
            progress("encoding", done, len(scans))
        results.append(_encode_or_refuse(job, scan, strict))
    if progress is not None:
        progress("encoding", len(scans), len(scans))
    return _note_duplicates(results)


def _encode_or_refuse(job: _Job, scan: Scan, strict: bool) -> ScanReport:
    started_s = time.perf_counter()
    sha256 = ""
    try:
        sha256 = _input_hash(scan)
        metadata = _finished_metadata(job, scan, sha256)
        status: Literal["encoded", "kept"] = "encoded" if metadata is None else "kept"
        if metadata is None:
            metadata = _encode_one(job, scan, sha256)
    except ScanError as error:
        reason = error.message.removeprefix(f"{scan.path}: ")
        if strict:
            raise ScanError(f"{scan.path}: {reason}", error.hint) from error
        return ScanReport(
            scan.subject,
            str(scan.path),
            "refused",
            reason,
            error.hint,
            sha256=sha256,
            seconds=round(time.perf_counter() - started_s, 3),
        )
    record = metadata["preprocessing"]
    return ScanReport(
        scan.subject,
        str(scan.path),
        status,
        sha256=sha256,
        seconds=round(time.perf_counter() - started_s, 3),
        spacing_mm=tuple(record["spacing_mm"]),
        foreground_lost=record["foreground_lost"],
        notes=_notes(record),
        reconstruction=metadata["reconstruction"],
    )


def _encode_one(job: _Job, scan: Scan, sha256: str) -> dict[str, Any]:
    """Scan -> latent file(s); returns the metadata written."""
    prepared = _prepare(scan.path, job.preprocessing)
    volume = torch.from_numpy(prepared.array)[None]
    metadata = {
        "subject": scan.subject,
        "input": {"name": scan.path.name, "sha256": sha256},
        "autoencoder": job.autoencoder_record,
        "preprocessing": prepared.record,
        "preprocessing_sha256": job.preprocessing.digest,
        "neuromf_version": __version__,
        "flipped": False,
        "reconstruction": _reconstruction(job.autoencoder, volume) if job.report else None,
    }
    if job.flip_copies:
        # First, so that a finished original means that its copy is finished too.
        flipped = metadata | {"flipped": True, "reconstruction": None}
        _encode_volume(job, scan, volume.flip(2), flipped)
    _encode_volume(job, scan, volume, metadata)
    return metadata


def _prepare(path: Path, spec: Preprocessing) -> Prepared:
    """The order of all steps; skull stripping, then N4, take their place between loading and resampling."""
    volume = load_volume(path)
    return preprocess(volume, spec)


def _encode_volume(job: _Job, scan: Scan, volume: torch.Tensor, metadata: Mapping[str, Any]) -> None:
    """Write the posterior of one volume (1, 1, I, J, K)."""
    posterior = job.autoencoder.encode(volume.to(job.autoencoder.device))
    mean, log_sigma = posterior.mean[0].cpu().float(), posterior.log_sigma[0].cpu().float()
    assert tuple(mean.shape) == job.latent_shape, f"latent {tuple(mean.shape)}, expected {job.latent_shape}"
    if not (mean.isfinite().all() and log_sigma.isfinite().all()):
        raise ScanError(
            f"{scan.path}: the autoencoder gives NaN or Inf for this scan", "look at its intensities for outliers"
        )
    path = latent_path(job.out, scan.subject, flipped=bool(metadata["flipped"]))
    save_latent(path, mean, log_sigma, metadata)


def _reconstruction(autoencoder: Autoencoder, volume: torch.Tensor) -> dict[str, float | None]:
    """SSIM and PSNR of the round trip, on [0, 1]."""
    restored = autoencoder.reconstruct(volume.to(autoencoder.device)).cpu().float()
    ratio = float(psnr(volume, restored))
    return {"ssim": float(ssim(volume, restored)), "psnr_db": ratio if math.isfinite(ratio) else None}


def _input_hash(scan: Scan) -> str:
    try:
        return sha256_file(scan.path)
    except OSError as error:
        raise ScanError(f"{scan.path}: cannot be read ({error.strerror})", "check the file and its rights") from error


def _finished_metadata(job: _Job, scan: Scan, sha256: str) -> dict[str, Any] | None:
    """The metadata of an earlier run's latent if it is what this run would write, else None."""
    path = latent_path(job.out, scan.subject)
    if not path.is_file() or (job.flip_copies and not latent_path(job.out, scan.subject, flipped=True).is_file()):
        return None
    try:
        metadata = load_latent(path, mmap=True)["metadata"]
    except UserError:
        return None
    same = (
        metadata.get("input", {}).get("sha256") == sha256
        and metadata.get("preprocessing_sha256") == job.preprocessing.digest
        and metadata.get("autoencoder") == job.autoencoder_record
        and not (job.report and metadata.get("reconstruction") is None)
    )
    return metadata if same else None


def _notes(record: Mapping[str, Any]) -> tuple[str, ...]:
    notes = []
    if record["source"]["orientation_from"] == "none":
        notes.append("the header states no orientation (sform and qform codes are 0): left and right are a guess")
    if record["foreground_lost"] > _MUCH_LOST:
        notes.append(f"the crop loses {record['foreground_lost']:.0%} of the head: a larger size keeps it")
    return tuple(notes)


def _note_duplicates(results: Sequence[ScanReport]) -> tuple[ScanReport, ...]:
    """Say which scans have the same bytes: copies in two splits would flatter every metric."""
    first: dict[str, str] = {}
    noted = []
    for scan in results:
        original = first.setdefault(scan.sha256, scan.subject) if scan.sha256 else scan.subject
        if original != scan.subject:
            note = f"the same file content as {original}: a copy may be in another split"
            scan = replace(scan, notes=(*scan.notes, note))
        noted.append(scan)
    return tuple(noted)


def _finish(
    job: _Job,
    encoded: EncodeReport,
    groups: Mapping[str, str] | None,
    classes: Mapping[str, Any] | None,
    splitting: Mapping[str, Any],
    progress: Progress | None,
) -> EncodeReport:
    """Splits, statistics of the training split, and last the file that declares the folder complete."""
    usable = [scan for scan in encoded.scans if scan.status != "refused"]
    if not usable:
        raise UserError(
            f"none of the {len(encoded.scans)} scans can be used; the first: {encoded.scans[0].reason}",
            f"{job.out / REPORT_FILE} gives the reason of each",
        )
    splits = make_splits([scan.subject for scan in usable], groups, splitting["fractions"], splitting["seed"])
    statistics = compute_statistics(_training_files(job.out, splits["train"], progress))
    digest = split_hash(splits)

    spacings = np.asarray([scan.spacing_mm for scan in usable])
    spacing = np.median(spacings, axis=0)
    write_json(job.out / STATISTICS_FILE, statistics.to_dict() | {"split": "train", "split_hash": digest})
    write_json(job.out / SPLITS_FILE, splits | {"hash": digest})
    write_json(
        job.out / DATASET_FILE,
        job.identity
        | {
            "complete": True,
            "spacing_mm": spacing.tolist(),
            "spacing_varies": bool(np.ptp(spacings, axis=0).max() > 1e-3 * spacing.min()),
            "affine": _grid_affine(job.preprocessing.size, spacing).tolist(),
            "splits": dict(splitting) | {"hash": digest},
            "counts": {name: len(members) for name, members in splits.items()} | {"refused": encoded.refused},
            "classes": classes,
            "flip_copies": job.flip_copies,
            "neuromf_version": __version__,
        },
    )
    return EncodeReport(job.out, encoded.scans, job.latent_shape, splits, statistics)


def _training_files(out: Path, subjects: Sequence[str], progress: Progress | None) -> Iterator[Path]:
    for done, subject in enumerate(subjects, start=1):
        yield latent_path(out, subject)
        if progress is not None:
            progress("statistics", done, len(subjects))


def _grid_affine(size: Sequence[int], spacing_mm: np.ndarray) -> np.ndarray:
    """The affine generated volumes get: RAS+ axes, world origin in the middle of the grid."""
    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = -(np.asarray(size) - 1) / 2 * spacing_mm
    return affine
