"""How the processes of one command share its work and its folder: by a fixed rule, and by files alone.

They exchange no messages: a process that ends early, dies or is slow holds up no other, and the same command run
again goes on from the files, with any number of processes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from neuromf.errors import UserError
from neuromf.files import read_json, write_json
from neuromf.launch import process_count, process_rank

PATIENCE_S = 600.0
"""How long the main process waits for the next file of the others before it takes them for dead, at least."""
_SLOWER = 5  # times the slowest block of the main process are waited for, too
_POLL_S = 0.2

T = TypeVar("T")


class Share(NamedTuple):
    """Which blocks of work a process does: block b is done by process b modulo their number."""

    rank: int
    processes: int

    @classmethod
    def own(cls) -> Share:
        """That of this process, as its launcher says."""
        return cls(process_rank(), process_count())

    @property
    def main(self) -> bool:
        """Whether this process writes what there is one of."""
        return self.rank == 0

    def has(self, block: int) -> bool:
        """Whether it does this block."""
        return block % self.processes == self.rank


def take_own_gpu(device: str) -> None:
    """Let `cuda` mean another GPU in each process of a node.

    Args:
        device: what the user asked for: auto, cpu, cuda or mps.
    """
    if device in ("auto", "cuda") and process_count() > 1 and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def claim(
    folder: Path, file: str, record: Mapping[str, Any], keys: Sequence[str], what: str, *, dry_run: bool = False
) -> None:
    """Write the record of a new folder, or check that the one there agrees; every process may call it.

    Args:
        folder: may be absent or empty.
        file: name of the record in it.
        record: settings of this call.
        keys: those of them that must agree, as in `model.sha256`.
        what: the folder holds, in a word.
        dry_run: check, and write nothing.

    Raises:
        UserError: the folder holds something else.
    """
    path = folder / file
    # Looked at before the record: another process writes that first.
    present = folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir())
    if path.exists():
        before = read_json(path)
        pairs = {key: (value_at(before, key), value_at(record, key)) for key in keys}
        changed = [f"{key} {_short(old)} there, {_short(new)} now" for key, (old, new) in pairs.items() if old != new]
        if changed:
            raise UserError(f"{folder} holds other {what}: {'; '.join(changed)}", "give another --out, or remove it")
    elif present:
        raise UserError(f"{folder} is not empty and holds no {what}", "give another --out")
    elif not dry_run:
        write_json(path, record)


def wait_for(things: Iterable[T], ready: Callable[[T], bool], what: str, *, slowest_s: float = 0.0) -> None:
    """Wait until all things are ready, as long as one after the other gets so.

    Args:
        things: what other processes make.
        ready: whether one of them is made.
        what: they are, in a word.
        slowest_s: what the slowest block took here: others may take longer than usual, too.

    Raises:
        UserError: none got ready for so long.
    """
    patience_s = max(PATIENCE_S, _SLOWER * slowest_s)
    left = list(things)
    last = time.monotonic()
    while True:
        began = time.monotonic()
        still = [thing for thing in left if not ready(thing)]
        if not still:
            return
        if len(still) < len(left):
            left, last = still, began
        elif began - last > patience_s:
            raise UserError(
                f"{len(left)} {what} of other processes are missing, and none came for {patience_s:g} s",
                "see what those processes said; the same command again makes what is missing",
            )
        time.sleep(max(_POLL_S, 5 * (time.monotonic() - began)))


class Arrivals:
    """The files that the processes of a command make, and when all of them are there.

    Args:
        path: of the file of a number.
        sound: whether it is there and whole, to be found by reading it.

    Attributes:
        slowest_s: what the slowest block of this process took.
    """

    def __init__(self, path: Callable[[int], Path], sound: Callable[[int], bool]) -> None:
        self._path, self._sound = path, sound
        self._since, self.slowest_s = time.time(), 0.0

    @contextmanager
    def block(self) -> Iterator[None]:
        """Around the work on one block: others are given several times as long as the slowest took here."""
        began_s = time.perf_counter()
        yield
        self.slowest_s = max(self.slowest_s, time.perf_counter() - began_s)

    def wait(self, numbers: Iterable[int], what: str) -> None:
        """As `wait_for`; files of this command are whole since they were renamed, and need not be read."""
        wait_for(numbers, self._arrived, what, slowest_s=self.slowest_s)

    def _arrived(self, number: int) -> bool:
        path = self._path(number)
        return path.is_file() and (path.stat().st_mtime >= self._since or self._sound(number))


def value_at(record: Mapping[str, Any], key: str) -> Any:
    """A value of nested records by its dotted name; None where there is none.

    Example:
        >>> value_at({"model": {"update": 3}}, "model.update")
        3
    """
    value: Any = record
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _short(value: Any) -> Any:
    """Hashes by their first digits."""
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else value
