"""`neuromf weights`: what it prints where, and how it ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from neuromf.files import sha256_file
from neuromf.weights import entries, find

Run = Callable[..., Any]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "weights"
    place.mkdir()
    monkeypatch.setenv("NEUROMF_WEIGHTS", str(place))
    return place


@pytest.fixture
def carried(tmp_path: Path) -> Path:
    torch.save({"weight": torch.zeros(3)}, tmp_path / "carried.pt")
    return tmp_path / "carried.pt"


def test_list_shows_what_is_here_with_size_and_licence(neuromf: Run, folder: Path, carried: Path) -> None:
    neuromf("weights", "fetch", "maisi", "--from", carried)
    lines = {line.split()[0]: line for line in neuromf("weights", "list").stdout.splitlines()[1:]}
    assert lines.keys() == entries().keys()
    assert "yes" in lines["maisi"].split()
    assert "NVIDIA Open Model License" in lines["maisi"]
    assert "no" in lines["maisi-v2"].split()
    assert "non-commercial use only" in lines["maisi-v2"]


def test_list_as_json_holds_everything_and_null_for_what_is_not_known(neuromf: Run, folder: Path) -> None:
    report = json.loads(neuromf("weights", "list", "--json").stdout)
    assert report["folder"] == str(folder)
    listed = {entry["name"]: entry for entry in report["weights"]}
    assert listed["maisi"]["sha256"] is None
    assert listed["maisi"]["revision"] is None
    assert listed["maisi"]["present"] is False
    assert listed["mindgrab"]["sha256"] == find("mindgrab").sha256
    assert listed["rflow-mr"]["licence"]["non_commercial"] is True


def test_fetch_from_a_file_reports_hash_and_place_and_says_the_licence_once(
    neuromf: Run, folder: Path, carried: Path
) -> None:
    done = neuromf("weights", "fetch", "maisi", "--from", carried, "--json")
    report = json.loads(done.stdout)
    assert report["sha256"] == sha256_file(carried)
    assert report["path"] == str(folder / "autoencoder_v1.pt")
    assert report["new"] is True
    assert report["licence"]["name"] == "NVIDIA Open Model License"
    assert "NVIDIA Open Model License" in done.stderr
    again = neuromf("weights", "fetch", "maisi", "--json")
    assert json.loads(again.stdout)["new"] is False
    assert again.stderr == ""


def test_fetch_offline_exits_2_and_says_what_to_put_where(neuromf: Run, folder: Path) -> None:
    result = neuromf("weights", "fetch", "medicalnet-50", "--offline")
    assert result.exit_code == 2
    assert "resnet_50_23dataset.pth" in result.stderr
    assert str(folder) in result.stderr
    assert result.stdout == ""


def test_verify_exits_4_where_a_file_is_wrong_and_0_where_all_are_right(
    neuromf: Run, folder: Path, carried: Path
) -> None:
    neuromf("weights", "fetch", "maisi", "--from", carried)
    right = neuromf("weights", "verify")
    assert right.exit_code == 0
    assert sha256_file(carried) in right.stdout
    (folder / "autoencoder_v1.pt").write_bytes(carried.read_bytes()[:-20])
    wrong = neuromf("weights", "verify", "--json")
    assert wrong.exit_code == 4
    assert "1 of the files cannot be used" in wrong.stderr
    assert json.loads(wrong.stdout)["weights"][0]["status"] == "wrong"


def test_verify_of_an_empty_folder_says_that_nothing_is_there(neuromf: Run, folder: Path) -> None:
    done = neuromf("weights", "verify")
    assert done.exit_code == 0
    assert str(folder) in done.stdout


def test_path_prints_the_place_alone_on_stdout(neuromf: Run, folder: Path, carried: Path) -> None:
    absent = neuromf("weights", "path", "maisi")
    assert (absent.exit_code, absent.stdout) == (0, f"{folder / 'autoencoder_v1.pt'}\n")
    assert "not there yet: neuromf weights fetch maisi" in absent.stderr
    neuromf("weights", "fetch", "maisi", "--from", carried)
    present = neuromf("weights", "path", "maisi")
    assert present.stdout == absent.stdout
    assert "not there yet" not in present.stderr


@pytest.mark.parametrize("verb", ["fetch", "path", "verify"])
def test_an_unknown_name_exits_2_and_suggests_the_nearest(verb: str, neuromf: Run, folder: Path) -> None:
    result = neuromf("weights", verb, "maisi-v3")
    assert result.exit_code == 2
    assert "did you mean 'maisi-v2'?" in result.stderr
