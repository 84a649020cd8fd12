"""Copies of the training scans, mirrored and augmented, each encoded from its own volume.

They are made once the split is known, so that no held-back scan has any. A copy is kept when its scan, the
settings and its own draw are the same; so the same command continues, and a larger number adds copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

import torch

from neuromf.data.augmentation import Change
from neuromf.data.latents import FLIPPED_FOLDER, copy_name, latent_path
from neuromf.data.sources import Scan
from neuromf.errors import ScanError
from neuromf.pipeline.encode_input import WantedCopies, prepare_copies
from neuromf.pipeline.encode_report import CopiesReport
from neuromf.pipeline.encode_scan import EncodeJob, encode_volume, finished_metadata, latent_metadata
from neuromf.pipeline.workers import ahead

Progress = Callable[[int], None]

# Copies that travel together, so that memory does not grow with their number.
_AT_ONCE = 4


class HashedScan(NamedTuple):
    """A usable scan and the SHA-256 of its file."""

    scan: Scan
    sha256: str


def plan_copies(job: EncodeJob, scans: Sequence[HashedScan]) -> CopiesReport:
    """What would become of the copies of the training scans, without encoding any."""
    planned = sum(len(_missing(job, entry)) for entry in scans)
    of_each = job.copies + job.flip_copies
    return CopiesReport(len(scans), of_each, 0, len(scans) * of_each - planned, planned, _unused(job))


def encode_copies(job: EncodeJob, scans: Sequence[HashedScan], workers: int, progress: Progress) -> int:
    """Write the copies of some training scans that are not there yet; returns how many.

    Args:
        job: what is the same for all.
        scans: those of this process.
        workers: processes that make copies ahead of the autoencoder; 1: none do.
        progress: called with how many scans are done.

    Raises:
        ScanError: a copy gives no finite latent. Training on fewer copies of it would not be what was asked for.
    """
    place = {entry.scan.subject: n for n, entry in enumerate(scans)}
    wanted: list[WantedCopies] = []

    def missing() -> Iterator[WantedCopies]:
        for entry in scans:
            changes = list(_missing(job, entry).items())
            for start in range(0, len(changes), _AT_ONCE):
                wanted.append(WantedCopies(*entry, dict(changes[start : start + _AT_ONCE])))
                yield wanted[-1]

    encoded = 0
    with closing(ahead(partial(prepare_copies, how=job.preparation), missing(), workers)) as prepared:
        for copies in prepared:
            asked = wanted.pop(0)
            progress(place[asked.scan.subject])
            origin = latent_metadata(job, asked.scan, asked.sha256, copies.prepared)
            for kind, array in copies.arrays.items():
                _encode_copy(job, asked, kind, torch.from_numpy(array)[None], origin)
            encoded += len(copies.arrays)
    progress(len(scans))
    return encoded


def _encode_copy(
    job: EncodeJob, asked: WantedCopies, kind: str, volume: torch.Tensor, origin: Mapping[str, Any]
) -> None:
    metadata = dict(origin) | _identity(job, kind, asked.changes[kind])
    try:
        encode_volume(job, latent_path(job.out, asked.scan.subject, kind), volume, metadata)
    except ScanError as error:
        raise ScanError(f"{asked.scan.path}, {kind}: {error.message}", error.hint) from error


def report_copies(job: EncodeJob, scans: int, encoded: int) -> CopiesReport:
    """What became of the copies of all training scans, of which `encoded` were made now."""
    of_each = job.copies + job.flip_copies
    return CopiesReport(scans, of_each, encoded, scans * of_each - encoded, 0, _unused(job))


def copy_folders(job: EncodeJob) -> list[str]:
    """The subfolders of the copies that were asked for."""
    return list(_changes(job, "any"))


def _missing(job: EncodeJob, entry: HashedScan) -> dict[str, Change]:
    """The copies of a scan that are not there, or are of something else."""
    missing = {}
    for kind, change in _changes(job, entry.scan.subject).items():
        found = finished_metadata(job, latent_path(job.out, entry.scan.subject, kind))
        expected = {"sha256": entry.sha256}, _identity(job, kind, change)
        if found is None or not (_holds(found["input"], expected[0]) and _holds(found, expected[1])):
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


def _holds(found: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    return all(found.get(key) == value for key, value in expected.items())


def _unused(job: EncodeJob) -> tuple[str, ...]:
    mirrored = () if job.flip_copies else (FLIPPED_FOLDER,)
    return tuple(kind for kind in (*mirrored, copy_name(job.copies + 1)) if (job.out / kind).is_dir())
