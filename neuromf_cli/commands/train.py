"""`neuromf train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neuromf.launch import join_slurm, process_rank
from neuromf_cli import console, options
from neuromf_cli.progress import progress


def train(
    ctx: typer.Context,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings to change, as in training.lr=2e-4.")
    ] = None,
    preset: options.Preset = "imf-xpred",
    config: Annotated[
        Path | None, typer.Option("--config", metavar="YAML", help="A file of settings laid over the preset.")
    ] = None,
    data: Annotated[Path, typer.Option("--data", help="Folder that `neuromf encode` wrote.")] = Path("latents"),
    out: Annotated[Path | None, typer.Option("--out", help="Run folder.", show_default="runs/<preset>")] = None,
    device: options.Device = "auto",
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Only algorithms that give the same bits each time; slower.")
    ] = False,
    track: Annotated[
        list[str] | None,
        typer.Option("--track", metavar="wandb|mlflow", help="Also send figures and samples there; may be repeated."),
    ] = None,
    dry_run: options.DryRun = False,
    time_step: Annotated[
        bool, typer.Option("--time-step", help="As --dry-run, with a few updates made to see how long it will take.")
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a generator on latents; the same command run again resumes.

    Settings come from KEY=VALUE, then NEUROMF_* variables, then --config, then
    the preset (neuromf presets list). The raw loss is the one to watch. Ctrl-C
    or a scheduler's signal saves and exits with code 75.

    Example: neuromf train --preset imf-xpred training.lr=2e-4
    """
    from neuromf import config as settings

    join_slurm()
    tracking = [f"tracking.to=[{', '.join(track)}]"] if track else []
    resolved = settings.load(preset, [*(overrides or ()), *tracking], config)
    run = ctx.params["out"] = out or Path("runs") / resolved.preset
    from neuromf.pipeline import train as pipeline

    if time_step:
        from neuromf.pipeline.time_step import time_step as measure

        with progress(quiet or json) as show:
            timed = measure(resolved, data, device=device, progress=show)
        return console.result(timed, json)
    if dry_run:
        return console.result(pipeline.plan(resolved, data, device=device), json)
    with progress(quiet or process_rank() > 0) as show:
        done = pipeline.train(resolved, data, run, device=device, deterministic=deterministic, listener=show)
    return console.result(done, json) if process_rank() == 0 else None
