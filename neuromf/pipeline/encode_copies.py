"""Copies of the training scans, mirrored and augmented, each encoded from its own volume.

They are made once the split is known, so that no held-back scan has any. A copy is kept when its scan, the
settings and its own draw are the same; so the same command continues, and a larger number adds copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from neuromf.data.augmentation import Augmenter, Change
from neuromf.data.latents import FLIPPED_FOLDER, copy_name, latent_path
from neuromf.data.sources import Scan
from neuromf.errors import ScanError
from neuromf.files import remove_leftovers
from neuromf.pipeline.encode_report import CopiesReport
from neuromf.pipeline.encode_scan import EncodeJob, encode_volume, finished_metadata, latent_metadata, read_scan

Progress = Callable[[str, int, int], None]


class HashedScan(NamedTuple):
    """A usable scan and the SHA-256 of its file."""

    scan: Scan
    sha256: str


def plan_copies(job: EncodeJob, scans: Sequence[HashedScan]) -> CopiesReport:
    """What would become of the copies of the training scans, without encoding any."""
    planned = sum(len(_missing(job, entry)) for entry in scans)
    of_each = job.copies + job.flip_copies
    return CopiesReport(len(scans), of_each, 0, len(scans) * of_each - planned, planned, _unused(job))


def encode_copies(job: EncodeJob, scans: Sequence[HashedScan], progress: Progress | None = None) -> CopiesReport:
    """Write the copies of the training scans that are not there yet.

    Raises:
        ScanError: a copy gives no finite latent. Training on fewer copies of it would not be what was asked for.
    """
    encoded, of_each = 0, job.copies + job.flip_copies
    for kind in _changes(job, "any"):
        remove_leftovers(job.out / kind)
    for done, entry in enumerate(scans if of_each else (), start=1):
        encoded += _encode_missing(job, entry)
        if progress is not None:
            progress("copies", done, len(scans))
    return CopiesReport(len(scans), of_each, encoded, len(scans) * of_each - encoded, 0, _unused(job))


def _encode_missing(job: EncodeJob, entry: HashedScan) -> int:
    missing = _missing(job, entry)
    if not missing:
        return 0
    volume, prepared = read_scan(job, entry.scan)
    augmenter, origin = Augmenter(volume, prepared), latent_metadata(job, entry.scan, entry.sha256, prepared)
    for kind, change in missing.items():
        array = torch.from_numpy(augmenter.copy(change))[None]
        metadata = origin | _identity(job, kind, change)
        try:
            encode_volume(job, latent_path(job.out, entry.scan.subject, kind), array, metadata)
        except ScanError as error:
            raise ScanError(f"{entry.scan.path}, {kind}: {error.message}", error.hint) from error
    return len(missing)


def _missing(job: EncodeJob, entry: HashedScan) -> dict[str, Change]:
    """The copies of a scan that are not there, or are of something else."""
    missing = {}
    for kind, change in _changes(job, entry.scan.subject).items():
        found = finished_metadata(job, latent_path(job.out, entry.scan.subject, kind), entry.sha256)
        if found is None or any(found.get(key) != value for key, value in _identity(job, kind, change).items()):
            missing[kind] = change
    return missing


def _changes(job: EncodeJob, subject: str) -> dict[str, Change]:
    """What each copy of a subject is, by the name of its subfolder."""
    mirrored = {FLIPPED_FOLDER: Change(flip=True)} if job.flip_copies else {}
    return mirrored | {copy_name(n): job.augmentation.draw(subject, n) for n in range(1, job.copies + 1)}


def _identity(job: EncodeJob, kind: str, change: Change) -> dict[str, Any]:
    """What a copy's metadata say beyond its original's."""
    if kind == FLIPPED_FOLDER:
        return {"flipped": True, "augmentation": None}
    return {
        "flipped": change.flip,
        "augmentation": {"copy": kind, "settings": job.augmentation.to_dict(), "change": change.to_dict()},
    }


def _unused(job: EncodeJob) -> tuple[str, ...]:
    mirrored = () if job.flip_copies else (FLIPPED_FOLDER,)
    return tuple(kind for kind in (*mirrored, copy_name(job.copies + 1)) if (job.out / kind).is_dir())
