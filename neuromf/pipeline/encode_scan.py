"""One scan to one latent file: keep what is there, encode what is not, refuse what cannot be used."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from neuromf import __version__
from neuromf.data.latents import FORMAT, FORMAT_VERSION, latent_path, load_latent, save_latent
from neuromf.data.preprocessing import Prepared, Preprocessing, preprocess
from neuromf.data.sources import Scan
from neuromf.data.volumes import load_volume
from neuromf.errors import ScanError, UserError
from neuromf.files import sha256_file
from neuromf.metrics.similarity import psnr, ssim
from neuromf.pipeline.encode_report import ScanReport

if TYPE_CHECKING:
    from neuromf.models.autoencoder import Autoencoder

_MUCH_LOST = 0.05


@dataclass(frozen=True)
class EncodeJob:
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
    kept = _finished_metadata(job, scan, sha256) is not None
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


def _encode_one(job: EncodeJob, scan: Scan, sha256: str) -> dict[str, Any]:
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


def _encode_volume(job: EncodeJob, scan: Scan, volume: torch.Tensor, metadata: Mapping[str, Any]) -> None:
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


def _finished_metadata(job: EncodeJob, scan: Scan, sha256: str) -> dict[str, Any] | None:
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
