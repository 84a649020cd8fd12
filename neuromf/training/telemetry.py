"""What a run says about itself: one record an update for the live view, one summary an epoch on disk.

Layout: `diagnostics/per_epoch_metrics/epoch_NNN/summary.json`, and all of them as an array in
`diagnostics/aggregate_results/training_summary.json`. Means are sums over counts; a figure an epoch had no sample
for is null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from neuromf.errors import UserError
from neuromf.files import read_json, write_json, write_text
from neuromf.training.diagnostics import finite, mean, mean_by_time, sampling_figures, std

EXTRA = {"raw_v": "vhead", "perceptual": "perceptual"}  # figures that some objectives have
SUMMARY = Path("diagnostics/aggregate_results/training_summary.json")


class Epoch:
    """Gathers the records of an epoch's updates; the state of an unfinished one travels in the checkpoint."""

    def __init__(self) -> None:
        self.records: list[dict[str, Tensor]] = []
        self.gradients: list[tuple[float, bool]] = []
        self.seconds = 0.0
        self.closing: dict[str, Any] = {}

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

    def close(self, figures: dict[str, Any]) -> None:
        """Take the figures of the last update (`diagnostics.StepProbe`); no checkpoint lies between it and the end."""
        self.closing = figures

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
        usable = torch.isfinite(values["raw"])
        values = {name: value[usable] for name, value in values.items()}
        moving = values["moving"].bool()
        norms = [norm for norm, _ in self.gradients if math.isfinite(norm)]
        x_variance = values["x_square"].mean() - values["x_mean"].mean() ** 2
        return {
            "loss_mean": mean(values["weighted"]),
            "loss_std": std(values["weighted"]),
            "raw_loss_mean": mean(values["raw"]),
            "raw_loss_std": std(values["raw"]),
            "raw_loss_fm_mean": mean(values["raw"][~moving]),
            "raw_loss_mf_mean": mean(values["raw"][moving]),
            "raw_loss_by_t": mean_by_time(values["raw"], values["t"]),
            **{f"raw_loss_{name}_mean": mean(values[key]) for key, name in EXTRA.items() if key in values},
            "velocity_norms": {
                "u_norm": mean(values["u_norm"]),
                "compound_v_norm": mean(values["V_norm"]),
                "target_v_norm": mean(values["v_norm"]),
                "v_tilde_norm": mean(values["v_tilde_norm"][moving]),
                "jvp_norm": mean(values["jvp_norm"][moving]),
            },
            "cosine_sim_V_vc": mean(values["cosine_V"]),
            "cosine_sim_vtilde_vc": mean(values["cosine_v_tilde"][moving]),
            "relative_error": mean(values["relative_error"]),
            "adaptive_weight": {"mean": mean(values["denominator"]), "std": std(values["denominator"])},
            "x_hat_stats": {
                "mean": mean(values["x_mean"]),
                "std": finite(x_variance.clamp(min=0).sqrt()),
                "min": finite(values["x_min"].min()) if usable.any() else None,
                "max": finite(values["x_max"].max()) if usable.any() else None,
            },
            "grad_clip_fraction": sum(clipped for _, clipped in self.gradients) / len(self.gradients),
            "grad_norm_mean": mean(torch.tensor(norms)),
            "grad_norm_std": std(torch.tensor(norms)),
            "epoch_time_sec": round(self.seconds, 3),
            "sampling": {**sampling_figures(values["r"], values["t"]), "count": len(values["t"])},
            **self.closing,
        }


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
        self._lines = [_line(e) for e in self.epochs]

    def add(self, summary: dict[str, Any]) -> None:
        """Write one epoch's summary, and the array with an epoch a line."""
        self.epochs.append(summary)
        self._lines.append(_line(summary))
        folder = self.run / "diagnostics/per_epoch_metrics" / f"epoch_{summary['epoch']:03d}"
        write_json(folder / "summary.json", summary)
        # Each line is encoded once: a thousand epochs take 0.1 s, which is several updates of a small network.
        write_text(self.run / SUMMARY, "[\n" + ",\n".join(self._lines) + "\n]\n")


def _line(summary: dict[str, Any]) -> str:
    return json.dumps(summary, allow_nan=False)


def numbers(summary: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """All numbers of a summary by name, nested ones as `group/name` and `list/0`; epoch and step are left out.

    Example:
        >>> numbers({"epoch": 3, "val_loss": None, "sampling": {"t_mean": 0.4}, "raw_loss_by_t": [1.0, 2.0]})
        {'sampling/t_mean': 0.4, 'raw_loss_by_t/0': 1.0, 'raw_loss_by_t/1': 2.0}
    """
    found: dict[str, float] = {}
    for name, value in summary.items():
        if isinstance(value, list):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, Mapping):
            found |= numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name not in {"epoch", "global_step"}:
            found[prefix + name] = float(value)
    return found


class TensorBoard:
    """The figures of every epoch, the settings and the pictures of samples, in `logs/`.

    Args:
        run: the run folder.
        start: updates done before; what an earlier session wrote beyond them is hidden, for it will be redone.
    """

    def __init__(self, run: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.start = start
        # The event of the update that was saved stays: `purge_step` is the first step to go.
        self.writer = SummaryWriter(str(run / "logs"), purge_step=start + 1)

    def settings(self, text: str) -> None:
        """The resolved settings of this session, as YAML."""
        self.writer.add_text("settings", f"```yaml\n{text.strip()}\n```", self.start + 1)

    def write(self, summary: Mapping[str, Any]) -> None:
        """All numbers of a summary."""
        for name, value in numbers(summary).items():
            self.writer.add_scalar(name, value, summary["global_step"])
        self.writer.flush()  # or a killed run loses up to two minutes of them

    def picture(self, name: str, file: Path, step: int) -> None:
        """A picture that lies in the run folder."""
        self.writer.add_image(name, pixels(file), step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        """Flush and close the event file."""
        self.writer.close()


def pixels(file: Path) -> NDArray[np.uint8]:
    """A picture file as (rows, columns, 3)."""
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))
