from __future__ import annotations

import os
import signal

import pytest
import torch
from torch import nn

from neuromf.errors import Interrupted, UserError
from neuromf.training import checkpoint
from tests.training.small_runs import (
    UPDATES,
    CrashError,
    Ears,
    Latents,
    Small,
    crash,
    last,
    learn,
    run,
    same,
    settings,
    terminate,
    untimed,
)

# --- stopping and going on ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "error", "after", "resumes"),
    [
        (terminate, Interrupted, 7, 7),
        (crash, CrashError, 7, 5),
        (terminate, Interrupted, 11, 11),
        (crash, CrashError, 12, 10),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, uninterrupted, action, error, after, resumes):
    with pytest.raises(error):
        run(tmp_path, settings(), Ears(after, action))
    ears = run(tmp_path, settings())
    assert any(f"resumed after update {resumes} of {UPDATES}" in text for text in ears.messages)
    assert [step["update"] for step in ears.steps] == list(range(resumes + 1, UPDATES + 1))
    ours, theirs = last(tmp_path), last(uninterrupted)
    assert same(ours.model, theirs.model)
    assert same(ours.averages, theirs.averages)
    assert same(ours.state["optimizer"], theirs.state["optimizer"])
    assert same(ours.state["guards"], theirs.state["guards"])
    assert untimed(tmp_path) == untimed(uninterrupted)


def test_dropout_resumes_too(tmp_path):
    """Whatever a network draws for itself depends on the update alone."""

    class Forgetful(Small):
        def forward(self, z, r, t):
            return super().forward(nn.functional.dropout3d(z, 0.3, self.training), r, t)

    for folder, ears in (("whole", Ears()), ("parts", Ears(after=7, action=terminate))):
        learner = (settings(), tmp_path / folder, Forgetful(), Latents(6), Latents(3))
        if ears.action:
            with pytest.raises(Interrupted):
                learn(*learner, ears)
            torch.rand(5)
        learn(*learner, Ears())
    assert same(last(tmp_path / "whole").model, last(tmp_path / "parts").model)


def test_a_network_without_blocks_to_recompute_is_refused(tmp_path):
    with pytest.raises(UserError, match="no blocks to recompute"):
        run(tmp_path, settings(training={"recompute": True}))


def test_accumulated_micro_batches_resume_too(tmp_path):
    config = settings(training={"batch_size": 2, "accumulation": 2})
    run(tmp_path / "a", config)
    with pytest.raises(Interrupted):
        run(tmp_path / "b", config, Ears(7, terminate))
    run(tmp_path / "b", config)
    assert same(last(tmp_path / "a").model, last(tmp_path / "b").model)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_saves_and_ends_with_the_code_that_means_resume(tmp_path, name):
    before = signal.getsignal(getattr(signal, name))
    with pytest.raises(Interrupted, match=rf"{name} after update 3 of 12") as caught:
        run(tmp_path, settings(), Ears(3, lambda: os.kill(os.getpid(), getattr(signal, name))))
    assert caught.value.exit_code == 75
    assert last(tmp_path).update == 3
    assert signal.getsignal(getattr(signal, name)) == before


def test_a_damaged_checkpoint_costs_only_the_updates_since_the_one_before(tmp_path, uninterrupted):
    with pytest.raises(CrashError):
        run(tmp_path, settings(), Ears(11, crash))
    newest, _ = checkpoint.newest(tmp_path)
    assert newest.name == "step_00000010"
    (newest / "model.safetensors").write_bytes(b"")
    ears = run(tmp_path, settings())
    assert any("step_00000010 is damaged" in text for text in ears.messages)
    assert ears.steps[0]["update"] == 6
    assert same(last(tmp_path).model, last(uninterrupted).model)


def test_a_finished_run_has_nothing_left_to_do(tmp_path):
    run(tmp_path, settings())
    before = last(tmp_path)
    ears = run(tmp_path, settings())
    assert ears.steps == []
    assert same(last(tmp_path).model, before.model)


# --- what is kept ------------------------------------------------------------------------------------------------


def test_the_best_weights_are_those_of_the_lowest_validation(tmp_path):
    """Too high a rate from the second epoch on: the first one's average stays the best."""
    ears = run(tmp_path, settings(training={"updates": 40, "lr": 0.3, "warmup_steps": 40}))
    validated = {e["global_step"]: e["val_raw_loss"] for e in ears.epochs}
    best = checkpoint.best(tmp_path)
    assert best == (min(validated, key=validated.get), "0.9", min(validated.values()))
    assert best.update < 40


def test_a_stopped_run_keeps_the_same_best(tmp_path, uninterrupted):
    with pytest.raises(CrashError):
        run(tmp_path, settings(), Ears(12, crash))
    run(tmp_path, settings())
    ours, theirs = (checkpoint.load_best(folder) for folder in (tmp_path, uninterrupted))
    assert ours[1] == theirs[1]
    assert same(ours[0], theirs[0])


def test_checkpoints_that_are_to_stay_are_written_and_stay(tmp_path):
    run(tmp_path, settings(intervals={"keep_every": 4, "checkpoint_updates": 5, "keep_checkpoints": 1}))
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*"))
    assert kept == ["step_00000004", "step_00000008", "step_00000012"]
