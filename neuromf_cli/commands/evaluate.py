"""`neuromf evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neuromf_cli import console, options
from neuromf_cli.progress import progress


def evaluate(
    generated: Annotated[Path, typer.Argument(metavar="GENERATED", help="Folder of generated volumes.")],
    real: Annotated[Path, typer.Argument(metavar="REAL", help="Folder of real ones that training did not see.")],
    train: Annotated[
        Path | None, typer.Option("--train", help="Folder of the training volumes, to look for copies.")
    ] = None,
    latents: Annotated[
        Path | None,
        typer.Option(
            "--latents", help="Latents encoded from REAL: its held-back subjects are compared, prepared alike."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of tables and figures.")] = None,
    autoencoder: options.AutoencoderName = "builtin",
    weights: options.Weights = None,
    features: Annotated[
        list[str] | None,
        typer.Option(
            "--features",
            metavar="NAME[,NAME]",
            help="builtin, inception, radimagenet, radimagenet-mr, medicalnet-10, medicalnet-50, lpips,"
            " or module:FILE.py[:FUNCTION]; may be repeated.",
        ),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option("--cache", help="Folder of computed features, which evaluations may share.")
    ] = None,
    batch_size: options.BatchSize = 4,
    seed: options.Seed = 0,
    limit: Annotated[int | None, typer.Option("--limit", min=2, help="Use only so many of each.")] = None,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare generated volumes with real ones.

    Frechet and kernel distances, precision and recall of features of your
    choice, spectrum, latent statistics, and the nearest training neighbour of
    each volume; with intervals. Weights of published networks are brought by
    `neuromf weights fetch`.

    Example: neuromf evaluate runs/cpu-small/generated/volumes scans --latents latents
    """
    from neuromf.devices import torch_device
    from neuromf.models.autoencoder import load_autoencoder
    from neuromf.pipeline import evaluate as pipeline
    from neuromf.pipeline.evaluation_sets import generated_latents, held_back

    place = torch_device(device)
    sets = held_back(real, latents) if latents else None
    with progress(quiet) as show:
        done = pipeline.evaluate(
            generated,
            sets.real if sets else real,
            train=(sets.train or None) if sets else train,
            preprocessing=sets.preprocessing if sets else None,
            latents=generated_latents(generated),
            out=out,
            features=options.words(features) or pipeline.FEATURES,
            cache=cache,
            autoencoder=load_autoencoder(autoencoder, device=place, weights=weights),
            batch_size=batch_size,
            seed=seed,
            limit=limit,
            device=place,
            progress=show,
        )
    refused = [": ".join(entry.values()) for entry in done.refused]
    console.result(done.content, json, refused, rows=done.rows)
