"""From a name to a file that can be trusted, with its hash and its licence."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from neuromf.errors import UserError
from neuromf.weights.catalogue import NOT_PINNED, Entry, Licence, find
from neuromf.weights.integrity import Trust, damage, record, trust
from neuromf.weights.places import Notes, expected_path, folder, found_path


class WeightsFile(NamedTuple):
    """Weights ready to be read: where they lie, what they are, and on which terms."""

    name: str
    path: Path
    sha256: str
    licence: Licence
    trust: Trust

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for what is made with them."""
        return {
            "name": self.name,
            "file": self.path.name,
            "sha256": self.sha256,
            "licence": self.licence._asdict(),
        }


def locate(name: str) -> WeightsFile:
    """The file of some weights, checked; at their first use in this folder the licence is printed on stderr.

    Args:
        name: of `neuromf weights list`.

    Raises:
        UserError: no such name, not on this machine (the hint says how to get it), damaged, or another file.

    Example:
        >>> locate("maisi").path  # doctest: +SKIP
        PosixPath('/home/anna/.cache/neuromf/weights/autoencoder_v1.pt')
    """
    entry = find(name)
    path = found_path(entry)
    if path is None:
        raise UserError(
            f"the weights '{entry.name}' are not on this machine: {expected_path(entry)} does not exist",
            how_to_get(entry),
        )
    notes = Notes(folder())
    found = examine(entry, path, notes.sha256)
    if notes.first_time(f"licence of {entry.name}"):
        announce(entry)
    return found


def how_to_get(entry: Entry) -> str:
    """What to type next, with internet and without."""
    if entry.repo or entry.url:
        return (
            f"neuromf weights fetch {entry.name} ({entry.licence.short}); where there is no internet, {by_hand(entry)}"
        )
    return f"{by_hand(entry)}; licence: {entry.licence}"


def by_hand(entry: Entry) -> str:
    """Which file to get where, and where to put it."""
    return (
        f"get {entry.basename} from {entry.source} and put it at {expected_path(entry)}, "
        f"or: neuromf weights fetch {entry.name} --from {entry.basename}"
    )


def announce(entry: Entry) -> None:
    """Say on which terms weights come."""
    pin = "" if entry.sha256 else f"; {NOT_PINNED}"
    print(f"weights '{entry.name}': {entry.licence}{pin}", file=sys.stderr)


def examine(entry: Entry, path: Path, digest_of: Callable[[Path], str]) -> WeightsFile:
    """Check the file of an entry, and record its hash where nothing was known of it.

    Raises:
        UserError: damaged, or another file.
    """
    if problem := damage(path):
        raise UserError(f"{path} {problem}", f"remove it and get it again: neuromf weights fetch {entry.name}")
    digest = digest_of(path)
    vouched = trust(entry, path, digest)
    if vouched == "unrecorded" and record(path, digest):
        vouched = "recorded"
    return WeightsFile(entry.name, path, digest, entry.licence, vouched)
