"""Is a generated volume one that somebody could look at? A few figures, and what is wrong in words."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from neuromf.data.preprocessing import head_mask

LEAST_CONTRAST = 0.05
RANGE = (-2.0, 5.0)
HEAD_SHARE = (0.02, 0.98)


class Quality(NamedTuple):
    """What was measured of a volume; `problem` is empty where nothing is wrong.

    Attributes:
        problem: in words.
        finite: share of the voxels that are numbers.
        minimum, maximum: of those; None where there are none.
        head_share: of the voxels, those of the largest connected foreground (`head_mask`).
        head_ml: its volume.
    """

    problem: str
    finite: float
    minimum: float | None
    maximum: float | None
    head_share: float
    head_ml: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, rounded to what a report needs."""
        numbers = {key: value for key, value in self._asdict().items() if key != "problem"}
        rounded = {key: None if value is None else float(f"{value:.5g}") for key, value in numbers.items()}
        return {"problem": self.problem, **rounded}


def check_volume(volume: np.ndarray, voxel_ml: float = 1.0) -> Quality:
    """Measure a volume and judge it: finite, not empty, within range, a head of a sensible size.

    Args:
        volume: (I, J, K), intensity 0 to about 1.
        voxel_ml: volume of a voxel in millilitres.
    """
    finite = np.isfinite(volume)
    share = float(finite.mean())
    if not share:
        return Quality("100 % of the voxels are not finite", 0.0, None, None, 0.0, 0.0)
    sound = np.where(finite, volume, 0) if share < 1 else volume
    low, high = float(volume[finite].min()), float(volume[finite].max())
    head = int(head_mask(sound).sum()) if high > low else 0
    found = Quality("", share, low, high, head / volume.size, head * voxel_ml)
    return found._replace(problem=_problem(found))


def _problem(found: Quality) -> str:
    assert found.minimum is not None
    assert found.maximum is not None
    span = f"intensities lie between {found.minimum:.3g} and {found.maximum:.3g}"
    if found.finite < 1:
        return f"{100 * (1 - found.finite):.2g} % of the voxels are not finite"
    if found.maximum - found.minimum < LEAST_CONTRAST:
        return f"empty: {span}"
    if found.minimum < RANGE[0] or found.maximum > RANGE[1]:
        return f"out of range: {span}"
    if not HEAD_SHARE[0] < found.head_share < HEAD_SHARE[1]:
        return f"the head covers {100 * found.head_share:.1f} % of the volume"
    return ""
