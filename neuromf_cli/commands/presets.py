"""`neuromf presets`: list, show, copy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neuromf_cli import console, options
from neuromf_cli.command import Command

presets = typer.Typer(
    help="List, show and copy the settings that come with NeuroMF.", no_args_is_help=True, add_completion=False
)
Name = Annotated[
    str, typer.Argument(metavar="NAME", help="Of `neuromf presets list`.", autocompletion=options.preset_names)
]


@presets.command("list", cls=Command)
def list_presets(json: options.Json = False) -> None:
    """List the presets and what each is for.

    Example: neuromf presets list
    """
    from neuromf.config import preset_files, preset_header

    purposes = {name: " ".join(preset_header(path)[:1]) for name, path in preset_files().items()}
    rows = [{"preset": name, "purpose": purpose} for name, purpose in purposes.items()]
    console.result(purposes, json, rows=rows)


@presets.command("show", cls=Command)
def show(
    name: Name,
    resolved: Annotated[bool, typer.Option("--resolved", help="Every setting, not only what differs.")] = False,
) -> None:
    """Print a preset.

    Example: neuromf presets show imf-xpred --resolved
    """
    from neuromf.config import find_preset, load

    typer.echo((load(name).to_yaml() if resolved else find_preset(name).read_text(encoding="utf-8")).rstrip())


@presets.command("copy", cls=Command)
def copy(
    name: Name,
    to: Annotated[Path | None, typer.Argument(metavar="PATH", help="New file.", show_default="./NAME.yaml")] = None,
) -> None:
    """Copy a preset to edit; train takes the file as --preset PATH.

    Example: neuromf presets copy imf-xpred mine.yaml
    """
    from neuromf.config import find_preset
    from neuromf.errors import UserError
    from neuromf.files import write_text

    source = find_preset(name)
    target = to or Path(f"{source.stem}.yaml")
    if target.exists():
        raise UserError(f"{target} exists", "give another path: neuromf presets copy NAME PATH")
    write_text(target, source.read_text(encoding="utf-8"))
    typer.echo(target)
