"""What a run writes while it goes: messages to whoever started it, curves, samples and their pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuromf.data.latents import LatentStatistics
from neuromf.devices import torch_device
from neuromf.errors import UserError
from neuromf.files import atomic_path
from neuromf.models.autoencoder import load_autoencoder
from neuromf.reporting.figures import curves, montage


class Silent:
    """A listener that says nothing."""

    def message(self, text: str) -> None:
        """Ignore."""

    def step(self, record: dict[str, Any]) -> None:
        """Ignore."""


class Recorder:
    """The loop's listener: passes messages on, and writes `progress.png` and `samples/`."""

    def __init__(self, listener: Any, out: Path, description: dict[str, Any], device: str) -> None:
        self.listener, self.out, self.device = listener, out, device
        self.statistics = LatentStatistics.from_dict(description["statistics"])
        self.recorded: dict[str, Any] = description["autoencoder"]
        self.message, self.step = listener.message, listener.step

    def epoch(self, summaries: list[dict[str, Any]]) -> None:
        """Redraw the curves; a long run redraws at most about 200 times."""
        if len(summaries) % max(1, len(summaries) // 20) == 0:
            self._curves(summaries)

    def _curves(self, summaries: list[dict[str, Any]]) -> None:
        def series(name: str) -> tuple[list[int], list[float]]:
            points = [(e["global_step"], e[name]) for e in summaries if e.get(name) is not None]
            return [x for x, _ in points], [y for _, y in points]

        panels = {
            "raw loss": {
                "r = t": series("raw_loss_fm_mean"),
                "r < t": series("raw_loss_mf_mean"),
                "validation": series("val_raw_loss"),
            },
            "cosine with v_c": {"V": series("cosine_sim_V_vc"), "tangent": series("cosine_sim_vtilde_vc")},
            "gradient norm": {"mean": series("grad_norm_mean")},
        }
        shown = {title: {name: xy for name, xy in lines.items() if xy[0]} for title, lines in panels.items()}
        curves(
            {title: lines for title, lines in shown.items() if lines},
            self.out / "progress.png",
            x_label="updates",
            log_y=("raw loss", "gradient norm"),
        )

    def samples(self, epoch: int, samples: Mapping[int, Tensor]) -> None:
        """Keep the whitened samples, a picture of the one-step ones' channels, and of what those decode to."""
        folder, latents = self.out / "samples", samples[1]
        with atomic_path(folder / "generated_samples" / f"epoch_{epoch:04d}.pt") as path:
            torch.save({f"nfe_{nfe}": whitened.clone() for nfe, whitened in samples.items()}, path)
        raw = self.statistics.unwhiten(latents)
        flat = (latents[0] / 6 + 0.5).clamp(0, 1).numpy()
        montage(
            list(flat), [f"channel {c}" for c in range(len(flat))], folder / f"epoch_{epoch:04d}/latent_channels.png"
        )
        autoencoder = self._autoencoder()
        if autoencoder is not None:
            volumes = autoencoder.decode(raw.to(autoencoder.device)).cpu().clamp(0, 1).numpy()
            titles = [f"sample {i}, 1 evaluation" for i in range(len(volumes))]
            montage(list(volumes), titles, folder / "decoded" / f"epoch_{epoch:04d}.png", columns=2)

    def _autoencoder(self) -> Any:
        """The autoencoder of these latents where it is at hand (foreign weights may lie elsewhere)."""
        recorded = self.recorded
        try:
            autoencoder = load_autoencoder(recorded["name"], device=torch_device(self.device))
        except UserError:
            return None
        return autoencoder if autoencoder.sha256 == recorded["sha256"] else None
