"""Progress: plain lines for logs, a live view for people, warnings alone when quiet."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from typing import Any

import pytest

from neuromf_cli import progress as module
from neuromf_cli.progress import (
    PlainLines,
    WarningsOnly,
    describe_epoch,
    describe_guards,
    describe_step,
    duration,
    progress,
    validations,
)

RECORD = {
    "update": 120,
    "updates": 4000,
    "epoch": 3,
    "raw_loss": 0.512,
    "loss": 0.98,
    "lr": 1e-4,
    "images_per_s": 34.12,
    "eta_s": 130.0,
}
FULL = {
    **RECORD,
    "raw_fm": 0.43,
    "raw_mf": None,
    "V_ratio": 0.97,
    "cosine": 0.62,
    "grad_norm": 0.4,
    "seconds_per_update": 0.47,
    "memory_bytes": 12.5 * 2**30,
    "guards": {"state": "diverging", "warned": True, "skipped_updates": 2},
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """A clock that is put forward by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now_s)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def summary(epoch: int, validation: float | None = None) -> dict[str, Any]:
    return {"epoch": epoch, "global_step": 10 * epoch, "raw_loss_mean": 0.5, "val_raw_loss": validation}


# --- which one ---------------------------------------------------------------------------------------------------


def test_the_kind_of_progress_follows_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from neuromf_cli.live import LiveView

    with progress(quiet=True) as show:
        assert isinstance(show, WarningsOnly)
    with progress(quiet=False) as show:
        assert isinstance(show, PlainLines)
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with progress(quiet=False) as show:
        assert isinstance(show, LiveView)
    with progress(quiet=True) as show:
        assert isinstance(show, WarningsOnly)
    monkeypatch.setenv("TERM", "dumb")  # it can move no cursor
    with progress(quiet=False) as show:
        assert isinstance(show, PlainLines)


def test_a_log_needs_no_rich() -> None:
    script = (
        "import sys; from neuromf_cli.progress import progress\n"
        "with progress(quiet=False) as show: show('encoding', 1, 2)\n"
        "sys.exit('rich' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "encoding 1/2\n")


def test_quiet_lets_warnings_through_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    show = WarningsOnly()
    show("encoding", 1, 2)
    show.step(FULL)
    show.epoch([summary(1, 0.5)])
    show.message("updates: 60\nwarning: the window is long\ndisk: 1 GiB")
    show.message("resumed after update 3")
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", "warning: the window is long\n")


# --- plain lines -------------------------------------------------------------------------------------------------


def test_plain_lines_are_few_and_show_first_and_last(capsys: pytest.CaptureFixture[str]) -> None:
    lines = PlainLines()
    for done in range(1001):
        lines("encoding", done, 1000)
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.splitlines()[0] == "encoding 0/1000"
    assert output.err.splitlines()[-1] == "encoding 1000/1000"
    assert len(output.err.splitlines()) < 10


def test_plain_lines_tell_rate_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    lines = PlainLines(every_s=0)
    lines("encoding", 10, 20)
    lines("encoding", 12, 20)
    assert "/s, " in capsys.readouterr().err.splitlines()[1]


def test_updates_are_told_by_the_clock_and_the_last_one_always(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = PlainLines()
    for update in range(1, 101):
        clock.now_s += 1
        lines.step({"update": update, "updates": 100})
    told = [line.split()[1] for line in capsys.readouterr().err.splitlines()]
    assert told == ["1/100", "31/100", "61/100", "91/100", "100/100"]


def test_epochs_are_told_when_validated_but_not_one_upon_the_other(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, summaries = PlainLines(), []
    for epoch in range(1, 21):
        clock.now_s += 2
        lines.step({"update": epoch, "updates": 20})
        summaries.append(summary(epoch, 1 / epoch if epoch % 2 == 0 else None))
        lines.epoch(summaries)
    told = [line.split()[1] for line in capsys.readouterr().err.splitlines() if line.startswith("epoch")]
    assert told == ["2", "6", "10", "14", "18", "20"]  # 8 s apart, for 4 s are too near, and the last


# --- words -------------------------------------------------------------------------------------------------------


def test_a_training_step_shows_the_raw_loss_before_the_weighted_one(capsys: pytest.CaptureFixture[str]) -> None:
    PlainLines().step(RECORD)
    line = capsys.readouterr().err
    assert line.startswith("update 120/4000  epoch 3  raw loss 0.512  loss 0.98  lr 0.0001  34.1 images/s, 2:10 left")
    assert describe_step({"update": 1, "updates": 2, "raw_loss": None}) == "update 1/2"


def test_a_full_step_names_all_that_is_known() -> None:
    text = describe_step(FULL)
    for words in ("r=t 0.43", "|V|/|v_c| 0.97", "cosine 0.620", "gradient 0.4", "12.5 GiB", "guards diverging"):
        assert words in text
    assert "r<t" not in text
    assert "guards" not in describe_step({**FULL, "guards": {"state": "ok", "skipped_updates": 0}})
    assert "raw loss nan" in describe_step({**FULL, "raw_loss": math.nan})


def test_guards_are_told_by_their_state_and_what_they_skipped() -> None:
    assert describe_guards(None) == describe_guards({}) == ""
    assert describe_guards({"warned": False, "skipped_updates": 0}) == "ok"
    assert describe_guards({"warned": True}) == "warned"
    assert describe_guards({"state": "stuck", "warned": False, "skipped_updates": 3}) == "stuck, 3 skipped"


def test_an_epoch_tells_the_last_and_the_best_validation() -> None:
    summaries = [summary(1), summary(2, 0.25), summary(3, 0.5), summary(4)]
    last, best = validations(summaries) or pytest.fail("validated")
    assert (tuple(last), tuple(best)) == ((3, 0.5), (2, 0.25))
    assert describe_epoch(summaries) == "epoch 4 done  raw loss 0.5  validation 0.5 (best 0.25 at epoch 2)"
    assert validations([summary(1)]) is None
    assert describe_epoch([summary(1)]) == "epoch 1 done  raw loss 0.5"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (-3, "0:00"), (59.6, "1:00"), (3725, "1:02:05"), (190_805, "2 d 5:00:05")]
)
def test_duration_reads_like_a_clock(seconds: float, text: str) -> None:
    assert duration(seconds) == text
