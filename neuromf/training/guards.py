"""What stops a run that has gone wrong. The raw loss decides: the weighted one hides divergence."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Any, Literal

from neuromf.config import GuardsConfig
from neuromf.errors import GuardError

WINDOW = 50
BEGINNING = 5


@dataclass
class Guards:
    """Guards against divergence, a loss that never falls, and numbers that are not finite.

    Feed it every update; it answers with warnings, or raises. It compares the median raw loss of the last 50 updates
    with that of the first 50, or of the first 5 where that is lower (a run may diverge within its first 50), for the
    r = t and the r < t parts separately (batches without r < t samples are left out of the latter).
    """

    config: GuardsConfig
    first: dict[str, list[float]] = field(default_factory=lambda: {"fm": [], "mf": []})
    last: dict[str, list[float]] = field(default_factory=lambda: {"fm": [], "mf": []})
    updates: int = 0
    nonfinite: int = 0
    skipped_last: bool = False
    warned: bool = False
    stuck: bool = False

    def observe(self, raw_fm: float | None, raw_mf: float | None) -> str | None:
        """Take the mean raw losses of one update (None where it had no such sample).

        Returns:
            A warning the first time the ratio passes `divergence_warn`, or when the loss is found stuck; else None.

        Raises:
            GuardError: the ratio passes `divergence_halt`.
        """
        self.updates += 1
        for part, value in (("fm", raw_fm), ("mf", raw_mf)):
            if value is None or not math.isfinite(value):
                continue
            if len(self.first[part]) < WINDOW:
                self.first[part].append(value)
            self.last[part] = [*self.last[part][-(WINDOW - 1) :], value]
        return self._divergence() or self._stuck()

    def _divergence(self) -> str | None:
        if not self.config.divergence:
            return None
        ratio, part = max((self.ratio(part) or 0.0, part) for part in ("fm", "mf"))
        if ratio >= self.config.divergence_halt:
            raise GuardError(
                f"the raw {part} loss is {ratio:.0f} times what it was at the start ({self._then_and_now(part)}): "
                "the run diverges",
                "lower training.lr, lengthen training.warmup_steps, or raise times.data_proportion",
            )
        if ratio >= self.config.divergence_warn and not self.warned:
            self.warned = True
            return f"the raw {part} loss has grown {ratio:.1f} times since the first {WINDOW} updates"
        return None

    def _stuck(self) -> str | None:
        """Look once: a loss that has not begun to fall by then is not being trained."""
        if self.config.stuck_after is None or self.updates != self.config.stuck_after:
            return None
        part = "fm" if len(self.first["fm"]) == WINDOW else "mf"
        ratio = self.ratio(part)
        if ratio is None or not self.config.stuck_ratio <= ratio < self.config.divergence_warn:
            return None
        self.stuck = True
        return (
            f"the raw {part} loss has not fallen in {self.updates:,} updates ({self._then_and_now(part)}): look at "
            "training.lr, training.warmup_steps and the latents"
        )

    def ratio(self, part: str) -> float | None:
        """Median raw loss of the last 50 updates over that of the first; None before there were as many."""
        if len(self.first[part]) < WINDOW:
            return None
        return statistics.median(self.last[part]) / max(self._start(part), 1e-30)

    def _start(self, part: str) -> float:
        first = self.first[part]
        return min(statistics.median(first), statistics.median(first[:BEGINNING]))

    def _then_and_now(self, part: str) -> str:
        return f"{statistics.median(self.last[part]):.3g} against {self._start(part):.3g}"

    def skip_nonfinite(self, update: int) -> str:
        """Count a step whose loss or gradient is not finite; its update is skipped.

        Raises:
            GuardError: more than `nonfinite_limit` of them.
        """
        self.nonfinite += 1
        self.skipped_last = True
        if self.nonfinite > self.config.nonfinite_limit:
            raise GuardError(
                f"{self.nonfinite} updates had a non-finite loss or gradient (the last is number {update})",
                "lower training.lr, use training.precision=fp32, or inspect the latents with `neuromf encode --report`",
            )
        return f"update {update} skipped: loss or gradient is not finite ({self.nonfinite} so far)"

    def accept(self) -> None:
        """Note that an update was made."""
        self.skipped_last = False

    @property
    def verdict(self) -> Literal["ok", "non-finite", "diverging", "stuck"]:
        """How the run stands now.

        `non-finite`: the last update was skipped. `diverging`: the median raw loss has passed `divergence_warn`, or
        the last update's `divergence_halt`. `stuck`: until the loss has fallen after all.
        """
        if self.skipped_last:
            return "non-finite"
        config = self.config
        ratios = [ratio for part in ("fm", "mf") if (ratio := self.ratio(part)) is not None]
        peak = max((last[-1] / max(self._start(part), 1e-30) for part, last in self.last.items() if last), default=0.0)
        if config.divergence and (max(ratios, default=0.0) >= config.divergence_warn or peak >= config.divergence_halt):
            return "diverging"
        return "stuck" if self.stuck and ratios and ratios[0] >= config.stuck_ratio else "ok"

    @property
    def healthy(self) -> bool:
        """Whether the weights are worth going back to."""
        return self.verdict in ("ok", "stuck")

    def figures(self) -> dict[str, Any]:
        """What the console and the diagnostics show."""
        return {
            "state": self.verdict,
            "ratio_fm": self.ratio("fm"),
            "ratio_mf": self.ratio("mf"),
            "warned": self.warned,
            "skipped_updates": self.nonfinite,
        }

    def state(self) -> dict[str, object]:
        """What a checkpoint keeps."""
        return {name: value for name, value in vars(self).items() if name != "config"}

    def restore(self, state: dict[str, object]) -> None:
        """The inverse of `state`."""
        for name, value in state.items():
            setattr(self, name, value)
