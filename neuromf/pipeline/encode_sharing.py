"""How several processes of one `neuromf encode` divide the scans, and how two commands keep out of each other's way.

A process tells how far it is, and in the end what became of its scans, in a small file in the folder; the main process
waits for all of these and finishes the folder. Latents are written whole and are the same whoever writes them, so a
process that dies costs what it had in hand: the same command again goes on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from neuromf.errors import UserError
from neuromf.files import read_json, write_json
from neuromf.pipeline.sharing import PATIENCE_S, Share

try:
    import fcntl
except ImportError:  # where there are no such locks
    fcntl = None  # type: ignore[assignment]

Progress = Callable[[str, int, int], None]

LOCK_FILE = ".lock"
_PREFIX = ".share-"
_SAY_EVERY_S, _LOOK_EVERY_S = 5.0, 0.2
_LAUNCHED_BY = (
    *("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT"),
    *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"),
)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder for this command; a second one is told so. A process that dies lets go of it.

    File systems without locks let both work: each file is still whole and the same, and the work is done twice.

    Raises:
        UserError: another command holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    handle = _held(path)
    try:
        yield
    finally:
        # Removed while it is held, so that nobody takes a lock on a file that is gone.
        with suppress(OSError):
            path.unlink()
        os.close(handle)


def _held(path: Path) -> int:
    """The lock's open file; another's that is just being given up is tried again."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise UserError(
                f"another `neuromf encode` is at work in {path.parent}",
                "wait for its end; to share the work, start both at once: torchrun --nproc-per-node 2 -m neuromf_cli"
                " encode ..., or srun",
            ) from error
        except OSError:
            return handle  # a file system without locks
        with suppress(FileNotFoundError):
            if os.fstat(handle).st_ino == path.stat().st_ino:
                return handle
        os.close(handle)


class Parts:
    """What the processes of a launch tell each other of one stage of the work.

    Args:
        folder: where they tell it.
        share: of this process.
        stage: a word.
        total: how many scans this process has.
        patience_s: how long to wait for a process that says nothing new.
    """

    def __init__(self, folder: Path, share: Share, stage: str, total: int, *, patience_s: float = PATIENCE_S) -> None:
        self._folder, self._share, self._stage, self._patience_s = folder, share, stage, patience_s
        self._total, self._said_s = total, -_SAY_EVERY_S
        self._launch = launch()
        self.say(0)

    def say(self, done: int) -> None:
        """Tell, now and then, how many of this process's scans are done."""
        now = time.monotonic()
        if self._share.processes > 1 and now - self._said_s >= _SAY_EVERY_S:
            self._said_s = now
            self._write(done, None)

    def finish(self, result: Any) -> None:
        """Tell the result of this process, in plain values."""
        if self._share.processes > 1:
            self._write(self._total, {"of": result})

    def others(self, progress: Progress | None) -> list[Any]:
        """The results of all other processes, waited for.

        Raises:
            UserError: one of them has said nothing new for too long.
        """
        before, since = -1, time.monotonic()
        while True:
            said = {rank: self._read(rank) for rank in range(self._share.processes) if rank != self._share.rank}
            if all(part and part["result"] for part in said.values()):
                return [part["result"]["of"] for part in said.values()]
            done = sum(part.get("done", 0) for part in said.values())
            if progress is not None and all(said.values()):
                progress(f"{self._stage}, other processes", done, sum(part["total"] for part in said.values()))
            now = time.monotonic()
            if done > before:
                before, since = done, now
            elif now - since > self._patience_s:
                late = [rank for rank, part in said.items() if not part.get("result")]
                raise UserError(
                    f"{len(late)} of {self._share.processes} processes have said nothing new for {self._patience_s:g} s"
                    f" (rank {', '.join(map(str, late))})",
                    "see what they said last; the same command again keeps what is done and goes on",
                )
            time.sleep(_LOOK_EVERY_S)

    def _write(self, done: int, result: Any) -> None:
        said = {"launch": self._launch, "done": done, "total": self._total, "result": result}
        write_json(self._path(self._share.rank), said)

    def _read(self, rank: int) -> dict[str, Any]:
        """What a process of this launch has said; empty if nothing."""
        try:
            said = read_json(self._path(rank))
        except UserError:
            return {}
        return said if said.get("launch") == self._launch else {}

    def _path(self, rank: int) -> Path:
        return self._folder / f"{_PREFIX}{self._stage}-{rank}-of-{self._share.processes}.json"


def remove_parts(folder: Path) -> None:
    """Delete what processes told each other, once nobody waits for it."""
    for path in folder.glob(f"{_PREFIX}*.json"):
        path.unlink(missing_ok=True)


def launch() -> str:
    """The same in all processes of a launch, another in the next, so that what a killed one said counts no more."""
    said = [os.environ.get(name, "") for name in _LAUNCHED_BY]
    # On one machine the launcher itself tells them apart, which may be all there is.
    together = os.environ.get("LOCAL_WORLD_SIZE", "") == os.environ.get("WORLD_SIZE", "1")
    return "/".join([*said, str(os.getppid()) if together else ""])
