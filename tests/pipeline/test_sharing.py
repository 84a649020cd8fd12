from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from neuromf.errors import UserError
from neuromf.pipeline.sharing import Arrivals, Share, claim, value_at, wait_for


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_block_belongs_to_one_process(count: int) -> None:
    owners = [[rank for rank in range(count) if Share(rank, count).has(block)] for block in range(20)]
    assert all(len(ranks) == 1 for ranks in owners)
    assert {ranks[0] for ranks in owners} == set(range(count))


def test_the_launcher_says_which_process_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Share.own() == (0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert Share.own() == (2, 4)
    assert not Share.own().main


def test_a_folder_is_claimed_once_and_only_by_equal_settings(tmp_path: Path) -> None:
    folder, record = tmp_path / "g", {"seed": 0, "model": {"sha256": "a" * 64}, "note": 1}
    keys = ["seed", "model.sha256"]
    claim(folder, "m.json", record, keys, "samples", dry_run=True)
    assert not folder.exists()
    claim(folder, "m.json", record, keys, "samples")
    claim(folder, "m.json", record | {"note": 2}, keys, "samples")
    assert json.loads((folder / "m.json").read_text())["note"] == 1
    with pytest.raises(UserError, match=r"other samples: seed 0 there, 1 now; model.sha256 aaaaaaaaaaaa\.\.\. there"):
        claim(folder, "m.json", {"seed": 1, "model": {"sha256": "b" * 64}}, keys, "samples")


def test_a_folder_of_something_else_is_refused_and_one_that_another_process_is_claiming_is_not(tmp_path: Path) -> None:
    (tmp_path / ".partial-x").write_text("")
    claim(tmp_path, "m.json", {"seed": 0}, ["seed"], "samples")
    (tmp_path / "m.json").unlink()
    (tmp_path / "thesis.doc").write_text("")
    with pytest.raises(UserError, match="not empty and holds no samples"):
        claim(tmp_path, "m.json", {"seed": 0}, ["seed"], "samples")


def test_waiting_ends_when_all_is_there_and_gives_up_when_nothing_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuromf.pipeline.sharing._POLL_S", 0.001)
    asked: list[int] = []
    wait_for(range(3), lambda i: asked.append(i) or len(asked) > 4 * (i + 1), "samples")  # type: ignore[func-returns-value]
    assert asked.count(2) > asked.count(0)
    monkeypatch.setattr("neuromf.pipeline.sharing.PATIENCE_S", 0.01)
    for slowest_s, patience in ((0, r"0\.01"), (0.004, r"0\.02")):
        with pytest.raises(UserError, match=rf"2 samples of other .* none came for {patience} s"):
            wait_for(range(3), lambda i: i == 1, "samples", slowest_s=slowest_s)


def test_what_comes_while_waiting_is_taken_for_whole_and_what_was_there_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neuromf.pipeline.sharing._POLL_S", 0.001)
    monkeypatch.setattr("neuromf.pipeline.sharing.PATIENCE_S", 0.01)
    read: list[int] = []
    path = lambda number: tmp_path / str(number)
    for number in (0, 1):
        path(number).write_text("x")
    os.utime(path(0), (1, 1))
    arrivals = Arrivals(path, lambda number: read.append(number) or True)  # type: ignore[func-returns-value]
    os.utime(path(1), (2**32, 2**32))
    arrivals.wait(range(2), "samples")
    assert read == [0]
    with arrivals.block():
        time.sleep(0.02)
    with pytest.raises(UserError, match=r"1 samples of other .* none came for 0\.[1-9]"):
        arrivals.wait(range(3), "samples")


def test_values_are_found_by_dotted_names() -> None:
    assert value_at({"a": {"b": [1]}}, "a.b") == [1]
    assert value_at({"a": 1}, "a.b") is None
    assert value_at({}, "x.y.z") is None
