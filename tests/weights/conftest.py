"""A weights folder of its own, and files that look like weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from neuromf.weights import Entry, catalogue, entries, find

Known = Callable[..., Entry]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty weights folder, named by the environment."""
    place = tmp_path / "weights"
    place.mkdir()
    monkeypatch.setenv("NEUROMF_WEIGHTS", str(place))
    return place


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Known:
    """`known("maisi", sha256=...)` changes an entry of the catalogue for one test."""

    def change(name: str, **values: object) -> Entry:
        changed = {**entries(), name: find(name)._replace(**values)}  # type: ignore[arg-type]
        monkeypatch.setattr(catalogue, "entries", lambda: changed)
        monkeypatch.setattr("neuromf.weights.inventory.entries", lambda: changed)
        return changed[name]

    return change


@pytest.fixture
def weights_file(tmp_path: Path) -> Callable[..., Path]:
    """`weights_file("a.pt", value)` writes a small torch file; another value, another hash."""

    def write(name: str, value: float = 0.0) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"weight": torch.full((5,), value)}, path)
        return path

    return write
