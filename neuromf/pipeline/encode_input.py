"""A scan's way to the volumes that are encoded: read, cleaned, brought to the grid, and copied.

Processes without torch do this, ahead of the one that encodes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from neuromf.data.augmentation import Augmenter, Change
from neuromf.data.preprocessing import Prepared, Preprocessing, preprocess
from neuromf.data.sources import Scan
from neuromf.data.volumes import Volume, absent, check_regular, load_volume
from neuromf.errors import ScanError
from neuromf.files import sha256_file
from neuromf.pipeline.cleaning import Cleaning


@dataclass(frozen=True)
class Preparation:
    """How scans become volumes: `cleaning`, which keeps its masks in a folder, then `preprocessing`."""

    masks: Path
    preprocessing: Preprocessing
    cleaning: Cleaning = field(default_factory=Cleaning)

    def read(self, scan: Scan, sha256: str) -> tuple[Volume, Prepared]:
        """A scan as it goes into `preprocess`, cleaned, and what comes out; the record says how it was cleaned.

        Args:
            scan: its masks are kept by its name.
            sha256: of its file.

        Raises:
            ScanError: it cannot be used.
        """
        volume, cleaned = self.cleaning(load_volume(scan.path), self.masks / f"{scan.subject}.nii.gz", sha256)
        prepared = preprocess(volume, self.preprocessing)
        return volume, prepared._replace(record=prepared.record | cleaned)


class Wanted(NamedTuple):
    """A scan to prepare, unless its file has the hash `known`: then it is encoded already."""

    scan: Scan
    known: str | None = None


class Found(NamedTuple):
    """What became of a scan: `prepared`, or what is wrong with it, or neither where its hash was known."""

    sha256: str
    seconds: float
    prepared: Prepared | None = None
    error: ScanError | None = None


class WantedCopies(NamedTuple):
    """Copies of a scan to make, by the names of their subfolders."""

    scan: Scan
    sha256: str
    changes: Mapping[str, Change]


class Copies(NamedTuple):
    """The scan they are of, and the copies (1, I, J, K) float32, by the names of their subfolders."""

    prepared: Prepared
    arrays: dict[str, np.ndarray]


def prepare(wanted: Wanted, how: Preparation) -> Found:
    """Read a scan and prepare it. Memory: one scan."""
    began, sha256 = time.perf_counter(), ""
    prepared, error = None, None
    try:
        sha256 = input_hash(wanted.scan)
        if sha256 != wanted.known:
            prepared = how.read(wanted.scan, sha256)[1]
    except ScanError as found:
        error = found
    except MemoryError:
        error = ScanError(f"{wanted.scan.path}: too large for the memory there is", "use fewer --workers, or a crop")
    return Found(sha256, time.perf_counter() - began, prepared, error)


def prepare_copies(wanted: WantedCopies, how: Preparation) -> Copies:
    """Make copies of a scan.

    Raises:
        ScanError: it cannot be used any more.
    """
    volume, prepared = how.read(wanted.scan, wanted.sha256)
    augmenter = Augmenter(volume, prepared)
    return Copies(prepared, {kind: augmenter.copy(change) for kind, change in wanted.changes.items()})


def input_hash(scan: Scan) -> str:
    """SHA-256 of a scan's file.

    Raises:
        ScanError: its name has a fault; or it is absent, or cannot be read.
    """
    if scan.fault is not None:
        raise ScanError(*scan.fault)
    check_regular(scan.path)
    try:
        return sha256_file(scan.path)
    except FileNotFoundError as error:
        raise absent(scan.path) from error
    except OSError as error:
        raise ScanError(f"{scan.path}: cannot be read ({error.strerror})", "check the file and its rights") from error
