"""One scan to one latent file: keep what is there, encode what is not, refuse what cannot be used."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from neuromf import __version__
from neuromf.data.augmentation import Augmentation
from neuromf.data.latents import FORMAT, FORMAT_VERSION, latent_path, load_latent, save_latent
from neuromf.data.preprocessing import Prepared, Preprocessing
from neuromf.data.sources import Scan
from neuromf.errors import ScanError, UserError
from neuromf.metrics.similarity import psnr, ssim
from neuromf.pipeline.check_scan import scan_notes
from neuromf.pipeline.cleaning import MASKS_FOLDER, Cleaning
from neuromf.pipeline.encode_input import Found, Preparation, Wanted, input_hash, prepare
from neuromf.pipeline.encode_report import ScanReport
from neuromf.pipeline.workers import ahead

if TYPE_CHECKING:
    from neuromf.models.autoencoder import Autoencoder


@dataclass(frozen=True)
class EncodeJob:
    """What is the same for every scan of a run.

    `cleaning` is what comes before `preprocessing`; `augmentation` is of the `copies` beside the mirrored ones;
    `covariates` are subject -> column -> value.
    """

    out: Path
    autoencoder: Autoencoder
    preprocessing: Preprocessing
    cleaning: Cleaning = field(default_factory=Cleaning)
    report: bool = False
    flip_copies: bool = False
    copies: int = 0
    augmentation: Augmentation = field(default_factory=Augmentation)
    covariates: Mapping[str, Mapping[str, float | str | None]] = field(default_factory=dict)

    @property
    def identity(self) -> dict[str, Any]:
        """What must agree for latents to share a folder."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "autoencoder": self.autoencoder_record,
            "preprocessing": self.preprocessing.to_dict(),
            "cleaning": self.cleaning.identity,
            "latent_shape": list(self.latent_shape),
        }

    @property
    def preparation(self) -> Preparation:
        """What processes that prepare scans need to know."""
        return Preparation(self.out / MASKS_FOLDER, self.preprocessing, self.cleaning)

    @property
    def autoencoder_record(self) -> dict[str, Any]:
        """What of the autoencoder travels with every latent."""
        a = self.autoencoder
        return {"name": a.name, "sha256": a.sha256, "latent_channels": a.latent_channels, "factor": a.factor}

    @property
    def preprocessing_sha256(self) -> str:
        """Equal for scans that are prepared alike: cleaning and preprocessing."""
        cleaning = self.cleaning.identity
        if cleaning is None:
            return self.preprocessing.digest
        both = json.dumps([self.preprocessing.digest, cleaning], sort_keys=True)
        return hashlib.sha256(both.encode()).hexdigest()

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, I, J, K)."""
        size = tuple(n // self.autoencoder.factor for n in self.preprocessing.size)
        return (self.autoencoder.latent_channels, *size)


def plan_scan(job: EncodeJob, scan: Scan) -> ScanReport:
    """What would become of a scan, without encoding it."""
    try:
        sha256 = input_hash(scan)
    except ScanError as error:
        return _refused(scan, error)
    found = _finished(job, scan)
    kept = found is not None and found["input"]["sha256"] == sha256
    return ScanReport(scan.subject, str(scan.path), "kept" if kept else "planned", sha256=sha256)


def encode_scans(
    job: EncodeJob, scans: Sequence[Scan], strict: bool, workers: int
) -> Generator[ScanReport, None, None]:
    """Write the latents that are not there already, and say of each scan what became of it, in their order.

    `workers` processes prepare scans ahead of the autoencoder (1: none do).

    Raises:
        ScanError: with `strict`, at the first scan that cannot be used.
    """
    there: deque[dict[str, Any] | None] = deque()

    def wanted() -> Iterator[Wanted]:
        for scan in scans:
            there.append(_finished(job, scan))
            yield Wanted(scan, there[-1]["input"]["sha256"] if there[-1] else None)

    with closing(ahead(partial(prepare, how=job.preparation), wanted(), workers)) as prepared:
        for scan, found in zip(scans, prepared, strict=True):
            yield _encode_found(job, scan, found, there.popleft(), strict)


def _encode_found(job: EncodeJob, scan: Scan, found: Found, there: dict[str, Any] | None, strict: bool) -> ScanReport:
    """Encode a prepared scan, or keep what is `there`: the metadata of its latent."""
    began = time.perf_counter()
    status: Literal["encoded", "kept"] = "kept"
    try:
        if found.error is not None:
            raise found.error
        if found.prepared is not None:
            status, metadata = "encoded", _encode_one(job, scan, found.sha256, found.prepared)
        else:
            assert there is not None
            metadata = there
            if (metadata.get("covariates") or {}) != job.covariates.get(scan.subject, {}):
                metadata = _with_covariates(job, scan)
    except ScanError as error:
        if strict:
            raise ScanError(f"{scan.path}: {_reason(scan, error)}", error.hint) from error
        return _refused(scan, error, found.sha256, found.seconds + time.perf_counter() - began)
    record = metadata["preprocessing"]
    return ScanReport(
        scan.subject,
        str(scan.path),
        status,
        sha256=found.sha256,
        seconds=round(found.seconds + time.perf_counter() - began, 3),
        spacing_mm=tuple(record["spacing_mm"]),
        foreground_lost=record["foreground_lost"],
        notes=scan_notes(record),
        reconstruction=metadata["reconstruction"],
    )


def _refused(scan: Scan, error: ScanError, sha256: str = "", seconds: float = 0.0) -> ScanReport:
    return ScanReport(
        scan.subject,
        str(scan.path),
        "refused",
        _reason(scan, error),
        error.hint,
        sha256=sha256,
        seconds=round(seconds, 3),
    )


def _reason(scan: Scan, error: ScanError) -> str:
    return error.message.removeprefix(f"{scan.path}: ")


def _encode_one(job: EncodeJob, scan: Scan, sha256: str, prepared: Prepared) -> dict[str, Any]:
    """Prepared scan -> latent file; returns the metadata written."""
    volume = torch.from_numpy(prepared.array)[None]
    quality = _reconstruction(job.autoencoder, volume) if job.report else None
    metadata = latent_metadata(job, scan, sha256, prepared)
    metadata |= {"covariates": dict(job.covariates.get(scan.subject, {})), "reconstruction": quality}
    encode_volume(job, latent_path(job.out, scan.subject), volume, metadata)
    return metadata


def latent_metadata(job: EncodeJob, scan: Scan, sha256: str, prepared: Prepared) -> dict[str, Any]:
    """What every latent file of a scan says of its origin."""
    return {
        "subject": scan.subject,
        "input": {"name": scan.path.name, "sha256": sha256},
        "autoencoder": job.autoencoder_record,
        "preprocessing": prepared.record,
        "preprocessing_sha256": job.preprocessing_sha256,
        "neuromf_version": __version__,
        "flipped": False,
        "augmentation": None,
        "reconstruction": None,
    }


def encode_volume(job: EncodeJob, path: Path, volume: torch.Tensor, metadata: Mapping[str, Any]) -> None:
    """Write the posterior of one volume (1, 1, I, J, K) as a latent file.

    Raises:
        ScanError: the autoencoder gives no finite latent for it.
    """
    posterior = job.autoencoder.encode(volume.to(job.autoencoder.device))
    mean, log_sigma = posterior.mean[0].cpu().float(), posterior.log_sigma[0].cpu().float()
    assert tuple(mean.shape) == job.latent_shape, f"latent {tuple(mean.shape)}, expected {job.latent_shape}"
    if not (mean.isfinite().all() and log_sigma.isfinite().all()):
        raise ScanError("the autoencoder gives NaN or Inf for this scan", "look at its intensities for outliers")
    save_latent(path, mean, log_sigma, metadata)


def _reconstruction(autoencoder: Autoencoder, volume: torch.Tensor) -> dict[str, float | None]:
    """SSIM and PSNR of the round trip, on [0, 1]."""
    restored = autoencoder.reconstruct(volume.to(autoencoder.device)).cpu().float()
    ratio = float(psnr(volume, restored))
    return {"ssim": float(ssim(volume, restored)), "psnr_db": ratio if math.isfinite(ratio) else None}


def _with_covariates(job: EncodeJob, scan: Scan) -> dict[str, Any]:
    """Write what is known of the scan by now into its finished latent: a corrected age needs no new encoding."""
    path = latent_path(job.out, scan.subject)
    latent = load_latent(path)
    metadata = latent["metadata"] | {"covariates": dict(job.covariates.get(scan.subject, {}))}
    save_latent(path, latent["z"], latent["log_sigma"], metadata)
    return metadata


def _finished(job: EncodeJob, scan: Scan) -> dict[str, Any] | None:
    """The metadata of a scan's latent if this run would write the same of the same file, else None."""
    metadata = finished_metadata(job, latent_path(job.out, scan.subject))
    unmeasured = metadata is not None and job.report and metadata.get("reconstruction") is None
    return None if unmeasured else metadata


def finished_metadata(job: EncodeJob, path: Path) -> dict[str, Any] | None:
    """The metadata of a latent file, or of a copy, if it was made with these settings, of whatever file; else None."""
    if not path.is_file():
        return None
    try:
        metadata = load_latent(path, mmap=True)["metadata"]
    except UserError:
        return None
    same = (
        isinstance(metadata.get("input"), dict)
        and "sha256" in metadata["input"]
        and metadata.get("preprocessing_sha256") == job.preprocessing_sha256
        and metadata.get("autoencoder") == job.autoencoder_record
    )
    return metadata if same else None
