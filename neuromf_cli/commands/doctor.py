"""`neuromf doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from neuromf_cli import console, options
from neuromf_cli.progress import progress


def doctor(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings to change (--jvp), as for train.")
    ] = None,
    jvp: Annotated[bool, typer.Option("--jvp", help="Check du/dt on the network of --preset instead.")] = False,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            metavar="NAME|YAML",
            help="Whose network (--jvp).",
            show_default="imf-xpred",
            autocompletion=options.preset_names,
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--size", metavar="N|I J K", help="Latent cells per axis (--jvp).", show_default="smallest that fits"
        ),
    ] = None,
    device: options.Device = "auto",
    seed: options.Seed = 0,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Check the installation, or with --jvp the derivative du/dt of a preset.

    Looks at Python, libraries, devices, disk, weights and presets. --jvp takes
    du/dt on the preset's own network (random weights) exactly and by finite
    differences, in float32 and bf16, and compares with the exact one in
    float64. Exits with 4 if something will not work.

    Example: neuromf doctor --jvp --preset imf-xpred
    """
    from neuromf.errors import UserError

    if not jvp:
        if preset or size or overrides:
            raise UserError("--preset, --size and KEY=VALUE belong to the check of the derivative", "add --jvp")
        from neuromf.pipeline.doctor import check_environment

        found = check_environment(device)
        return console.result(found, json, found.problems, complaint="of the checks found a problem")

    from neuromf import config as settings

    resolved = settings.load(preset or "imf-xpred", overrides or ())
    cells = options.voxels(size) if size else None
    from neuromf.pipeline.doctor_jvp import check_derivative

    with progress(quiet) as show:
        report = check_derivative(resolved, size=cells, device=device, seed=seed, progress=show)
    return console.result(report, json, report.failed, complaint="of the checks failed")
