"""One command: what every verb shares in how it reads its words and how it ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typer.core import TyperCommand

from neuromf_cli import console
from neuromf_cli.options import NUMBER_LISTS, PAIR_LISTS


class Command(TyperCommand):
    """A command that takes `--size 64 64 64` as it is spoken, and ends as `console.tidy_exit` says."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words of the command line."""
        return super().parse_args(ctx, repeat_pairs(join_numbers(args)))

    def invoke(self, ctx: Any) -> Any:
        """Run the command; a bug leaves its traceback in the folder of `--out`, if there is one."""
        with console.tidy_exit(lambda: _folder(ctx.params.get("out"))):
            return super().invoke(ctx)


def join_numbers(args: Sequence[str]) -> list[str]:
    """Join the numbers after an option of `NUMBER_LISTS` with commas, since click takes one word per option.

    Example:
        >>> join_numbers(["--size", "48", "64", "48", "scans"])
        ['--size', '48,64,48', 'scans']
    """
    words = list(args)
    joined: list[str] = []
    while words:
        joined.append(words.pop(0))
        if joined[-1] == "--":
            return joined + words
        if joined[-1] in NUMBER_LISTS:
            numbers: list[str] = []
            while words and len(numbers) < 3 and _is_number(words[0]):
                numbers.append(words.pop(0))
            joined += [",".join(numbers)] if numbers else []
    return joined


def repeat_pairs(args: Sequence[str]) -> list[str]:
    """Repeat an option of `PAIR_LISTS` before each `key=value` that follows it.

    Example:
        >>> repeat_pairs(["--where", "contrast=T1", "sex=F", "runs/a"])
        ['--where', 'contrast=T1', '--where', 'sex=F', 'runs/a']
    """
    words, option = list(args), None
    repeated: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        if option and before != option and "=" in word and not word.startswith("-"):
            repeated.append(option)
        elif before != option:
            option = None
        option = word if word in PAIR_LISTS else option
        repeated.append(word)
    return repeated


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _folder(out: Any) -> Path | None:
    """`out` if work has begun there: a log alone would make an empty folder look taken."""
    return Path(out) if out is not None and Path(out).is_dir() and any(Path(out).iterdir()) else None
