"""Several processes of one command, and two commands on one folder, at the same time."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from neuromf.data.preprocessing import Preprocessing
from neuromf.errors import UserError
from neuromf.files import read_json, write_json
from neuromf.models.autoencoder import HaarAutoencoder
from neuromf.pipeline import encode as module
from neuromf.pipeline import encode_sharing
from neuromf.pipeline.encode import encode
from neuromf.pipeline.encode_sharing import LOCK_FILE, Parts, alone
from neuromf.pipeline.sharing import Share

SPEC = Preprocessing((8, 8, 8), None)


@pytest.fixture
def scans(tmp_path) -> Path:
    """Seven scans, one of them no scan."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for i in range(6):
        array = np.random.default_rng(i).gamma(2, 50, (8, 9, 10)).astype(np.float32)
        nib.save(nib.Nifti1Image(array, np.diag([-1, 1, 1, 1])), folder / f"s{i}.nii.gz")
    (folder / "bad.nii.gz").write_bytes(b"no")
    return folder


def run(scans: Path, out: Path, **options):
    return encode([scans], out, autoencoder=HaarAutoencoder("haar", 1), preprocessing=SPEC, **options)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the report, which tells how long things took."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "encode_report.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def untold(report: dict) -> list[dict]:
    """The report of each scan, without what depends on who encoded it when."""
    return [{key: value for key, value in scan.items() if key not in ("seconds", "status")} for scan in report["scans"]]


def together(scans: Path, out: Path, count: int, monkeypatch, **options) -> list[module.EncodeReport]:
    """All processes of a launch, as threads of this one."""
    own = threading.local()
    monkeypatch.setattr(Share, "own", classmethod(lambda cls: cls(own.rank, count)))
    reports: list = [None] * count

    def process(rank: int) -> None:
        own.rank = rank
        reports[rank] = run(scans, out, **options)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return reports


@pytest.mark.parametrize(("count", "options"), [(2, {}), (3, {"flip_copies": True, "copies": 1})])
def test_processes_make_the_folder_that_one_makes(scans, tmp_path, monkeypatch, count, options):
    alone_report = run(scans, tmp_path / "one", **options)
    first, *others = together(scans, tmp_path / "many", count, monkeypatch, **options)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert (first.encoded, first.refused) == (alone_report.encoded, alone_report.refused) == (6, 1)
    assert untold(first.to_dict()) == untold(alone_report.to_dict())
    assert first.copies == alone_report.copies
    assert all(other.statistics is None for other in others)
    if not options:
        assert [len(other.scans) for other in others] == [3]


def test_processes_that_prepare_scans_ahead_change_nothing(scans, tmp_path):
    run(scans, tmp_path / "one", copies=1)
    report = run(scans, tmp_path / "many", copies=1, workers=2)
    assert (report.encoded, report.refused, report.copies.encoded) == (6, 1, len(report.splits["train"]))
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_a_partner_that_died_is_named_and_the_same_command_goes_on(scans, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(module, "Parts", lambda *a: Parts(*a, patience_s=0.1))
    monkeypatch.setattr(Share, "own", classmethod(lambda cls: cls(0, 2)))
    with pytest.raises(UserError, match=r"1 of 2 processes have said nothing new .*\(rank 1\)") as caught:
        run(scans, out)
    assert "goes on" in caught.value.hint
    assert len(list(out.glob("*.pt"))) == 3
    monkeypatch.undo()
    report = run(scans, out)
    assert (report.kept, report.encoded) == (3, 3)
    run(scans, tmp_path / "straight")
    assert contents(out) == contents(tmp_path / "straight")


def test_what_a_process_of_an_earlier_launch_said_counts_no_more(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    Parts(tmp_path, Share(1, 2), "encoding", 4).finish(["old"])
    assert Parts(tmp_path, Share(0, 2), "encoding", 4, patience_s=0.1).others(None) == [["old"]]
    monkeypatch.setenv("SLURM_JOB_ID", "2")
    with pytest.raises(UserError, match="have said nothing"):
        Parts(tmp_path, Share(0, 2), "encoding", 4, patience_s=0.1).others(None)


def test_a_process_that_goes_on_is_waited_for(tmp_path):
    other = Parts(tmp_path, Share(1, 2), "encoding", 50)
    path = next(tmp_path.glob(".share-encoding-1-of-2.json"))

    def work() -> None:
        for done in range(10):
            threading.Event().wait(0.05)
            write_json(path, read_json(path) | {"done": done})
        other.finish("made")

    thread = threading.Thread(target=work)
    thread.start()
    shown = []
    assert Parts(tmp_path, Share(0, 2), "encoding", 4, patience_s=0.45).others(lambda *a: shown.append(a)) == ["made"]
    thread.join()
    assert shown[0][0] == "encoding, other processes"
    assert shown[0][2] == 50


# --- two commands -------------------------------------------------------------------------------------------


def test_a_second_command_is_told_and_the_first_is_not_disturbed(scans, tmp_path):
    said = []

    def start_another(description, done, total):
        if description == "encoding" and done == 2:
            with pytest.raises(UserError, match="another `neuromf encode` is at work in") as caught:
                run(scans, tmp_path / "out")
            said.append(caught.value.hint)

    run(scans, tmp_path / "out", progress=start_another)
    assert "torchrun" in said[0]
    run(scans, tmp_path / "straight")
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_two_commands_on_a_file_system_without_locks_make_the_same_folder(scans, tmp_path, monkeypatch):
    monkeypatch.setattr(encode_sharing, "fcntl", None)
    inner = []

    def start_another(description, done, total):
        if description == "encoding" and done == 3:
            inner.append(run(scans, tmp_path / "out", copies=1))

    outer = run(scans, tmp_path / "out", copies=1, progress=start_another)
    assert (inner[0].kept, inner[0].encoded, outer.kept + outer.encoded) == (2, 4, 6)
    run(scans, tmp_path / "straight", copies=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_a_lock_is_let_go_of_by_whoever_dies_and_leaves_no_file(tmp_path):
    script = (
        "import os, pathlib, signal, sys\n"
        "from neuromf.pipeline.encode_sharing import alone\n"
        "with alone(pathlib.Path(sys.argv[1])):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False).returncode == -9
    assert (tmp_path / LOCK_FILE).exists()
    with alone(tmp_path), pytest.raises(UserError, match="at work"), alone(tmp_path):
        pass
    assert not (tmp_path / LOCK_FILE).exists()


@pytest.mark.slow  # two processes that import torch
def test_torchrun_starts_processes_that_share_the_scans(scans, in_tmp):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    words = ["encode", str(scans), "--size", "8", "--autoencoder", "haar", "--device", "cpu"]
    done = subprocess.run(
        [*launcher, "-m", "neuromf_cli", *words, "--out", "many"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert "6 encoded, 1 refused" in done.stdout, done.stderr
    run(scans, in_tmp / "one")
    assert contents(in_tmp / "many") == contents(in_tmp / "one")
