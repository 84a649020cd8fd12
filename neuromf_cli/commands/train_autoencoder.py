"""`neuromf train-autoencoder`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neuromf_cli import console, options
from neuromf_cli.progress import progress


def train_autoencoder(
    label_maps: Annotated[
        list[str] | None,
        typer.Argument(metavar="LABELS", help="Label maps in FreeSurfer/SynthSeg numbers; none: only invented heads."),
    ] = None,
    templates: Annotated[
        list[str] | None, typer.Option("--template", metavar="SCAN", help="Also train on this scan; may be repeated.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of the weights and their recipe.")] = Path("autoencoder"),
    minutes: Annotated[float, typer.Option("--minutes", min=0.0, help="Train at most this long.")] = 60.0,
    updates: Annotated[int, typer.Option("--updates", min=1, help="Train at most so many updates.")] = 20_000,
    seed: options.Seed = 0,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train the small autoencoder that encodes and decodes volumes.

    It learns from renderings of label maps, invented heads and templates, on a
    CPU. encode and decode take the result as --autoencoder FILE. The same
    command again continues.

    Example: neuromf train-autoencoder labels/ --out autoencoder --minutes 60
    """
    from neuromf.pipeline import autoencoder as pipeline

    settings = pipeline.AutoencoderSettings(minutes=minutes, updates=updates, seed=seed)
    with progress(quiet) as show:
        done = pipeline.train_autoencoder(
            label_maps or [], out, templates=templates or [], settings=settings, log=show.message, progress=show
        )
    console.result(done, json)
