"""A stage as a job of a cluster runs it: one process below this one, whose end is noted where the launcher looks.

The job's process reads the module again by its name, so it imports nothing heavy.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from neuromf.errors import EXIT_PARTIAL, EXIT_RESUME
from neuromf.pipeline.ablation.stage_logs import begin_log, failed, forget_failure, note_failure, stage_environment

_STOPPING = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]


@dataclass(frozen=True)
class StageJob:
    """What a job does for a stage.

    Attributes:
        stage: its name.
        command: what comes before its words.
        words: as in `Stage`.
        logs: the ablation's folder of logs, absolute.
    """

    stage: str
    command: tuple[str, ...]
    words: tuple[str, ...]
    logs: Path

    def __call__(self) -> None:
        """Run the stage; return if it did well, with or without remarks.

        Raises:
            SystemExit: 75 if it was stopped and the job belongs back into the queue, 1 if it failed.
        """
        first = os.environ.get("SLURM_PROCID", "0") == "0"
        if first:
            forget_failure(self.stage, self.logs)
        with _remembering() as stops, begin_log(self.stage, self.words, self.logs) as log:
            code = subprocess.run(
                [*self.command, *self.words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=stage_environment(os.environ),
                check=False,
            ).returncode
        if code in (0, EXIT_PARTIAL):
            return
        # A signal in the middle of an import can end in anything; what fails without one will fail in the next round.
        if code == EXIT_RESUME or stops:
            raise SystemExit(EXIT_RESUME)
        note_failure(failed(self.stage, code, self.logs), self.logs)
        raise SystemExit(1)


@contextmanager
def _remembering() -> Iterator[list[int]]:
    """Outlive stopping signals, and list them. SLURM sends them to every process of a step, so none is passed on."""
    stops: list[int] = []

    def remember(number: int, _: FrameType | None) -> None:
        stops.append(number)

    before = {number: signal.signal(number, remember) for number in _STOPPING}
    try:
        yield stops
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
