"""`neuromf lora`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from neuromf.errors import UserError
from neuromf.launch import join_slurm, process_rank
from neuromf_cli import console, options
from neuromf_cli.progress import progress

if TYPE_CHECKING:
    from neuromf.pipeline.pairs import PairSource


def lora(
    ctx: typer.Context,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings to change, as in adapters.rank=16.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="RUN", help="Trained run or exported generator to adapt.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option("--images", help="Folder, table with the columns path and mask, or BIDS dataset.")
    ] = None,
    masks: Annotated[
        Path | None,
        typer.Option("--masks", help="Folder of masks named as the images.", show_default="table or derivatives"),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option("--label", metavar="N[,N]", help="Values of the masks that count, where they have several."),
    ] = None,
    suffix: Annotated[
        list[str] | None, typer.Option("--suffix", metavar="FLAIR", help="Of BIDS datasets, which kind of image.")
    ] = None,
    fractions: Annotated[
        str, typer.Option("--fractions", metavar="A B C", help="Shares for training, validation and test.")
    ] = "0.8,0.1,0.1",
    seed: options.Seed = 0,
    preset: options.Preset = "lora-joint",
    config: Annotated[
        Path | None, typer.Option("--config", metavar="YAML", help="A file of settings laid over the preset.")
    ] = None,
    data: Annotated[Path, typer.Option("--data", help="Folder of the encoded pairs; made from --images.")] = Path(
        "pairs"
    ),
    out: Annotated[
        Path | None, typer.Option("--out", help="Run folder, or that of --merge.", show_default="runs/<preset>")
    ] = None,
    merge: Annotated[
        Path | None, typer.Option("--merge", metavar="RUN|FILE", help="Write base and adapters as one generator.")
    ] = None,
    info: Annotated[
        Path | None, typer.Option("--info", metavar="RUN|FILE", help="Say what adapters are, and of which base.")
    ] = None,
    weights: options.Weights = None,
    device: options.Device = "auto",
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Only algorithms that give the same bits each time; slower.")
    ] = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Teach a trained generator to make images with lesion masks, from few cases.

    The base stays frozen: low-rank adapters and the masks' channels alone are
    trained, by the same loop as train; the same command run again resumes.
    Sampling the run gives an image and its mask in one evaluation. The run
    holds adapters.safetensors, a small file that knows its base by hash;
    --merge makes a generator of its own of both.

    Example: neuromf lora --base runs/imf-xpred --images flair --masks masks
    """
    from neuromf.pipeline import lora as pipeline

    if info is not None:
        return console.result(pipeline.info(info), json)
    if merge is not None:
        folder = ctx.params["out"] = out or merge.with_name(f"{merge.stem}-merged")
        return console.result({"merged": pipeline.merge(merge, folder, base)}, json)
    if base is None:
        raise UserError("there is nothing to adapt", "say which run: --base runs/imf-xpred")
    join_slurm()
    resolved = pipeline.resolve(base, preset, overrides or (), config)
    run = ctx.params["out"] = out or Path("runs") / resolved.preset
    # A dry run writes nothing, pairs neither.
    source = None if dry_run else _source(images, masks, label, suffix, fractions, seed, resolved.adapters.mask)
    with progress(quiet or process_rank() > 0) as show:
        resolved, pairs = pipeline.prepare(resolved, data, source, weights=weights, device=device, progress=show)
        if pairs and not dry_run:
            show.message("\n".join(pairs.lines()))
        if not dry_run:
            done = pipeline.lora(resolved, data, run, device=device, deterministic=deterministic, listener=show)
    if dry_run:
        return console.result(pipeline.plan(resolved, data, device=device), json)
    return console.result(done, json) if process_rank() == 0 else None


def _source(
    images: Path | None,
    masks: Path | None,
    label: list[str] | None,
    suffix: list[str] | None,
    fractions: str,
    seed: int,
    mask: str,
) -> PairSource | None:
    """What the options say of the pairs; None where they are encoded already."""
    from neuromf.data.bids import Selection
    from neuromf.pipeline.pairs import PairSource

    if images is None:
        if masks is not None or label or suffix:
            raise UserError("--masks, --label and --suffix belong to --images", "say where the images are")
        return None
    words = options.words(label)
    if not all(word.isdecimal() and int(word) for word in words):
        raise UserError(f"--label {','.join(words)} is not usable", "give whole numbers above 0, as in --label 1,2")
    labels = tuple(sorted({int(word) for word in words}))
    selection = Selection(options.words(suffix))
    return PairSource(images, masks, labels, selection, options.shares(fractions), seed, mask)
