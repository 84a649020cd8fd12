"""`neuromf demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neuromf_cli import console, options
from neuromf_cli.progress import progress


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder of everything it makes.")] = Path("demo"),
    seed: options.Seed = 0,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Run everything on embedded data, in minutes and without a download.

    Invented heads are encoded; a MeanFlow and a rectified flow are trained on
    them with the same budget; both generate with 1 and 10 network evaluations.
    Ends with a sheet of pictures and a table.

    Example: neuromf demo --out demo
    """
    from neuromf.pipeline import demo as pipeline

    with progress(quiet) as show:
        done = pipeline.demo(out, seed=seed, progress=show)
    console.result(done, json)
