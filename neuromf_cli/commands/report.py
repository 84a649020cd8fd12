"""`neuromf report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neuromf_cli import console, options
from neuromf_cli.progress import progress


def report(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A run, a generated set, or an ablation.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.html", help="The page.", show_default="PATH/report.html")
    ] = None,
    figures: Annotated[
        bool, typer.Option("--figures", help="Also draw the figures of a paper, as PNG and PDF, in figures/.")
    ] = False,
    real_scans: Annotated[
        bool, typer.Option("--real-scans", help="Also show pictures of real scans; mind who will see the page.")
    ] = False,
    weights: options.Weights = None,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write one HTML page about a run, a generated set, or an ablation.

    Curves to hover, findings, volumes with sliders, metrics with intervals,
    and where all of it comes from; in one file that loads nothing, to be opened
    anywhere and sent to anyone. What is missing is said with its command.

    Example: neuromf report runs/cpu-small
    """
    from neuromf.pipeline.report import report as write

    with progress(quiet) as show:
        done = write(path, out, figures=figures, real_scans=real_scans, weights=weights, device=device, progress=show)
    console.result(done, json)
