"""`neuromf toy`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neuromf_cli import console, options
from neuromf_cli.progress import progress


def toy(
    ctx: typer.Context,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings to change, as in training.lr=2e-3.")
    ] = None,
    preset: options.Preset = "toy-torus",
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the runs.", show_default="runs/<preset>")] = None,
    seeds: options.Seeds = "0,1,2",
    both: Annotated[
        bool, typer.Option("--both/--one", help="Also train the other prediction (x or u), to report it.")
    ] = True,
    cells: Annotated[int, typer.Option("--cells", min=4, help="Cells per axis of the volumes: 8, 16 or 32.")] = 8,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", min=1, help="Runs trained at a time.", show_default="one per CPU core; 1 on a GPU"),
    ] = None,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Prove the method on data whose answer is known: a torus.

    Trains with each seed, samples 2,000 times with 1, 2 and 5 evaluations,
    measures how far the samples lie from the torus and how evenly they cover
    it, and draws a figure. toy-torus is points in R^4, toy-volume blobs that
    two angles move. Exits with 4 if a required gate fails.

    Example: neuromf toy --preset toy-torus --seeds 0 1 2
    """
    from neuromf import config as settings

    numbers = options.seeds(seeds)
    run = ctx.params["out"] = out or Path("runs") / settings.find_preset(preset).stem
    from neuromf.pipeline import toy as pipeline

    with progress(quiet) as show:
        report = pipeline.toy(
            preset,
            run,
            seeds=numbers,
            overrides=overrides or (),
            both=both,
            cells=cells,
            jobs=jobs,
            device=device,
            progress=show,
        )
    console.result(report, json, report.failed, complaint="of the required gates failed")
