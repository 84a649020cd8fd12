"""The weights folder: where it is, which of its files belongs to an entry, and what was noted about them.

Notes are conveniences (hashes already computed, licences already shown): losing them costs time, never correctness.
They are kept in the user's cache, because a weights folder is often another person's, and not ours to write into.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from neuromf.errors import UserError
from neuromf.files import read_json, sha256_file, sha256_text, write_json
from neuromf.weights.catalogue import Entry

VARIABLE = "NEUROMF_WEIGHTS"


def folder() -> Path:
    """`$NEUROMF_WEIGHTS`, else `neuromf/weights` in the user's cache (`$XDG_CACHE_HOME`, `~/.cache`)."""
    named = os.environ.get(VARIABLE)
    return Path(named).expanduser() if named else cache_folder() / "weights"


def expected_path(entry: Entry) -> Path:
    """Where the file of an entry belongs."""
    return folder() / entry.file


def found_path(entry: Entry) -> Path | None:
    """Where the file of an entry lies, if it does."""
    return next((path for name in (entry.file, *entry.also) if (path := folder() / name).is_file()), None)


def cache_folder() -> Path:
    """`neuromf` in the user's cache: `$XDG_CACHE_HOME`, else `~/.cache`."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    # By the XDG standard a relative path there is to be ignored.
    return (Path(named) if Path(named).is_absolute() else Path("~/.cache").expanduser()) / "neuromf"


class Notes:
    """What was noted about the files of a weights folder, by this user."""

    def __init__(self, about: Path) -> None:
        self._file = cache_folder() / "weights-notes" / f"{sha256_text(str(about.absolute()))[:16]}.json"

    def sha256(self, path: Path) -> str:
        """The hash of a file, computed only if its size or time changed since it was noted."""
        noted = self._section("hashes").get(str(path))
        if isinstance(noted, dict) and noted.get("state") == _state(path) and isinstance(noted.get("sha256"), str):
            return str(noted["sha256"])
        return self.rehash(path)

    def rehash(self, path: Path) -> str:
        """The hash of a file, computed in any case, and noted."""
        state = _state(path)
        digest = sha256_file(path)
        self._note("hashes", str(path), {"state": state, "sha256": digest})
        return digest

    def first_time(self, what: str) -> bool:
        """Whether `what` was never shown here; from now on it was."""
        if what in self._section("shown"):
            return False
        self._note("shown", what, True)
        return True

    def _section(self, name: str) -> dict[str, Any]:
        with suppress(UserError):
            content = read_json(self._file)
            section = content.get(name) if isinstance(content, dict) else None
            return section if isinstance(section, dict) else {}
        return {}

    def _note(self, section: str, key: str, value: Any) -> None:
        # Read anew each time: other processes note here, too.
        values = {name: self._section(name) for name in ("hashes", "shown")}
        values[section][key] = value
        with suppress(UserError):
            write_json(self._file, values)


def _state(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]
