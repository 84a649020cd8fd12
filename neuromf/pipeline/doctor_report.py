"""What `neuromf doctor --jvp` found, in words and for scripts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

LIMIT = 1e-3
"""Largest relative error of a derivative that training may use."""

REFERENCE_LIMIT = 1e-6
"""Largest relative difference between the reference and central differences, both in float64."""


class Reference(NamedTuple):
    """du/dt in float64 for one factor on the times, and its relative difference from central differences."""

    times: float
    du_dt: Tensor
    disagreement: float
    milliseconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without the derivative itself."""
        return {name: value for name, value in self._asdict().items() if name != "du_dt"}


class Row(NamedTuple):
    """One way of taking the derivative; no error where it does not run."""

    strategy: str
    precision: str
    times: float
    in_use: bool
    error: float | None
    milliseconds: float | None
    failure: str = ""

    @property
    def accurate(self) -> bool:
        """Within the limit; NaN is not."""
        return self.error is not None and self.error <= LIMIT

    @property
    def verdict(self) -> str:
        """In words."""
        words = f"does not run: {self.failure}" if self.failure else "ok" if self.accurate else "too far"
        return words + (" (in use)" if self.in_use else "")

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**self._asdict(), "accurate": self.accurate, "verdict": self.verdict}


@dataclass(frozen=True)
class DerivativeReport:
    """The comparison for one preset on one device; `facts` are network, latents, point, memory and time."""

    preset: str
    objective: str
    device: str
    fd_step: float
    facts: dict[str, Any]
    references: list[Reference]
    rows: list[Row]

    @property
    def used(self) -> Row | None:
        """What training with this preset would do; None where it takes no derivative."""
        return next((row for row in self.rows if row.in_use), None)

    @property
    def failed(self) -> list[str]:
        """What is wrong, one line each."""
        faults = [
            f"times x{found.times:g}: exact derivative and central differences differ by {found.disagreement:.1e} in "
            f"float64 (limit {REFERENCE_LIMIT:g}): something in the network computes in less, or is not smooth"
            for found in self.references
            if not found.disagreement <= REFERENCE_LIMIT
        ]
        return faults + ([self.verdict] if self.used and not self.used.accurate else [])

    @property
    def verdict(self) -> str:
        """One sentence on what the preset is configured to do."""
        row = self.used
        if row is None:
            return f"{self.preset}: {self.objective} trains on r = t alone and takes no du/dt"
        how = f"{self.preset}: du/dt by objective.derivative={row.strategy} at training.precision={row.precision}"
        if row.error is None:
            return f"{how} does not run: {row.failure}"
        if row.accurate:
            return f"{how} has a relative error of {row.error:.1e}: ok (limit {LIMIT:g})"
        return f"{how} has a relative error of {row.error:.2g} (limit {LIMIT:g}): {self._reason(row)}"

    def _reason(self, row: Row) -> str:
        if row.strategy != "exact":
            why = "bf16 keeps 8 bits of u" if row.precision == "bf16" else "a step is not a derivative"
            return f"{why}, and the difference is divided by fd_step={self.fd_step:g}; set objective.derivative=exact"
        if self.device == "cuda":
            return "convolutions may run in TF32; compare with torch.backends.cudnn.allow_tf32=False"
        return "float32 is not enough for this network; lower its factor on the times"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "preset": self.preset,
            "objective": self.objective,
            "device": self.device,
            "fd_step": self.fd_step,
            **self.facts,
            "limit": LIMIT,
            "references": [reference.to_dict() for reference in self.references],
            "rows": [row.to_dict() for row in self.rows],
            "passed": not self.failed,
            "verdict": self.verdict,
        }

    def lines(self) -> list[str]:
        """What was compared, the table, and the verdict."""
        truth = "the truth; central differences are so far from it"
        cells: list[tuple[str, ...]] = [("du/dt", "precision", "times", "relative error", "ms", "verdict")]
        cells += [_cells("exact", "fp64", r.times, r.disagreement, r.milliseconds, truth) for r in self.references]
        cells += [_cells(r.strategy, r.precision, r.times, r.error, r.milliseconds, r.verdict) for r in self.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        table = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
        facts = self.facts
        return [
            f"{self.preset}: {self.objective}, {facts['prediction']}-prediction; {facts['network']} of "
            f"{facts['parameters'] / 1e6:.2f} M random weights, on {self.device}",
            f"latents of {facts['latent_shape']}, {facts['size']}; r = {facts['r']:g}, t = {facts['t']:g}",
            f"{facts['memory_gib']:.1f} GiB held in float64, {facts['seconds']:.0f} s in all",
            "",
            *table,
            "",
            self.verdict,
        ]


def _cells(
    strategy: str, precision: str, times: float, error: float | None, milliseconds: float | None, verdict: str
) -> tuple[str, ...]:
    return (
        strategy,
        precision,
        f"x{times:g}",
        "-" if error is None else f"{error:.1e}",
        "-" if milliseconds is None else f"{milliseconds:.1f}",
        verdict,
    )
