"""What a run shows while it goes: messages to whoever started it, curves, samples and their pictures, trackers.

None of it may end a run: what fails here becomes a warning. Only a tracker that does not start at the beginning of a
run does, for then nobody has left yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuromf.config import TrainConfig
from neuromf.data.latents import LatentStatistics
from neuromf.devices import torch_device
from neuromf.errors import UserError
from neuromf.files import atomic_path
from neuromf.models.autoencoder import load_autoencoder
from neuromf.models.mask_codec import PairLayout
from neuromf.reporting.figures import curves, montage
from neuromf.training.telemetry import TensorBoard
from neuromf.training.trackers import Service

PROGRESS_FILE = "progress.png"
# Drawing the curves takes at most this share of the time: each epoch is drawn unless epochs are very short.
DRAWING_SHARE = 0.02


class Silent:
    """A listener that says nothing; the loop's one in the processes beside the main one."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing was opened."""

    def message(self, text: str) -> None:
        """Ignore."""

    def step(self, record: dict[str, Any]) -> None:
        """Ignore."""

    def epoch(self, summaries: list[dict[str, Any]]) -> None:
        """Ignore."""

    def samples(self, epoch: int, samples: Mapping[int, Tensor]) -> None:
        """Ignore."""


class Recorder:
    """The loop's listener, on the main process; used as a context, for at the end it draws and closes what is open.

    Args:
        listener: hears messages and updates, and the epochs if it has a method for them.
        out: the run folder.
        config: resolved settings.
        description: of the data, as data.json holds it.
        device: where samples are decoded.
    """

    def __init__(self, listener: Any, out: Path, config: TrainConfig, description: dict[str, Any], device: str) -> None:
        self.listener, self.out, self.config, self.device = listener, out, config, device
        self.statistics = LatentStatistics.from_dict(description["statistics"])
        self.recorded: dict[str, Any] = description["autoencoder"]
        self.pair = PairLayout.of(description)
        self.message = listener.message
        self._boards: list[TensorBoard | Service] | None = None
        self._summaries: list[dict[str, Any]] = []
        self._drawn, self._due_s = 0, 0.0
        self._warned: set[str] = set()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *error: object) -> None:
        if len(self._summaries) > self._drawn:
            self._safely(PROGRESS_FILE, self._draw)
        for board in self._boards or ():
            self._safely(_name(board), board.close)

    def step(self, record: dict[str, Any]) -> None:
        """Pass the update on; the first one opens TensorBoard and the trackers."""
        if self._boards is None:
            self._open(record["update"] - 1)
        self.listener.step(record)

    def epoch(self, summaries: list[dict[str, Any]]) -> None:
        """Write the newest epoch's figures, and redraw the curves unless that was done a moment ago."""
        self._summaries = summaries
        for board in self._boards or ():
            self._safely(_name(board), board.write, summaries[-1])
        if hasattr(self.listener, "epoch"):
            self.listener.epoch(summaries)
        if time.monotonic() >= self._due_s:
            self._safely(PROGRESS_FILE, self._draw)

    def samples(self, epoch: int, samples: Mapping[int, Tensor]) -> None:
        """Keep the whitened samples, a picture of the one-step ones' channels, and of what those decode to."""
        folder, latents = self.out / "samples", samples[1].float().cpu()
        self._safely("the samples", self._keep, folder / "generated_samples" / f"epoch_{epoch:04d}.pt", samples)
        channels, decoded = folder / f"epoch_{epoch:04d}/latent_channels.png", folder / f"decoded/epoch_{epoch:04d}.png"
        self._safely("a picture of samples", self._picture, "samples/latent_channels", channels, _channels, latents)
        self._safely("a picture of samples", self._picture, "samples/decoded", decoded, self._decoded, latents)

    def _open(self, start: int) -> None:
        """Begin the records of this session, which goes on after `start` updates.

        Raises:
            UserError: a tracker does not start at the beginning of a run; a resumed one goes on without it.
        """
        self._boards = []
        self._safely("TensorBoard", self._open_board, self._boards, start)
        for name in self.config.tracking.to:
            try:
                service = Service(name, self.out, self.config.tracking.project, self.config.model_dump(mode="json"))
            except UserError as error:
                if start == 0:
                    raise
                self.message(f"warning: {error.message}; the run goes on without it")
            else:
                self._boards.append(service)

    def _open_board(self, boards: list[TensorBoard | Service], start: int) -> None:
        board = TensorBoard(self.out, start)
        board.settings(self.config.to_yaml())
        boards.append(board)

    def _safely(self, what: str, action: Callable[..., Any], *arguments: Any) -> None:
        """Do it; a failure is a warning, said once."""
        try:
            action(*arguments)
        except Exception as error:  # of drawing, decoding, disks and networks alike
            text = f"warning: {what} could not be written: {type(error).__name__}: {error}".splitlines()[0]
            if text not in self._warned:
                self._warned.add(text)
                self.message(text)

    def _draw(self) -> None:
        began = time.monotonic()
        self._drawn = len(self._summaries)
        draw_progress(self._summaries, self.out / PROGRESS_FILE)
        ended = time.monotonic()
        self._due_s = ended + (ended - began) / DRAWING_SHARE

    def _keep(self, file: Path, samples: Mapping[int, Tensor]) -> None:
        with atomic_path(file) as path:
            torch.save({f"nfe_{nfe}": whitened.clone() for nfe, whitened in samples.items()}, path)

    def _picture(self, name: str, file: Path, draw: Callable[[Tensor, Path], bool], latents: Tensor) -> None:
        """Draw a picture of samples and hand it to the trackers."""
        if draw(latents, file) and self._summaries:
            for board in self._boards or ():
                self._safely(_name(board), board.picture, name, file, self._summaries[-1]["global_step"])

    def _decoded(self, latents: Tensor, file: Path) -> bool:
        """Draw the volumes that whitened latents (B, C, I, J, K) stand for; not without their autoencoder."""
        autoencoder = self._autoencoder()
        if autoencoder is None:
            return False
        raw = self.statistics.unwhiten(latents)
        images = raw if self.pair is None else self.pair.image(raw)
        volumes = autoencoder.decode(images.to(autoencoder.device)).float().cpu().clamp(0, 1).numpy()
        masks = None if self.pair is None else list(self.pair.decode_mask(raw, autoencoder).numpy())
        titles = [f"sample {i}, 1 evaluation" for i in range(len(volumes))]
        montage(list(volumes), titles, file, columns=2, masks=masks)
        return True

    def _autoencoder(self) -> Any:
        """The autoencoder of these latents where it is at hand (foreign weights may lie elsewhere)."""
        recorded = self.recorded
        try:
            autoencoder = load_autoencoder(recorded["name"], device=torch_device(self.device))
        except UserError:
            return None
        return autoencoder if autoencoder.sha256 == recorded["sha256"] else None


def _name(board: TensorBoard | Service) -> str:
    return board.name if isinstance(board, Service) else "TensorBoard"


def _channels(latents: Tensor, file: Path) -> bool:
    """Draw the channels of the first of the whitened latents (B, C, I, J, K), -3 to 3 as black to white."""
    flat = (latents[0] / 6 + 0.5).clamp(0, 1).numpy()
    montage(list(flat), [f"channel {c}" for c in range(len(flat))], file)
    return True


def draw_progress(summaries: list[dict[str, Any]], path: Path) -> None:
    """Draw how a run has gone: six panels over the updates."""

    def series(figure: Callable[[dict[str, Any]], float | None]) -> tuple[list[int], list[float]]:
        points = [(e["global_step"], value) for e in summaries if (value := figure(e)) is not None]
        return [x for x, _ in points], [y for _, y in points]

    def named(name: str) -> tuple[list[int], list[float]]:
        return series(lambda summary: summary.get(name))

    panels = {
        "raw loss": {
            "all": named("raw_loss_mean"),
            "r = t": named("raw_loss_fm_mean"),
            "r < t": named("raw_loss_mf_mean"),
            "validation": named("val_raw_loss"),
        },
        "|V| / |v_c|": {"|V| / |v_c|": series(_overshoot)},
        "cosine with v_c": {"V": named("cosine_sim_V_vc"), "tangent": named("cosine_sim_vtilde_vc")},
        "gradient norm": {"mean": named("grad_norm_mean")},
        "learning rate": {"of the last update": named("learning_rate")},
        "distance of the average from the weights": {"relative": named("ema_divergence")},
    }
    shown = {title: {name: xy for name, xy in lines.items() if xy[0]} for title, lines in panels.items()}
    curves(
        {title: lines for title, lines in shown.items() if lines},
        path,
        x_label="updates",
        log_y=("raw loss", "gradient norm", "distance of the average from the weights"),
        levels={"|V| / |v_c|": 1.0, "cosine with v_c": 1.0},
        heading=_heading(summaries),
    )


def _overshoot(summary: dict[str, Any]) -> float | None:
    norms = summary.get("velocity_norms") or {}
    length, target = norms.get("compound_v_norm"), norms.get("target_v_norm")
    return length / target if length is not None and target else None


def _heading(summaries: list[dict[str, Any]]) -> str:
    last = summaries[-1]
    words = [f"epoch {last['epoch']:,}, update {last['global_step']:,}"]
    validated = [(e["val_raw_loss"], e["epoch"]) for e in summaries if e.get("val_raw_loss") is not None]
    if validated:
        best, epoch = min(validated)
        words.append(f"best validation raw loss {best:.4g} (epoch {epoch:,})")
    return ", ".join(words)
