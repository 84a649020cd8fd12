"""From a name to a file: found where it was put, checked, its licence said once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from neuromf.errors import UserError
from neuromf.files import sha256_file
from neuromf.weights import find, locate, places

CACHE_FOLDER = places.cache_folder  # the real one: every test has its own in its place


def test_a_file_put_by_hand_is_found_checked_and_its_hash_recorded(folder: Path, weights_file) -> None:
    path = weights_file("weights/autoencoder_v1.pt")
    found = locate("maisi")
    assert (found.name, found.path, found.sha256) == ("maisi", path, sha256_file(path))
    assert found.trust == "recorded"
    assert (folder / "autoencoder_v1.pt.sha256").read_text().split() == [found.sha256, "autoencoder_v1.pt"]


def test_what_is_made_with_weights_can_say_hash_and_licence(folder: Path, weights_file) -> None:
    path = weights_file("weights/autoencoder_v2.pt")
    assert locate("maisi-v2").to_dict() == {
        "name": "maisi-v2",
        "file": "autoencoder_v2.pt",
        "sha256": sha256_file(path),
        "licence": find("maisi-v2").licence._asdict(),
    }


def test_upstream_s_own_folders_are_searched_too(folder: Path, weights_file) -> None:
    path = weights_file("weights/models/autoencoder_v1.pt")
    assert locate("maisi").path == path


def test_an_absent_file_is_named_with_the_command_and_the_place(folder: Path) -> None:
    with pytest.raises(UserError, match="'maisi' are not on this machine") as error:
        locate("maisi")
    assert f"{folder / 'autoencoder_v1.pt'} does not exist" in error.value.message
    assert error.value.hint.startswith("neuromf weights fetch maisi (NVIDIA Open Model License)")
    assert "get autoencoder_v1.pt from https://huggingface.co/nvidia/NV-Generate-CT" in error.value.hint
    assert f"put it at {folder / 'autoencoder_v1.pt'}" in error.value.hint


def test_without_the_variable_the_folder_is_in_the_user_s_cache(own_cache: Path) -> None:
    assert places.folder() == own_cache / "weights"


@pytest.mark.parametrize(
    ("value", "expected"), [("/x/y", "/x/y/neuromf"), ("", "~/.cache/neuromf"), ("relative", "~/.cache/neuromf")]
)
def test_the_cache_is_the_one_of_the_xdg_standard(value: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert CACHE_FOLDER() == Path(expected).expanduser()


def test_the_licence_is_said_at_the_first_use_only(
    folder: Path, weights_file, capsys: pytest.CaptureFixture[str]
) -> None:
    weights_file("weights/autoencoder_v1.pt")
    weights_file("weights/autoencoder_v2.pt")
    for name, words in {"maisi": "NVIDIA Open Model License", "maisi-v2": "non-commercial use only"}.items():
        locate(name)
        said = capsys.readouterr()
        assert said.err.startswith(f"weights '{name}': ")
        assert words in said.err
        assert "not pinned: sha256 will be recorded at first use" in said.err
        assert said.out == ""
        locate(name)
        assert capsys.readouterr().err == ""


def test_another_folder_says_the_licence_again(
    folder: Path, weights_file, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights_file("weights/autoencoder_v1.pt")
    weights_file("other/autoencoder_v1.pt")
    locate("maisi")
    capsys.readouterr()
    monkeypatch.setenv("NEUROMF_WEIGHTS", str(tmp_path / "other"))
    locate("maisi")
    assert "NVIDIA Open Model License" in capsys.readouterr().err


def test_a_large_file_is_hashed_once_and_again_when_it_changes(
    folder: Path, weights_file, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []
    monkeypatch.setattr(places, "sha256_file", lambda path: hashed.append(path) or sha256_file(path))
    path = weights_file("weights/autoencoder_v1.pt")
    assert locate("maisi") == locate("maisi")
    assert hashed == [path]
    os.utime(path, (1, 1))
    locate("maisi")
    assert hashed == [path, path]


def test_another_file_under_the_same_name_is_refused(folder: Path, weights_file) -> None:
    first = sha256_file(weights_file("weights/autoencoder_v1.pt", 0))
    locate("maisi")
    second = sha256_file(weights_file("weights/autoencoder_v1.pt", 1))
    with pytest.raises(UserError, match="not what the weights 'maisi' were at their first use") as error:
        locate("maisi")
    assert first in error.value.message
    assert second in error.value.message
    assert f"delete {folder / 'autoencoder_v1.pt.sha256'}" in error.value.hint
    (folder / "autoencoder_v1.pt.sha256").unlink()
    assert locate("maisi").sha256 == second


def test_a_file_with_another_hash_than_the_published_one_is_refused_and_not_recorded(
    folder: Path, weights_file, capsys: pytest.CaptureFixture[str]
) -> None:
    weights_file("weights/mindgrab_skullstrip/model.pth")
    with pytest.raises(UserError, match=f"it should be {find('mindgrab').sha256}"):
        locate("mindgrab")
    assert [path.name for path in (folder / "mindgrab_skullstrip").iterdir()] == ["model.pth"]
    assert capsys.readouterr().err == ""


def test_a_damaged_file_is_refused_and_not_recorded(folder: Path, weights_file) -> None:
    path = weights_file("weights/autoencoder_v1.pt")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="is cut short") as error:
        locate("maisi")
    assert "neuromf weights fetch maisi" in error.value.hint
    assert [path.name for path in folder.iterdir()] == ["autoencoder_v1.pt"]


def test_a_read_only_folder_serves_without_a_trace(folder: Path, weights_file) -> None:
    path = weights_file("weights/autoencoder_v1.pt")
    folder.chmod(0o555)
    found = locate("maisi")
    assert (found.sha256, found.trust) == (sha256_file(path), "unrecorded")
    assert list(folder.iterdir()) == [path]


def test_without_a_writable_cache_everything_still_works(
    folder: Path, weights_file, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = weights_file("weights/autoencoder_v1.pt")
    (tmp_path / "a-file").write_text("")
    monkeypatch.setattr(places, "cache_folder", lambda: tmp_path / "a-file" / "cache")
    for _ in range(2):
        assert locate("maisi").sha256 == sha256_file(path)
        assert "NVIDIA" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "[]", "{", '{"hashes": 3, "shown": null}', '{"hashes": {"%s": 3}}'])
def test_damaged_notes_are_no_notes(content: str, folder: Path, weights_file, own_cache: Path) -> None:
    path = weights_file("weights/autoencoder_v1.pt")
    locate("maisi")
    (notes,) = (own_cache / "weights-notes").iterdir()
    notes.write_text(content.replace("%s", str(path)))
    assert locate("maisi").sha256 == sha256_file(path)


def test_the_real_networks_are_found_where_they_lie(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEUROMF_WEIGHTS", str(shared_data / "weights"))
    for name in ("mindgrab", "meshnet-tissue", "meshnet-18", "meshnet-18-small"):
        assert locate(name).trust == "published"
