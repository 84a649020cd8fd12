"""`neuromf encode --check`: every input is read and prepared, nothing is written, and what was found is told.

Scans are looked at by several processes, each holding one at a time; what is kept of a scan is its row.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from neuromf.data.preprocessing import Preprocessing
from neuromf.errors import UserError
from neuromf.pipeline.check_report import CheckReport, Disk
from neuromf.pipeline.check_scan import ScanCheck, check_scan
from neuromf.pipeline.cohort import Cohort
from neuromf.pipeline.workers import ahead, cores

if TYPE_CHECKING:
    from neuromf.data.sources import Scan
    from neuromf.models.autoencoder import Autoencoder
    from neuromf.pipeline.cleaning import Cleaning

Progress = Callable[[str, int, int], None]

# A latent file holds z and log sigma in float32, and about this much of metadata; N4 adds its field on 12^3 knots.
_BYTES_PER_VALUE, _METADATA_BYTES, _BIAS_FIELD_BYTES = 2 * 4, 6_000, 17_000
# A process takes about a second to start: below this many scans each, it does not pay.
_WORTH_A_PROCESS = 8


def check(
    cohort: Cohort,
    out: str | Path,
    *,
    preprocessing: Preprocessing,
    load: Callable[[], Autoencoder],
    cleaning: Cleaning | None = None,
    copies: int = 0,
    workers: int | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """Look at every scan as `encode` would, and at all of them together.

    Args:
        cohort: the scans.
        out: where the latents would go (for the free space there).
        preprocessing: the grid and the intensity scale.
        load: gives the autoencoder; if it cannot be loaded, that is a finding too.
        cleaning: what comes before it; not tried, but its records take room.
        copies: of each training scan, mirrored and augmented.
        workers: processes; None takes one per core, fewer where there are few scans.
        progress: called with (description, done, total).

    Raises:
        UserError: a size the autoencoder cannot take, or a process that was killed.
    """
    problems: list[str] = []
    shape: tuple[int, ...] = ()
    try:
        autoencoder = load()
    except UserError as error:
        problems.append(f"the autoencoder cannot be loaded: {error.message}")
    else:
        autoencoder.check_size(preprocessing.size)
        shape = autoencoder.latent_shape(preprocessing.size)
    scans = []
    for found in check_scans(cohort.scans, preprocessing, workers):
        scans.append(found)
        if progress is not None:
            progress("checking", len(scans), len(cohort.scans))
    usable = [scan.subject for scan in scans if scan.verdict != "refused"]
    splits: dict[str, list[str]] = {}
    try:
        splits = cohort.splits(usable) if usable else {}
    except UserError as error:
        problems.append(error.message)
    files = len(usable) + copies * len(splits.get("train", ()))
    metadata = _METADATA_BYTES + (_BIAS_FIELD_BYTES if cleaning and cleaning.bias else 0)
    disk = Disk(shape, files, _BYTES_PER_VALUE * prod(shape) + metadata, _free_bytes(Path(out))) if shape else None
    return CheckReport(cohort, preprocessing, tuple(scans), splits, disk, tuple(problems))


def check_scans(scans: Sequence[Scan], preprocessing: Preprocessing, workers: int | None = None) -> Iterator[ScanCheck]:
    """`check_scan` of each, in their order, by `workers` processes (1: in this one).

    Raises:
        UserError: a process was killed, as the kernel does where memory runs out.
    """
    look = partial(check_scan, spec=preprocessing)
    workers = min(workers or cores(), max(1, len(scans) // _WORTH_A_PROCESS))
    yield from ahead(look, scans, workers)


def _free_bytes(folder: Path) -> int | None:
    """Free space where a folder is or would be made."""
    there = next((parent for parent in (folder, *folder.absolute().parents) if parent.is_dir()), None)
    return shutil.disk_usage(there).free if there else None
