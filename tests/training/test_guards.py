from __future__ import annotations

import math

import pytest

from neuromf.config import GuardsConfig
from neuromf.errors import GuardError
from neuromf.training.guards import WINDOW, Guards


def started(**settings) -> Guards:
    """Guards that have seen a first window of raw losses of one."""
    guards = Guards(GuardsConfig(**settings))
    for _ in range(WINDOW):
        assert guards.observe(1.0, 1.0) is None
    return guards


def feed(guards: Guards, raw_fm: float | None, raw_mf: float | None, count: int = WINDOW) -> list[str]:
    return [text for _ in range(count) if (text := guards.observe(raw_fm, raw_mf))]


def test_a_steady_run_is_left_alone():
    assert feed(started(), 9.9, 9.9, 200) == []


@pytest.mark.parametrize(("losses", "part"), [((11.0, 1.0), "fm"), ((1.0, 11.0), "mf")])
def test_ten_times_the_first_raw_loss_is_warned_of_once(losses, part):
    texts = feed(started(), *losses, 150)
    assert len(texts) == 1
    assert f"raw {part} loss" in texts[0]
    assert "11.0 times" in texts[0]


@pytest.mark.parametrize("losses", [(101.0, None), (None, 101.0), (1.0, 101.0)])
def test_a_hundred_times_ends_the_run(losses):
    with pytest.raises(GuardError, match=r"101 times .*diverges") as caught:
        feed(started(), *losses)
    assert caught.value.exit_code == 3


def test_a_run_that_diverges_at_once_is_caught_as_soon_as_there_is_a_window():
    guards = Guards(GuardsConfig())
    assert feed(guards, 1.0, 1.0, 8) == []
    with pytest.raises(GuardError, match="1000 times"):
        feed(guards, 1000.0, 1.0, WINDOW)
    assert guards.updates == WINDOW


def test_the_median_decides_so_single_peaks_do_not():
    guards = started()
    for _ in range(20):
        assert feed(guards, 1e6, 1e6, 1) == []
        assert feed(guards, 1.0, 1.0, 2) == []


def test_updates_without_moving_samples_are_left_out_of_that_part():
    guards = Guards(GuardsConfig())
    for k in range(4 * WINDOW):
        guards.observe(1.0, 5.0 if k % 4 == 0 else None)
    assert guards.first["mf"] == [5.0] * WINDOW
    assert len(guards.first["fm"]) == WINDOW


def test_without_the_guard_nothing_happens():
    assert feed(started(divergence=False), 1e9, 1e9) == []


def test_non_finite_losses_do_not_enter_the_medians():
    assert feed(started(), math.nan, math.inf, 200) == []


def test_non_finite_updates_are_counted_and_end_the_run_beyond_the_limit():
    guards = Guards(GuardsConfig(nonfinite_limit=2))
    assert "update 5 skipped" in guards.skip_nonfinite(5)
    assert "2 so far" in guards.skip_nonfinite(9)
    with pytest.raises(GuardError, match=r"3 updates .*number 11"):
        guards.skip_nonfinite(11)


def test_the_memory_survives_a_restart():
    guards = started()
    guards.skip_nonfinite(1)
    feed(guards, 20.0, 20.0, 30)
    assert guards.warned
    resumed = Guards(GuardsConfig())
    resumed.restore(guards.state())
    assert resumed == guards
    with pytest.raises(GuardError):
        feed(resumed, 200.0, 1.0)


def test_a_loss_that_has_not_begun_to_fall_is_said_once():
    guards = started(stuck_after=200)
    texts = feed(guards, 0.99, 0.5, 400)
    assert len(texts) == 1
    assert "raw fm loss has not fallen in 200 updates (0.99 against 1)" in texts[0]
    assert guards.verdict == guards.figures()["state"] == "stuck"
    assert feed(guards, 0.5, 0.5) == []
    assert guards.verdict == "ok"


@pytest.mark.parametrize(("settings", "loss"), [({"stuck_after": 200}, 0.9), ({"stuck_after": None}, 1.0)])
def test_a_loss_that_falls_is_not_stuck_and_nobody_has_to_look(settings, loss):
    guards = started(**settings)
    assert feed(guards, loss, loss, 400) == []
    assert guards.verdict == "ok"


def test_weights_are_worth_keeping_while_updates_are_made_and_their_loss_is_usual():
    guards = Guards(GuardsConfig())
    assert feed(guards, 1.0, None, 3) == []
    assert guards.healthy
    guards.skip_nonfinite(4)
    assert guards.verdict == "non-finite"
    assert not guards.healthy
    guards.accept()
    assert guards.healthy
    feed(guards, 1e5, None, 1)
    assert (guards.verdict, guards.healthy) == ("diverging", False)


def test_the_verdict_follows_the_loss_and_travels_in_the_checkpoint():
    guards = started()
    feed(guards, 11.0, 1.0)
    assert guards.verdict == "diverging"
    other = Guards(GuardsConfig())
    other.restore(guards.state())
    assert other == guards
    assert other.figures()["ratio_fm"] == pytest.approx(11)
    feed(other, 1.0, 1.0)
    assert other.verdict == "ok"
    assert other.warned
