from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.small_runs import run, settings


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    run(folder, settings())
    return folder
