"""What stops a run that has gone wrong. The raw loss decides: the weighted one hides divergence."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

from neuromf.config import GuardsConfig
from neuromf.errors import GuardError

WINDOW = 50


@dataclass
class Guards:
    """Divergence and non-finite guards; feed it every update, it answers with warnings or raises.

    Divergence: median raw loss of the last 50 updates against that of the first 50, for the r = t and the r < t
    parts separately (batches without r < t samples are left out of the latter).
    """

    config: GuardsConfig
    first: dict[str, list[float]] = field(default_factory=lambda: {"fm": [], "mf": []})
    last: dict[str, list[float]] = field(default_factory=lambda: {"fm": [], "mf": []})
    nonfinite: int = 0
    warned: bool = False

    def observe(self, raw_fm: float | None, raw_mf: float | None) -> str | None:
        """Take the mean raw losses of one update (None where it had no such sample).

        Returns:
            A warning the first time the ratio passes `divergence_warn`, else None.

        Raises:
            GuardError: the ratio passes `divergence_halt`.
        """
        for part, value in (("fm", raw_fm), ("mf", raw_mf)):
            if value is None or not math.isfinite(value):
                continue
            if len(self.first[part]) < WINDOW:
                self.first[part].append(value)
            self.last[part] = [*self.last[part][-(WINDOW - 1) :], value]
        if not self.config.divergence:
            return None
        ratio, part = max((self._ratio(part), part) for part in ("fm", "mf"))
        if ratio >= self.config.divergence_halt:
            raise GuardError(
                f"the raw {part} loss is {ratio:.0f} times what it was at the start "
                f"({statistics.median(self.last[part]):.3g} against {statistics.median(self.first[part]):.3g}): "
                "the run diverges",
                "lower training.lr, lengthen training.warmup_steps, or raise times.data_proportion",
            )
        if ratio >= self.config.divergence_warn and not self.warned:
            self.warned = True
            return f"the raw {part} loss has grown {ratio:.1f} times since the first {WINDOW} updates"
        return None

    def _ratio(self, part: str) -> float:
        if len(self.first[part]) < WINDOW:
            return 0.0
        return statistics.median(self.last[part]) / max(statistics.median(self.first[part]), 1e-30)

    def skip_nonfinite(self, update: int) -> str:
        """Count a step whose loss or gradient is not finite; its update is skipped.

        Raises:
            GuardError: more than `nonfinite_limit` of them.
        """
        self.nonfinite += 1
        if self.nonfinite > self.config.nonfinite_limit:
            raise GuardError(
                f"{self.nonfinite} updates had a non-finite loss or gradient (the last is number {update})",
                "lower training.lr, use training.precision=fp32, or inspect the latents with `neuromf encode --report`",
            )
        return f"update {update} skipped: loss or gradient is not finite ({self.nonfinite} so far)"

    def state(self) -> dict[str, object]:
        """What a checkpoint keeps."""
        return {"first": self.first, "last": self.last, "nonfinite": self.nonfinite, "warned": self.warned}

    def restore(self, state: dict[str, object]) -> None:
        """The inverse of `state`."""
        for name, value in state.items():
            setattr(self, name, value)
