"""What a file shows of itself, and who vouches for its content."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from neuromf.errors import UserError
from neuromf.files import sha256_file
from neuromf.weights import damage, find
from neuromf.weights.integrity import record, record_path, recorded_sha256, trust

A, B = "a" * 64, "b" * 64


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, Path]:
    """One file of each format that weights come in."""
    tensors = {"weight": torch.randn(40, 50)}
    paths = {name: tmp_path / f"{name}.pth" for name in ("zip", "pickle", "safetensors")}
    torch.save(tensors, paths["zip"])
    torch.save(tensors, paths["pickle"], _use_new_zipfile_serialization=False)
    save_file(tensors, paths["safetensors"], metadata={"a": "b"})
    return paths


@pytest.mark.parametrize("format", ["zip", "pickle", "safetensors"])
def test_a_whole_file_shows_no_damage_whatever_its_ending(format: str, whole: dict[str, Path]) -> None:
    assert damage(whole[format]) == ""


@pytest.mark.parametrize(("format", "words"), [("zip", "is cut short"), ("safetensors", "where its header promises")])
@pytest.mark.parametrize("kept", [0.5, 0.99])
def test_a_file_cut_short_shows_it(format: str, words: str, kept: float, whole: dict[str, Path]) -> None:
    path = whole[format]
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    assert words in damage(path)


def test_a_safetensors_file_cut_inside_its_header_shows_it(whole: dict[str, Path]) -> None:
    path = whole["safetensors"]
    path.write_bytes(path.read_bytes()[:30])
    assert damage(path) == "is cut short: its header cannot be read"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\n<!DOCTYPE html><html>sign in</html>", "is a web page"),
        (b"<HTML>404</HTML>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 83\n", "is a git-lfs pointer"),
        (b"hello", "is neither a torch nor a safetensors file"),
    ],
)
def test_what_is_often_saved_by_mistake_is_named(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "autoencoder_v1.pt"
    path.write_bytes(content)
    assert damage(path).startswith(words)


def test_an_unreadable_file_is_the_user_s_to_mend(tmp_path: Path) -> None:
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        damage(tmp_path / "folder.pt")


def test_a_published_hash_decides_even_over_a_record(tmp_path: Path) -> None:
    entry = find("mindgrab")._replace(sha256=A)
    record(tmp_path / "model.pth", B)
    assert trust(entry, tmp_path / "model.pth", A) == "published"
    with pytest.raises(UserError, match=f"its sha256 is {B}, it should be {A}"):
        trust(entry, tmp_path / "model.pth", B)


def test_the_digits_in_a_name_are_compared_and_the_rest_is_recorded(tmp_path: Path) -> None:
    entry, path = find("lpips-alex"), tmp_path / "alex.pth"
    first, second = "7be5be79" + "0" * 56, "7be5be79" + "1" * 56
    assert trust(entry, path, first) == "unrecorded"
    record(path, first)
    assert trust(entry, path, first) == "recorded"
    with pytest.raises(UserError, match="first use"):
        trust(entry, path, second)
    with pytest.raises(UserError, match="it should begin with 7be5be79"):
        trust(entry, path, A)


def test_a_record_is_readable_by_sha256sum(weights_file) -> None:
    path = weights_file("a.pt")
    assert record(path, sha256_file(path))
    assert record_path(path).read_text() == f"{sha256_file(path)}  a.pt\n"
    assert recorded_sha256(path) == sha256_file(path)


@pytest.mark.parametrize("content", ["", "hello a.pt", "12ab a.pt"])
def test_a_damaged_record_is_not_taken_for_none(content: str, weights_file) -> None:
    path = weights_file("a.pt")
    record_path(path).write_text(content)
    with pytest.raises(UserError, match="holds no sha256"):
        recorded_sha256(path)


def test_nothing_is_written_into_a_read_only_folder(weights_file) -> None:
    path = weights_file("sealed/a.pt")
    path.parent.chmod(0o555)
    assert not record(path, A)
    assert [file.name for file in path.parent.iterdir()] == ["a.pt"]
