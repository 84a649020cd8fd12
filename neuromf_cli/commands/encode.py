"""`neuromf encode`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from neuromf.launch import join_slurm, process_rank
from neuromf_cli import console, options
from neuromf_cli.progress import progress

if TYPE_CHECKING:
    import torch

    from neuromf.models.autoencoder import Autoencoder
    from neuromf.pipeline.cleaning import Cleaning


def encode(
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT", help="NIfTI files, folders, BIDS datasets, .csv or .tsv tables, quoted globs."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the latents.")] = Path("latents"),
    size: options.Size = "64",
    spacing: options.MaybeSpacing = None,
    skull_strip: Annotated[
        Literal["none", "synthstrip", "hd-bet", "mindgrab"],
        typer.Option("--skull-strip", help="Keep the brain alone, found by a program on the path or by a network."),
    ] = "none",
    n4: Annotated[bool, typer.Option("--n4", help="Even out brightness by N4 (needs SimpleITK).")] = False,
    intensity: Annotated[
        Literal["percentile", "foreground"],
        typer.Option("--intensity", help="Take p99.5 of all voxels, or of the head alone."),
    ] = "percentile",
    autoencoder: options.AutoencoderName = "builtin",
    weights: options.Weights = None,
    memory: options.Memory = None,
    groups: Annotated[
        Path | None, typer.Option("--groups", metavar="CSV", help="Table of the scans or participants, one row each.")
    ] = None,
    group_column: Annotated[
        str | None,
        typer.Option(
            "--group-column", metavar="NAME", help="Column of who belongs together. Default: the same participant."
        ),
    ] = None,
    class_column: Annotated[
        str | None, typer.Option("--class-column", metavar="NAME", help="Column of what each scan shows.")
    ] = None,
    suffix: Annotated[
        list[str] | None, typer.Option("--suffix", metavar="T1w", help="Of BIDS datasets, which kind of scan.")
    ] = None,
    entity: Annotated[
        list[str] | None,
        typer.Option("--entity", metavar="KEY=LABEL", help="Of BIDS datasets, only these: ses=01 run=1,2 acq=none."),
    ] = None,
    fractions: Annotated[
        str, typer.Option("--fractions", metavar="A B C", help="Shares for training, validation and test.")
    ] = "0.8,0.1,0.1",
    seed: options.Seed = 0,
    report: Annotated[bool, typer.Option("--report", help="Also decode, and report SSIM and PSNR.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first scan that cannot be used.")] = False,
    flip_copies: Annotated[
        bool, typer.Option("--flip-copies", help="Also encode each training scan mirrored left to right.")
    ] = False,
    copies: Annotated[
        int, typer.Option("--copies", metavar="N", min=0, help="Also encode N augmented copies of each training scan.")
    ] = 0,
    augment: Annotated[
        list[str] | None,
        typer.Option(
            "--augment",
            metavar="KEY=VALUE",
            help="How far copies differ: flip=0.5 intensity=0.05 rotation_deg=2 scale=0.02.",
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Read all inputs, tell what would become of each, and write nothing.")
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            metavar="N",
            min=1,
            help="Processes that read scans ahead. Default: one per core, on a CPU one for all.",
        ),
    ] = None,
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Turn MRI scans into latents, ready for training.

    Each scan is turned to RAS, on request stripped of all but the brain and
    evened out, resampled and cropped to one grid, scaled so that p0 is 0 and
    p99.5 is 1, and encoded. Scans that cannot be used are refused by name
    (exit code 4). The same command again continues, and several processes
    (torchrun, srun) share it. --check first: it shows what would be used,
    changed or refused, and why (without the two steps on request).

    Example: neuromf encode bids/ --suffix T1w --size 64 --spacing 3 --check
    """
    from neuromf.data.augmentation import Augmentation
    from neuromf.data.bids import Selection
    from neuromf.data.preprocessing import Preprocessing

    join_slurm()
    preprocessing = Preprocessing(options.voxels(size), options.maybe_spacing(spacing), intensity=intensity)
    # Before a long check, too: a missing program is better told at once.
    cleaning = _cleaning(skull_strip, n4, device)
    dataset: dict[str, Any] = {
        "selection": Selection(options.words(suffix), options.entities(entity)),
        "group_column": group_column,
        "class_column": class_column,
        "fractions": options.shares(fractions),
        "seed": seed,
    }
    if check:
        from neuromf.pipeline.check import check as look
        from neuromf.pipeline.cohort import read_cohort

        cohort = read_cohort(inputs, table=groups, **dataset)
        with progress(quiet) as show:
            found = look(
                cohort,
                out,
                preprocessing=preprocessing,
                load=lambda: _autoencoder(autoencoder, device, weights, memory),
                cleaning=cleaning,
                copies=copies + flip_copies,
                workers=workers,
                progress=show,
            )
        console.result(found, json, found.complaints, complaint="cannot be used as they are; nothing was written")
        return

    from neuromf.pipeline import encode as pipeline

    with progress(quiet or process_rank() > 0) as show:
        done = pipeline.encode(
            inputs,
            out,
            autoencoder=_autoencoder(autoencoder, device, weights, memory),
            preprocessing=preprocessing,
            cleaning=cleaning,
            groups_csv=groups,
            **dataset,
            report=report,
            strict=strict,
            dry_run=dry_run,
            flip_copies=flip_copies,
            copies=copies,
            augmentation=Augmentation(seed=seed).changed(options.pairs(augment, "--augment", "flip=0"))
            if augment
            else None,
            workers=workers,
            progress=show,
        )
    if process_rank():
        return  # the main process tells of all
    refused = [f"{scan.path}: {scan.reason}" for scan in done.scans if scan.status == "refused"]
    console.result(done, json, refused)


def _cleaning(skull_strip: str, n4: bool, device: options.DeviceName) -> Cleaning:
    from neuromf.data.bias_field import BiasCorrection
    from neuromf.pipeline.cleaning import Cleaning
    from neuromf.pipeline.skull_strip import skull_stripper

    cleaning = Cleaning(skull_stripper(skull_strip, _own_device(device)), BiasCorrection() if n4 else None)
    _ = cleaning.identity  # asks whether SimpleITK is there
    return cleaning


def _autoencoder(name: str, device: options.DeviceName, weights: Path | None, memory_gib: float | None) -> Autoencoder:
    from neuromf.models.autoencoder import load_autoencoder

    return load_autoencoder(name, device=_own_device(device), weights=weights, memory=options.gib(memory_gib))


def _own_device(name: options.DeviceName) -> torch.device:
    """That of this process among those of a launch, by its number: processes that read scans need that."""
    import torch

    from neuromf.devices import torch_device
    from neuromf.pipeline.sharing import take_own_gpu

    take_own_gpu(name)
    device = torch_device(name)
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device
