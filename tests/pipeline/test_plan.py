from __future__ import annotations

import json
from pathlib import Path

import pytest

from neuromf import config
from neuromf.pipeline.plan import Plan
from neuromf.pipeline.train import plan

LONG = ["training.updates=100000", "training.warmup_steps=1000"]


def of(latents: Path, *words: str) -> Plan:
    return plan(config.load("imf-xpred", list(words)), latents, device="cpu")


def test_the_plan_counts_updates_epochs_images_and_looks(small: list[str], latents: Path) -> None:
    found = of(latents, *small, "training.updates=45", "training.accumulation=2", "intervals.samples=2")
    assert (found.updates, found.epochs) == (45, 5)  # an epoch has ten updates at least
    assert found.batch == (4, 2, 1)
    assert found.to_dict()["images"] == 45 * 8
    assert (found.validations, found.drawn) == (1, 3)  # every tenth epoch and every second, and in the last


def test_processes_of_a_launcher_are_part_of_the_batch(
    small: list[str], latents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    found = of(latents, *small, "training.accumulation=2")
    assert found.batch == (4, 2, 3)
    assert "24 images an update = 4 at a time x 2 accumulated x 3 processes" in "\n".join(found.lines())


@pytest.mark.parametrize(
    ("words", "written"),
    [
        (["intervals.checkpoint_updates=5"], 3),  # 5, 10, 12
        (["intervals.checkpoint_updates=4"], 3),  # 4, 8, 12
        (["intervals.checkpoint_updates=5", "intervals.keep_every=10"], 3),
        (["intervals.checkpoint_updates=5", "intervals.keep_every=4"], 5),  # 4, 5, 8, 10, 12
        (["intervals.checkpoint_updates=500"], 1),
    ],
)
def test_checkpoints_are_counted(small: list[str], latents: Path, words: list[str], written: int) -> None:
    assert of(latents, *small, *words).written == written


def test_the_disk_holds_the_kept_checkpoints_and_one_in_the_making(small: list[str], latents: Path) -> None:
    each = ["intervals.checkpoint_updates=1"]
    found = of(latents, *small, *each)
    weights = 4 * sum(found.parameters.values())
    # weights, one average and two moments, for the two kept checkpoints and one being written
    assert found.disk.checkpoints == 4 * weights * 3
    assert found.disk.best == weights
    assert found.disk.samples == 4 * 4 * 8**4 * 4 * found.drawn  # numbers of evaluations, samples, float32 latents
    assert of(latents, *small, *each, "intervals.keep_every=4").disk.checkpoints == 4 * weights * (3 + 3)
    assert of(latents, *small, "intervals.checkpoint_updates=500").disk.checkpoints == 4 * weights * 2  # there is one


def test_a_finished_run_takes_the_planned_disk(small: list[str], latents: Path, run: Path) -> None:
    """One checkpoint, the best average and the samples; headers and figures come on top."""
    found = of(latents, *small)
    (newest,) = (run / "checkpoints").glob("step_*")
    taken = sum(path.stat().st_size for path in newest.iterdir())
    assert taken == pytest.approx(found.disk.checkpoints / 2, rel=0.1)
    assert (run / "checkpoints/best.safetensors").stat().st_size == pytest.approx(found.disk.best, rel=0.1)
    (drawn,) = (run / "samples/generated_samples").iterdir()
    assert drawn.stat().st_size == pytest.approx(found.disk.samples, rel=0.1)


def test_parameters_are_told_apart(small: list[str], latents: Path) -> None:
    alone = of(latents, *small)
    more = of(
        latents, *small, "network.v_head_blocks=2", "objective.tangent=v-head", "objective.channel_weights=learned"
    )
    assert more.parameters["network"] == alone.parameters["network"]
    assert alone.parameters["second head"] == alone.parameters["learned by the objective"] == 0
    assert more.parameters["second head"] > 1000
    assert more.parameters["learned by the objective"] == 8  # channels
    assert sum(more.parameters.values()) == more.memory.parameters
    assert "learned by the objective 8 of them" in "\n".join(more.lines())


def test_the_windows_of_the_averages_are_shares_of_the_run(latents: Path, small: list[str]) -> None:
    averages = ["ema.decays=[0.999,0.99]", "ema.half_lives_kimg=[4]", "ema.select=0.99", "training.updates=1000"]
    found = {a.name: a for a in of(latents, *small, *averages).averages}
    assert found["0.999"].window == pytest.approx(1000)
    assert found["0.999"].share == pytest.approx(1)
    assert found["0.99"].share == pytest.approx(0.1)
    assert found["4kimg"].window == pytest.approx(4000 / 0.6931 / 4, rel=1e-3)
    assert [name for name, a in found.items() if a.selected] == ["0.99"]


# --- warnings ----------------------------------------------------------------------------------------------------


def test_a_run_that_is_long_enough_warns_of_nothing(latents: Path, small: list[str]) -> None:
    assert of(latents, *small, *LONG).warnings == []


@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        (["ema.decays=[0.99999]", "ema.select=0.99999"], ["100,000 updates", "10 %", "100,000 planned"]),
        (["training.warmup_steps=30000"], ["30,000 of 100,000", "30%", "warmup_steps=5000"]),
        (["training.updates=9999", "training.warmup_steps=10"], ["9,999 updates are few", "100,000"]),
        (["training.precision=bf16"], ["2^3 cells", "fp32"]),
    ],
)
def test_a_warning_quotes_its_numbers(latents: Path, small: list[str], words: list[str], numbers: list[str]) -> None:
    (warning,) = of(latents, *small, *LONG, *words).warnings
    assert all(number in warning for number in numbers), warning


# --- what is shown -----------------------------------------------------------------------------------------------


def test_the_table_says_first_what_a_user_asks_first(latents: Path, small: list[str]) -> None:
    lines = of(latents, *small).lines()
    names = [line.split("  ")[0].split(" about")[0].strip() for line in lines if not line.startswith("warning")]
    assert names[:5] == ["preset", "data", "network", "batch", "updates"]
    assert all(len(line) < 250 for line in lines)
    assert not any("norm_groups" in line for line in lines)


def test_the_answer_for_scripts_holds_the_numbers_and_the_settings(latents: Path, small: list[str]) -> None:
    found = json.loads(json.dumps(of(latents, *small).to_dict()))
    assert found["memory_bytes"]["total"] < found["memory_bytes"]["available"]
    assert found["disk_bytes"]["total"] == sum(found["disk_bytes"][k] for k in ("checkpoints", "best", "samples"))
    assert found["batch"] == {"per_process": 4, "accumulation": 1, "processes": 1, "total": 4}
    assert found["config"]["network"]["channels"] == [16, 32]
    assert found["warmup"]["share"] == 1
