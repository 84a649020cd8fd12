"""Signals that end a run cleanly: the step in progress is finished, then the run is saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

STOPPING = ("SIGTERM", "SIGUSR1", "SIGINT")


class StopRequest:
    """Remembers a stopping signal for as long as the block lasts; a second one acts at once.

    Args:
        patient: a second one does nothing: launchers of several processes pass on what their children got already.

    Example:
        >>> with StopRequest() as stop:
        ...     stop.number
        0
    """

    def __init__(self, *, patient: bool = False) -> None:
        self.number, self.patient = 0, patient
        self._before: dict[int, signal.Handlers | int | None] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for name in STOPPING:
                number = getattr(signal, name, None)
                if number is not None:
                    self._before[number] = signal.signal(number, self._remember)  # type: ignore[assignment]
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.number and not self.patient:
            raise KeyboardInterrupt
        self.number = self.number or number

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
