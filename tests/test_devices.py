from __future__ import annotations

from pathlib import Path

import pytest
import torch

from neuromf.devices import free_memory, left_in_groups, torch_device
from neuromf.errors import UserError


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content + "\n")


def test_a_job_may_take_what_the_tightest_group_around_it_leaves(tmp_path: Path) -> None:
    """As SLURM sets it: the step has no limit, its job has."""
    (tmp_path / "own").write_text("0::/slurm/job_7/step_0\n")
    group(tmp_path / "fs/slurm", memory__max="9000", memory__current="4000", memory__stat="anon 1\ninactive_file 100")
    group(tmp_path / "fs/slurm/job_7", memory__max="5000", memory__current="3500", memory__stat="inactive_file 500")
    group(tmp_path / "fs/slurm/job_7/step_0", memory__max="max", memory__current="3000", memory__stat="anon 1")
    assert sorted(left_in_groups(tmp_path / "own", tmp_path / "fs")) == [2000, 5100]


def test_in_a_container_the_root_is_all_there_is_to_see(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("3:cpuset:/docker/abc\n4:memory:/docker/abc\n0::/\n")
    group(
        tmp_path / "fs/memory",
        memory__limit_in_bytes="1000",
        memory__usage_in_bytes="1200",
        memory__stat="total_inactive_file 50",
    )
    assert list(left_in_groups(tmp_path / "own", tmp_path / "fs")) == [0]
    assert list(left_in_groups(tmp_path / "absent", tmp_path / "fs")) == []


def test_free_memory_is_no_more_than_a_group_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    there = free_memory(torch.device("cpu"))
    assert there > 2**20
    monkeypatch.setattr("neuromf.devices.left_in_groups", lambda: iter([12345]))
    assert free_memory(torch.device("cpu")) == 12345


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device") as caught:
        torch_device("cuda")
    assert "--device cpu" in caught.value.hint
    assert torch_device("cpu") == torch.device("cpu")
