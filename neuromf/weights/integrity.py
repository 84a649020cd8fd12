"""Whether a file is what its entry promises: whole, and of the right content.

A file whose hash nobody published is trusted the first time it is used. Its hash is then written beside it as
`<file>.sha256` (the format of `sha256sum`), and from then on it has to stay the same.
"""

from __future__ import annotations

import json
import re
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Literal

from neuromf.errors import UserError
from neuromf.files import write_text
from neuromf.weights.catalogue import Entry

Trust = Literal["published", "recorded", "unrecorded"]
"""Who vouches for a file's hash: its publisher, an earlier use, or nobody (the record could not be kept)."""

_LARGEST_HEADER = 100_000_000  # of safetensors, by its own definition
_DIGEST = re.compile(r"[0-9a-f]{64}")


def damage(path: Path) -> str:
    """What is visibly wrong with a file, or "": web pages saved as weights, pointers, downloads cut short.

    Raises:
        UserError: it cannot be read.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(512)
            if size == 0:
                return "is empty"
            if head.startswith(b"version https://git-lfs"):
                return "is a git-lfs pointer of a few lines, not the weights"
            if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
                return "is a web page, such as a login or an error page, not the weights"
            if head.startswith(b"PK"):
                return "" if zipfile.is_zipfile(file) else f"is cut short ({size:,} bytes)"
            if head[8:9] == b"{":
                return _safetensors_damage(path, size)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error})", "check the file and its rights"
        ) from error
    # torch's files of before 2020 are bare pickles; how long one should be only reading it tells.
    return "" if head.startswith(b"\x80") else "is neither a torch nor a safetensors file"


def _safetensors_damage(path: Path, size: int) -> str:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, _LARGEST_HEADER))
    with suppress(ValueError, TypeError, KeyError, AttributeError):
        tensors = [value for name, value in json.loads(header).items() if name != "__metadata__"]
        whole = 8 + length + max((int(tensor["data_offsets"][1]) for tensor in tensors), default=0)
        return "" if size == whole else f"has {size:,} bytes where its header promises {whole:,}"
    return "is cut short: its header cannot be read"


def record_path(path: Path) -> Path:
    """Where the hash of a file is recorded."""
    return path.with_name(path.name + ".sha256")


def recorded_sha256(path: Path) -> str | None:
    """The hash that was recorded beside a file; None where there is no record.

    Raises:
        UserError: a record that holds no hash: it must not be mistaken for none.
    """
    record = record_path(path)
    try:
        words = record.read_text(encoding="utf-8").split()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{record} cannot be read ({error})", "mend it, or delete it to trust the file anew") from error
    if not words or not _DIGEST.fullmatch(words[0].lower()):
        raise UserError(f"{record} holds no sha256", "mend it, or delete it to trust the file anew")
    return words[0].lower()


def record(path: Path, digest: str) -> bool:
    """Write the hash of a file beside it; False where the folder is read-only, which root, too, respects here."""
    if not path.parent.stat().st_mode & 0o222:
        return False
    with suppress(UserError):
        write_text(record_path(path), f"{digest}  {path.name}\n")
        return True
    return False


def trust(entry: Entry, path: Path, digest: str, *, place: Path | None = None) -> Trust:
    """Who vouches for this content, after comparing it with what is published and what was recorded.

    Args:
        entry: what it should be.
        path: the file, for messages.
        digest: its sha256.
        place: where it lies or is to lie, if elsewhere: there its record is.

    Raises:
        UserError: it is another file.
    """
    if entry.sha256 and not digest.startswith(entry.sha256):
        raise UserError(
            f"{path} is not the file of the weights '{entry.name}': its sha256 is {digest}, "
            f"it should {'be' if len(entry.sha256) == 64 else 'begin with'} {entry.sha256}",
            f"remove it and get it again: neuromf weights fetch {entry.name}",
        )
    if entry.sha256 and len(entry.sha256) == 64:
        return "published"
    known = recorded_sha256(place or path)
    if known and known != digest:
        raise UserError(
            f"{path} is not what the weights '{entry.name}' were at their first use here: its sha256 is {digest}, "
            f"recorded was {known}",
            f"latents and models of the two do not mix; if you do want this file, delete {record_path(place or path)}",
        )
    return "recorded" if known else "unrecorded"
