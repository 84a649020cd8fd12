"""The application: commands are known here by name and one line, and imported only when called."""

from __future__ import annotations

import importlib
import signal
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from neuromf_cli import console
from neuromf_cli.command import Command

# The first docstring line of each command, kept equal by a test: `--help` then imports none of them.
COMMANDS = {
    "encode": "Turn MRI scans into latents, ready for training.",
    "train": "Train a generator on latents; the same command run again resumes.",
    "diagnose": "Say what is wrong with a training run, and which setting to change.",
    "sample": "Generate latents from a trained run, with one network evaluation each or more.",
    "decode": "Turn latents into NIfTI volumes.",
    "evaluate": "Compare generated volumes with real ones.",
    "ablate": "Train, sample and evaluate every cell of a plan, and compare them.",
    "lora": "Teach a trained generator to make images with lesion masks, from few cases.",
    "report": "Write one HTML page about a run, a generated set, or an ablation.",
    "demo": "Run everything on embedded data, in minutes and without a download.",
    "toy": "Prove the method on data whose answer is known: a torus.",
    "doctor": "Check the installation, or with --jvp the derivative du/dt of a preset.",
    "bench": "Measure an update, the derivative, samples and a decode on this machine.",
    "presets": "List, show and copy the settings that come with NeuroMF.",
    "weights": "List, fetch and verify the weights of others that NeuroMF can use.",
    "render": "Make synthetic MRI from label maps, or from invented heads.",
    "train-autoencoder": "Train the small autoencoder that encodes and decodes volumes.",
}


class LazyGroup(TyperGroup):
    """A group whose commands are placeholders (a name, one line of help) until one of them runs."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = {name: TyperCommand(name, help=line) for name, line in COMMANDS.items()}

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Find the command behind `args`, imported; an unknown one suggests the nearest."""
        name, placeholder, rest = super().resolve_command(ctx, args)
        return name, load_command(name) if name and placeholder else placeholder, rest


def load_command(name: str) -> Any:
    """Import `commands/<name>.py`, which holds one thing of that name: a function, or a Typer of functions."""
    attribute = name.replace("-", "_")
    found = getattr(importlib.import_module(f"neuromf_cli.commands.{attribute}"), attribute)
    if not isinstance(found, typer.Typer):
        single = typer.Typer(add_completion=False)
        single.command(name, cls=Command)(found)
        found = single
    command = get_command(found)
    command.name = name
    return command


app = typer.Typer(cls=LazyGroup, no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})


def _version(wanted: bool) -> None:
    if wanted:
        from neuromf import __version__

        typer.echo(f"neuromf {__version__}")
        raise typer.Exit


@app.callback()
def neuromf(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make 3-D brain MRI with one network evaluation: encode, train, sample, decode, evaluate.

    Start here: neuromf demo
    """


def main() -> None:
    """Entry point of the `neuromf` script."""
    for name in ("SIGTERM", "SIGUSR1"):  # a scheduler's stop reads like Ctrl-C
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.default_int_handler)
    with console.tidy_exit(as_process=True):
        app(prog_name="neuromf")
