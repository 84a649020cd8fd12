"""`neuromf render`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neuromf_cli import console, options
from neuromf_cli.progress import progress


def render(
    label_maps: Annotated[
        list[str] | None,
        typer.Argument(metavar="LABELS", help="Label maps in FreeSurfer/SynthSeg numbers; none: invented heads."),
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="How many volumes; label maps take turns.")] = 100,
    out: Annotated[Path, typer.Option("--out", help="Folder of the volumes.")] = Path("volumes"),
    size: options.Size = "64",
    spacing: options.OneSpacing = 3.0,
    contrast: Annotated[options.ContrastName, typer.Option("--contrast", help="Kind of scan.")] = "T1",
    stripped: Annotated[bool, typer.Option("--stripped", help="Only the brain; the rest is 0.")] = False,
    labels: Annotated[bool, typer.Option("--labels", help="Also write the label map of each volume.")] = False,
    lesions: Annotated[
        float,
        typer.Option(
            "--lesions",
            metavar="SIZE",
            min=0.0,
            help="Give invented heads lesions (1: 7 to 20 mm across, 2: twice that), their masks go to masks/.",
        ),
    ] = 0.0,
    seed: options.Seed = 0,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Make synthetic MRI from label maps, or from invented heads.

    Every volume differs in pose, shape, grey values, bias field and noise.
    renderings.csv says which map each came from: give it to encode as
    --groups renderings.csv --group-column source. The same command again continues.

    Example: neuromf render --n 300 --size 64 --spacing 3 --out volumes labels/
    """
    from neuromf.pipeline import render as pipeline

    recipe = pipeline.Recipe(options.voxels(size), spacing, contrast, stripped, seed, lesions)
    with progress(quiet) as show:
        done = pipeline.render(label_maps or [], out, n=n, recipe=recipe, labels=labels, progress=show)
    console.result(done, json)
