"""How far a long step is: a live view on a terminal, plain lines in a log, warnings alone when quiet."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import typer

LINE_EVERY_S = 5.0
UPDATE_LINE_EVERY_S = 30.0
GIB = 2**30

# How the figures of an update are written; what a record lacks is left out.
FIGURES = {
    "epoch": "epoch {}",
    "raw_loss": "raw loss {:.4g}",
    "raw_fm": "r=t {:.3g}",
    "raw_mf": "r<t {:.3g}",
    "loss": "loss {:.4g}",
    "V_ratio": "|V|/|v_c| {:.3g}",
    "cosine": "cosine {:.3f}",
    "grad_norm": "gradient {:.3g}",
    "lr": "lr {:.2g}",
    "images_per_s": "{:.1f} images/s",
}


class Reporter(Protocol):
    """What library functions are given: `progress(description, done, total)`, and for training the other three."""

    def __call__(self, description: str, done: int, total: int) -> None:
        """Report that `done` of `total` are finished."""

    def message(self, text: str) -> None:
        """Show lines of text; those that begin with "warning:" are warnings."""

    def step(self, record: Mapping[str, Any]) -> None:
        """Show one training update (the keys are those of `training.loop`'s listener; unknown ones may be absent)."""

    def epoch(self, summaries: Sequence[Mapping[str, Any]]) -> None:
        """Take note of an epoch's end; all summaries so far."""


@contextmanager
def progress(quiet: bool) -> Iterator[Reporter]:
    """The reporter that suits stderr."""
    if quiet:
        yield WarningsOnly()
    elif sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
        from neuromf_cli.live import LiveView  # rich, which a log does not need

        with LiveView() as view:
            yield view
    else:
        yield PlainLines()


class WarningsOnly:
    """Shows nothing but warnings."""

    def __call__(self, description: str, done: int, total: int) -> None:
        """Ignore it."""

    def message(self, text: str) -> None:
        """Print the lines that are warnings."""
        for line in text.splitlines():
            if is_warning(line):
                typer.echo(line, err=True)

    def step(self, record: Mapping[str, Any]) -> None:
        """Ignore it."""

    def epoch(self, summaries: Sequence[Mapping[str, Any]]) -> None:
        """Ignore it."""


class PlainLines:
    """Lines on stderr, for logs: at the start and end of a task, and between them by the clock.

    Args:
        every_s: seconds between the lines of a task, and between those of epochs.
        update_every_s: seconds between the lines of training updates.
    """

    def __init__(self, every_s: float = LINE_EVERY_S, update_every_s: float = UPDATE_LINE_EVERY_S) -> None:
        self.every_s, self.update_every_s = every_s, update_every_s
        self._description = ""
        self._started_s = self._shown_s = 0.0
        self._first = 0
        self._update_s = self._epoch_s = -1e9
        self._last_update = False

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
        """Print it."""
        typer.echo(text, err=True)

    def step(self, record: Mapping[str, Any]) -> None:
        """Print the update, if the last such line is old enough or it is the last one."""
        now = time.monotonic()
        self._last_update = record["update"] == record["updates"]
        if now - self._update_s >= self.update_every_s or self._last_update:
            self._update_s = now
            self.message(describe_step(record))

    def epoch(self, summaries: Sequence[Mapping[str, Any]]) -> None:
        """Print the epoch's losses if it was validated, unless such a line has just been printed."""
        now = time.monotonic()
        validated = summaries[-1].get("val_raw_loss") is not None
        if validated and (now - self._epoch_s >= self.every_s or self._last_update):
            self._epoch_s = now
            self.message(describe_epoch(summaries))


class Validated(NamedTuple):
    """The raw loss of an epoch's validation."""

    epoch: int
    raw_loss: float


def validations(summaries: Sequence[Mapping[str, Any]]) -> tuple[Validated, Validated] | None:
    """The last and the best validation of a run; None before the first."""
    found = [Validated(e["epoch"], e["val_raw_loss"]) for e in summaries if e.get("val_raw_loss") is not None]
    return (found[-1], min(found, key=lambda one: one.raw_loss)) if found else None


def describe_epoch(summaries: Sequence[Mapping[str, Any]]) -> str:
    """The end of an epoch as a line of text."""
    summary, found = summaries[-1], validations(summaries)
    words = [f"epoch {summary['epoch']} done"]
    if summary.get("raw_loss_mean") is not None:
        words.append(f"raw loss {summary['raw_loss_mean']:.4g}")
    if found:
        last, best = found
        words.append(f"validation {last.raw_loss:.4g} (best {best.raw_loss:.4g} at epoch {best.epoch})")
    return "  ".join(words)


def describe_step(record: Mapping[str, Any]) -> str:
    """One training update as a line of text; the raw loss first: the weighted one hides divergence."""
    words = [f"update {record['update']}/{record['updates']}"]
    words += [text.format(record[key]) for key, text in FIGURES.items() if record.get(key) is not None]
    if record.get("memory_bytes") is not None:
        words.append(f"{record['memory_bytes'] / GIB:.1f} GiB")
    guards = describe_guards(record.get("guards"))
    words += [f"guards {guards}"] if guards not in ("", "ok") else []
    left = f", {duration(record['eta_s'])} left" if record.get("eta_s") is not None else ""
    return "  ".join(words) + left


def describe_guards(guards: Mapping[str, Any] | None) -> str:
    """The state of the guards in words, with the updates they skipped; nothing if it is unknown."""
    state = guard_state(guards)
    skipped = (guards or {}).get("skipped_updates")
    return f"{state}, {skipped} skipped" if skipped else state


def guard_state(guards: Mapping[str, Any] | None) -> str:
    """What the guards say in a word: `ok`, or what they warned of; nothing if it is unknown."""
    if not guards:
        return ""
    return guards.get("state") or ("warned" if guards.get("warned") else "ok")


def is_warning(line: str) -> bool:
    """Whether a line of a message is a warning."""
    return line.lower().startswith("warning")


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss, and days before them where there are any."""
    minutes, s = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"
    return f"{hours // 24} d {hours % 24}:{minutes:02}:{s:02}"
