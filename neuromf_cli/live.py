"""The view on a terminal: a bar for each task, and for a training a panel of its figures, redrawn in place.

There is no thread: what is reported is drawn on the spot, at most a few times a second and for at most a hundredth
of the time. (rich's own thread could hold the console's lock while a data loader forks its workers.)
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from neuromf_cli.progress import (
    GIB,
    describe_guards,
    describe_step,
    duration,
    guard_state,
    is_warning,
    validations,
)

REDRAW_S = 0.25
DRAWING_SHARE = 0.01
WINDOW = 50
NOTES = 3
# Panels need this much room; below it there are lines alone.
WIDEST, WIDE, NARROW, LOW = 110, 76, 46, 16
ALARMING = ("diverging", "halted")
BLOCKS, LETTERS = "▁▂▃▄▅▆▇█", "_.-=+*%#"

# label -> key and format, column by column. Single updates scatter, so the averaged ones are shown by their mean.
COLUMNS: tuple[dict[str, tuple[str, str]], ...] = (
    {
        "raw loss": ("raw_loss", ".4g"),
        "  r = t": ("raw_fm", ".4g"),
        "  r < t": ("raw_mf", ".4g"),
        "weighted": ("loss", ".4g"),
    },
    {
        "|V|/|v_c|": ("V_ratio", ".3g"),
        "cosine": ("cosine", ".3f"),
        "gradient": ("grad_norm", ".3g"),
        "lr": ("lr", ".3g"),
    },
    {
        "images/s": ("images_per_s", ".4g"),
        "s/update": ("seconds_per_update", ".3g"),
        "memory": ("memory_bytes", ""),
        "guards": ("guards", ""),
    },
)
AVERAGED = ("raw_loss", "raw_fm", "raw_mf", "loss", "V_ratio", "cosine", "grad_norm")


class LiveView:
    """A `progress.Reporter` that owns the lower end of the terminal until the block ends, however it ends."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}", style="dim"),
            TimeRemainingColumn(),
            console=self._console,
            auto_refresh=False,
        )
        self._tasks: dict[str, Any] = {}
        self._training: TrainingPanel | None = None
        self._live = Live(
            console=self._console,
            get_renderable=self._shown,
            auto_refresh=False,
            redirect_stdout=sys.stdout.isatty(),  # else results meant for a file would land here
        )
        self._due_s = 0.0
        self._gone = False  # the terminal was closed; the work goes on

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        with self._as_long_as_it_is_there():
            self._live.stop()

    def __call__(self, description: str, done: int, total: int) -> None:
        """Move the bar of this description; a panel gives way to it and leaves its last line."""
        if self._training is not None:
            last, self._training = self._training.record, None
            self.message(describe_step(last))
        if description not in self._tasks:
            self._tasks[description] = self._bars.add_task(description, total=total, completed=done, rate="")
        task = self._tasks[description]
        speed = self._bars.tasks[task].speed
        self._bars.update(task, completed=done, total=total, rate=f"{speed:.2f}/s" if speed else "")
        self._draw(now=done >= total)

    def message(self, text: str) -> None:
        """Print it above, where it stays; the panel keeps the last few too."""
        for line in text.splitlines():
            with self._as_long_as_it_is_there():
                self._console.print(Text(line, "yellow" if is_warning(line) else ""), soft_wrap=True)
            if self._training is not None:
                self._training.notes.append(line)
        self._draw(now=True)

    def step(self, record: Mapping[str, Any]) -> None:
        """Take one training update; a new run starts a new panel."""
        if self._training is None or record["update"] <= self._training.record["update"]:
            self._training = TrainingPanel(record)
        self._training.step(record)
        self._draw(now=record["update"] == record["updates"])

    def epoch(self, summaries: Sequence[Mapping[str, Any]]) -> None:
        """Take the last and the best validation."""
        if self._training is not None:
            self._training.validated = validations(summaries)

    def _shown(self) -> RenderableType:
        parts: list[RenderableType] = [self._bars] if self._tasks else []
        return Group(*parts, *([self._training] if self._training else []))

    def _draw(self, now: bool) -> None:
        began = time.monotonic()
        if self._gone or (began < self._due_s and not now):
            return
        with self._as_long_as_it_is_there():
            self._live.refresh()
        ended = time.monotonic()
        self._due_s = ended + max(REDRAW_S, (ended - began) / DRAWING_SHARE)

    @contextmanager
    def _as_long_as_it_is_there(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self._gone = True


class TrainingPanel:
    """What is known of a run: its newest update, means of the last ones, validation, messages."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record, self.first = record, record["update"]
        self.recent: dict[str, deque[float]] = {name: deque(maxlen=WINDOW) for name in AVERAGED}
        self.history = History()
        self.early: float | None = None
        self.validated: Any = None
        self.notes: deque[str] = deque(maxlen=NOTES)

    def step(self, record: Mapping[str, Any]) -> None:
        """Take one update."""
        self.record = record
        for name, values in self.recent.items():
            value = record.get(name)
            if value is not None:
                values.append(value)
        self.history.add(record.get("raw_loss"))
        if self.early is None and len(self.recent["raw_loss"]) == WINDOW:
            self.early = self.value("raw_loss")

    def value(self, key: str) -> float | None:
        """The mean of the last updates for what scatters, unless the newest is not finite; else the newest value."""
        values = self.recent.get(key)
        if values is None:
            return self.record.get(key)
        finite = [value for value in values if math.isfinite(value)]
        if not finite or not math.isfinite(values[-1]):
            return values[-1] if values else None
        return sum(finite) / len(finite)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        # The terminal's echo of Ctrl-C must fit beside the last line, or everything is drawn a line too low.
        width, height = min(options.max_width - len("^C"), WIDEST), options.size.height
        if width < NARROW or height < LOW:
            yield from self._lines()
            return
        columns = 3 if width >= WIDE else 2
        parts = [self._top(), self._figures(columns), *self._bottom(width - 4, options.ascii_only)]
        yield Panel(
            Group(*parts),
            title="training",
            title_align="left",
            subtitle=f"means of the last {WINDOW} updates" if columns == 3 else None,
            subtitle_align="right",
            width=width,
            border_style=self._guard_style() or "dim",
        )

    def _top(self) -> Table:
        """Bar, count, epoch, time left."""
        done, total = self.record["update"], self.record["updates"]
        row = Table.grid(expand=True, padding=(0, 2, 0, 0))
        row.add_column(ratio=1, no_wrap=True)
        words = [f"{done:,}/{total:,}", f"{100 * done / max(total, 1):.0f} %"]
        words += [f"epoch {self.record['epoch']}"] if "epoch" in self.record else []
        words += [f"{duration(self.record['eta_s'])} left"] if _number(self.record.get("eta_s")) else []
        for _ in words:
            row.add_column(no_wrap=True)
        row.add_row(ProgressBar(total=total, completed=done), *(Text(word) for word in words))
        return row

    def _figures(self, columns: int) -> Table:
        """The figures, in as many columns as there is room for."""
        cells = [(label, *where) for column in COLUMNS for label, where in column.items()]
        rows = -(-len(cells) // columns)
        grid = Table.grid(expand=True, padding=(0, 2, 0, 0))
        for column in range(columns):
            grid.add_column(no_wrap=True)
            grid.add_column(ratio=3 if column == columns - 1 else 2, no_wrap=True)  # the guards' words are the longest
        for row in range(rows):
            line = [cells[row + column * rows] for column in range(columns) if row + column * rows < len(cells)]
            grid.add_row(*(part for cell in line for part in (Text(cell[0], "dim"), self._written(*cell[1:]))))
        return grid

    def _written(self, key: str, form: str) -> Text:
        """One figure, or a dash where it is unknown."""
        if key == "guards":
            return Text(describe_guards(self.record.get("guards")) or "-", self._guard_style())
        value = self.value(key)
        if value is None:
            return Text("-", "dim")
        if key == "memory_bytes":
            return Text(f"{value / GIB:.1f} GiB")
        return Text(format(value, form), "" if math.isfinite(value) else "bold red")

    def _guard_style(self) -> str:
        state = guard_state(self.record.get("guards"))
        return "" if state in ("", "ok") else "bold red" if state in ALARMING else "bold yellow"

    def _bottom(self, width: int, ascii_only: bool) -> Iterator[RenderableType]:
        """Validation, the course of the raw loss, the last messages."""
        if self.validated:
            last, best = self.validated
            line = f"{last.raw_loss:.4g} after epoch {last.epoch}, best {best.raw_loss:.4g} after epoch {best.epoch}"
            yield _line(Text.assemble(("validation  ", "dim"), line))
        means = self.history.means
        if len(means) > 1:
            label = f"raw loss since update {self.first:,}  " if width >= WIDE - 4 else "raw loss  "
            ends = f"  {self.early:.3g} to {self.value('raw_loss'):.3g}" if self.early is not None else ""
            drawn = self.history.sparkline(max(width - len(label) - len(ends), 1), LETTERS if ascii_only else BLOCKS)
            yield _line(Text.assemble((label, "dim"), (drawn, "cyan"), (ends, "dim")))
        for note in self.notes:
            yield _line(Text(note, "yellow" if is_warning(note) else "dim"))

    def _lines(self) -> Iterator[RenderableType]:
        """What fits into a very small terminal."""
        means = {name: self.value(name) for name in AVERAGED}
        yield _line(Text(describe_step({**self.record, **means}).replace("  ", " ")))
        if self.notes:
            yield _line(Text(self.notes[-1], "yellow" if is_warning(self.notes[-1]) else "dim"))


class History:
    """The course of a figure: means over equally many updates, of which there are never more than `cells`.

    Args:
        cells: an even number.
    """

    def __init__(self, cells: int = 128) -> None:
        self.cells = cells
        self.means: list[float] = []
        self._span, self._sum, self._count = 1, 0.0, 0

    def add(self, value: float | None) -> None:
        """Take the next update's value; one that is absent or not finite is left out."""
        if value is None or not math.isfinite(value):
            return
        self._sum += value
        self._count += 1
        if self._count < self._span:
            return
        self.means.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self.means) == self.cells:
            self.means = [(a + b) / 2 for a, b in zip(self.means[::2], self.means[1::2], strict=True)]
            self._span *= 2

    def sparkline(self, width: int, levels: str = BLOCKS) -> str:
        """At most `width` characters from the lowest level to the highest, by the logarithm if all is positive."""
        group = max(-(-len(self.means) // width), 1)
        means = [self.means[i : i + group] for i in range(0, len(self.means), group)]
        values = [sum(part) / len(part) for part in means]
        if min(values, default=0) > 0:
            values = [math.log(value) for value in values]
        low, high = min(values, default=0), max(values, default=0)
        step = (len(levels) - 1) / (high - low) if high > low else 0
        return "".join(levels[round((value - low) * step)] for value in values)


def _line(text: Text) -> Text:
    """The same on one line, cut where the terminal ends."""
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
