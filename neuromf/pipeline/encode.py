"""`neuromf encode`: scans -> a folder of latents with statistics, splits and a report.

Resumable: a finished latent is kept when its scan, the preprocessing and the autoencoder are the same.
One bad scan is listed in the report and never stops the rest. Scans are prepared by processes of their own, ahead of
the autoencoder; the processes of a launcher share the scans. The latents are the same, bit for bit, for any number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from neuromf import __version__
from neuromf.data.augmentation import Augmentation
from neuromf.data.bids import Selection
from neuromf.data.latents import (
    DATASET_FILE,
    SPLITS_FILE,
    STATISTICS_FILE,
    compute_statistics,
    latent_path,
)
from neuromf.data.preprocessing import Preprocessing
from neuromf.data.sources import Scan
from neuromf.data.splits import split_hash
from neuromf.errors import UserError
from neuromf.files import read_json, remove_leftovers, write_json
from neuromf.pipeline.cleaning import MASKS_FOLDER, Cleaning
from neuromf.pipeline.cohort import Cohort, read_cohort
from neuromf.pipeline.encode_copies import HashedScan, copy_folders, encode_copies, plan_copies, report_copies
from neuromf.pipeline.encode_effect import measure_effect
from neuromf.pipeline.encode_report import CopiesReport, EncodeReport, ScanReport
from neuromf.pipeline.encode_scan import EncodeJob, encode_scans, plan_scan
from neuromf.pipeline.encode_sharing import Parts, alone, remove_parts
from neuromf.pipeline.sharing import Share
from neuromf.pipeline.workers import cores

if TYPE_CHECKING:
    from neuromf.models.autoencoder import Autoencoder

REPORT_FILE = "encode_report.json"

# A process takes about a second to start: below this many scans each, it does not pay.
_WORTH_A_PROCESS, _MOST_PROCESSES = 8, 16

Progress = Callable[[str, int, int], None]


def encode(
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    autoencoder: Autoencoder,
    preprocessing: Preprocessing,
    cleaning: Cleaning | None = None,
    selection: Selection | None = None,
    groups_csv: str | Path | None = None,
    group_column: str | None = None,
    class_column: str | None = None,
    fractions: Sequence[float] = (0.8, 0.1, 0.1),
    seed: int = 0,
    report: bool = False,
    strict: bool = False,
    dry_run: bool = False,
    flip_copies: bool = False,
    copies: int = 0,
    augmentation: Augmentation | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> EncodeReport:
    """Encode scans into `<out>/<subject>.pt`, and write statistics, splits and a report beside them.

    Every process of a launcher encodes its share; the main one waits for the others and finishes the folder. What
    another one returns is its share alone.

    Args:
        inputs: NIfTI files, folders, globs, tables, BIDS trees (see `find_sources`).
        out: the latent folder; the same settings resume it, other settings are refused.
        autoencoder: frozen; its hash travels with every latent.
        preprocessing: the grid and the intensity scale.
        cleaning: what comes before it; masks are kept in `<out>/masks/`.
        selection: which scans of a BIDS tree.
        groups_csv: table of the scans or participants, whose columns become covariates.
        group_column: the covariate that says who belongs together; None keeps the scans of a participant together.
        class_column: the covariate that says what each scan shows (contrast, sex, site): training can be told.
        fractions: of train, val, test, unless a table of the inputs has a column `split`.
        seed: of the split.
        report: also measure SSIM and PSNR of each reconstruction, and whether latents may be flipped themselves.
        strict: stop at the first scan that cannot be used.
        dry_run: check the inputs and the folder, write nothing.
        flip_copies: also encode each training scan mirrored left to right, into `<out>/flipped/`.
        copies: how many augmented copies of each training scan to encode, into `<out>/copies/<n>/`.
        augmentation: how far these may differ from the scan; by default `Augmentation(seed=seed)`.
        workers: processes that prepare scans while others are encoded; 1 prepares and encodes in turn, in this one;
            None decides.
        progress: called with (description, done, total).

    Raises:
        UserError: no usable scan, a folder of other settings or in another command's hands, a full disk, a process
            that was killed.
        ScanError: with `strict`, the first scan that cannot be used.
    """
    cohort = read_cohort(
        inputs,
        selection=selection,
        table=groups_csv,
        group_column=group_column,
        class_column=class_column,
        fractions=fractions,
        seed=seed,
    )
    scans = cohort.scans
    autoencoder.check_size(preprocessing.size)
    if augmentation and not copies:
        raise UserError("an augmentation was described and no copies are asked for", "add --copies N")
    augmentation = augmentation or Augmentation(seed=seed)
    job = EncodeJob(
        Path(out),
        autoencoder,
        preprocessing,
        cleaning or Cleaning(),
        report,
        flip_copies,
        copies,
        augmentation,
        cohort.covariates,
    )
    _check_folder(job, scans)
    if dry_run:
        return _planned(job, cohort)

    share = Share.own()
    workers = workers or _default_workers(job, len(scans) // share.processes)
    with alone(job.out) if share.main else nullcontext():
        if not (job.out / DATASET_FILE).exists():
            write_json(job.out / DATASET_FILE, job.identity | {"complete": False})
        effect_before = _effect_before(job.out)
        encoded = EncodeReport(job.out, _encode_all(job, scans, share, strict, workers, progress), job.latent_shape)
        if not (share.main or copy_folders(job)):
            return encoded
        finished = _finish(job, encoded, cohort, share, workers, progress)
        if not share.main:
            return finished
        if report or job.copies or job.flip_copies:
            training = _hashed(finished, scans, finished.splits["train"])
            effect = measure_effect(job, training, finished.statistics, effect_before, progress)
            finished = replace(finished, effect=effect)
        write_json(job.out / REPORT_FILE, finished.to_dict())
        return finished


def _default_workers(job: EncodeJob, scans: int) -> int:
    """On a GPU as many as there are cores left; the CPU is the autoencoder's, and more processes would slow it."""
    if not str(job.autoencoder.device).startswith("cuda"):
        return 1
    if job.cleaning.stripper is not None:
        return 2  # what strips skulls takes all cores, or the GPU's memory
    return max(1, min(cores() - 1, _MOST_PROCESSES, scans // _WORTH_A_PROCESS))


def _check_folder(job: EncodeJob, scans: Sequence[Scan]) -> None:
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
    there = read_json(job.out / DATASET_FILE)
    different = _differences(there, job.identity)
    if there.get("copies") and job.copies:
        different += _differences(there, {"augmentation": job.augmentation.to_dict()})
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


def _encode_all(
    job: EncodeJob, scans: Sequence[Scan], share: Share, strict: bool, workers: int, progress: Progress | None
) -> tuple[ScanReport, ...]:
    """Encode this process's share; what became of all scans where that is needed, else of the share."""
    mine = scans[share.rank :: share.processes]
    parts = Parts(job.out, share, "encoding", len(mine))
    show = partial(_show, parts, progress, "encoding", len(mine))
    show(0)
    results = []
    with closing(encode_scans(job, mine, strict, workers)) as encoded:
        for result in encoded:
            results.append(result)
            show(len(results))
    parts.finish([asdict(result) for result in results])
    if share.processes > 1 and (share.main or copy_folders(job)):
        results += [ScanReport.from_dict(values) for part in parts.others(progress) for values in part]
        results.sort(key=lambda result: result.subject)
    return _note_duplicates(results)


def _show(parts: Parts, progress: Progress | None, stage: str, total: int, done: int) -> None:
    """Tell the other processes and the user how far this one is."""
    parts.say(done)
    if progress is not None and total:
        progress(stage, done, total)


def _planned(job: EncodeJob, cohort: Cohort) -> EncodeReport:
    """What would be done, as far as it can be told without opening the scans."""
    planned = EncodeReport(job.out, tuple(plan_scan(job, scan) for scan in cohort.scans), job.latent_shape)
    usable = [scan.subject for scan in planned.scans if scan.status != "refused"]
    training = cohort.splits(usable)["train"] if usable else []
    return replace(planned, copies=plan_copies(job, _hashed(planned, cohort.scans, training)))


def _hashed(report: EncodeReport, scans: Sequence[Scan], subjects: Sequence[str]) -> list[HashedScan]:
    by_subject = {scan.subject: scan for scan in scans}
    sha256 = {scan.subject: scan.sha256 for scan in report.scans}
    return [HashedScan(by_subject[subject], sha256[subject]) for subject in subjects]


def _effect_before(out: Path) -> dict[str, Any] | None:
    """The effect on latents that an earlier command measured, if its report can be read."""
    try:
        return read_json(out / REPORT_FILE).get("effect_on_latents")
    except UserError:
        return None


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
    job: EncodeJob,
    encoded: EncodeReport,
    cohort: Cohort,
    share: Share,
    workers: int,
    progress: Progress | None,
) -> EncodeReport:
    """Splits, copies, statistics of the training split, and last the file that declares the folder complete.

    Processes other than the main one do their share of the copies alone.
    """
    if share.main:
        # Written before and after the statistics: the reasons of refused scans are there even if those fail.
        write_json(job.out / REPORT_FILE, encoded.to_dict())
    usable = [scan for scan in encoded.scans if scan.status != "refused"]
    if not usable:
        raise UserError(
            f"none of the {len(encoded.scans)} scans can be used; the first: {encoded.scans[0].reason}",
            f"{job.out / REPORT_FILE} gives the reason of each",
        )
    subjects = [scan.subject for scan in usable]
    splits, described = cohort.splits(subjects), cohort.to_dict(subjects)
    copies = _copy_all(job, _hashed(encoded, cohort.scans, splits["train"]), share, workers, progress)
    if not share.main:
        return replace(encoded, copies=copies)
    remove_parts(job.out)
    for folder in (job.out, job.out / MASKS_FOLDER, *(job.out / name for name in copy_folders(job))):
        remove_leftovers(folder)
    # Of the originals alone: copies are added later without another whitening, and runs with and without compare.
    statistics = compute_statistics(_training_files(job.out, splits["train"], progress))
    digest = split_hash(splits)

    spacings = np.asarray([scan.spacing_mm for scan in usable])
    spacing = np.median(spacings, axis=0)
    write_json(job.out / STATISTICS_FILE, statistics.to_dict() | {"split": "train", "split_hash": digest})
    write_json(job.out / SPLITS_FILE, splits | {"hash": digest})
    write_json(
        job.out / DATASET_FILE,
        job.identity
        | described
        | {
            "complete": True,
            "spacing_mm": spacing.tolist(),
            "spacing_varies": bool(np.ptp(spacings, axis=0).max() > 1e-3 * spacing.min()),
            "affine": _grid_affine(job.preprocessing.size, spacing).tolist(),
            "splits": described["splits"] | {"hash": digest},
            "counts": {name: len(members) for name, members in splits.items()} | {"refused": encoded.refused},
            "flip_copies": job.flip_copies,
            "copies": job.copies,
            "augmentation": job.augmentation.to_dict() if job.copies else None,
            "neuromf_version": __version__,
        },
    )
    return EncodeReport(job.out, encoded.scans, job.latent_shape, splits, statistics, copies)


def _copy_all(
    job: EncodeJob, training: Sequence[HashedScan], share: Share, workers: int, progress: Progress | None
) -> CopiesReport:
    """Make this process's share of the copies; the main one waits for the others."""
    encoded = 0
    if copy_folders(job):
        mine = training[share.rank :: share.processes]
        parts = Parts(job.out, share, "copies", len(mine))
        encoded = encode_copies(job, mine, workers, partial(_show, parts, progress, "copies", len(mine)))
        parts.finish(encoded)
        if share.processes > 1 and share.main:
            encoded += sum(parts.others(progress))
    return report_copies(job, len(training), encoded)


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
