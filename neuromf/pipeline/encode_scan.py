"""One scan to one latent file: keep what is there, encode what is not, refuse what cannot be used."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from neuromf import __version__
from neuromf.data.augmentation import Augmentation
from neuromf.data.latents import FORMAT, FORMAT_VERSION, latent_path, load_latent, save_latent
from neuromf.data.preprocessing import Prepared, Preprocessing, preprocess
from neuromf.data.sources import Scan
from neuromf.data.volumes import Volume, absent, load_volume
from neuromf.errors import ScanError, UserError
from neuromf.files import sha256_file
from neuromf.metrics.similarity import psnr, ssim
from neuromf.pipeline.check_scan import scan_notes
from neuromf.pipeline.encode_report import ScanReport

if TYPE_CHECKING:
    from neuromf.models.autoencoder import Autoencoder


@dataclass(frozen=True)
class EncodeJob:
    """What is the same for every scan of a run.

    `augmentation` is of the `copies` beside the mirrored ones; `covariates` are subject -> column -> value.
    """

    out: Path
    autoencoder: Autoencoder
    preprocessing: Preprocessing
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
            "latent_shape": list(self.latent_shape),
        }

    @property
    def autoencoder_record(self) -> dict[str, Any]:
        """What of the autoencoder travels with every latent."""
        a = self.autoencoder
        return {"name": a.name, "sha256": a.sha256, "latent_channels": a.latent_channels, "factor": a.factor}

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, I, J, K)."""
        size = tuple(n // self.autoencoder.factor for n in self.preprocessing.size)
        return (self.autoencoder.latent_channels, *size)


def plan_scan(job: EncodeJob, scan: Scan) -> ScanReport:
    """What would become of a scan, without encoding it."""
    try:
        sha256 = _input_hash(scan)
    except ScanError as error:
        return ScanReport(
            scan.subject, str(scan.path), "refused", error.message.removeprefix(f"{scan.path}: "), error.hint
        )
    kept = _kept(job, scan, sha256) is not None
    return ScanReport(scan.subject, str(scan.path), "kept" if kept else "planned", sha256=sha256)


def encode_scan(job: EncodeJob, scan: Scan, strict: bool) -> ScanReport:
    """Write the latent of a scan unless it is there already, or say why it cannot be used.

    Raises:
        ScanError: with `strict`, where it cannot be used.
    """
    started_s = time.perf_counter()
    sha256 = ""
    try:
        sha256 = _input_hash(scan)
        metadata = _kept(job, scan, sha256)
        status: Literal["encoded", "kept"] = "encoded" if metadata is None else "kept"
        if metadata is None:
            metadata = _encode_one(job, scan, sha256)
        elif (metadata.get("covariates") or {}) != job.covariates.get(scan.subject, {}):
            metadata = _with_covariates(job, scan)
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
        notes=scan_notes(record),
        reconstruction=metadata["reconstruction"],
    )


def _encode_one(job: EncodeJob, scan: Scan, sha256: str) -> dict[str, Any]:
    """Scan -> latent file; returns the metadata written."""
    _, prepared = read_scan(job, scan)
    volume = torch.from_numpy(prepared.array)[None]
    quality = _reconstruction(job.autoencoder, volume) if job.report else None
    metadata = latent_metadata(job, scan, sha256, prepared)
    metadata |= {"covariates": dict(job.covariates.get(scan.subject, {})), "reconstruction": quality}
    encode_volume(job, latent_path(job.out, scan.subject), volume, metadata)
    return metadata


def read_scan(job: EncodeJob, scan: Scan) -> tuple[Volume, Prepared]:
    """A scan as it goes into `preprocess`, and what comes out.

    Skull stripping, then N4, take their place between the two steps here.
    """
    volume = load_volume(scan.path)
    return volume, preprocess(volume, job.preprocessing)


def latent_metadata(job: EncodeJob, scan: Scan, sha256: str, prepared: Prepared) -> dict[str, Any]:
    """What every latent file of a scan says of its origin."""
    return {
        "subject": scan.subject,
        "input": {"name": scan.path.name, "sha256": sha256},
        "autoencoder": job.autoencoder_record,
        "preprocessing": prepared.record,
        "preprocessing_sha256": job.preprocessing.digest,
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


def _input_hash(scan: Scan) -> str:
    try:
        return sha256_file(scan.path)
    except FileNotFoundError as error:
        raise absent(scan.path) from error
    except OSError as error:
        raise ScanError(f"{scan.path}: cannot be read ({error.strerror})", "check the file and its rights") from error


def _with_covariates(job: EncodeJob, scan: Scan) -> dict[str, Any]:
    """Write what is known of the scan by now into its finished latent: a corrected age needs no new encoding."""
    path = latent_path(job.out, scan.subject)
    latent = load_latent(path)
    metadata = latent["metadata"] | {"covariates": dict(job.covariates.get(scan.subject, {}))}
    save_latent(path, latent["z"], latent["log_sigma"], metadata)
    return metadata


def _kept(job: EncodeJob, scan: Scan, sha256: str) -> dict[str, Any] | None:
    """The metadata of an earlier run's latent if it is what this run would write, else None."""
    metadata = finished_metadata(job, latent_path(job.out, scan.subject), sha256)
    unmeasured = metadata is not None and job.report and metadata.get("reconstruction") is None
    return None if unmeasured else metadata


def finished_metadata(job: EncodeJob, path: Path, sha256: str) -> dict[str, Any] | None:
    """The metadata of a latent file, or of a copy, if it was made of this scan with these settings, else None."""
    if not path.is_file():
        return None
    try:
        metadata = load_latent(path, mmap=True)["metadata"]
    except UserError:
        return None
    same = (
        metadata.get("input", {}).get("sha256") == sha256
        and metadata.get("preprocessing_sha256") == job.preprocessing.digest
        and metadata.get("autoencoder") == job.autoencoder_record
    )
    return metadata if same else None
