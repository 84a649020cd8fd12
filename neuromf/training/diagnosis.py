"""What an expert would say of a run: its phase, and what is wrong with it, ranked by evidence.

Pure reasoning: epoch summaries, settings and sizes in, findings out; nothing is read or drawn here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from neuromf.training import diagnosis_losses as losses
from neuromf.training import diagnosis_network as network
from neuromf.training import diagnosis_settings as settings
from neuromf.training.diagnosis_evidence import SEVERITIES, Evidence, Finding, Phase

Rule = Callable[[Evidence], Finding | None]

RULES: tuple[Rule, ...] = (
    losses.masked_divergence,
    losses.divergence,
    settings.halted,
    settings.finite_difference_in_bf16,
    settings.warmup_starvation,
    settings.too_few_updates,
    settings.ema_window,
    losses.mf_dominates,
    network.direction_not_learned,
    network.velocity_overshoot,
    network.correction_hurts,
    network.derivative_grows,
    losses.loss_falls_cosine_flat,
    network.cosine_high_at_start,
    network.mode_collapse,
    network.x_hat_extremes,
    network.dead_blocks,
    network.out_dominates,
    network.clipping,
    losses.overfitting,
    losses.channel_imbalance,
    losses.weight_apart_from_loss,
    settings.sampler_drift,
    network.nfe_gap,
)
"""Every failure mode that is looked for; a finding's id is the name of its rule."""


class Diagnosis(NamedTuple):
    """The phase, and the findings: problems first, within a severity the strongest evidence first."""

    phase: Phase
    findings: tuple[Finding, ...]

    @property
    def problems(self) -> list[Finding]:
        """The findings that are one."""
        return [finding for finding in self.findings if finding.severity == "problem"]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"phase": self.phase._asdict(), "findings": [finding.to_dict() for finding in self.findings]}

    def lines(self) -> list[str]:
        """In words."""
        counts = [sum(finding.severity == severity for finding in self.findings) for severity in SEVERITIES]
        counted = ", ".join(f"{n} {word}{'s' * (n != 1)}" for n, word in zip(counts, SEVERITIES, strict=True))
        lines = [f"phase: {self.phase.name} ({self.phase.judged_by})", f"found: {counted}"]
        for finding in self.findings:
            lines += ["", *finding.lines()]
        return lines


def diagnose(run: Evidence) -> Diagnosis:
    """Judge a run by everything known of it."""
    found = [finding for rule in RULES if (finding := rule(run)) is not None]
    found.sort(key=lambda finding: (SEVERITIES.index(finding.severity), -finding.evidence))
    return Diagnosis(run.phase, tuple(found))
