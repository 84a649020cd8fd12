"""How far a long step is: a live bar on a terminal, a plain line every few seconds elsewhere, or nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import typer

LINE_EVERY_S = 5.0


class Reporter(Protocol):
    """What library functions are given: `progress(description, done, total)`, and for training the other two."""

    def __call__(self, description: str, done: int, total: int) -> None:
        """Report that `done` of `total` are finished."""

    def message(self, text: str) -> None:
        """Show one line of text."""

    def step(self, record: Mapping[str, Any]) -> None:
        """Show one training update."""


@contextmanager
def progress(quiet: bool) -> Iterator[Reporter]:
    """The reporter that suits stderr."""
    if quiet:
        yield Silence()
    elif sys.stderr.isatty():
        with LiveBar() as bar:
            yield bar
    else:
        yield PlainLines()


class Silence:
    """Shows nothing."""

    def __call__(self, description: str, done: int, total: int) -> None:
        """Ignore it."""

    def message(self, text: str) -> None:
        """Ignore it."""

    def step(self, record: Mapping[str, Any]) -> None:
        """Ignore it."""


class PlainLines:
    """One line on stderr at the start and end of a task and every few seconds between, for logs."""

    def __init__(self, every_s: float = LINE_EVERY_S) -> None:
        self.every_s = every_s
        self._description = ""
        self._started_s = self._shown_s = 0.0
        self._first = 0

    def __call__(self, description: str, done: int, total: int) -> None:
        """Print a line with rate and time left."""
        now = time.monotonic()
        if description != self._description:
            self._description, self._started_s, self._shown_s, self._first = description, now, -1e9, done
        if now - self._shown_s < self.every_s and done < total:
            return
        self._shown_s = now
        rate = (done - self._first) / max(now - self._started_s, 1e-9)
        left = f"  {rate:.2f}/s, {duration((total - done) / rate)} left" if rate and done < total else ""
        self.message(f"{description} {done}/{total}{left}")

    def message(self, text: str) -> None:
        """Print the line."""
        typer.echo(text, err=True)

    def step(self, record: Mapping[str, Any]) -> None:
        """Print the update, if the last line is old enough or it is the last one."""
        now = time.monotonic()
        if now - self._shown_s >= self.every_s or record.get("update") == record.get("updates"):
            self._shown_s = now
            self.message(describe_step(record))


class LiveBar:
    """A rich bar per task, with count, rate and time left."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from neuromf_cli import console

        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}", style="dim"),
            TimeRemainingColumn(),
            console=console.stderr(),
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> LiveBar:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def __call__(self, description: str, done: int, total: int) -> None:
        """Move the bar of this description."""
        self._move(description, description, done, total)

    def message(self, text: str) -> None:
        """Print the line above the bars."""
        self._bars.console.print(text, markup=False)

    def step(self, record: Mapping[str, Any]) -> None:
        """Move the training bar; the raw loss stands beside it."""
        self._move("training", describe_losses(record), record["update"], record["updates"])

    def _move(self, key: str, description: str, done: int, total: int) -> None:
        if key not in self._tasks:
            self._tasks[key] = self._bars.add_task(description, total=total, completed=done, rate="")
        speed = self._bars.tasks[self._tasks[key]].speed
        rate = f"{speed:.2f}/s" if speed else ""
        self._bars.update(self._tasks[key], description=description, completed=done, total=total, rate=rate)


def describe_step(record: Mapping[str, Any]) -> str:
    """One training update as a line of text."""
    eta_s = record.get("eta_s")
    left = f", {duration(eta_s)} left" if eta_s is not None else ""
    return f"update {record['update']}/{record['updates']}  {describe_losses(record)}{left}".rstrip()


def describe_losses(record: Mapping[str, Any]) -> str:
    """Raw loss first: the weighted one stays near 1 or 2 whatever happens."""
    names = {"epoch": "epoch {}", "raw_loss": "raw loss {:.4g}", "loss": "loss {:.4g}", "lr": "lr {:.2g}"}
    names["images_per_s"] = "{:.1f} images/s"
    return "  ".join(text.format(record[key]) for key, text in names.items() if record.get(key) is not None)


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"
