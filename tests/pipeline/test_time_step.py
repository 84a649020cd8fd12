from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neuromf import config
from neuromf.errors import UserError
from neuromf.pipeline.time_step import MOST, WARM_UP, Session, StepTimes, TimedPlan, time_step
from neuromf.pipeline.train import plan

TINY = [
    "network.name=mlp", "network.width=8", "network.depth=2", "ema.decays=[0.5]", "ema.select=0.5",
    "training.batch_size=4", "training.accumulation=2", "training.updates=3",
]  # fmt: skip


def test_the_expected_total_is_updates_and_looks(latents: Path, small: list[str]) -> None:
    planned = plan(config.load("imf-xpred", [*small, "training.updates=200"]), latents, device="cpu")
    assert (planned.updates, planned.validations, planned.drawn) == (200, 2, 1)
    found = TimedPlan(planned, StepTimes(0.4, 0.5, 0.2, 7.0, 30.0, 20, planned.memory.total // 2))
    assert found.total_s == 200 * 0.5 + 2 * 7 + 30
    assert found.ratio == pytest.approx(2)
    shown = "\n".join(found.lines())
    assert "400.0 ms (median of 20); 200.0 ms with r = t throughout: MeanFlow costs 2.00 times" in shown
    assert "0.50 of the estimate" in shown
    assert "whole run   about 2 min" in shown
    assert shown.index("whole run") < shown.index("warning: ")


def test_a_few_updates_are_made_of_both_kinds_and_nothing_is_kept(
    latents: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from neuromf.training.objective import Objective

    moving: list[int] = []
    forward = Objective.forward

    def spy(self: Objective, x: Any, eps: Any, r: Any, t: Any, *rest: Any, **named: Any) -> Any:
        if self.training:
            moving.append(int((r < t).sum()))
        return forward(self, x, eps, r, t, *rest, **named)

    monkeypatch.setattr(Objective, "forward", spy)
    before = {path: path.stat().st_mtime_ns for path in latents.rglob("*")}
    heard: list[tuple[str, int, int]] = []
    found = time_step(
        config.load("imf-xpred", [*TINY, "times.data_proportion=0.75"]),
        latents,
        device="cpu",
        progress=lambda *said: heard.append(said),
    )
    half = len(moving) // 2
    assert half == 2 * (2 + MOST)  # micro-batches: two to warm up, and those that are timed
    assert sum(moving[:half]) == half  # a quarter of four samples
    assert sum(moving[half:]) == 0
    assert min(found.times[:5]) > 0
    assert found.times.timed == MOST
    assert ("timing updates", MOST, MOST) in heard
    assert list(in_tmp.iterdir()) == []
    assert before == {path: path.stat().st_mtime_ns for path in latents.rglob("*")}


def test_a_second_head_guidance_and_learned_weights_are_timed_too(latents: Path) -> None:
    words = ["network.v_head_blocks=1", "objective.tangent=v-head", "objective.channel_weights=learned"]
    found = time_step(config.load("imf-xpred", [*TINY, *words]), latents, device="cpu")
    assert found.to_dict()["time_step"]["ratio_to_plain"] > 0


def test_without_latents_the_next_command_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        time_step(config.load("imf-xpred", TINY), tmp_path / "latents")
    assert "neuromf encode" in caught.value.hint


def test_the_command_tells_time_and_memory(neuromf: Callable[..., Any], latents: Path, in_tmp: Path) -> None:
    words = ["train", "--data", latents, "--device", "cpu", "--time-step", *TINY]
    shown = neuromf(*words, "--quiet")
    assert shown.exit_code == 0, shown.stderr
    assert "times plain flow matching" in shown.stdout
    answer = json.loads(neuromf(*words, "--json").stdout)
    assert answer["time_step"]["timed"] == MOST
    assert answer["time_step"]["expected_total_s"] > 0
    assert list(in_tmp.iterdir()) == []


def test_ctrl_c_ends_it_cleanly(
    neuromf: Callable[..., Any], latents: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates = iter(range(100))

    def interrupted(self: Session, batches: Any) -> None:
        update(self, batches)
        if next(updates) == WARM_UP + 1:
            os.kill(os.getpid(), signal.SIGINT)

    update = Session.update
    monkeypatch.setattr(Session, "update", interrupted)
    ended = neuromf("train", "--data", latents, "--device", "cpu", "--time-step", *TINY)
    assert ended.exit_code == 75
    assert "stopped" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert next(updates) == WARM_UP + 2
    assert list(in_tmp.iterdir()) == []
