"""`neuromf bench`."""

from __future__ import annotations

from typing import Annotated

import typer

from neuromf_cli import console, options
from neuromf_cli.progress import progress


def bench(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings to change, as for train.")
    ] = None,
    preset: Annotated[
        str,
        typer.Option("--preset", metavar="NAME|YAML", help="Whose network.", autocompletion=options.preset_names),
    ] = "imf-xpred",
    size: Annotated[str, typer.Option("--size", metavar="N|I J K", help="Latent cells per axis.")] = "16",
    channels: Annotated[int, typer.Option("--channels", min=1, help="Channels of a latent.")] = 4,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="Samples.", show_default="the preset's")
    ] = None,
    autoencoder: Annotated[
        str, typer.Option("--autoencoder", help="Time a decode of this one too; none leaves it out.")
    ] = "builtin",
    seconds: Annotated[float, typer.Option("--seconds", min=0.0, help="How long each group is timed.")] = 20.0,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure an update, the derivative, samples and a decode on this machine.

    Beside ours stand plain flow matching, torch.func.jvp and the finite
    difference, timed in turns in the same run, on random latents. On a GPU the
    peak memory of each, too.

    Example: neuromf bench --preset imf-xpred --size 48
    """
    from neuromf import config as settings
    from neuromf.devices import torch_device
    from neuromf.models.autoencoder import load_autoencoder
    from neuromf.pipeline import bench as pipeline

    resolved, cells = settings.load(preset, overrides or ()), options.voxels(size)
    decoder = None if autoencoder == "none" else load_autoencoder(autoencoder, device=torch_device(device))
    with progress(quiet) as show:
        report = pipeline.bench(
            resolved,
            shape=(channels, *cells),
            batch=batch_size,
            device=device,
            autoencoder=decoder,
            seconds=seconds,
            progress=show,
        )
    console.result(report, json)
