"""How a command ends: exit codes, hints, the log of a bug; and how it reads numbers."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from neuromf import config
from neuromf.errors import GuardError, Interrupted, PartialError, UserError
from neuromf_cli import console
from neuromf_cli.command import join_numbers, repeat_pairs

Run = Callable[..., Any]


def ends_with(error: BaseException, folder: Path | None = None) -> int:
    with pytest.raises(typer.Exit) as caught, console.tidy_exit(lambda: folder):
        raise error
    return caught.value.exit_code


@pytest.mark.parametrize(("error", "code"), [(UserError, 2), (GuardError, 3), (PartialError, 4), (Interrupted, 75)])
def test_each_kind_of_error_has_its_exit_code_message_and_hint(
    error: type[UserError], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ends_with(error("found a [b]", "do c")) == code
    output = capsys.readouterr()
    assert output.err.splitlines()[0].removeprefix("error: ") == "found a [b]"
    assert output.err.splitlines()[1] == "do c"
    assert output.out == ""


def test_ctrl_c_says_how_to_continue(capsys: pytest.CaptureFixture[str]) -> None:
    assert ends_with(KeyboardInterrupt()) == 75
    assert capsys.readouterr().err == "stopped; run the same command again to continue\n"


def test_a_full_disk_and_a_forbidden_file_are_no_bugs(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ends_with(OSError(errno.ENOSPC, "No space left on device", "a.pt")) == 2
    assert ends_with(PermissionError(errno.EACCES, "Permission denied", "b.pt")) == 2
    assert "No space left on device: a.pt" in capsys.readouterr().err
    assert not list(in_tmp.iterdir())


def test_too_little_memory_names_the_batch_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert ends_with(RuntimeError("CUDA out of memory. Tried to allocate 20 GiB")) == 2
    assert "--batch-size" in capsys.readouterr().err


def test_a_bug_leaves_its_traceback_in_the_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ends_with(ZeroDivisionError("oops"), tmp_path) == 1
    message = capsys.readouterr().err
    log = tmp_path / "neuromf-error.log"
    assert str(log) in message
    assert "Traceback" not in message
    assert "Traceback" in log.read_text()
    assert "ZeroDivisionError: oops" in log.read_text()


def test_a_bug_of_a_command_is_logged_in_its_out_folder_else_here(
    neuromf: Run, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(config, "load", broken)
    assert neuromf("train").exit_code == 1
    assert (in_tmp / "neuromf-error.log").is_file()
    (in_tmp / "here").mkdir()
    assert neuromf("train", "--out", "here").exit_code == 1
    assert not list((in_tmp / "here").iterdir())
    (in_tmp / "here" / "config.yaml").write_text("")
    assert neuromf("train", "--out", "here").exit_code == 1
    assert (in_tmp / "here" / "neuromf-error.log").is_file()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_long_work_exits_75_and_the_same_command_continues(
    number: signal.Signals, in_tmp: Path, neuromf: Run, small_label_maps: Path
) -> None:
    words = ["render", "--n", "2000", "--size", "16", "--spacing", "12", str(small_label_maps)]
    process = subprocess.Popen(
        [sys.executable, "-m", "neuromf_cli", *words],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    volumes = in_tmp / "volumes"
    deadline = time.monotonic() + 120
    while not list(volumes.glob("rendering_*.nii.gz")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, message = process.communicate(timeout=120)
    assert process.returncode == 75, message
    assert "run the same command again" in message
    assert not list(volumes.glob(".partial-*"))
    kept = len(list(volumes.glob("rendering_*.nii.gz")))
    assert 0 < kept < 2000
    words[2] = str(2 * kept + 2)  # the two label maps are rendered one after the other
    assert neuromf(*words, "--json").stdout.count(f'"kept": {kept}') == 1


def test_a_full_disk_exits_2_keeps_what_is_whole_and_continues(
    in_tmp: Path, neuromf: Run, small_label_maps: Path
) -> None:
    # Stands in for a full disk: no file of the process may grow beyond 3 KB, as the volume would.
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))

    words = ["render", "--n", "1", "--size", "32", "--spacing", "5", "--out", "large", str(small_label_maps)]
    done = subprocess.run(
        [sys.executable, "-B", "-m", "neuromf_cli", *words],
        capture_output=True,
        text=True,
        preexec_fn=limit,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "the disk is full" in done.stderr
    assert [path.name for path in (in_tmp / "large").iterdir()] == ["recipe.json"]
    assert neuromf(*words).exit_code == 0


def test_a_reader_that_leaves_early_is_no_error(in_tmp: Path) -> None:
    line = f"{sys.executable} -m neuromf_cli presets show imf-xpred --resolved | head -n 1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout == "preset: imf-xpred\n"
    assert "Traceback" not in done.stderr
    assert not list(in_tmp.iterdir())


def test_numbers_after_an_option_become_one_word() -> None:
    assert join_numbers(["a", "--size", "48", "64", "48", "b"]) == ["a", "--size", "48,64,48", "b"]
    assert join_numbers(["--spacing", "3", "--size", "64"]) == ["--spacing", "3", "--size", "64"]
    assert join_numbers(["--size", "1", "2", "3", "4"]) == ["--size", "1,2,3", "4"]
    assert join_numbers(["--size"]) == ["--size"]
    assert join_numbers(["--", "--size", "1", "2"]) == ["--", "--size", "1", "2"]


def test_an_option_of_pairs_takes_all_that_follow_it() -> None:
    pairs = ["--where", "a=b", "c=d"]
    repeated = ["--where", "a=b", "--where", "c=d"]
    assert repeat_pairs(pairs) == repeated
    assert repeat_pairs([*pairs, "runs/a"]) == [*repeated, "runs/a"]
    assert repeat_pairs(["runs/a", *pairs, "--n", "3"]) == ["runs/a", *repeated, "--n", "3"]
    assert repeat_pairs([*pairs, "--n", "3", "e=f"]) == [*repeated, "--n", "3", "e=f"]
    assert repeat_pairs([*repeated, "e=f"]) == [*repeated, "--where", "e=f"]
    assert repeat_pairs(["--where"]) == ["--where"]
    assert repeat_pairs(["training.lr=1", "network.pad=true"]) == ["training.lr=1", "network.pad=true"]
    assert repeat_pairs([*pairs, "--", "e=f"]) == [*repeated, "--", "e=f"]


@pytest.mark.parametrize("words", [["1", "2"], ["0"], ["-4"], ["3.5"], ["inf"], ["x"]])
def test_a_size_that_is_none_is_refused_with_an_example(words: list[str], neuromf: Run) -> None:
    result = neuromf("render", "--size", *words)
    assert result.exit_code == 2
    assert "--size" in result.stderr
