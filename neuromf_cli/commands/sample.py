"""`neuromf sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neuromf.launch import join_slurm, process_rank
from neuromf_cli import console, options
from neuromf_cli.progress import progress


def sample(
    run: Annotated[
        str | None, typer.Argument(metavar="RUN", help="Run folder; by default the newest finished one in ./runs.")
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="How many.")] = 16,
    nfe: Annotated[int, typer.Option("--nfe", min=1, help="Network evaluations per sample.")] = 1,
    seed: options.Seed = 0,
    out: Annotated[Path | None, typer.Option("--out", help="Folder.", show_default="<run>/generated")] = None,
    batch_size: options.BatchSize = 8,
    solver: Annotated[
        options.SolverName, typer.Option("--solver", help="How to step; auto takes what the run was trained for.")
    ] = "auto",
    ema: Annotated[
        str | None,
        typer.Option("--ema", metavar="NAME", help="Which average to use.", show_default="the run's ema.select"),
    ] = None,
    checkpoint: Annotated[
        options.CheckpointName, typer.Option("--checkpoint", help="The newest weights, or those validated best.")
    ] = "newest",
    where: Annotated[
        list[str] | None, typer.Option("--where", metavar="KEY=VALUE", help="What to ask for, as in contrast=T1.")
    ] = None,
    guidance: Annotated[
        float, typer.Option("--guidance", min=1.0, help="Guidance scale, for models trained to take one.")
    ] = 1.0,
    guidance_interval: Annotated[
        str, typer.Option("--guidance-interval", metavar="A B", help="Times between which guidance acts.")
    ] = "0,1",
    decode: Annotated[bool, typer.Option("--decode", help="Write NIfTI volumes instead of latents.")] = False,
    keep_latents: Annotated[bool, typer.Option("--keep-latents", help="With --decode, write the latents too.")] = False,
    autoencoder: options.SameAutoencoder = None,
    weights: options.Weights = None,
    memory: options.Memory = None,
    dtype: options.Dtype = "int16",
    compression: options.Compression = 1,
    montage: Annotated[bool, typer.Option(help="With --decode, also draw a sheet of slices.")] = True,
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Generate latents from a trained run, with one network evaluation each or more.

    The noise of sample i depends on (seed, i) only, whatever the batch size.
    The same command again continues; several processes (torchrun, accelerate
    launch, srun) share it. --autoencoder to --montage are for --decode.

    Example: neuromf sample --nfe 1 --n 2000 --decode
    """
    from neuromf.pipeline import sample as pipeline
    from neuromf.pipeline.decode import Decoding

    join_slurm()
    volumes = Decoding(autoencoder, weights, options.gib(memory), dtype=dtype, compression=compression, montage=montage)
    with progress(quiet or process_rank() > 0) as show:
        done = pipeline.sample(
            run,
            n,
            nfe=nfe,
            seed=seed,
            out=out,
            batch_size=batch_size,
            solver=solver,
            ema=ema,
            checkpoint=checkpoint,
            where=options.pairs(where),
            guidance=guidance,
            interval=options.interval(guidance_interval),
            decoding=volumes if decode else None,
            keep_latents=keep_latents,
            dry_run=dry_run,
            device=device,
            progress=show,
        )
    if process_rank() == 0:
        failed = [f"{name}: {reason}" for name, reason in done.failed.items()]
        console.result(done, json, failed, complaint="of the volumes failed the check, all are written")
