from __future__ import annotations

import json
import os
import stat
import subprocess
import sys

import pytest

from neuromf.errors import UserError
from neuromf.files import (
    atomic_path,
    read_json,
    remove_leftovers,
    sha256_file,
    sha256_text,
    write_json,
    write_text,
)

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_appears_only_when_it_is_whole(tmp_path):
    target = tmp_path / "deep" / "er" / "a.txt"
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert not target.exists()
        assert temporary.parent == target.parent
    assert target.read_text() == "new"
    assert names(target.parent) == {"a.txt"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_keeps_the_old_file_and_leaves_nothing_else(tmp_path, error):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(error), atomic_path(target) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise error
    assert target.read_text() == "old"
    assert names(tmp_path) == {"a.txt"}


def test_a_folder_replaces_the_old_one_whole(tmp_path):
    target = tmp_path / "folder"
    target.mkdir()
    (target / "old").touch()
    with atomic_path(target) as temporary:
        temporary.mkdir()
        (temporary / "new").touch()
        assert names(target) == {"old"}
    assert names(target) == {"new"}


def test_a_half_written_folder_is_removed(tmp_path):
    with pytest.raises(ValueError, match="x"), atomic_path(tmp_path / "folder") as temporary:  # noqa: PT012
        temporary.mkdir()
        (temporary / "half").touch()
        raise ValueError("x")
    assert names(tmp_path) == set()


def test_the_extension_a_writer_insists_on_is_kept(tmp_path):
    with atomic_path(tmp_path / "a.nii.gz", suffix=".nii.gz") as temporary:
        assert temporary.name.endswith(".nii.gz")
        temporary.touch()
    with atomic_path(tmp_path / "a.png") as temporary:
        assert temporary.suffix == ".png"
        temporary.touch()


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX systems")
def test_files_are_as_readable_as_any_other_new_file(tmp_path):
    (tmp_path / "plain").touch()
    write_text(tmp_path / "ours", "x")
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_a_folder_that_is_a_file_is_the_users_mistake(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="could not write") as caught:
        write_text(tmp_path / "file" / "a.txt", "x")
    assert caught.value.hint


FULL_DISK = """
import resource, sys
from pathlib import Path
from neuromf.errors import UserError
from neuromf.files import write_text
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_text(Path(sys.argv[1]) / "big.txt", "x" * 5000)
except UserError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.skipif(os.name != "posix", reason="size limits of POSIX systems")
def test_a_full_disk_is_said_and_leaves_the_old_file_alone(tmp_path):
    (tmp_path / "big.txt").write_text("old")
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2, done.stderr
    assert "disk is full" in done.stdout
    assert "run the same command again" in done.stdout
    assert (tmp_path / "big.txt").read_text() == "old"
    assert names(tmp_path) == {"big.txt"}


def test_json_makes_the_round_trip_and_refuses_what_no_reader_takes(tmp_path):
    value = {"a": [1, 2.5, None], "b": {"c": "é"}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            write_json(tmp_path / "a.json", {"x": bad})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == value


def test_unreadable_json_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.json does not exist"):
        read_json(tmp_path / "gone.json")
    (tmp_path / "half.json").write_text('{"a": 1')
    with pytest.raises(UserError, match=r"half\.json is not readable JSON"):
        read_json(tmp_path / "half.json")


def test_the_digests_are_sha256(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_file(tmp_path / "abc") == sha256_text("abc") == ABC


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    (tmp_path / ".partial-abc.json").touch()
    (tmp_path / ".partial-folder").mkdir()
    (tmp_path / ".partial-folder" / "x").touch()
    (tmp_path / "kept.json").touch()
    assert remove_leftovers(tmp_path) == 2
    assert names(tmp_path) == {"kept.json"}
    assert remove_leftovers(tmp_path) == 0
