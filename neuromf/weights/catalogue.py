"""Which foreign weights there are: name, file, source, hash, licence. The facts are in `catalogue.toml`."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from neuromf.errors import UserError, did_you_mean

CATALOGUE = Path(__file__).with_name("catalogue.toml")
NOT_PINNED = "not pinned: sha256 will be recorded at first use"


class Licence(NamedTuple):
    """What one may do with weights; None is not known, and the page at `url` says it."""

    name: str
    url: str
    non_commercial: bool | None = None
    redistribution: bool | None = None

    def __str__(self) -> str:
        return f"{self.short} ({self.url})"

    @property
    def short(self) -> str:
        """The name, and what is to be minded."""
        return f"{self.name}, non-commercial use only" if self.non_commercial else self.name


class Entry(NamedTuple):
    """One weights file; see the head of `catalogue.toml` for the fields."""

    name: str
    purpose: str
    used_by: str
    file: str
    licence: Licence
    stated_in: str
    also: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    repo: str | None = None
    repo_file: str | None = None
    revision: str | None = None
    url: str | None = None
    page: str | None = None
    sha256: str | None = None
    size_mib: float | None = None

    @property
    def basename(self) -> str:
        """The file's name without its folder."""
        return PurePosixPath(self.file).name

    @property
    def source(self) -> str:
        """Where a person finds the file."""
        if self.repo:
            return f"https://huggingface.co/{self.repo} ({self.repo_file})"
        return self.url or self.page or "nowhere"

    @property
    def pin(self) -> str:
        """What is known of the right content, in words."""
        if self.sha256 is None:
            return NOT_PINNED
        return f"sha256 {self.sha256}" if len(self.sha256) == 64 else f"sha256 begins with {self.sha256}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values; what is not known is None."""
        return {**self._asdict(), "licence": self.licence._asdict()}


@cache
def entries() -> dict[str, Entry]:
    """All entries by name, in the order of the file."""
    content = tomllib.loads(CATALOGUE.read_text(encoding="utf-8"))
    licences = {key: Licence(**values) for key, values in content["licences"].items()}
    return {name: _entry(name, values, licences) for name, values in content["weights"].items()}


def _entry(name: str, values: dict[str, Any], licences: dict[str, Licence]) -> Entry:
    lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
    return Entry(name=name, **{**values, **lists, "licence": licences[values["licence"]]})


def find(name: str) -> Entry:
    """The entry of a name or an alias.

    Raises:
        UserError: none of that name; the nearest is suggested.
    """
    for entry in entries().values():
        if name == entry.name or name in entry.aliases:
            return entry
    raise UserError(f"no weights '{name}'", did_you_mean(name, entries()))


def recognise(path: str | Path, sha256: str) -> Entry | None:
    """The entry a file belongs to, by its hash, or by its name where that is the name of one entry only."""
    for entry in entries().values():
        if entry.sha256 and sha256.startswith(entry.sha256):
            return entry
    named = [entry for entry in entries().values() if entry.basename == Path(path).name and not entry.sha256]
    return named[0] if len(named) == 1 else None
