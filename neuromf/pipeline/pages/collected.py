"""What the pages share: how they are asked for, and reading what may be damaged or absent."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neuromf.errors import UserError
from neuromf.files import read_json

Progress = Callable[[str, int, int], None]

VOLUME_BYTES, PICTURE_BYTES, ALL_PICTURES_BYTES = 6_000_000, 500_000, 2_500_000
"""Of the 10 MB of a page: all volumes, one picture, all pictures."""


@dataclass
class Wanted:
    """How a page is asked for; `pictures_left` is what pictures may still take, in bytes."""

    real_scans: bool = False
    device: str = "auto"
    weights: Path | None = None
    progress: Progress = lambda *_: None
    pictures_left: int = ALL_PICTURES_BYTES
    remarks: list[str] = field(default_factory=list)

    def mapping(self, path: Path) -> dict[str, Any]:
        """A JSON file that holds one object; empty where it is absent, with a remark where it is damaged."""
        if not path.is_file():
            return {}
        try:
            content = read_json(path)
        except UserError as error:
            self.remarks.append(error.message)
            return {}
        if isinstance(content, dict):
            return content
        self.remarks.append(f"{path} holds {type(content).__name__}, not an object")
        return {}


def command(*words: str | int | Path) -> str:
    """A command line of `neuromf` that a shell takes as it stands; capitals stand for what the reader fills in."""
    return " ".join(["neuromf", *(shlex.quote(str(word)) for word in words)])


def part(values: Any, key: str) -> Mapping[str, Any]:
    """The mapping below a key; empty for anything else."""
    found = values.get(key) if isinstance(values, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def count(n: float, word: str) -> str:
    """A number with its word.

    Example:
        >>> count(1, "epoch"), count(1200, "update")
        ('1 epoch', '1,200 updates')
    """
    return f"{n:,.0f} {word}{'s' * (n != 1)}"
