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


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache: neither weights of the person who runs the tests, nor notes about theirs."""
    place = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("neuromf.weights.places.cache_folder", lambda: place)
    return place


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
def bids_tree(tmp_path: Path) -> Path:
    """A BIDS dataset with every fault a check should see; two sessions of most, T1w and FLAIR.

    sub-01 and sub-02 are sound; sub-03 has a truncated file, sub-04 the image of sub-01, sub-05 a 4-D file, sub-06 NaN,
    sub-07 a sheared affine; sub-08 is listed without a scan, sub-09 has a scan and is not listed.
    """
    import nibabel as nib

    root = tmp_path / "study"

    def add(subject: str, session: str, suffix: str, seed: int, affine: np.ndarray, **change: Any) -> Path:
        array = np.random.default_rng(seed).gamma(2, 50, (15, 16, 18)).astype(np.float32)
        array = array[..., None].repeat(3, -1) if change.get("volumes") else array
        array.flat[: change.get("nan", 0)] = np.nan
        path = root / f"sub-{subject}/ses-{session}/anat/sub-{subject}_ses-{session}_{suffix}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array, affine), path)
        return path

    ras, las = np.diag([1, 1, 1.2, 1]), np.diag([-1, 1, 1.2, 1])
    sheared = ras + np.array([[0, 0.2, 0, 0], *[[0] * 4] * 3])
    for seed, subject in enumerate(("01", "02")):
        for visit, session in enumerate(("a", "b")):
            add(subject, session, "T1w", 10 * seed + visit, las)
            add(subject, session, "FLAIR", 10 * seed + visit + 5, ras)
    truncated = add("03", "a", "T1w", 30, ras)
    truncated.write_bytes(truncated.read_bytes()[:4000])
    nib.save(nib.load(root / "sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz"), add("04", "a", "T1w", 0, las))
    add("05", "a", "T1w", 50, ras, volumes=True)
    add("06", "a", "T1w", 60, ras, nan=216)
    add("07", "a", "T1w", 70, sheared)
    add("09", "a", "T1w", 90, ras)
    (root / "dataset_description.json").write_text('{"Name": "study", "BIDSVersion": "1.10.0"}')
    rows = [f"sub-{i:02}\t{20 + i if i != 2 else 'n/a'}\t{'FM'[i % 2]}\t{i % 2 + 1}\n" for i in range(1, 9)]
    (root / "participants.tsv").write_text("participant_id\tage\tsex\tsite\n" + "".join(rows))
    (root / "participants.json").write_text('{"site": {"Levels": {"1": "Rome", "2": "Kyoto"}}}')
    (root / "sub-01/sub-01_sessions.tsv").write_text("session_id\tage\nses-a\t21\nses-b\t23.5\n")
    derived = root / "derivatives/strip/sub-01/anat/sub-01_desc-brain_T1w.nii.gz"
    derived.parent.mkdir(parents=True)
    derived.write_bytes((root / "sub-01/ses-b/anat/sub-01_ses-b_T1w.nii.gz").read_bytes())
    return root


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
