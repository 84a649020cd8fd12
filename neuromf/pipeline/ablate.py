"""`neuromf ablate`: a plan in, its runs trained, sampled and evaluated, and the tables that compare them out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuromf.pipeline.ablation.cluster import Cluster, Submission, refuse_queued, submit
from neuromf.pipeline.ablation.folder import Ablation, claim, open_ablation
from neuromf.pipeline.ablation.local import COMMAND, alone, launch
from neuromf.pipeline.ablation.preview import Preview, count, preview, status
from neuromf.pipeline.ablation.results import Results, collect
from neuromf.pipeline.ablation.stage_logs import Failure

__all__ = [
    "AblateReport",
    "Ablation",
    "Cluster",
    "Preview",
    "Results",
    "ablate",
    "collect",
    "open_ablation",
    "preview",
    "status",
]

Message = Callable[[str], None]


@dataclass(frozen=True)
class AblateReport:
    """What became of the cells: how many are in which state, what failed, and the tables if any were evaluated.

    `submission` is what was given to a cluster, if it was asked for.
    """

    out: Path
    states: dict[str, int]
    failures: list[Failure]
    results: Results | None
    submission: Submission | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "out": str(self.out),
            "cells": self.states,
            "failures": [failure._asdict() for failure in self.failures],
            "results": None if self.results is None else self.results.to_dict(),
            **({} if self.submission is None else {"slurm": self.submission.to_dict()}),
        }

    def lines(self) -> list[str]:
        """Counts, what was submitted, then the results."""
        counts = ", ".join(f"{n} {state}" for state, n in self.states.items())
        jobs = self.submission.lines() if self.submission else []
        return [f"{sum(self.states.values())} cells: {counts}", *jobs, *(self.results.lines() if self.results else [])]

    @property
    def failed(self) -> list[str]:
        """Failures as they are reported: the stage, and the end of its log."""
        tails = {f.stage: "\n".join(f"    {line}" for line in f.tail.splitlines()) for f in self.failures}
        return [f"{f.stage}: {f.reason}; {f.log} ends\n{tails[f.stage]}" for f in self.failures]


def ablate(
    plan: str,
    out: Path | None = None,
    *,
    jobs: int = 1,
    cluster: Cluster | None = None,
    retry: bool = False,
    device: str = "auto",
    message: Message = lambda _: None,
    command: Sequence[str] = COMMAND,
) -> AblateReport:
    """Do what is not finished of a plan, or submit it to a cluster, then collect; the same call again continues.

    Args:
        plan: a shipped name or a YAML path.
        out: the folder; `ablations/<name>` when None.
        jobs: stages at once, each a process; without `cluster`.
        cluster: submit to SLURM instead of working here, and ask for this.
        retry: also do again what failed in an earlier call.
        device: auto, cpu, cuda or mps.
        message: hears what begins and ends.
        command: what a stage's words are given to; `neuromf` itself.

    Raises:
        UserError: see `open_ablation` and `submit`; or another launcher or a cluster's jobs are at work in the folder.
        Interrupted: a stopping signal; the same call continues.
    """
    ablation = open_ablation(plan, out, device=device)
    place = ablation.place
    with alone(place.out, message) as lock:
        claim(ablation, message)
        message(f"{len(ablation.cells)} cells of {len(ablation.runs)} runs in {place.out}")
        submission = None
        if cluster is None:
            refuse_queued(ablation.stages, place)
            failures = launch(ablation.stages, place, lock, jobs=jobs, retry=retry, message=message, command=command)
        else:
            name = ablation.plan.name
            submission = submit(
                ablation.stages, place, cluster, name=name, retry=retry, message=message, command=command
            )
            failures = submission.failures
        states = count(ablation.state(cell) for cell in ablation.cells)
        results = collect(ablation) if states.get("finished") else None
    return AblateReport(place.out, states, failures, results, submission)
