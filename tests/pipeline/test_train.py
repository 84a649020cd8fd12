from __future__ import annotations

import json
from pathlib import Path

import pytest

from neuromf import config
from neuromf.data.latents import load_latent_folder_info
from neuromf.errors import UserError
from neuromf.pipeline.train import plan, train


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


def test_run_leaves_pictures_and_curves(run: Path) -> None:
    assert (run / "progress.png").stat().st_size > 1000
    assert list((run / "samples").glob("epoch_*/latent_channels.png"))
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


def test_plan_counts_parameters_updates_and_disk(small: list[str], latents: Path) -> None:
    settings = config.load("imf-xpred", small)
    expected = plan(settings, latents)
    assert expected.updates == 12
    assert expected.subjects == len(load_latent_folder_info(latents).splits["train"])
    # weights, one average and two moments, in float32, for the two kept checkpoints and one being written
    assert expected.disk_bytes == expected.memory.parameters * 4 * 4 * 3
    assert json.dumps(expected.to_dict())


def test_flipped_copies_are_asked_for_in_vain(small: list[str], latents: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs flipped copies") as caught:
        train(config.load("imf-xpred", [*small, "training.flip=true"]), latents, tmp_path / "run")
    assert "--flip-copies" in caught.value.hint
