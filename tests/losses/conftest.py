from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]


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
