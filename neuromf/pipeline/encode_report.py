"""What `neuromf encode` tells about its work: one record per scan, and their sums."""

from __future__ import annotations

from collections.abc import Mapping
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

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ScanReport:
        """The record that `asdict` gave, also after JSON."""
        plain: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in values.items()}
        return cls(**plain)


@dataclass(frozen=True)
class CopiesReport:
    """What became of the copies.

    Attributes:
        scans: how many training scans have them; of_each: how many copies per scan, mirrored ones included.
        encoded, kept, planned: how many copies, as for scans.
        unused: copies of an earlier command that this one did not ask for.
    """

    scans: int
    of_each: int
    encoded: int = 0
    kept: int = 0
    planned: int = 0
    unused: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """What became of them, for a terminal."""
        lines = []
        if self.of_each:
            counts = [f"{n} {status}" for status in STATUSES if (n := getattr(self, status, 0))]
            lines.append(f"copies: {self.of_each} of each of {self.scans} training scans: {', '.join(counts)}")
        if self.unused:
            names = ", ".join(self.unused)
            lines.append(f"note: copies of an earlier command lie unused in {names}: ask for them to train on them")
        return lines


@dataclass(frozen=True)
class EncodeReport:
    """The result of `encode`; `refused > 0` is exit status 4.

    Attributes:
        copies: of the training scans, where any were asked for.
        effect: of flips and gains on latents (`encode_effect`), where it was measured.
    """

    out: Path
    scans: tuple[ScanReport, ...]
    latent_shape: tuple[int, ...]
    splits: dict[str, list[str]] = field(default_factory=dict)
    statistics: LatentStatistics | None = None
    copies: CopiesReport | None = None
    effect: dict[str, Any] | None = None

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
        if self.copies is not None:
            lines += self.copies.lines()
        if len({tuple(round(mm, 2) for mm in scan.spacing_mm) for scan in self.scans if scan.spacing_mm}) > 1:
            lines.append("note: voxel sizes differ between scans, so heads differ in scale: --spacing MM unites them")
        if self.statistics is not None:
            pairs = zip(self.statistics.mean, self.statistics.std, strict=True)
            lines.append(
                "training latents, mean +- std per channel: " + ", ".join(f"{m:.3g} +- {s:.3g}" for m, s in pairs)
            )
            lines.append(f"a drawn latent would be {self.statistics.sigma2_share:.2%} noise; the stored mean has none")
        if quality := self.reconstruction:
            ratio = "exact" if quality["psnr_db_mean"] is None else f"{quality['psnr_db_mean']:.2f} dB"
            lines.append(f"reconstruction: SSIM {quality['ssim_mean']:.4f}, PSNR {ratio} (N = {quality['n']})")
        if self.effect is not None:
            lines += _effect_lines(self.effect)
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
            "copies": None if self.copies is None else asdict(self.copies),
            "effect_on_latents": self.effect,
            "scans": [asdict(scan) for scan in self.scans],
        }


def _effect_lines(effect: Mapping[str, Any]) -> list[str]:
    """The effect for a terminal, one line per change."""
    return [
        f"{what} {'is' if effect[name]['harmless'] else 'is NOT'} harmless here (N = {effect['n']}): "
        + _sentence(effect[name])
        for name, what in (
            ("flip", "flipping latents"),
            ("gain", f"multiplying latents by {effect['gain_factor']:g}"),
        )
    ]


def _sentence(means: Mapping[str, Any]) -> str:
    sides = [
        f"{'exact' if means[f'psnr_db{side}'] is None else format(means[f'psnr_db{side}'], '.2f') + ' dB'}"
        + ("" if means[f"ssim{side}"] is None else f" (SSIM {means[f'ssim{side}']:.4f})")
        for side in ("", "_encoded")
    ]
    return (
        f"off by {means['relative_error']:.1%} of the latent, {means['relative_error_whitened']:.1%} whitened; decoded "
        f"{sides[0]}, against {sides[1]} encoded from the changed volume"
    )
