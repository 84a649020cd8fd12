"""Files that are either whole or absent: every write goes to a temporary name and is renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from neuromf.errors import UserError

_TEMPORARY = ".partial-"


@contextmanager
def atomic_path(path: str | Path, *, suffix: str = "") -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed and renamed, else removed.

    Works for a file or for a folder (whatever the caller creates at the yielded path). `suffix` keeps an
    extension that the writer insists on (`.nii.gz`).

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=_TEMPORARY, suffix=suffix or path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        temporary.unlink()
        yield temporary
        if temporary.is_file():
            _fsync(temporary)
        elif not temporary.exists():
            raise FileNotFoundError(errno.ENOENT, "nothing was written to its temporary name", str(temporary))
        elif path.is_dir():
            shutil.rmtree(path)
        temporary.replace(path)
    except OSError as error:
        raise _readable(error, path) from error
    except RuntimeError as error:
        # torch's writer reports a full disk as a RuntimeError without an errno.
        if "file write failed" in str(error) or "unexpected pos" in str(error):
            raise UserError(
                f"could not write {path}: the disk is full or a size limit was reached",
                "free some space and run the same command again",
            ) from error
        raise
    finally:
        if temporary is not None and temporary.exists():
            with suppress(OSError):
                shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()


def _fsync(path: Path) -> None:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def _readable(error: OSError, path: Path) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(
            f"could not write {path}: the disk is full or a size limit was reached",
            "free some space and run the same command again: finished work is kept",
        )
    return UserError(
        f"could not write {path}: {error.strerror or error}",
        "check that the folder exists, is a folder, and that you may write there",
    )


def write_text(path: str | Path, text: str) -> None:
    """Write `text` atomically, UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON atomically; NaN and Inf are refused so that every reader can parse it."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: absent or not JSON.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not readable JSON: {error}") from error


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's content, read in 1 MiB blocks."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_text(text: str) -> str:
    """Hex SHA-256 of a text, UTF-8."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def is_leftover(path: Path) -> bool:
    """Whether this is a temporary file or folder of a process that is writing, or was killed while it did."""
    return path.name.startswith(_TEMPORARY)


def discard_folder(folder: Path) -> None:
    """Delete a folder that a reader must never see half deleted: it loses its name first."""
    gone = folder.with_name(_TEMPORARY + folder.name)
    folder.rename(gone)
    shutil.rmtree(gone)


def remove_leftovers(folder: str | Path, *, below: bool = False) -> int:
    """Delete the temporary files a killed process left in `folder`, and `below` it if asked; returns how many."""
    count = 0
    for leftover in list((Path(folder).rglob if below else Path(folder).glob)(_TEMPORARY + "*")):
        shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        count += 1
    return count
