"""What a run says about itself: one record an update for the live view, one summary an epoch on disk.

Layout: `diagnostics/per_epoch_metrics/epoch_NNN/summary.json`, and all of them as an array in
`diagnostics/aggregate_results/training_summary.json`. Means are sums over counts; a figure an epoch had no sample
for is null.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuromf.errors import UserError
from neuromf.files import read_json, write_json

EXTRA = {"raw_v": "vhead", "perceptual": "perceptual"}  # figures that some objectives have
SUMMARY = Path("diagnostics/aggregate_results/training_summary.json")


class Epoch:
    """Gathers the records of an epoch's updates; the state of an unfinished one travels in the checkpoint."""

    def __init__(self) -> None:
        self.records: list[dict[str, Tensor]] = []
        self.gradients: list[tuple[float, bool]] = []
        self.seconds = 0.0

    def add(self, record: dict[str, Tensor], gradient_norm: float, clipped: bool, seconds: float) -> None:
        """Add one update.

        Args:
            record: per-sample figures of `Objective`, each (B,).
            gradient_norm: before clipping.
            clipped: whether the clip acted.
            seconds: wall time of the update.
        """
        self.records.append(record)
        self.gradients.append((gradient_norm, clipped))
        self.seconds += seconds

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of an unfinished epoch."""
        return {"records": self.records, "gradients": self.gradients, "seconds": self.seconds}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.records, self.seconds = list(state["records"]), state["seconds"]
        self.gradients = [(norm, clipped) for norm, clipped in state["gradients"]]

    def summary(self) -> dict[str, Any]:
        """The epoch's figures under the names of the diagnostics schema."""
        values = {name: torch.cat([r[name].float().cpu() for r in self.records]) for name in self.records[0]}
        # A skipped update must not make the whole epoch's figures null.
        finite = torch.isfinite(values["raw"])
        values = {name: value[finite] for name, value in values.items()}
        moving = values["moving"].bool()
        norms = [norm for norm, _ in self.gradients if math.isfinite(norm)]
        x_variance = values["x_square"].mean() - values["x_mean"].mean() ** 2
        return {
            "loss_mean": _mean(values["weighted"]),
            "loss_std": _std(values["weighted"]),
            "raw_loss_mean": _mean(values["raw"]),
            "raw_loss_std": _std(values["raw"]),
            "raw_loss_fm_mean": _mean(values["raw"][~moving]),
            "raw_loss_mf_mean": _mean(values["raw"][moving]),
            **{f"raw_loss_{name}_mean": _mean(values[key]) for key, name in EXTRA.items() if key in values},
            "velocity_norms": {
                "u_norm": _mean(values["u_norm"]),
                "compound_v_norm": _mean(values["V_norm"]),
                "target_v_norm": _mean(values["v_norm"]),
                "v_tilde_norm": _mean(values["v_tilde_norm"][moving]),
                "jvp_norm": _mean(values["jvp_norm"][moving]),
            },
            "cosine_sim_V_vc": _mean(values["cosine_V"]),
            "cosine_sim_vtilde_vc": _mean(values["cosine_v_tilde"][moving]),
            "relative_error": _mean(values["relative_error"]),
            "adaptive_weight": {"mean": _mean(values["denominator"]), "std": _std(values["denominator"])},
            "x_hat_stats": {
                "mean": _mean(values["x_mean"]),
                "std": _finite(x_variance.clamp(min=0).sqrt()),
                "min": _finite(values["x_min"].min()) if finite.any() else None,
                "max": _finite(values["x_max"].max()) if finite.any() else None,
            },
            "grad_clip_fraction": sum(clipped for _, clipped in self.gradients) / len(self.gradients),
            "grad_norm_mean": _mean(torch.tensor(norms)),
            "grad_norm_std": _std(torch.tensor(norms)),
            "epoch_time_sec": round(self.seconds, 3),
            "sampling": {
                "t_mean": _mean(values["t"]),
                "t_std": _std(values["t"]),
                "h_mean": _mean(values["t"] - values["r"]),
                "h_zero_frac": _mean((~moving).float()),
            },
        }


def _finite(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _mean(values: Tensor) -> float | None:
    return _finite(values.double().mean()) if values.numel() else None


def _std(values: Tensor) -> float | None:
    return _finite(values.double().std(correction=0)) if values.numel() else None


class Summaries:
    """The epoch summaries of a run folder.

    Args:
        run: the run folder; summaries it already holds are kept up to `before`.
        before: number of updates the resumed run starts from; later summaries are dropped, they will be redone.
    """

    def __init__(self, run: Path, before: int) -> None:
        self.run = run
        self.epochs: list[dict[str, Any]] = []
        if (run / SUMMARY).exists():
            try:
                self.epochs = [e for e in read_json(run / SUMMARY) if e["global_step"] <= before]
            except (UserError, KeyError, TypeError):
                self.epochs = []  # the array is rebuilt from here on; the per-epoch files remain

    def add(self, summary: dict[str, Any]) -> None:
        """Write one epoch's summary, and the array."""
        self.epochs.append(summary)
        folder = self.run / "diagnostics/per_epoch_metrics" / f"epoch_{summary['epoch']:03d}"
        write_json(folder / "summary.json", summary)
        write_json(self.run / SUMMARY, self.epochs)


class TensorBoard:
    """Scalars of every epoch in `logs/`."""

    def __init__(self, run: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run / "logs"), purge_step=start)

    def write(self, summary: dict[str, Any], prefix: str = "") -> None:
        """All numbers of a summary, nested ones as `group/name`."""
        for name, value in summary.items():
            if isinstance(value, dict):
                self.write({**value, "global_step": summary["global_step"]}, f"{prefix}{name}/")
            elif isinstance(value, int | float) and name not in {"epoch", "global_step"}:
                self.writer.add_scalar(f"{prefix}{name}", value, summary["global_step"])

    def close(self) -> None:
        """Flush and close the event file."""
        self.writer.close()
