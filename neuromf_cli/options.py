"""Options that several commands share, each with one spelling and one help text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import typer

from neuromf.errors import UserError

# Options followed by one or three numbers (see `command.join_numbers`).
NUMBER_LISTS = ("--size", "--spacing", "--fractions", "--guidance-interval", "--seeds")
# Options followed by words of the form key=value.
PAIR_LISTS = ("--where", "--augment", "--entity", "--sbatch")

DeviceName = Literal["auto", "cpu", "cuda", "mps"]
SolverName = Literal["auto", "meanflow", "euler", "heun"]
ContrastName = Literal["T1", "FLAIR"]
CheckpointName = Literal["newest", "best"]
DtypeName = Literal["int16", "uint8", "float32"]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")]
Device = Annotated[DeviceName, typer.Option("--device", help="Where to compute; auto takes a GPU if there is one.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same result.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="How many at a time; bounds the memory.")]
AutoencoderName = Annotated[
    str,
    typer.Option(
        "--autoencoder", metavar="NAME|PATH", help="builtin, identity, haar, maisi, or a .pt or .safetensors file."
    ),
]
Weights = Annotated[
    Path | None, typer.Option("--weights", metavar="FILE", help="Weights of the autoencoder, where it brings none.")
]
SameAutoencoder = Annotated[
    str | None,
    typer.Option(
        "--autoencoder",
        metavar="NAME|PATH",
        help="Where it lies; it must be the one that encoded.",
        show_default="as encoded",
    ),
]
Memory = Annotated[
    float | None,
    typer.Option(
        "--memory",
        metavar="GIB",
        min=0.01,
        help="What the autoencoder may take; larger volumes are computed in slabs.",
        show_default="what is free",
    ),
]
Dtype = Annotated[DtypeName, typer.Option("--dtype", help="How the volumes are stored; intensity 1 reads as 1000.")]
Compression = Annotated[
    int, typer.Option("--compression", min=0, max=9, help="1 (fast) to 9 (small) of .nii.gz; 0 writes .nii.")
]
Seeds = Annotated[
    str, typer.Option("--seeds", metavar="N [N N]", help="Repeat with each of these seeds (more than three: 0,1,2,3).")
]
Size = Annotated[str, typer.Option("--size", metavar="N|I J K", help="Voxels per axis: one number, or three.")]
Spacing = Annotated[str, typer.Option("--spacing", metavar="MM|I J K", help="Voxel edge in mm: one number, or three.")]
MaybeSpacing = Annotated[
    str | None,
    typer.Option("--spacing", metavar="MM|I J K", help="Voxel edge in mm: one number, or three. Default: as scanned."),
]
OneSpacing = Annotated[float, typer.Option("--spacing", metavar="MM", min=0.05, help="Voxel edge in mm.")]


def preset_names(incomplete: str) -> list[str]:
    """Shipped presets that begin so, for the shell's completion."""
    from neuromf.config import preset_files

    return [name for name in preset_files() if name.startswith(incomplete)]


Preset = Annotated[
    str,
    typer.Option("--preset", metavar="NAME|YAML", help="Settings to start from.", autocompletion=preset_names),
]


def voxels(text: str) -> tuple[int, int, int]:
    """The value of `--size`, one or three whole numbers, as three.

    Raises:
        UserError: anything else.
    """
    i, j, k = _three(text, "--size", "one or three whole numbers above 0, as in --size 64 64 64", minimum=1)
    if (i, j, k) != (int(i), int(j), int(k)):
        raise UserError(f"--size {_spoken(text)} is not usable", "voxels are counted: give whole numbers")
    return int(i), int(j), int(k)


def maybe_spacing(text: str | None) -> float | tuple[float, float, float] | None:
    """The value of `--spacing` in mm: one number, three, or None where it was not given.

    Raises:
        UserError: anything else.
    """
    if text is None:
        return None
    values = _three(text, "--spacing", "one or three numbers of mm above 0, as in --spacing 3", minimum=1e-3)
    return values[0] if len(set(values)) == 1 else values


def shares(text: str) -> tuple[float, float, float]:
    """The value of `--fractions`.

    Raises:
        UserError: not three numbers of 0 or more.
    """
    if text.count(",") != 2:
        raise UserError(
            f"--fractions {_spoken(text)} is not usable", "give three shares, as in --fractions 0.8 0.1 0.1"
        )
    return _three(text, "--fractions", "three shares, as in --fractions 0.8 0.1 0.1", minimum=0)


def seeds(text: str) -> list[int]:
    """The value of `--seeds`.

    Raises:
        UserError: not different whole numbers of 0 or more.
    """
    words = text.split(",")
    if not all(word.isdecimal() for word in words) or len(set(words)) < len(words):
        raise UserError(f"--seeds {_spoken(text)} is not usable", "give different whole numbers, as in --seeds 0 1 2")
    return [int(word) for word in words]


def interval(text: str) -> tuple[float, float]:
    """The value of `--guidance-interval`.

    Raises:
        UserError: not two times in order.
    """
    low, high = text.split(",")[:2] if text.count(",") == 1 else ("", "")
    try:
        times = float(low), float(high)
    except ValueError:
        times = (1.0, 0.0)
    if not 0 <= times[0] <= times[1] <= 1:
        raise UserError(f"--guidance-interval {_spoken(text)} is not usable", "give two times in order, as in 0.2 0.8")
    return times


def pairs(words: list[str] | None, option: str = "--where", example: str = "contrast=T1") -> dict[str, str]:
    """The values of an option of `PAIR_LISTS` as a mapping.

    Raises:
        UserError: a word that is no key=value.
    """
    wrong = [word for word in words or [] if not all(word.partition("="))]
    if wrong:
        raise UserError(f"{option} {wrong[0]} is not usable", f"write KEY=VALUE, as in {option} {example}")
    return dict(word.split("=", 1) for word in words or [])


def words(given: list[str] | None) -> tuple[str, ...]:
    """The values of an option that may be repeated or hold commas: `--suffix T1w --suffix T2w,FLAIR`."""
    return tuple(word for text in given or [] for word in text.split(",") if word)


def entities(words: list[str] | None) -> dict[str, tuple[str, ...]]:
    """The values of `--entity`: `run=1,2 acq=mprage`, a key given twice adds to its labels.

    Raises:
        UserError: a word that is no key=value.
    """
    found: dict[str, tuple[str, ...]] = {}
    for word in words or []:
        for key, labels in pairs([word], "--entity", "acq=mprage").items():
            found[key] = (*found.get(key, ()), *labels.split(","))
    return found


def gib(value: float | None) -> int | None:
    """The value of `--memory` in bytes."""
    return None if value is None else int(value * 2**30)


def _three(text: str, option: str, allowed: str, minimum: float) -> tuple[float, float, float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in (1, 3) or not all(minimum <= value < math.inf for value in values):
        raise UserError(f"{option} {_spoken(text)} is not usable", f"give {allowed}")
    i, j, k = values * 3 if len(values) == 1 else values
    return i, j, k


def _spoken(text: str) -> str:
    return text.replace(",", " ")
