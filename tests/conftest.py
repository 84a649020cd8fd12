"""What all tests share: the real data where it is, few threads, and ways to call the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> None:
    """One thread: small tensors gain nothing from more, and threads that wait for each other lose much."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the person who runs the tests reaches them."""
    for name in os.environ:
        if name.startswith("NEUROMF_") and name not in ("NEUROMF_TEST_DATA", "NEUROMF_TEST_GOLDEN"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real scans and label maps; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("NEUROMF_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "hippocampus").is_dir():
        pytest.skip(f"no real scans at {folder}: set NEUROMF_TEST_DATA to the folder that holds hippocampus/")
    return folder


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, Tensor]]:
    """`golden("net")` reads net.npz of the reference vectors as torch tensors; never copied here."""
    default = REPOSITORY.parent / "shared/reference/golden"
    folder = Path(os.environ.get("NEUROMF_TEST_GOLDEN", default))
    if not (folder / "net.npz").is_file():
        pytest.skip("no golden vectors: set NEUROMF_TEST_GOLDEN to the folder that holds net.npz")

    def read(name: str) -> dict[str, Tensor]:
        with np.load(folder / f"{name}.npz") as arrays:
            return {key: torch.from_numpy(np.array(arrays[key])) for key in arrays.files}

    return read


@pytest.fixture(scope="session")
def small_label_maps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two label maps, anna and bela: a ball of white matter (2) in cortex (3), of two radii."""
    from neuromf.data.volumes import save_volume

    grid = np.stack(np.meshgrid(*[np.arange(24) - 11.5] * 3, indexing="ij"))
    radius = np.sqrt((grid**2).sum(0))
    folder = tmp_path_factory.mktemp("label_maps")
    for name, inner in (("anna", 5), ("bela", 7)):
        labels = np.where(radius < inner, 2, np.where(radius < 10, 3, 0)).astype(np.int16)
        save_volume(folder / f"{name}.nii.gz", labels, np.diag([6.0, 6.0, 6.0, 1.0]), dtype=np.int16)
    return folder


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def neuromf(in_tmp: Path) -> Callable[..., Any]:
    """`neuromf("train", "--dry-run")` in this process, in an empty folder: .exit_code, .stdout, .stderr."""
    from typer.testing import CliRunner

    from neuromf_cli.app import app

    def run(*words: str | Path) -> Any:
        return CliRunner().invoke(app, [str(word) for word in words], prog_name="neuromf")

    return run


@pytest.fixture
def neuromf_process(in_tmp: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The same as a process of its own, for what only a process shows: start-up, signals, imports."""

    def run(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "neuromf_cli", *map(str, words)],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, **environment},
            check=False,
        )

    return run
