from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import neuromf
from neuromf import config
from neuromf.data.latents import load_latent_folder_info
from neuromf.errors import Interrupted, UserError
from neuromf.files import read_json, write_json
from neuromf.pipeline.train import plan, train

# The smallest network there is.
TINY = [
    "network.name=mlp", "network.width=8", "network.depth=2", "ema.decays=[0.5]", "ema.select=0.5",
    "training.batch_size=4", "training.accumulation=1", "training.warmup_steps=0",
]  # fmt: skip
HEAD = ["network.v_head_blocks=1", "objective.tangent=v-head"]


def test_run_folder_holds_everything_that_sampling_needs(small: list[str], run: Path, latents: Path) -> None:
    assert config.from_yaml(run / "config.yaml") == config.load("imf-xpred", small)
    data = json.loads((run / "data.json").read_text())
    info = load_latent_folder_info(latents)
    assert data["statistics"] == info.statistics.to_dict()
    assert data["autoencoder"]["sha256"] == info.dataset["autoencoder"]["sha256"]
    assert data["split_hash"] == info.dataset["splits"]["hash"]
    environment = json.loads((run / "environment.json").read_text())
    assert environment["seed"] == 0
    assert environment["packages"]["torch"]


def test_run_leaves_pictures_curves_and_samples(run: Path) -> None:
    assert (run / "progress.png").stat().st_size > 1000
    assert list((run / "samples").glob("epoch_*/latent_channels.png"))
    (collected,) = (run / "samples" / "generated_samples").glob("*.pt")
    samples = torch.load(collected, weights_only=True)
    assert list(samples) == ["nfe_1", "nfe_2", "nfe_5", "nfe_10"]
    assert {values.shape for values in samples.values()} == {(4, *neuromf.load(run, device="cpu").latent_shape)}
    assert list((run / "samples" / "decoded").glob("*.png"))
    assert list((run / "logs").iterdir())


def test_finished_run_is_not_trained_again(small: list[str], run: Path, latents: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*")}
    heard: list[str] = []

    class Listener:
        def message(self, text: str) -> None:
            heard.append(text)

        def step(self, record: dict[str, object]) -> None:
            raise AssertionError("an update was made")

    train(config.load("imf-xpred", small), latents, run, device="cpu", listener=Listener())
    assert any("already finished" in text for text in heard)
    assert before == {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*")}


def test_folder_of_another_run_is_refused_with_the_difference(small: list[str], run: Path, latents: Path) -> None:
    with pytest.raises(UserError, match=r"training\.lr: 0\.0001 there, 0\.5 now"):
        train(config.load("imf-xpred", [*small, "training.lr=0.5"]), latents, run)


def test_folder_that_is_no_run_is_refused_and_left_alone(small: list[str], tmp_path: Path, latents: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not empty"):
        train(config.load("imf-xpred", small), latents, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_missing_latents_name_the_next_command(small: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        train(config.load("imf-xpred", small), tmp_path / "latents", tmp_path / "run")
    assert "neuromf encode" in caught.value.hint
    assert not (tmp_path / "run").exists()


def test_latents_too_small_for_the_network_name_the_nearest_sizes(
    small: list[str], latents: Path, tmp_path: Path
) -> None:
    deep = ["network.channels=[8,8,8,8,8]", "network.attention_levels=[false,false,false,false,false]"]
    with pytest.raises(UserError, match="multiple of 16") as caught:
        plan(config.load("imf-xpred", [*small, *deep]), latents)
    assert "(16, 16, 16)" in caught.value.hint


def test_run_that_cannot_fit_proposes_the_small_preset(
    small: list[str], latents: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("neuromf.training.memory.available", lambda device: (1 << 20, "a pocket calculator"))
    with pytest.raises(UserError, match=r"a pocket calculator has 0\.0 GiB") as caught:
        train(config.load("imf-xpred", small), latents, tmp_path / "run")
    assert "imf-xpred-small" in caught.value.hint


def test_copies_are_asked_for_in_vain(small: list[str], latents: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs copies of the training scans") as caught:
        train(config.load("imf-xpred", [*small, "training.augmentation=true"]), latents, tmp_path / "run")
    assert "--copies N or --flip-copies" in caught.value.hint


@pytest.fixture(scope="module")
def copied(heads: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from neuromf.data.preprocessing import Preprocessing
    from neuromf.models.autoencoder import load_autoencoder
    from neuromf.pipeline.encode import encode

    folder = tmp_path_factory.mktemp("copied") / "latents"
    spec = Preprocessing(size=(16, 16, 16), spacing_mm=12.0, centre="grid")
    encode([heads], folder, autoencoder=load_autoencoder("haar"), preprocessing=spec, flip_copies=True, copies=1)
    return folder


@pytest.mark.parametrize(("augmentation", "latents"), [("auto", 30), ("false", 10)])
def test_copies_count_in_the_length_of_an_epoch(copied: Path, tmp_path: Path, augmentation: str, latents: int) -> None:
    words = [*TINY, "training.epochs=1", "training.batch_size=1", f"training.augmentation={augmentation}"]
    settings, heard = config.load("imf-xpred", words), Ears()
    expected = plan(settings, copied)
    assert (expected.subjects, expected.latents, expected.updates) == (10, latents, latents)
    assert ("30 with their copies" in "\n".join(expected.lines())) == (latents == 30)
    assert train(settings, copied, tmp_path / "run", device="cpu").updates == latents
    train(settings, copied, tmp_path / "run", device="cpu", listener=heard)
    assert any("already finished" in text for text in heard.messages)


def test_a_run_is_not_continued_on_more_copies(copied: Path, tmp_path: Path) -> None:
    words = [*TINY, "training.updates=1", "training.batch_size=1"]
    without = tmp_path / "latents"
    shutil.copytree(copied, without)
    write_json(without / "dataset.json", read_json(without / "dataset.json") | {"copies": 0})
    train(config.load("imf-xpred", words), without, tmp_path / "run", device="cpu")
    with pytest.raises(UserError, match="was trained on other latents"):
        train(config.load("imf-xpred", words), copied, tmp_path / "run", device="cpu")


# --- what does not fit the latents -------------------------------------------------------------------------------


class Ears:
    """A listener that remembers, and does something after a given update."""

    def __init__(self, after: int | None = None, action: Any = None) -> None:
        self.after, self.action = after, action
        self.messages: list[str] = []
        self.updates: list[int] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def step(self, record: dict[str, Any]) -> None:
        self.updates.append(record["update"])
        if record["update"] == self.after:
            self.action()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["network.name=mit", "network.patch=3", "network.v_head_blocks=0"], r"blocks of 3|multiple of 3|patch"),
        (["network.classes=true"], "needs latents that carry classes"),
        (["objective.lp=[1.5, 2, 2]"], "objective.lp has 3 entries, and these latents have 8 channels"),
        (["objective.channel_weights=[1, 2]"], "objective.channel_weights has 2 entries"),
    ],
)
def test_settings_that_do_not_fit_the_latents_are_refused_before_a_run_begins(
    latents: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    settings = config.load("imf-xpred", overrides)
    with pytest.raises(UserError, match=message):
        plan(settings, latents)
    with pytest.raises(UserError, match=message):
        train(settings, latents, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_token_grid_that_does_not_divide_names_the_sizes_that_do(latents: Path) -> None:
    with pytest.raises(UserError) as caught:
        plan(config.load("imf-xpred", ["network.name=mit", "network.patch=3", "network.v_head_blocks=0"]), latents)
    assert "(8, 8, 8)" in caught.value.message
    assert "(6, 6, 6) or (9, 9, 9)" in caught.value.hint


# --- starting from another run -----------------------------------------------------------------------------------

STILL = ["training.updates=1", "training.warmup_steps=1", "training.seed=0"]  # its one update has rate 0
FLOW = ["objective.name=rectflow", "objective.prediction=u", "network.conditioning=t", "training.lr=1e-2"]


@pytest.fixture(scope="module")
def flow(small: list[str], latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flow model that knows t alone."""
    folder = tmp_path_factory.mktemp("flow") / "run"
    train(config.load("imf-xpred", [*small, *FLOW]), latents, folder, device="cpu")
    return folder


def from_flow(small: list[str], flow: Path, *more: str) -> config.TrainConfig:
    return config.load("imf-xpred", [*small, "objective.prediction=u", f"training.init_from={flow}", *more])


@pytest.mark.parametrize("conditioning", ["decoupled", "t+h", "r+t"])
def test_a_flow_model_that_gets_a_second_time_begins_as_good_as_it_was(
    small: list[str], latents: Path, flow: Path, tmp_path: Path, conditioning: str
) -> None:
    """Its raw validation loss at r = t, before anything is learned, is the flow model's last."""
    settings = from_flow(small, flow, *STILL, f"network.conditioning={conditioning}", "times.data_proportion=1")
    ears = Ears()
    found = train(settings, latents, tmp_path / "run", device="cpu", listener=ears)
    last = json.loads((flow / "result.json").read_text())["val_raw_loss"]
    assert found.val_raw_loss == pytest.approx(last, rel=1e-6)
    assert any("starts from" in text and "average 0.5" in text for text in ears.messages)

    base, new = (neuromf.load(str(folder), device="cpu") for folder in (flow, tmp_path / "run"))
    z, r, t = torch.randn(3, *base.latent_shape), torch.tensor([0.0, 0.3, 0.5]), torch.tensor([1.0, 0.9, 0.5])
    equal = torch.isclose(new.u(z, r, t), base.u(z, t, t), rtol=1e-4, atol=1e-5).flatten(1).all(1)
    assert equal.tolist() == ([False, False, True] if conditioning == "decoupled" else [True, True, True])


@pytest.fixture(scope="module")
def tiny(latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the smallest network, with a second head."""
    folder = tmp_path_factory.mktemp("tiny") / "run"
    train(config.load("imf-xpred", [*TINY, *HEAD, "training.updates=3"]), latents, folder, device="cpu")
    return folder


@pytest.mark.parametrize("head", [HEAD, []])
def test_a_run_may_start_from_one_of_the_same_network_with_or_without_the_second_head(
    latents: Path, tiny: Path, tmp_path: Path, head: list[str]
) -> None:
    settings = config.load("imf-xpred", [*TINY, *head, *STILL, f"training.init_from={tiny}"])
    train(settings, latents, tmp_path / "again", device="cpu")
    ours, theirs = neuromf.load(str(tmp_path / "again"), device="cpu"), neuromf.load(str(tiny), device="cpu")
    assert torch.equal(ours.sample_latents([0]), theirs.sample_latents([0]))


def test_a_run_that_began_from_another_goes_on_from_its_own_checkpoint(
    latents: Path, tiny: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    settings = config.load(
        "imf-xpred", [*TINY, *HEAD, f"training.init_from={base}", "training.updates=8", "training.lr=1e-2"]
    )
    straight = train(settings, latents, tmp_path / "straight", device="cpu")
    stop = Ears(5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        train(settings, latents, tmp_path / "run", device="cpu", listener=stop)
    shutil.rmtree(base)  # no longer needed
    ears = Ears()
    resumed = train(settings, latents, tmp_path / "run", device="cpu", listener=ears)
    assert ears.updates == [6, 7, 8]
    assert not any("starts from" in text for text in ears.messages)
    assert resumed.val_raw_loss == straight.val_raw_loss


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.prediction=x"], "predicts u, this run x"),
        (["network.res_blocks=2"], "res_blocks: 1 there, 2 here"),
        (["network.channels=[16,64]"], "channels"),
    ],
)
def test_a_run_cannot_start_from_one_that_differs_in_more(
    small: list[str], latents: Path, flow: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train(from_flow(small, flow, *overrides), latents, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()  # the corrected command can have the folder


def test_a_run_cannot_start_from_latents_of_another_autoencoder(
    small: list[str], latents: Path, flow: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(flow, base)
    data = json.loads((base / "data.json").read_text())
    data["autoencoder"]["sha256"] = "0" * 64
    (base / "data.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="latents of another autoencoder"):
        train(from_flow(small, base), latents, tmp_path / "run", device="cpu")


def test_a_run_to_start_from_that_is_not_there_is_named(small: list[str], latents: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run at runs/absent"):
        train(from_flow(small, Path("runs/absent")), latents, tmp_path / "run", device="cpu")
