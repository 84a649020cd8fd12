"""Writes the files of completions/: `python -m neuromf_cli.completions [FOLDER]`.

The scripts ask `neuromf` itself at each Tab, so they only change with Typer.
"""

from __future__ import annotations

import sys
from pathlib import Path

from typer.completion import get_completion_script

FILES = {"bash": "neuromf.bash", "zsh": "_neuromf", "fish": "neuromf.fish"}


def scripts() -> dict[str, str]:
    """File name -> content."""
    return {
        file: get_completion_script(prog_name="neuromf", complete_var="_NEUROMF_COMPLETE", shell=shell) + "\n"
        for shell, file in FILES.items()
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "completions")
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in scripts().items():
        (folder / file).write_text(content, encoding="utf-8")
