"""`neuromf encode`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neuromf_cli import console, options
from neuromf_cli.progress import progress


def encode(
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT", help="NIfTI files, folders, or quoted globs.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the latents.")] = Path("latents"),
    size: options.Size = "64",
    spacing: options.MaybeSpacing = None,
    autoencoder: options.AutoencoderName = "builtin",
    weights: options.Weights = None,
    groups: Annotated[
        Path | None, typer.Option("--groups", metavar="CSV", help="Table of the scans, one row each.")
    ] = None,
    group_column: Annotated[
        str | None,
        typer.Option(
            "--group-column", metavar="NAME", help="Its column of who belongs together; no group is ever split."
        ),
    ] = None,
    class_column: Annotated[
        str | None, typer.Option("--class-column", metavar="NAME", help="Its column of what each scan shows.")
    ] = None,
    fractions: Annotated[
        str, typer.Option("--fractions", metavar="A B C", help="Shares for training, validation and test.")
    ] = "0.8,0.1,0.1",
    seed: options.Seed = 0,
    report: Annotated[bool, typer.Option("--report", help="Also decode, and report SSIM and PSNR.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first scan that cannot be used.")] = False,
    flip_copies: Annotated[
        bool, typer.Option("--flip-copies", help="Also encode each scan mirrored left to right, for training.")
    ] = False,
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Turn MRI scans into latents, ready for training.

    Each scan is turned to RAS, resampled and cropped to one grid, scaled so
    that p0 is 0 and p99.5 is 1, and encoded. Scans that cannot be used are
    refused by name (exit code 4). The same command again continues.

    Example: neuromf encode scans/ --out latents --size 64 64 64 --spacing 3
    """
    from neuromf.data.preprocessing import Preprocessing
    from neuromf.devices import torch_device
    from neuromf.models.autoencoder import load_autoencoder
    from neuromf.pipeline import encode as pipeline

    preprocessing = Preprocessing(options.voxels(size), options.maybe_spacing(spacing))
    with progress(quiet) as show:
        done = pipeline.encode(
            inputs,
            out,
            autoencoder=load_autoencoder(autoencoder, device=torch_device(device), weights=weights),
            preprocessing=preprocessing,
            groups_csv=groups,
            group_column=group_column,
            class_column=class_column,
            fractions=options.shares(fractions),
            seed=seed,
            report=report,
            strict=strict,
            dry_run=dry_run,
            flip_copies=flip_copies,
            progress=show,
        )
    refused = [f"{scan.path}: {scan.reason}" for scan in done.scans if scan.status == "refused"]
    console.result(done, json, refused)
