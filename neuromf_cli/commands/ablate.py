"""`neuromf ablate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from neuromf_cli import console, options
from neuromf_cli.progress import progress

if TYPE_CHECKING:
    from neuromf.pipeline.ablate import Cluster


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
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            min=1,
            help="Stages at a time. Here they share the cores; in SLURM it limits each array.",
            show_default="1; in SLURM what the cluster allows",
        ),
    ] = None,
    launcher: Annotated[
        Literal["local", "slurm"], typer.Option("--launcher", help="Work here, or submit to a cluster and return.")
    ] = "local",
    partition: Annotated[str | None, typer.Option("--partition", help="SLURM: nodes of this partition.")] = None,
    time: Annotated[
        str | None, typer.Option("--time", help="SLURM: a job's limit, as 90 (minutes), 12:00:00 or 1-12:00:00.")
    ] = None,
    gpus: Annotated[int | None, typer.Option("--gpus", min=0, help="SLURM: GPUs of a job.")] = None,
    cpus: Annotated[int | None, typer.Option("--cpus", min=1, help="SLURM: cores of a process.")] = None,
    memory: Annotated[
        float | None, typer.Option("--memory", metavar="GIB", min=0.1, help="SLURM: memory of a job.")
    ] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option("--sbatch", metavar="KEY=VALUE", help="SLURM: any option of sbatch, such as account=lab."),
    ] = None,
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
    where it was stopped, even by kill -9. Plans, clusters: docs/ablation.md.

    Example: neuromf ablate ablate-prediction-small --jobs 2
    """
    from neuromf.errors import UserError
    from neuromf.pipeline import ablate as pipeline

    if dry_run + status + collect > 1:
        raise UserError("--dry-run, --status and --collect each ask for another answer", "give one of them")
    asked = {"partition": partition, "time": time, "gpus": gpus, "cpus": cpus, "memory": memory, "sbatch": sbatch}
    cluster = _cluster(launcher, jobs, {key: value for key, value in asked.items() if value is not None})
    if not (dry_run or status or collect):
        with progress(quiet) as show:
            report = pipeline.ablate(
                plan, out, jobs=jobs or 1, cluster=cluster, retry=retry, device=device, message=show.message
            )
        return console.result(report, json, report.failed, complaint="stages failed; mend the cause, then add --retry")
    ablation = pipeline.open_ablation(plan, out, device=device)
    if status:
        found = pipeline.status(ablation)
        failed = [f"{entry['stage']}: {entry['reason']}; see {entry['log']}" for entry in found["failures"]]
        return console.result(
            found, json, failed, rows=found["cells"], complaint="stages failed; --retry does them again"
        )
    return console.result(pipeline.preview(ablation, device=device) if dry_run else pipeline.collect(ablation), json)


def _cluster(launcher: str, jobs: int | None, asked: dict[str, Any]) -> Cluster | None:
    """What is asked of SLURM; None for work that is done here."""
    from neuromf.errors import UserError
    from neuromf.pipeline.ablate import Cluster

    if launcher == "local":
        if asked:
            options = ", ".join(f"--{key}" for key in asked)
            raise UserError(f"{options}: these are for SLURM, and --launcher is local", "add --launcher slurm")
        return None
    more = {
        key.lstrip("-"): value or True for key, _, value in (word.partition("=") for word in asked.get("sbatch", []))
    }
    return Cluster(
        asked.get("partition"),
        asked.get("time"),
        asked.get("gpus", 0),
        asked.get("cpus"),
        asked.get("memory"),
        jobs,
        more,
    )
