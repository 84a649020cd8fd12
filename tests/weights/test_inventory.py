"""What is here, and whether it is what it should be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from neuromf.errors import UserError
from neuromf.files import sha256_file
from neuromf.weights import entries, locate, survey, verify


def test_every_entry_is_listed_with_its_place(folder: Path, weights_file) -> None:
    path = weights_file("weights/autoencoder_v1.pt")
    listed = {item.entry.name: item for item in survey()}
    assert listed.keys() == entries().keys()
    assert [name for name, item in listed.items() if item.present] == ["maisi"]
    assert listed["maisi"].to_dict()["bytes"] == path.stat().st_size
    assert listed["maisi-v2"].path == folder / "autoencoder_v2.pt"
    assert listed["maisi-v2"].to_dict()["revision"] is None


def test_verify_looks_at_what_is_here_and_tells_right_from_wrong(folder: Path, weights_file) -> None:
    right = weights_file("weights/autoencoder_v1.pt")
    weights_file("weights/mindgrab_skullstrip/model.pth")
    cut = weights_file("weights/autoencoder_v2.pt")
    cut.write_bytes(cut.read_bytes()[:-9])
    found = {checked.name: checked for checked in verify()}
    assert {name: checked.status for name, checked in found.items()} == {
        "maisi": "ok",
        "maisi-v2": "wrong",
        "mindgrab": "wrong",
    }
    assert found["maisi"].sha256 == sha256_file(right)
    assert "is cut short" in found["maisi-v2"].problem
    assert "it should be" in found["mindgrab"].problem


def test_verify_does_not_trust_a_noted_hash(folder: Path, weights_file) -> None:
    path = weights_file("weights/autoencoder_v1.pt", 0)
    stat = path.stat()
    locate("maisi")
    weights_file("weights/autoencoder_v1.pt", 1)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    assert verify()[0].status == "wrong"


def test_verify_of_what_is_not_here_says_how_to_get_it(folder: Path) -> None:
    assert verify() == []
    with pytest.raises(UserError, match="'maisi' are not in") as error:
        verify(["maisi"])
    assert "neuromf weights fetch maisi" in error.value.hint
