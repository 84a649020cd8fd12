"""Progress: plain lines for logs, a bar for people, nothing when quiet."""

from __future__ import annotations

import io
import sys

import pytest

from neuromf_cli.progress import LiveBar, PlainLines, Silence, describe_step, duration, progress

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


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


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


def test_a_training_step_shows_the_raw_loss_before_the_weighted_one(capsys: pytest.CaptureFixture[str]) -> None:
    PlainLines().step(RECORD)
    line = capsys.readouterr().err
    assert line.startswith("update 120/4000  epoch 3  raw loss 0.512  loss 0.98  lr 0.0001  34.1 images/s, 2:10 left")
    assert describe_step({"update": 1, "updates": 2, "raw_loss": None}) == "update 1/2"


def test_the_kind_of_progress_follows_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    with progress(quiet=True) as show:
        assert isinstance(show, Silence)
    with progress(quiet=False) as show:
        assert isinstance(show, PlainLines)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress(quiet=False) as show:
        assert isinstance(show, LiveBar)


def test_the_live_bar_shows_counts_messages_and_the_raw_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "200")
    with LiveBar() as bar:
        bar("encoding", 3, 7)
        bar("encoding", 7, 7)
        bar.message("resumed [from] update 3")
        bar.step(RECORD)
    shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "7/7" in shown
    assert "resumed [from] update 3" in shown
    assert "raw loss 0.512" in shown


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3725, "1:02:05")])
def test_duration_reads_like_a_clock(seconds: float, text: str) -> None:
    assert duration(seconds) == text
