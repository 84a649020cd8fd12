"""The numbers of one evaluation as plain records, each with its N and, where it has one, its interval.

A record: `{"value", "low", "high", "n", "better", ...}`; `n` names the count on each side; `better` is
`lower`, `higher`, or `equal` (compare with the real set's record). A number that is a mean over volumes, or has a
value without each of them, says so by `per_volume` ("mean", "leave one out") and brings these as `values` {set:
(N,)}, which the caller keeps elsewhere. All functions are pure: arrays and features in, records out; whatever cannot
be computed raises UserError, which the caller lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from neuromf.metrics.memorization import Audit
from neuromf.metrics.statistics import Estimate, bootstrap_of_means, proportion_interval

Better = Literal["lower", "higher", "equal"]
Record = dict[str, Any]

HISTOGRAM_EDGES = np.linspace(-0.5, 2.0, 251)


def record(estimate: Estimate, better: Better, **extra: Any) -> Record:
    """An estimate as a record; `extra` may replace `n` by counts per side."""
    return {**estimate._asdict(), "better": better, **extra}


def mean_record(values: Tensor, better: Better, *, seed: int = 0, of: str | None = None, **extra: Any) -> Record:
    """The mean over volumes with its bootstrap interval; `of` names the set whose volumes they are."""
    if of is not None:
        extra |= {"per_volume": "mean", "values": {of: values}}
    return record(bootstrap_of_means(values, seed=seed), better, **extra)


def intensity_records(
    generated: Sequence[np.ndarray] | np.ndarray, real: Sequence[np.ndarray] | np.ndarray, *, seed: int = 0
) -> tuple[dict[str, Record], dict[str, list[float]]]:
    """Intensity statistics per set and the distance of the two histograms.

    `intensity_<statistic>_<set>`: mean over volumes of each volume's mean, standard deviation and 99th
    percentile. `intensity_wasserstein`: area between the two cumulative histograms, in intensity units
    (1 is the range of the data).

    Args:
        generated: (N, 1, I, J, K).
        real: (M, 1, I, J, K).

    Returns:
        The records; and the densities on `HISTOGRAM_EDGES` per set, for the plot.
    """
    records: dict[str, Record] = {}
    counts: dict[str, np.ndarray] = {}
    for label, volumes in (("generated", generated), ("real", real)):
        rows, histograms = [], []
        for volume in volumes:
            rows.append([volume.mean(dtype=np.float64), volume.std(dtype=np.float64), np.percentile(volume, 99)])
            inside = volume.clip(HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1])
            histograms.append(np.histogram(inside, HISTOGRAM_EDGES)[0] / volume.size)
        table = torch.tensor(np.array(rows, dtype=np.float64))
        for column, statistic in enumerate(("mean", "std", "p99")):
            records[f"intensity_{statistic}_{label}"] = mean_record(table[:, column], "equal", seed=seed, of=label)
        counts[label] = np.array(histograms)
    estimate = bootstrap_of_means(
        torch.tensor(counts["generated"]), torch.tensor(counts["real"]), function=_wasserstein, seed=seed
    )
    sizes = {"generated": len(generated), "real": len(real)}
    records["intensity_wasserstein"] = record(estimate, "lower", n=sizes)
    width = HISTOGRAM_EDGES[1] - HISTOGRAM_EDGES[0]
    return records, {label: (c.mean(0) / width).tolist() for label, c in counts.items()}


def audit_record(result: Audit, *, name: str) -> dict[str, Record]:
    """Memorisation audit: share below the baseline's first percentile (0.01 is what fresh volumes give)."""
    sizes = {"generated": result.n_generated, "held-back real": result.n_baseline}
    share = proportion_interval(round(result.share * result.n_generated), result.n_generated)
    return {
        f"memorized_share_{name}": record(share, "lower", n=sizes)
        | {
            "threshold": result.threshold,
            "expected": 0.01,
            "median_distance_generated": result.median_generated,
            "median_distance_held_back": result.median_baseline,
        }
    }


def _wasserstein(a: Tensor, b: Tensor) -> Tensor:
    width = float(HISTOGRAM_EDGES[1] - HISTOGRAM_EDGES[0])
    return (a - b).cumsum(1).abs().sum(1) * width
