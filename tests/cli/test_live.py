"""The live view: what it draws, in how little room, how rarely, and that it leaves the terminal as it was."""

from __future__ import annotations

import errno
import io
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from neuromf_cli import live
from neuromf_cli.live import WINDOW, History, LiveView, TrainingPanel
from neuromf_cli.progress import Validated

FULL = {
    "update": 120,
    "updates": 4000,
    "epoch": 3,
    "raw_loss": 0.512,
    "raw_fm": 0.43,
    "raw_mf": None,
    "loss": 0.98,
    "V_ratio": 0.97,
    "cosine": 0.62,
    "grad_norm": 0.4,
    "lr": 1e-4,
    "images_per_s": 34.12,
    "seconds_per_update": 0.47,
    "eta_s": 130.0,
    "memory_bytes": 12.5 * 2**30,
    "guards": {"state": "diverging", "warned": True, "skipped_updates": 2},
}
Attach = Callable[[], "Terminal"]
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def attach(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Terminal]:
    """Makes stderr a terminal of 100 columns and 40 rows; called in the test, for pytest sets stderr before it."""
    for name, value in {"COLUMNS": "100", "LINES": "40", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)

    def make() -> Terminal:
        stream = Terminal()
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return make


def panel(*records: dict[str, Any]) -> TrainingPanel:
    made = TrainingPanel(records[0])
    for record in records:
        made.step(record)
    return made


def drawn(made: TrainingPanel, width: int = 100, height: int = 40, encoding: str = "utf-8") -> list[str]:
    raw = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=raw, width=width, height=height, force_terminal=True, color_system=None)
    console.print(made)
    raw.seek(0)
    return raw.read().splitlines()


# --- the panel ---------------------------------------------------------------------------------------------------


def test_the_panel_shows_every_figure() -> None:
    text = "\n".join(drawn(panel(FULL)))
    for words in ("120/4,000", "epoch 3", "2:10 left", "0.512", "0.43", "0.97", "0.620", "0.0001", "34.12", "12.5 GiB"):
        assert words in text
    assert "diverging, 2 skipped" in text
    assert "r < t" in text


def test_what_is_unknown_is_a_dash() -> None:
    lines = drawn(panel({"update": 1, "updates": 2}))
    assert any("raw loss  -" in line for line in lines)
    assert any("guards    -" in line for line in lines)


def test_what_scatters_is_shown_by_the_mean_of_the_last_updates() -> None:
    made = panel(*({"update": n, "updates": 999, "raw_loss": float(n), "lr": float(n)} for n in range(1, 2 * WINDOW)))
    assert made.value("raw_loss") == sum(range(WINDOW, 2 * WINDOW)) / WINDOW
    assert made.value("lr") == 2 * WINDOW - 1
    still = {"update": 2, "updates": 9, "raw_mf": None}
    assert panel({"update": 1, "updates": 9, "raw_mf": 3.0}, still).value("raw_mf") == 3.0


def test_a_loss_that_is_not_finite_shows_and_spoils_nothing_after_it() -> None:
    records = [{"update": n, "updates": 9, "raw_loss": loss} for n, loss in enumerate([1.0, 4.0, math.nan], 1)]
    made = panel(*records)
    assert "raw loss  nan" in "\n".join(drawn(made))
    made.step({"update": 4, "updates": 9, "raw_loss": 1.0})
    assert "raw loss  2 " in "\n".join(drawn(made))
    assert made.history.means == [1.0, 4.0, 1.0]


def test_the_panel_shows_validation_and_the_last_messages() -> None:
    made = panel(FULL)
    made.validated = Validated(30, 0.52), Validated(20, 0.47)
    made.notes.extend(["one", "two", "warning: [three]", "four"])
    text = "\n".join(drawn(made))
    assert "0.52 after epoch 30, best 0.47 after epoch 20" in text
    assert "warning: [three]" in text
    assert "four" in text
    assert "one" not in text


@pytest.mark.parametrize("width", [110, 90, 76, 60, 49, 30, 12, 4])
@pytest.mark.parametrize("height", [40, 6])
def test_no_line_is_wider_than_the_terminal_and_few_rows_are_enough(width: int, height: int) -> None:
    made = panel(FULL)
    made.validated = Validated(30, 0.52), Validated(20, 0.47)
    made.notes.append("warning: a sentence that does not fit into any terminal " * 4)
    lines = drawn(made, width, height)
    assert max(map(len, lines)) <= width
    assert len(lines) <= (13 if height == 40 else height)


def test_a_terminal_without_unicode_gets_letters() -> None:
    made = panel(*({**FULL, "raw_loss": float(n)} for n in range(1, 20)))
    lines = drawn(made, encoding="ascii")
    assert all(line.isascii() for line in lines)
    assert any("_" in line and "#" in line for line in lines)


# --- the sparkline -----------------------------------------------------------------------------------------------


def test_a_history_is_means_over_equal_spans_however_long_it_gets() -> None:
    history = History(cells=8)
    for n in range(32):
        history.add(float(n))
    assert history.means == [3.5, 11.5, 19.5, 27.5]
    history.add(None)
    history.add(math.inf)
    assert len(history.means) == 4


def test_a_sparkline_goes_from_the_lowest_level_to_the_highest() -> None:
    history = History()
    for n in range(8):
        history.add(2.0**n)  # even steps of the logarithm
    assert history.sparkline(8) == "▁▂▃▄▅▆▇█"
    assert history.sparkline(4, "abcd") == "abcd"
    assert len(history.sparkline(3)) <= 3


def test_flat_and_negative_courses_can_be_drawn() -> None:
    flat, negative = History(), History()
    for n in range(4):
        flat.add(1.0)
        negative.add(-float(n))
    assert flat.sparkline(10) == "▁▁▁▁"
    assert negative.sparkline(10)[0] == "█"
    assert History().sparkline(5) == ""


# --- on a terminal -----------------------------------------------------------------------------------------------


def test_bars_of_other_steps_show_counts(attach: Attach) -> None:
    terminal = attach()
    with LiveView() as view:
        view("encoding", 3, 7)
        view("encoding", 7, 7)
        view.message("resumed [from] update 3")
    shown = terminal.getvalue()
    assert "7/7" in shown
    assert "resumed [from] update 3" in shown


def test_a_training_gets_a_panel_that_gives_way_to_the_next_step(attach: Attach) -> None:
    terminal = attach()
    with LiveView() as view:
        view.step(FULL)
        view.epoch([{"epoch": 3, "val_raw_loss": 0.52}])
        view.message("warning: something")
        assert "best 0.52 after epoch 3" in terminal.getvalue()
        terminal.seek(0)
        terminal.truncate()
        view("sampling", 1, 2)
        view("sampling", 2, 2)
    shown = terminal.getvalue()
    assert "update 120/4000" in shown  # its last line stays
    assert shown.rindex("best 0.52") < shown.index("2/2")  # the panel is gone where the bar stands


def test_a_second_run_starts_a_new_panel(attach: Attach) -> None:
    attach()
    with LiveView() as view:
        view.step({**FULL, "raw_loss": 100.0})
        view.step({**FULL, "update": 1, "raw_loss": 2.0})
        assert view._training is not None
        assert view._training.value("raw_loss") == 2.0
        view.step({**FULL, "update": 2, "raw_loss": 4.0})
        assert view._training.value("raw_loss") == 3.0


def test_it_draws_at_most_a_few_times_a_second(attach: Attach, monkeypatch: pytest.MonkeyPatch) -> None:
    attach()
    times = iter(n / 1000 for n in range(10**6))  # every look at the clock is a millisecond later
    with LiveView() as view:
        monkeypatch.setattr(live.time, "monotonic", lambda: next(times))
        refreshed: list[int] = []
        monkeypatch.setattr(view._live, "refresh", lambda: refreshed.append(1))
        for update in range(1, 3001):
            view.step({**FULL, "update": update})
        assert 10 <= len(refreshed) <= 13  # three seconds
        view.step({**FULL, "update": 4000})  # the last one at once
        before = len(refreshed)
        view.step({**FULL, "update": 4000, "updates": 4000})
        assert len(refreshed) == before + 1


def test_drawing_takes_a_hundredth_of_the_time_on_a_slow_terminal(
    attach: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach()
    now = [0.0]
    with LiveView() as view:
        monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
        refreshed: list[float] = []

        def slow() -> None:
            refreshed.append(now[0])
            now[0] += 0.1

        monkeypatch.setattr(view._live, "refresh", slow)
        for update in range(1, 1000):
            now[0] += 0.1
            view.step({**FULL, "update": update})
        monkeypatch.undo()
    assert 8 <= len(refreshed) <= 11  # one in 10 s


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_terminal_is_restored_however_it_ends(attach: Attach, error: type[BaseException]) -> None:
    terminal = attach()
    before = sys.stdout

    def run() -> None:
        with LiveView() as view:
            assert HIDE in terminal.getvalue()
            view.step(FULL)
            raise error

    with pytest.raises(error):
        run()
    assert terminal.getvalue().rstrip().endswith(SHOW)
    assert sys.stdout is before
    assert sys.stderr is terminal


def test_a_terminal_that_is_closed_does_not_end_the_work(attach: Attach, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(text: str) -> int:
        raise OSError(errno.EIO, "Input/output error")

    terminal = attach()
    with LiveView() as view:
        view.step(FULL)
        monkeypatch.setattr(terminal, "write", closed)
        view.message("warning: nobody hears")
        view.step({**FULL, "update": 4000})
        view("sampling", 1, 1)
    assert sys.stderr is terminal


def test_no_color_is_honoured(attach: Attach, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = attach()

    def colours() -> set[str]:
        with LiveView() as view:
            view.message("warning: yellow")
            view.step(FULL)
        return {code for code in ("\x1b[33m", "\x1b[36m", "\x1b[1;31m") if code in terminal.getvalue()}

    assert "\x1b[33m" in colours()
    terminal = attach()
    monkeypatch.setenv("NO_COLOR", "1")
    assert colours() == set()


def test_results_for_a_file_do_not_land_on_the_terminal(attach: Attach, capsys: pytest.CaptureFixture[str]) -> None:
    terminal = attach()
    with LiveView():
        print("a result")
    assert capsys.readouterr().out == "a result\n"
    assert "a result" not in terminal.getvalue()
