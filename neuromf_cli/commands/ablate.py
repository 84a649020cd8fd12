"""`neuromf ablate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neuromf_cli import console, options
from neuromf_cli.progress import progress


def plan_names(incomplete: str) -> list[str]:
    """Shipped plans that begin so, for the shell's completion."""
    from neuromf.config import preset_folders

    names = (path.stem for folder in preset_folders() for path in sorted((folder / "plans").glob("*.yaml")))
    return [name for name in names if name.startswith(incomplete)]


def ablate(
    plan: Annotated[
        str, typer.Argument(metavar="PLAN", help="A YAML file, or a shipped plan.", autocompletion=plan_names)
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of everything it makes.", show_default="ablations/<name>")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Stages at a time; they share the CPU's cores.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells and what they cost, and stop.")] = False,
    status: Annotated[bool, typer.Option("--status", help="Say how far each cell is, and stop.")] = False,
    collect: Annotated[bool, typer.Option("--collect", help="Make the tables of what is evaluated, and stop.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Also do again what failed before.")] = False,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train, sample and evaluate every cell of a plan, and compare them.

    Cells of the same settings and data are trained once. A cell that fails is
    reported and stops no other (exit code 4). The same command again continues
    where it was stopped, even by kill -9. Plans: docs/ablation.md.

    Example: neuromf ablate ablate-prediction-small --jobs 2
    """
    from neuromf.errors import UserError
    from neuromf.pipeline import ablate as pipeline

    if dry_run + status + collect > 1:
        raise UserError("--dry-run, --status and --collect each ask for another answer", "give one of them")
    if not (dry_run or status or collect):
        with progress(quiet) as show:
            report = pipeline.ablate(plan, out, jobs=jobs, retry=retry, device=device, message=show.message)
        return console.result(report, json, report.failed, complaint="stages failed; mend the cause, then add --retry")
    ablation = pipeline.open_ablation(plan, out, device=device)
    if status:
        found = pipeline.status(ablation)
        failed = [f"{entry['stage']}: {entry['reason']}; see {entry['log']}" for entry in found["failures"]]
        return console.result(
            found, json, failed, rows=found["cells"], complaint="stages failed; --retry does them again"
        )
    return console.result(pipeline.preview(ablation, device=device) if dry_run else pipeline.collect(ablation), json)
