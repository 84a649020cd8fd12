"""`neuromf decode`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neuromf.launch import join_slurm, process_rank
from neuromf_cli import console, options
from neuromf_cli.progress import progress


def decode(
    latents: Annotated[Path, typer.Argument(metavar="LATENTS", help="Folder that sample or encode wrote.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the volumes.", show_default="beside the latents")
    ] = None,
    autoencoder: options.SameAutoencoder = None,
    weights: options.Weights = None,
    memory: options.Memory = None,
    batch_size: options.BatchSize = 1,
    dtype: options.Dtype = "int16",
    compression: options.Compression = 1,
    montage: Annotated[bool, typer.Option(help="Also draw a sheet of slices.")] = True,
    as_scanned: Annotated[
        bool,
        typer.Option("--as-scanned", help="Of encoded scans: back to each scan's own voxels and intensities."),
    ] = False,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Turn latents into NIfTI volumes.

    Each volume gets the affine of its grid and a JSON file beside it that says
    how it was made and what a check of it found. The same command again
    continues; several processes (torchrun, accelerate launch, srun) share it.

    Example: neuromf decode runs/imf-xpred/generated --out volumes
    """
    from neuromf.pipeline import decode as pipeline

    join_slurm()
    decoding = pipeline.Decoding(
        autoencoder, weights, options.gib(memory), batch_size, dtype, compression, montage, as_scanned
    )
    with progress(quiet or process_rank() > 0) as show:
        done = pipeline.decode(latents, out, decoding, device=device, progress=show)
    if process_rank() == 0:
        failed = [f"{name}: {reason}" for name, reason in done.failed.items()]
        console.result(done, json, failed, complaint="of the volumes failed the check, all are written")
