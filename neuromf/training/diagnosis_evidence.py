"""What a diagnosis reasons over: series of figures out of epoch summaries, the run's settings, and its sizes."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

Severity = Literal["problem", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("problem", "warning", "note")

SMOOTHED = ((15, 5), (6, 3))
"""From so many epochs on the median of so many is one reading: in healthy small runs two or three epochs in a row can
have an r < t part of tenfold loss. Fewer are read singly: an excerpt, or a run too young for a trend."""

LINE = 112
"""Characters of a printed line."""

COSINE_LEARNED = 0.5
"""Below it the larger part of V points elsewhere; a guess from z_t alone, as of white data, comes to 0.27 (logit-normal
times) to 0.45 (late ones)."""

ENOUGH_UPDATES = 100_000
"""What the specification holds a run of a real network against; improved MeanFlow used 1.1 million."""


EARLY, LATE = 0.1, 0.7
"""Shares of the planned updates; a cosine schedule has 20 % of its rate left at 0.7."""

EARLY_UPDATES, LATE_UPDATES = 5_000, 50_000
"""The same where no plan is known, from the 1e5 updates that a run of a real network should have."""


class Figure(NamedTuple):
    """A number and the first and last epoch it was read from (None: it is of the whole run)."""

    name: str
    value: float
    epochs: tuple[int, int] | None = None

    def __str__(self) -> str:
        if self.epochs is None:
            return f"{self.name} {number(self.value)}"
        first, last = self.epochs
        return f"{self.name} {number(self.value)} (epoch {first if first == last else f'{first}-{last}'})"


class Finding(NamedTuple):
    """One thing that is wrong with a run, or may be.

    `setting` is what to change, as `key=value` where a setting does it; `evidence` says how many times the decisive
    figure exceeds its limit.
    """

    id: str
    severity: Severity
    title: str
    numbers: tuple[Figure, ...]
    why: str
    setting: str
    evidence: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**self._asdict(), "numbers": [figure._asdict() for figure in self.numbers]}

    def lines(self) -> list[str]:
        """For a person."""
        parts = {"numbers": "; ".join(map(str, self.numbers)), "why": self.why, "try": self.setting}
        lines = [f"{self.severity}: {self.title}  [{self.id}]"]
        for name, text in parts.items():
            start = f"  {name + ':':<9}"
            lines += textwrap.wrap(text, LINE, initial_indent=start, subsequent_indent=" " * len(start))
        return lines


def graded(value: float, problem: float) -> Severity:
    """A problem from this limit on, a warning below it."""
    return "problem" if value >= problem else "warning"


def fold(value: float) -> str:
    """A factor: three digits, or all of them."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def number(value: float) -> str:
    """Four digits; counts in full, with thousands set apart."""
    return f"{value:,.0f}" if value == int(value) and 1 <= abs(value) < 1e7 else f"{value:.4g}"


@dataclass(frozen=True)
class Series:
    """One figure over the epochs that have it, oldest first; never empty."""

    name: str
    epochs: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def first(self) -> Figure:
        """The very first value."""
        return Figure(self.name, self.values[0], (self.epochs[0], self.epochs[0]))

    @property
    def start(self) -> Figure:
        """Where it starts."""
        return self._readings[0]

    @property
    def settled(self) -> Figure:
        """A quarter of the way: what every healthy run changes at its start lies behind."""
        return self._readings[len(self._readings) // 4]

    @property
    def end(self) -> Figure:
        """Where it stands now."""
        return self._readings[-1]

    @property
    def lowest(self) -> Figure:
        """The lowest reading."""
        return min(self._readings, key=lambda reading: reading.value)

    @property
    def highest(self) -> Figure:
        """The highest reading."""
        return max(self._readings, key=lambda reading: reading.value)

    def near(self, epochs: tuple[int, int] | None) -> Figure:
        """The reading nearest to these epochs."""
        middle = sum(epochs or (0, 0))
        return min(self._readings, key=lambda reading: abs(sum(reading.epochs or (0, 0)) - middle))

    def __len__(self) -> int:
        return len(self.values)

    @cached_property
    def _readings(self) -> list[Figure]:
        width = next((width for enough, width in SMOOTHED if len(self) >= enough), 1)
        return [
            Figure(
                self.name, statistics.median(self.values[i : i + width]), (self.epochs[i], self.epochs[i + width - 1])
            )
            for i in range(len(self) - width + 1)
        ]


def times(a: Figure, b: Figure) -> float:
    """a / b, bounded so that it can be written and ranked."""
    return min(a.value / max(b.value, 1e-12), 1e9)


class Sizes(NamedTuple):
    """How large a run is; None where it is not known.

    `updates` are those done, `planned` those it was to do; `samples` are trained on, `batch` counts all processes and
    the accumulation; `dimension` is D, the number of elements of a latent.
    """

    updates: int | None = None
    planned: int | None = None
    samples: int | None = None
    batch: int | None = None
    dimension: int | None = None


class Phase(NamedTuple):
    """How far a run is, and what that was judged by."""

    name: Literal["early", "mid", "late"]
    judged_by: str


@dataclass(frozen=True)
class Evidence:
    """All that is known of a run.

    Args:
        summaries: of its epochs, oldest first, by the names of the diagnostics schema; any field may be missing.
        settings: nested, as config.yaml; any may be missing.
        sizes: see `Sizes`; what it leaves open is worked out from the other two where possible.
        halted: the figures of the epoch in which a guard ended the run.
    """

    summaries: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    sizes: Sizes = field(default_factory=Sizes)
    halted: Mapping[str, Any] | None = None

    # --- the epochs ------------------------------------------------------------------------------------------

    def series(self, path: str, *, after: int = 0) -> Series | None:
        """The figure at a dotted path of the summaries, from update `after` on; None where no epoch has it."""
        return self._series(path, lambda summary: finite(_within(summary, path)), after)

    def quotient(self, above: str, below: str, name: str) -> Series | None:
        """The ratio of two figures in the epochs that have both."""

        def divided(summary: Mapping[str, Any]) -> float | None:
            a, b = finite(_within(summary, above)), finite(_within(summary, below))
            return None if a is None or b is None or b <= 0 else a / b

        return self._series(name, divided)

    def computed(self, name: str, value: Callable[[Mapping[str, Any]], float | None]) -> Series | None:
        """A figure that `value` makes of each summary, None where it cannot."""
        return self._series(name, value)

    def keys(self, path: str) -> list[str]:
        """The names below a group of figures, in any epoch."""
        groups = (_within(summary, path) for summary in self.summaries)
        return list(dict.fromkeys(key for group in groups if isinstance(group, Mapping) for key in group))

    def _series(self, name: str, value: Callable[[Mapping[str, Any]], float | None], after: int = 0) -> Series | None:
        points = list(self._points(value, after))
        if not points:
            return None
        return Series(name, tuple(epoch for epoch, _ in points), tuple(v for _, v in points))

    def _points(self, value: Callable[[Mapping[str, Any]], float | None], after: int) -> Iterator[tuple[int, float]]:
        for epoch, summary in zip(self.epochs, self.summaries, strict=True):
            found, step = value(summary), finite(summary.get("global_step"))
            if found is not None and (step is None or step > after):
                yield epoch, found

    @cached_property
    def epochs(self) -> list[int]:
        """The number of each summary's epoch; its place, counted from one, where it names none."""
        named = (finite(summary.get("epoch")) for summary in self.summaries)
        return [place if epoch is None else int(epoch) for place, epoch in enumerate(named, start=1)]

    # --- settings and sizes ----------------------------------------------------------------------------------

    def setting(self, key: str) -> Any:
        """A setting by its dotted key; None where it is not known."""
        return _within(self.settings, key)

    @cached_property
    def updates(self) -> int | None:
        """Updates done."""
        steps = [step for summary in self.summaries if (step := finite(summary.get("global_step"))) is not None]
        if self.sizes.updates is not None or steps:
            return self.sizes.updates if self.sizes.updates is not None else int(max(steps))
        if self.sizes.samples and self.sizes.batch and self.epochs:
            return round(self.sizes.samples * max(self.epochs) / self.sizes.batch)
        return None

    @cached_property
    def planned(self) -> int | None:
        """Updates the run was to do."""
        given = self.sizes.planned or finite(self.setting("training.updates"))
        if given:
            return int(given)
        epochs = finite(self.setting("training.epochs"))
        if epochs and self.updates and self.epochs and max(self.epochs) > 0:
            return round(self.updates * epochs / max(self.epochs))
        return None

    @property
    def length(self) -> int | None:
        """Updates the run will have when it ends: those planned, or those done where no plan is known."""
        return self.planned or self.updates

    @property
    def chance(self) -> float | None:
        """1 / sqrt(D), the root mean square cosine between a vector and a random one."""
        return 1 / math.sqrt(self.sizes.dimension) if self.sizes.dimension else None

    @cached_property
    def phase(self) -> Phase:
        """How far the run is: by its plan, else by its updates; without either it is taken as finished."""
        moved = _movement(self.series("raw_loss_mean"))
        if not self.updates:
            return Phase("late", f"{len(self.summaries)} epochs, no updates known: taken as finished{moved}")
        if not self.planned:
            judged_by = f"{self.updates:,} updates, no plan known{moved}"
            return Phase(_third(self.updates, EARLY_UPDATES, LATE_UPDATES), judged_by)
        judged_by = f"{self.updates:,} of {self.planned:,} updates{moved}"
        warmup = finite(self.setting("training.warmup_steps")) or 0.0
        if self.updates < min(warmup, self.planned):
            return Phase("early", f"{judged_by}; warm-up lasts {number(warmup)}")
        return Phase(_third(self.updates / self.planned, EARLY, LATE), judged_by)

    def slower(self, factor: float = 5.0) -> str:
        """A lower learning rate, as a setting."""
        rates = self.series("learning_rate")
        lr = finite(self.setting("training.lr")) or (rates.highest.value if rates else 1e-4)
        return f"training.lr={lr / factor:.2g}"


def finite(value: Any) -> float | None:
    """A number that is one; None for anything else."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def _within(values: Any, path: str) -> Any:
    for key in path.split("."):
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def _third(value: float, early: float, late: float) -> Literal["early", "mid", "late"]:
    return "early" if value < early else "late" if value >= late else "mid"


def _movement(raw: Series | None) -> str:
    """How the raw loss of the last third of the epochs differs from that of the third before, in words."""
    if raw is None or len(raw) < 3:
        return ""
    third = len(raw) // 3
    before, last = (statistics.median(part) for part in (raw.values[-2 * third : -third], raw.values[-third:]))
    ratio = last / before if before > 0 else 1.0
    return f"; the median raw loss of the last third is {fold(ratio)} times that of the third before"
