"""`neuromf decode`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neuromf_cli import console, options
from neuromf_cli.progress import progress


def decode(
    latents: Annotated[Path, typer.Argument(metavar="LATENTS", help="Folder that sample or encode wrote.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the volumes.", show_default="beside the latents")
    ] = None,
    autoencoder: Annotated[
        str | None,
        typer.Option(
            "--autoencoder",
            metavar="NAME|PATH",
            help="Where it lies; it must be the one that encoded.",
            show_default="as encoded",
        ),
    ] = None,
    weights: options.Weights = None,
    batch_size: options.BatchSize = 2,
    montage: Annotated[bool, typer.Option(help="Also draw a sheet of slices.")] = True,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Turn latents into NIfTI volumes.

    Each volume gets the affine of its grid and a JSON file beside it that says
    how it was made.

    Example: neuromf decode runs/imf-xpred/generated --out volumes
    """
    from neuromf.pipeline import decode as pipeline

    with progress(quiet) as show:
        done = pipeline.decode(
            latents,
            out,
            autoencoder=autoencoder,
            weights=weights,
            batch_size=batch_size,
            device=device,
            montage=montage,
            progress=show,
        )
    failed = [f"{name}: {reason}" for name, reason in done.failed.items()]
    console.result(done, json, failed, complaint="of the volumes failed the check, all are written")
