"""What an ablation would cost, and how far it is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuromf.errors import UserError
from neuromf.files import read_json
from neuromf.pipeline.ablation.cells import folder_of
from neuromf.pipeline.ablation.folder import Ablation, described
from neuromf.pipeline.ablation.job_notes import tasks_of
from neuromf.pipeline.ablation.stage_logs import failure_of
from neuromf.pipeline.ablation.stages import stage_names
from neuromf.pipeline.plan import Plan, plan_run
from neuromf.pipeline.run_folder import RESULT_FILE
from neuromf.reporting.tables import markdown_table


@dataclass(frozen=True)
class Preview:
    """Every cell with its state and what its run costs."""

    ablation: Ablation
    rows: list[dict[str, Any]]
    plans: dict[str, Plan]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "out": str(self.ablation.place.out),
            "cells": self.rows,
            "runs": {name: _cost(plan) for name, plan in self.plans.items()},
            "total": self.total(),
        }

    def total(self) -> dict[str, Any]:
        """What is still to train; `seconds` is an estimate from the runs that are finished, None without any."""
        runs = self.ablation.place.runs
        rates, images = [], 0
        for run in self.ablation.runs:
            result = folder_of(run, runs) / RESULT_FILE
            seen = _cost(self.plans[run.name])["images"]
            if result.is_file():
                rates.append(read_json(result)["seconds"] / seen)
            else:
                images += seen
        seconds = images * sum(rates) / len(rates) if rates else None
        return {"cells": len(self.rows), "runs": len(self.plans), "images_to_train": images, "seconds": seconds}

    def lines(self) -> list[str]:
        """A table and what it sums to."""
        total = self.total()
        time = f", about {total['seconds'] / 60:.0f} minutes at the pace so far" if total["seconds"] else ""
        return [
            markdown_table(self.rows),
            f"{total['cells']} cells of {total['runs']} runs; {total['images_to_train']:,} images to train{time}",
        ]


def preview(ablation: Ablation, *, device: str = "auto") -> Preview:
    """What would be done; cells that share a run name the same one.

    Raises:
        UserError: a size that a network cannot take.
    """
    descriptions: dict[str, dict[str, Any]] = {}
    plans, rows = {}, []
    for run in ablation.runs:
        described = descriptions.setdefault(run.data, _description(ablation, run.data))
        plans[run.name] = plan_run(run.config, described, device=device)
    for cell in ablation.cells:
        cost = _cost(plans[cell.run.name])
        row = {"cell": cell.name, "run": cell.run.name, "state": ablation.state(cell)}
        rows.append(row | {key: cost[key] for key in ("parameters", "updates", "images", "GiB")})
    return Preview(ablation, rows, plans)


def _cost(plan: Plan) -> dict[str, Any]:
    values = plan.to_dict()
    return {
        "parameters": values["parameters"]["total"],
        "updates": plan.updates,
        "images": values["images"],
        "GiB": round(values["memory_bytes"]["total"] / 2**30, 2),
    }


def status(ablation: Ablation) -> dict[str, Any]:
    """The state of every cell, counted and one by one, and what failed; where jobs were submitted, what SLURM says."""
    queue = _queue(ablation)
    rows = [
        {"cell": cell.name, "state": ablation.state(cell), **queue.get(cell.name, {}), "run": cell.run.name}
        for cell in ablation.cells
    ]
    logs = ablation.place.logs
    failures = [found for stage in ablation.stages if not stage.finished() and (found := failure_of(stage.name, logs))]
    return {
        "out": str(ablation.place.out),
        "counts": count(row["state"] for row in rows),
        "cells": rows,
        "failures": [failure._asdict() for failure in failures],
    }


def _queue(ablation: Ablation) -> dict[str, dict[str, str]]:
    """By cell, what the queue says of the first of its stages that is to do; empty where nothing was submitted."""
    try:
        tasks = tasks_of(ablation.stages, ablation.place.logs)
    except UserError as error:  # the files say enough to go on
        return {cell.name: {"queue": f"unknown: {error.message}"} for cell in ablation.cells}
    if not tasks:
        return {}
    by_name = {stage.name: stage for stage in ablation.stages}
    said = {name: str(task or "not in the queue") for name, task in tasks.items()}
    first = {
        cell.name: next((name for name in stage_names(cell) if not by_name[name].finished()), "")
        for cell in ablation.cells
    }
    return {cell: {"queue": said.get(stage, "")} for cell, stage in first.items()}


def count(states: Iterable[str]) -> dict[str, int]:
    """How many cells are in each state."""
    counts: dict[str, int] = {}
    for state in states:
        counts[state] = counts.get(state, 0) + 1
    return counts


def _description(ablation: Ablation, data: str) -> dict[str, Any]:
    """What `plan_run` has to know of latents; of invented heads that are not encoded yet it is worked out."""
    recipe = ablation.plan.phantoms
    if recipe is None or data != ablation.place.latents(ablation.plan) or ablation.stages[1].finished():
        return described(Path(data))
    from neuromf.models.autoencoder import load_autoencoder

    autoencoder = load_autoencoder(recipe.autoencoder)
    edge = recipe.size // autoencoder.factor
    return {
        "latent_shape": [autoencoder.latent_channels, edge, edge, edge],
        "autoencoder": {"factor": autoencoder.factor},
        "subjects": {"train": round(recipe.heads * recipe.fractions[0])},
    }
