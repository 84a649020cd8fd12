"""What `neuromf encode` tells about its work: one record per scan, and their sums."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from neuromf import __version__
from neuromf.data.latents import LatentStatistics

STATUSES = ("encoded", "kept", "planned", "refused")


@dataclass(frozen=True)
class ScanReport:
    """What became of one scan.

    Attributes:
        status: encoded now; kept from an earlier run; refused, with `reason` and `hint`; planned in a dry run.
        notes: what a careful reader should know although the scan was used.
        reconstruction: {"ssim", "psnr_db"} of the autoencoder's round trip (psnr_db None when exact), on request.
    """

    subject: str
    path: str
    status: Literal["encoded", "kept", "planned", "refused"]
    reason: str = ""
    hint: str = ""
    sha256: str = ""
    seconds: float = 0.0
    spacing_mm: tuple[float, ...] = ()
    foreground_lost: float | None = None
    notes: tuple[str, ...] = ()
    reconstruction: dict[str, float | None] | None = None


@dataclass(frozen=True)
class EncodeReport:
    """The result of `encode`; `refused > 0` is exit status 4."""

    out: Path
    scans: tuple[ScanReport, ...]
    latent_shape: tuple[int, ...]
    splits: dict[str, list[str]] = field(default_factory=dict)
    statistics: LatentStatistics | None = None

    def count(self, status: str) -> int:
        """How many scans ended with this status."""
        return sum(scan.status == status for scan in self.scans)

    @property
    def encoded(self) -> int:
        """Scans encoded by this run."""
        return self.count("encoded")

    @property
    def kept(self) -> int:
        """Scans whose latent an earlier run had finished."""
        return self.count("kept")

    @property
    def refused(self) -> int:
        """Scans that could not be used."""
        return self.count("refused")

    @property
    def reconstruction(self) -> dict[str, float | int | None] | None:
        """Mean SSIM and PSNR (dB) of the autoencoder over the scans measured, with their number n."""
        measured = [scan.reconstruction for scan in self.scans if scan.reconstruction]
        if not measured:
            return None
        ratios = [m["psnr_db"] for m in measured if m["psnr_db"] is not None]
        return {
            "n": len(measured),
            "ssim_mean": float(np.mean([m["ssim"] for m in measured])),
            "psnr_db_mean": float(np.mean(ratios)) if ratios else None,
        }

    def lines(self) -> list[str]:
        """What happened, for a terminal; ends with the next command."""
        counts = [f"{n} {status}" for status in STATUSES if (n := self.count(status))]
        lines = [f"{self.out}: {', '.join(counts)}; latents {' x '.join(map(str, self.latent_shape))}"]
        if self.splits:
            lines.append("splits: " + ", ".join(f"{name} {len(members)}" for name, members in self.splits.items()))
        if self.statistics is not None:
            pairs = zip(self.statistics.mean, self.statistics.std, strict=True)
            lines.append(
                "training latents, mean +- std per channel: " + ", ".join(f"{m:.3g} +- {s:.3g}" for m, s in pairs)
            )
            lines.append(f"a drawn latent would be {self.statistics.sigma2_share:.2%} noise; the stored mean has none")
        if quality := self.reconstruction:
            ratio = "exact" if quality["psnr_db_mean"] is None else f"{quality['psnr_db_mean']:.2f} dB"
            lines.append(f"reconstruction: SSIM {quality['ssim_mean']:.4f}, PSNR {ratio} (N = {quality['n']})")
        lines += [f"note: {scan.subject}: {note}" for scan in self.scans for note in scan.notes]
        if self.statistics is not None:
            lines.append(f"next: neuromf train --data {self.out}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """The content of encode_report.json."""
        return {
            "neuromf_version": __version__,
            "out": str(self.out),
            "counts": {status: self.count(status) for status in STATUSES},
            "latent_shape": list(self.latent_shape),
            "splits": {name: len(members) for name, members in self.splits.items()},
            "reconstruction": self.reconstruction,
            "scans": [asdict(scan) for scan in self.scans],
        }
