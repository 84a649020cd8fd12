"""`neuromf evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from neuromf_cli import console, options
from neuromf_cli.progress import progress

if TYPE_CHECKING:
    from neuromf.pipeline.evaluate import Morphology


def evaluate(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="GENERATED REAL",
            help="Folder of generated volumes, and of real ones that training did not see; or, with --compare,"
            " folders of evaluations.",
        ),
    ],
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
    morphology: Annotated[
        str | None,
        typer.Option(
            "--morphology",
            metavar="NAME",
            help="Measure anatomy: meshnet-18, meshnet-18-small, meshnet-tissue, synthseg, or two tables of volumes"
            " (GENERATED.csv,REAL.csv).",
        ),
    ] = None,
    morphology_limit: Annotated[
        int | None, typer.Option("--morphology-limit", min=3, help="Measure so many of each set.", show_default="all")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option("--labels", help="Label maps (FreeSurfer numbers) named as the volumes, for Dice.")
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option("--pairs", help="Pairs encoded by `neuromf lora`, in place of --latents: compares masks, too."),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Compare evaluations (folders, metrics.json, baseline.yaml).")
    ] = False,
    metric: Annotated[
        list[str] | None, typer.Option("--metric", metavar="NAME", help="With --compare: show these metrics only.")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option("--cache", help="Folder of computed features and segmentations, which evaluations may share."),
    ] = None,
    batch_size: options.BatchSize = 4,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes that read volumes.")] = 1,
    seed: options.Seed = 0,
    limit: Annotated[int | None, typer.Option("--limit", min=2, help="Use only so many of each.")] = None,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare generated volumes with real ones.

    Frechet and kernel distances, precision and recall of features of your
    choice, spectrum, anatomy, latent statistics, and the nearest training
    neighbour of each volume; with intervals. Weights of published networks are
    brought by `neuromf weights fetch`. With --compare, evaluations of several
    models in one table, with tests.

    Example: neuromf evaluate runs/cpu-small/generated/volumes scans --latents latents
    """
    if compare:
        return _compare(folders, out, metric, json)
    from neuromf.devices import torch_device
    from neuromf.models.autoencoder import load_autoencoder
    from neuromf.pipeline import evaluate as pipeline
    from neuromf.pipeline.evaluation_sets import generated_latents, held_back
    from neuromf.pipeline.sharing import Share, take_own_gpu

    generated, real = _two(folders)
    take_own_gpu(device)
    place = torch_device(device)
    sets = held_back(real, encoded, place) if (encoded := latents or pairs) else None
    with progress(quiet) as show:
        done = pipeline.evaluate(
            generated,
            sets.real if sets else real,
            train=(sets.train or None) if sets else train,
            preprocessing=sets.preprocessing if sets else None,
            clean=sets.clean if sets else None,
            latents=generated_latents(generated),
            out=out,
            features=options.words(features) or pipeline.FEATURES,
            morphology=_morphology(morphology, morphology_limit, labels),
            pairs=pairs,
            cache=cache,
            autoencoder=load_autoencoder(autoencoder, device=place, weights=weights),
            batch_size=batch_size,
            workers=workers,
            seed=seed,
            limit=limit,
            device=place,
            progress=show,
        )
    if Share.own().main:
        refused = [": ".join(entry.values()) for entry in done.refused]
        console.result(done.content, json, refused, rows=done.rows)
    return None


def _two(folders: list[Path]) -> tuple[Path, Path]:
    from neuromf.errors import UserError

    if len(folders) != 2:
        given = "one folder" if len(folders) == 1 else f"{len(folders)} folders"
        raise UserError(
            f"{given} given, and generated volumes are compared with real ones",
            "neuromf evaluate GENERATED REAL; several evaluations by: neuromf evaluate --compare A B",
        )
    return folders[0], folders[1]


def _morphology(by: str | None, limit: int | None, labels: Path | None) -> Morphology | None:
    from neuromf.errors import UserError
    from neuromf.pipeline.evaluate import Morphology

    if by is None and (limit or labels):
        raise UserError("--morphology-limit and --labels belong to --morphology", "add --morphology meshnet-18")
    return Morphology(by, limit, labels) if by is not None else None


def _compare(sources: list[Path], out: Path | None, metrics: list[str] | None, json: bool) -> None:
    from neuromf.pipeline.comparison import compare

    done = compare(sources, out, options.words(metrics))
    if json:
        return console.result(done.content, json)
    typer.echo(done.files[1].read_text(encoding="utf-8").rstrip())
    return typer.echo(f"\nwritten to {done.files[1]}", err=True)
