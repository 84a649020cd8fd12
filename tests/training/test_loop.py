from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from neuromf.errors import GuardError, Interrupted, UserError
from neuromf.files import read_json
from neuromf.training import checkpoint
from neuromf.training.processes import make_accelerator
from neuromf.training.telemetry import SUMMARY
from tests.training.small_runs import (
    SHAPE,
    UPDATES,
    Ears,
    Latents,
    Small,
    last,
    learn,
    run,
    same,
    settings,
    terminate,
)

SPECIFIED = {
    "epoch", "global_step", "loss_mean", "loss_std", "raw_loss_mean", "raw_loss_std", "raw_loss_fm_mean",
    "raw_loss_mf_mean", "velocity_norms", "cosine_sim_V_vc", "cosine_sim_vtilde_vc", "relative_error",
    "adaptive_weight", "x_hat_stats", "grad_clip_fraction", "grad_norm_mean", "grad_norm_std", "learning_rate",
    "epoch_time_sec", "val_loss", "val_raw_loss", "sampling", "raw_loss_by_t", "block_grad_norms",
    "relative_update_norm", "ema_divergence", "per_channel_loss", "generated_samples", "guards",
}  # fmt: skip


# --- learning ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [{"name": "imf"}, {"name": "rectflow", "prediction": "u"}])
def test_the_loss_falls_and_the_samples_approach_the_data(tmp_path, objective):
    ears = run(tmp_path, settings(objective=objective, training={"updates": 80, "lr": 3e-2}))
    losses = [e["raw_loss_mean"] for e in read_json(tmp_path / SUMMARY)]
    assert losses[-1] < 0.6 * losses[0]
    validated = [e["val_raw_loss"] for e in ears.epochs]
    assert validated[-1] < 0.6 * validated[0]


def test_the_learning_rate_is_the_schedules(tmp_path):
    rates = [step["lr"] for step in run(tmp_path, settings()).steps]
    assert rates[:3] == pytest.approx([0, 5e-3, 1e-2])
    assert rates[-1] == pytest.approx(1e-6)


def test_the_selected_average_validates_and_samples(tmp_path):
    """With a decay of nearly one the average is still the fresh network, so validation does not change."""
    slow = settings(ema={"decays": (0.5, 1 - 1e-9), "select": 1 - 1e-9})
    fast = settings(ema={"decays": (0.5, 1 - 1e-9), "select": 0.5})
    slow_ears, fast_ears = run(tmp_path / "slow", slow), run(tmp_path / "fast", fast)
    validated = [e["val_raw_loss"] for e in slow_ears.epochs]
    assert validated[0] == pytest.approx(validated[1], rel=1e-5)
    assert fast_ears.epochs[0]["val_raw_loss"] != pytest.approx(fast_ears.epochs[1]["val_raw_loss"], rel=1e-3)
    torch.testing.assert_close(slow_ears.drawn[0][1][1], slow_ears.drawn[1][1][1], rtol=1e-4, atol=1e-5)


def test_samples_come_from_fixed_noise(tmp_path):
    first, second = run(tmp_path / "a", settings()), run(tmp_path / "b", settings())
    assert [epoch for epoch, _ in first.drawn] == [1, 2]
    for (_, a), (_, b) in zip(first.drawn, second.drawn, strict=True):
        assert set(a) == {1, 2, 5, 10}
        assert a[1].shape == (3, *SHAPE)
        assert same(a, b)


# --- what the objective learns, and what it is told ------------------------------------------------------------------


LEARNED = {"objective": {"channel_weights": "learned", "prediction": "u"}}


def test_learned_channel_weights_are_trained_kept_and_resumed(tmp_path):
    config = settings(**LEARNED, training={"optimizer": "adamw", "lr": 1e-2})
    run(tmp_path / "a", config)
    with pytest.raises(Interrupted):
        run(tmp_path / "b", config, Ears(7, terminate))
    halfway = last(tmp_path / "b").state["objective"]["log_variances"]
    assert halfway.shape == (2,)
    assert halfway.any()
    run(tmp_path / "b", config)
    whole, resumed = last(tmp_path / "a"), last(tmp_path / "b")
    assert same(resumed.state, whole.state | {"epoch": resumed.state["epoch"]})  # which holds wall times
    assert same(resumed.model, whole.model)
    assert not same(whole.state["objective"]["log_variances"], halfway)
    assert "log_variances" not in whole.model


class Told(Small):
    """Also knows two classes, and remembers which labels it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.classes, self.seen = nn.Embedding(3, 2), []

    def forward(self, z, r, t, condition):
        self.seen += condition.label.tolist()
        return super().forward(z, r, t) + self.classes(condition.label)[..., None, None, None]


class Classed(Latents):
    """Every other latent is of class 1."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.labels = torch.arange(count) % 2


def test_a_network_with_classes_sees_each_and_sometimes_none(tmp_path):
    config = settings(
        network={"classes": True}, objective={"name": "rectflow", "prediction": "u"}, guidance={"label_drop": 0.3}
    )
    network = Told()
    start = network.classes.weight.detach().clone()
    ears = Ears()
    learn(config, tmp_path, network, Classed(6), Classed(3), ears, classes=2)
    assert set(network.seen) == {0, 1, 2}
    assert network.seen[: 4 * 10].count(2) < 25
    assert (last(tmp_path).model["classes.weight"] != start).any(dim=1).all()
    assert ears.epochs[-1]["val_raw_loss"] > 0
    assert [epoch for epoch, _ in ears.drawn] == [1, 2]


def test_the_schedule_of_alphaflow_follows_the_updates(tmp_path, monkeypatch):
    from neuromf.training.objective import Objective

    seen: list[float] = []
    plain = Objective.flow_alpha
    monkeypatch.setattr(Objective, "flow_alpha", lambda self, p: seen.append(p) or plain(self, p))
    run(tmp_path, settings(objective={"name": "alphaflow", "alpha_schedule": (0.0, 1.0)}))
    training = [p for p in seen if p < 1]  # validation stands at the end
    assert training == pytest.approx([i / UPDATES for i in range(UPDATES)])
    assert 1.0 in seen


# --- what a run says ---------------------------------------------------------------------------------------------


def test_every_update_shows_the_raw_loss_beside_the_weighted_one(tmp_path):
    weight = {"norm_p": 1.0, "norm_eps": 1e-6, "loss_reduction": "sum"}
    steps = run(tmp_path, settings(objective=weight)).steps
    assert [step["update"] for step in steps] == list(range(1, UPDATES + 1))
    assert all(step["updates"] == UPDATES for step in steps)
    assert [step["epoch"] for step in steps] == [1] * 10 + [2] * 2
    for step in steps:
        assert step["loss"] == pytest.approx(1, abs=1e-3)
        assert step["raw_loss"] > 10
    assert steps[-1]["eta_s"] == 0


def test_the_summaries_have_the_specified_fields(uninterrupted):
    epochs = read_json(uninterrupted / SUMMARY)
    assert [(e["epoch"], e["global_step"]) for e in epochs] == [(1, 10), (2, 12)]
    for epoch in epochs:
        assert set(epoch) >= SPECIFIED
        assert epoch["val_raw_loss"] > 0
        assert set(epoch["sampling"]) == set(epoch["sampling"]["expected"]) | {"expected", "count"}
        assert 0 <= epoch["sampling"]["h_zero_frac"] <= 1
        assert set(epoch["block_grad_norms"]) == {"inside", "outside", "times"}
        assert 0 < epoch["relative_update_norm"] < 0.1
        assert 0 < epoch["ema_divergence"] < 1
        assert set(epoch["generated_samples"]["stats"]) == {"nfe_1", "nfe_2", "nfe_5", "nfe_10"}
        assert epoch["guards"]["state"] == "ok"
        assert epoch["guards"]["skipped_updates"] == 0
    assert epochs[-1]["sampling"]["count"] == 2 * 4
    assert (uninterrupted / "diagnostics/per_epoch_metrics/epoch_002/summary.json").is_file()


def test_the_update_an_epoch_ends_with_is_the_one_looked_at(tmp_path):
    """The rate of its last update is nearly nought here, and the weights move by about as little."""
    epochs = run(tmp_path, settings(training={"updates": 20, "schedule": "linear", "lr_final": 1e-12})).epochs
    assert epochs[0]["relative_update_norm"] > 1e-4
    assert epochs[1]["relative_update_norm"] < 1e-9
    assert all(norm > 0 for norm in epochs[1]["block_grad_norms"].values())


def test_the_divergence_of_the_average_is_that_of_the_selected_one(tmp_path):
    """A decay of nearly one leaves the average where the network began."""
    frozen = run(tmp_path / "a", settings(ema={"decays": (0.5, 1 - 1e-9), "select": 1 - 1e-9})).epochs
    following = run(tmp_path / "b", settings(ema={"decays": (0.5, 1 - 1e-9), "select": 0.5})).epochs
    start, model = Small().state_dict(), last(tmp_path / "a").model
    squares = [sum(float((model[n] - w).square().sum()) for n, w in start.items())]
    squares.append(sum(float(w.square().sum()) for w in model.values()))
    assert frozen[-1]["ema_divergence"] == pytest.approx(math.sqrt(squares[0] / squares[1]), rel=1e-4)
    assert following[-1]["ema_divergence"] < 0.5 * frozen[-1]["ema_divergence"]


def test_the_costly_figures_come_at_their_intervals_and_at_the_end(tmp_path):
    rare = {"validation": 100, "samples": 100, "diagnostics": 2}
    epochs = run(tmp_path, settings(intervals=rare, training={"updates": 32})).epochs
    assert [e["per_channel_loss"] is not None for e in epochs] == [False, True, False, True]
    assert [e["generated_samples"] is not None for e in epochs] == [False, False, False, True]
    assert len(epochs[1]["per_channel_loss"]) == 2


def test_validation_and_samples_come_at_their_intervals_and_at_the_end(tmp_path):
    rare = {"validation": 2, "samples": 2}
    ears = run(tmp_path, settings(intervals=rare, training={"updates": 32}))
    assert [e["val_raw_loss"] is not None for e in ears.epochs] == [False, True, False, True]
    assert [epoch for epoch, _ in ears.drawn] == [2, 4]


def test_a_run_without_validation_data_says_null(tmp_path):
    learn(settings(), tmp_path, Small(), Latents(6), Latents(0), Ears())
    summary = read_json(tmp_path / SUMMARY)[-1]
    assert summary["val_raw_loss"] is None
    assert summary["per_channel_loss"] is None
    assert checkpoint.best(tmp_path) is None


# --- guards ------------------------------------------------------------------------------------------------------


def test_a_broken_latent_costs_its_updates_and_nothing_else(tmp_path):
    ears = run(tmp_path, settings(training={"batch_size": 2}), broken=(4,))
    skipped = [text for text in ears.messages if "skipped: loss or gradient is not finite" in text]
    assert len(skipped) == UPDATES * 2 // 6  # one of the three batches of every pass
    final = last(tmp_path)
    assert final.state["guards"]["nonfinite"] == len(skipped)
    assert ears.epochs[-1]["guards"]["skipped_updates"] == len(skipped)
    assert all(torch.isfinite(value).all() for value in final.model.values())
    assert all(torch.isfinite(value).all() for average in final.averages.values() for value in average.values())
    assert read_json(tmp_path / SUMMARY)[0]["raw_loss_mean"] > 0


def test_too_many_broken_updates_end_the_run(tmp_path):
    config = settings(training={"batch_size": 2}, guards={"nonfinite_limit": 2})
    with pytest.raises(GuardError, match="3 updates had a non-finite loss"):
        run(tmp_path, config, broken=(0, 1, 2, 3, 4, 5))


def test_divergence_ends_the_run_and_keeps_the_last_checkpoint(tmp_path):
    class Exploding(Small):
        """Gets a hundred times worse after the guard has seen how it began."""

        def forward(self, z, r, t):
            growth = 1.0 if len(self.autocast) < 51 else 100.0
            return growth * super().forward(z, r, t) + (growth - 1)

    config = settings(
        training={"updates": 200},
        objective={"name": "rectflow", "prediction": "u"},
        intervals={"validation": 100, "samples": 100, "checkpoint_updates": 50},
    )
    with pytest.raises(GuardError, match=r"the run diverges; the last good checkpoint is .*step_00000050"):
        learn(config, tmp_path, Exploding(), Latents(6), Latents(3), Ears())
    assert last(tmp_path).update == 50
    halted = read_json(tmp_path / "diagnostics/halted.json")
    assert halted["global_step"] > 50
    assert halted["guards"]["skipped_updates"] == 0


# --- precision and devices -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "expected"), [("bf16", True), ("fp32", False), ("auto", False)])
def test_every_update_runs_in_the_configured_precision(tmp_path, precision, expected):
    network = Small()
    config = settings(
        objective={"name": "rectflow", "prediction": "u"}, training={"precision": precision, "updates": 5}
    )
    ears = Ears()
    learn(config, tmp_path, network, Latents(6), Latents(0), ears)
    assert network.autocast[:5] == [expected] * 5
    assert all(math.isfinite(step["raw_loss"]) for step in ears.steps)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cpu"):
        make_accelerator(device, "auto")
