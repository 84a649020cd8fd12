"""What a run writes while it goes: curves, samples and their pictures; none of it may end the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from neuromf import config
from neuromf.data.latents import LatentStatistics
from neuromf.errors import Interrupted, UserError
from neuromf.models.autoencoder import load_autoencoder
from neuromf.pipeline import recorder as module
from neuromf.pipeline.recorder import Recorder, draw_progress
from neuromf.pipeline.train import train

CHANNELS = 8  # of the Haar transform
# The smallest network there is.
TINY = [
    "network.name=mlp", "network.width=8", "network.depth=2", "ema.decays=[0.5]", "ema.select=0.5",
    "training.batch_size=4", "training.accumulation=1", "training.updates=10",
]  # fmt: skip


class Ears:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.steps: list[int] = []
        self.epochs: list[int] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def step(self, record: dict[str, Any]) -> None:
        self.steps.append(record["update"])

    def epoch(self, summaries: list[dict[str, Any]]) -> None:
        self.epochs.append(summaries[-1]["epoch"])


class Board:
    """A tracker that remembers, in place of the real ones."""

    made: list[Board]
    refuses = False

    def __init__(self, name: str, run: Path, project: str, settings: dict[str, Any]) -> None:
        if Board.refuses:
            raise UserError(f"{name} did not start: no network", "leave it out")
        self.name, self.project, self.settings = name, project, settings
        self.heard: list[Any] = []
        Board.made.append(self)

    def write(self, summary: dict[str, Any]) -> None:
        self.heard.append(summary["global_step"])

    def picture(self, name: str, file: Path, step: int) -> None:
        self.heard.append((name, file.name, step))

    def close(self) -> None:
        self.heard.append("closed")


@pytest.fixture(autouse=True)
def boards(monkeypatch: pytest.MonkeyPatch) -> None:
    Board.made, Board.refuses = [], False
    monkeypatch.setattr(module, "Service", Board)


def summary(epoch: int, **more: Any) -> dict[str, Any]:
    norms = {"compound_v_norm": 1.2, "target_v_norm": 1.0}
    return {"epoch": epoch, "global_step": 10 * epoch, "raw_loss_mean": 1 / epoch, "velocity_norms": norms, **more}


def recorder(out: Path, ears: Ears, *overrides: str, sha256: str | None = None) -> Recorder:
    none, unit = (0.0,) * CHANNELS, (1.0,) * CHANNELS
    statistics = LatentStatistics(
        mean=none, std=unit, skewness=none, kurtosis=unit, correlation=(unit,) * CHANNELS, sigma2_share=0.0,
        sigma2_share_per_channel=none, pca_explained_variance=(), files=1, voxels=64,
    )  # fmt: skip
    description = {
        "statistics": statistics.to_dict(),
        "autoencoder": {"name": "haar", "sha256": sha256 or load_autoencoder("haar").sha256},
    }
    return Recorder(ears, out, config.load("imf-xpred", overrides), description, "cpu")


SAMPLES = {1: torch.zeros(2, CHANNELS, 4, 4, 4), 2: torch.ones(2, CHANNELS, 4, 4, 4)}


def events(out: Path) -> EventAccumulator:
    return EventAccumulator(str(out / "logs")).Reload()


# --- what it writes ----------------------------------------------------------------------------------------------


def test_epochs_and_samples_reach_tensorboard_the_trackers_and_the_listener(tmp_path: Path) -> None:
    ears = Ears()
    with recorder(tmp_path, ears, "tracking.to=[wandb, mlflow]", "tracking.project=brains") as record:
        for epoch in (1, 2):
            record.step({"update": 10 * epoch - 9, "updates": 20})
            record.epoch([summary(n) for n in range(1, epoch + 1)])
        record.samples(2, SAMPLES)
    assert (ears.steps, ears.epochs, ears.messages) == ([1, 11], [1, 2], [])
    assert [(board.name, board.project) for board in Board.made] == [("wandb", "brains"), ("mlflow", "brains")]
    pictures = [("samples/latent_channels", "latent_channels.png", 20), ("samples/decoded", "epoch_0002.png", 20)]
    assert [board.heard for board in Board.made] == [[10, 20, *pictures, "closed"]] * 2
    assert Board.made[0].settings["tracking"]["to"] == ["wandb", "mlflow"]
    tags = events(tmp_path).Tags()
    assert set(tags["images"]) == {"samples/latent_channels", "samples/decoded"}
    assert "velocity_norms/compound_v_norm" in tags["scalars"]
    assert tags["tensors"] == ["settings/text_summary"]
    kept = torch.load(tmp_path / "samples/generated_samples/epoch_0002.pt", weights_only=True)
    assert torch.equal(kept["nfe_2"], SAMPLES[2])


def test_nothing_is_sent_anywhere_unless_asked(tmp_path: Path) -> None:
    with recorder(tmp_path, Ears()) as record:
        record.step({"update": 1, "updates": 2})
    assert Board.made == []


def test_samples_of_an_absent_autoencoder_are_kept_without_their_volumes(tmp_path: Path) -> None:
    ears = Ears()
    with recorder(tmp_path, ears, sha256="another") as record:
        record.samples(1, SAMPLES)
    assert ears.messages == []
    assert (tmp_path / "samples/epoch_0001/latent_channels.png").exists()
    assert not (tmp_path / "samples/decoded").exists()


# --- how often curves are drawn ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("epoch_s", "expected"), [(1.0, 100), (10.0, 100), (0.01, 3)])
def test_every_epoch_is_drawn_unless_that_takes_a_fiftieth_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epoch_s: float, expected: int
) -> None:
    now, drawn = [0.0], []

    def draw(summaries: list[dict[str, Any]], path: Path) -> None:
        now[0] += 0.008
        drawn.append(len(summaries))

    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module, "draw_progress", draw)
    with recorder(tmp_path, Ears()) as record:
        for epoch in range(1, 101):
            now[0] += epoch_s
            record.epoch([summary(n) for n in range(1, epoch + 1)])
    assert abs(len(drawn) - expected) <= 1
    assert drawn[-1] == 100  # the end is always drawn
    assert len(set(drawn)) == len(drawn)


def test_curves_are_drawn_from_any_summaries(tmp_path: Path) -> None:
    full = [
        summary(
            n, val_raw_loss=1 / n if n % 2 else None, grad_norm_mean=10.0**n, learning_rate=1e-4, ema_divergence=0.1
        )
        for n in range(1, 9)
    ]
    for name, summaries in {"full": full, "bare": [summary(1)], "null": [summary(1, raw_loss_mean=None)]}.items():
        draw_progress(summaries, tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.format == "PNG"
    with Image.open(tmp_path / "full.png") as image, Image.open(tmp_path / "bare.png") as bare:
        assert image.size[1] > bare.size[1]  # two rows of panels


# --- what fails --------------------------------------------------------------------------------------------------


def test_what_cannot_be_drawn_is_a_warning_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **settings: Any) -> None:
        raise ValueError("no font\nat all")

    monkeypatch.setattr(module, "curves", fail)
    monkeypatch.setattr(module, "montage", fail)
    monkeypatch.setattr(module, "DRAWING_SHARE", 1e9)
    ears = Ears()
    with recorder(tmp_path, ears) as record:
        for epoch in (1, 2, 3):
            record.epoch([summary(n) for n in range(1, epoch + 1)])
            record.samples(epoch, SAMPLES)
    assert ears.messages == [
        "warning: progress.png could not be written: ValueError: no font",
        "warning: a picture of samples could not be written: ValueError: no font",
    ]
    assert len(list((tmp_path / "samples/generated_samples").iterdir())) == 3


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Board, summary: dict[str, Any]) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(Board, "write", fail)
    ears = Ears()
    with recorder(tmp_path, ears, "tracking.to=[wandb]") as record:
        record.step({"update": 1, "updates": 2})
        record.epoch([summary(1)])
    assert ears.messages == ["warning: wandb could not be written: ConnectionError: no network"]
    assert Board.made[0].heard == ["closed"]


def test_a_run_without_room_for_tensorboard_goes_on(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    ears = Ears()
    with recorder(tmp_path, ears) as record:
        record.step({"update": 1, "updates": 2})
        record.epoch([summary(1)])
    assert len(ears.messages) == 1
    assert ears.messages[0].startswith("warning: TensorBoard could not be written: ")
    assert ears.steps == [1]


def test_a_tracker_that_does_not_start_ends_a_new_run_but_not_a_resumed_one(tmp_path: Path) -> None:
    Board.refuses = True
    with (
        recorder(tmp_path, Ears(), "tracking.to=[wandb]") as record,
        pytest.raises(UserError, match="wandb did not start"),
    ):
        record.step({"update": 1, "updates": 20})
    ears = Ears()
    with recorder(tmp_path, ears, "tracking.to=[wandb]") as record:
        record.step({"update": 11, "updates": 20})
        record.epoch([summary(1)])
    assert ears.messages == ["warning: wandb did not start: no network; the run goes on without it"]
    assert ears.steps == [11]


def test_a_run_that_stops_still_draws_and_closes(tmp_path: Path) -> None:
    record = recorder(tmp_path, Ears(), "tracking.to=[mlflow]")

    def stopped() -> None:
        with record:
            record.step({"update": 1, "updates": 20})
            record._due_s = 1e18  # as if it had just been drawn
            record.epoch([summary(1)])
            assert not (tmp_path / "progress.png").exists()
            raise Interrupted("SIGTERM")

    with pytest.raises(Interrupted):
        stopped()
    assert (tmp_path / "progress.png").exists()
    assert Board.made[0].heard == [10, "closed"]


# --- in a run ----------------------------------------------------------------------------------------------------


def test_a_run_may_be_tracked_from_any_session_on(latents: Path, tmp_path: Path) -> None:
    """Asking for a tracker, or no longer asking, does not make it another run."""
    out, words = tmp_path / "run", TINY
    train(config.load("imf-xpred", words), latents, out, device="cpu")
    (out / "result.json").unlink()
    tracked = config.load("imf-xpred", [*words, "tracking.to=[]", "tracking.project=other"])
    assert train(tracked, latents, out, device="cpu").updates == 10
    assert "project: other" in (out / "config.yaml").read_text()
    summaries = json.loads((out / "diagnostics/aggregate_results/training_summary.json").read_text())
    assert [e.step for e in events(out).Scalars("raw_loss_mean")] == [e["global_step"] for e in summaries]


def test_a_missing_tracker_is_refused_before_a_run_begins(small: list[str], latents: Path, tmp_path: Path) -> None:
    from accelerate.tracking import get_available_trackers

    absent = [name for name in ("wandb", "mlflow") if name not in map(str, get_available_trackers())]
    if not absent:
        pytest.skip("both trackers are installed here")
    with pytest.raises(UserError, match="is not installed"):
        train(config.load("imf-xpred", [*small, f"tracking.to=[{absent[0]}]"]), latents, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
