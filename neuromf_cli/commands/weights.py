"""`neuromf weights`: list, fetch, verify, path."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neuromf_cli import console, options
from neuromf_cli.command import Command

weights = typer.Typer(
    help="List, fetch and verify the weights of others that NeuroMF can use.",
    no_args_is_help=True,
    add_completion=False,
)


def names(incomplete: str) -> list[str]:
    """Weights that begin so, for the shell's completion."""
    from neuromf.weights import entries

    return [name for name in entries() if name.startswith(incomplete)]


Name = Annotated[str, typer.Argument(metavar="NAME", help="Of `neuromf weights list`.", autocompletion=names)]


@weights.command("list", cls=Command)
def list_weights(json: options.Json = False) -> None:
    """List the weights: what each is for, its licence, and whether it is here.

    Example: neuromf weights list
    """
    from neuromf.weights import folder, survey

    found = survey()
    report = {"folder": str(folder()), "weights": [listed.to_dict() for listed in found]}
    console.result(report, json, rows=[listed.row() for listed in found])


@weights.command("fetch", cls=Command)
def fetch(
    name: Name,
    source: Annotated[
        Path | None, typer.Option("--from", metavar="FILE", help="Take this file instead of downloading.")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Say what to put where instead of downloading.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Bring a weights file into the weights folder, checked.

    Downloads it from its publisher, or takes a file that was carried here. The
    folder is NEUROMF_WEIGHTS, or neuromf/weights in your cache.

    Example: neuromf weights fetch maisi
    """
    from neuromf import weights as library

    done = library.fetch(name, source=source, offline=offline, quiet=quiet)
    report = {**done.weights.to_dict(), "path": str(done.weights.path), "trust": done.weights.trust, "new": done.new}
    console.result(report, json)


@weights.command("verify", cls=Command)
def verify(
    which: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME...", help="Those to check.", show_default="all here", autocompletion=names),
    ] = None,
    json: options.Json = False,
) -> None:
    """Compute the hash of the files that are here, and compare.

    With the published hash where there is one, else with the one recorded at
    the first use. Exits with 4 if one is damaged or another file.

    Example: neuromf weights verify
    """
    from neuromf.weights import folder, verify

    checked = verify(which or ())
    report = {"folder": str(folder()), "weights": [file._asdict() for file in checked]}
    wrong = [file.problem for file in checked if file.status == "wrong"]
    rows = [file.row() for file in checked]
    console.result(report, json, wrong, rows=rows, complaint="of the files cannot be used")


@weights.command("path", cls=Command)
def path(name: Name) -> None:
    """Print where a weights file lies, or where to put it.

    Example: neuromf weights path maisi
    """
    from neuromf import weights as library

    entry = library.find(name)
    found = library.found_path(entry)
    typer.echo(found or library.expected_path(entry))
    state = entry.pin if found else f"not there yet: {library.how_to_get(entry)}"
    typer.echo(f"{state}\nlicence: {entry.licence}", err=True)
