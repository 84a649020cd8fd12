"""`neuromf diagnose`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neuromf_cli import console, options


def diagnose(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder that `train` wrote; finished or not.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings of an old run whose folder does not tell them."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.png", help="The picture.", show_default="RUN/diagnosis.png")
    ] = None,
    json: options.Json = False,
) -> None:
    """Say what is wrong with a training run, and which setting to change.

    Reads the figures of each epoch, names the phase, and lists what an expert
    would find, the strongest evidence first, with the numbers it rests on; and
    draws them in one picture. Exits with 4 if a finding is a problem.

    Example: neuromf diagnose runs/imf-xpred
    """
    from neuromf.pipeline.diagnose import diagnose as examine

    report = examine(run, overrides=overrides or (), out=out)
    console.result(report, json, report.problems, complaint="of the findings are problems")
