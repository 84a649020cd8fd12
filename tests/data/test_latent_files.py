from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from neuromf.data import latent_files
from neuromf.data.latents import LatentDataset, compute_statistics, latent_path, load_latent, save_latent
from neuromf.data.splits import split_hash
from neuromf.errors import UserError
from neuromf.files import write_json

SHAPE = (4, 8, 8, 8)


def latent(seed: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def describe(folder: Path, subjects: list[str], shape: tuple[int, ...] = SHAPE) -> Path:
    """Make a folder of latents a dataset, all of it for training; statistics are those of the first four."""
    splits = {"train": subjects, "val": [], "test": []}
    statistics = compute_statistics(latent_path(folder, s) for s in subjects[:4])
    digest = split_hash(splits)
    write_json(folder / "latent_stats.json", statistics.to_dict() | {"split_hash": digest})
    write_json(folder / "splits.json", splits | {"hash": digest})
    dataset = {
        "format": "neuromf-latents",
        "format_version": 1,
        "complete": True,
        "latent_shape": list(shape),
        "autoencoder": {"sha256": "abc"},
        "splits": {"hash": digest},
    }
    write_json(folder / "dataset.json", dataset)
    return folder


def test_a_mapped_latent_is_what_torch_loads_and_is_found_without_torch(tmp_path, monkeypatch):
    z, log_sigma = latent(0), latent(1)
    metadata = {"subject": "Zoë", "list": [1, 2.5, None, True], "nested": {"a": {}}}
    save_latent(tmp_path / "a.pt", z, log_sigma, metadata)
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("torch.load is slow"))
    found = load_latent(tmp_path / "a.pt", mmap=True)
    assert torch.equal(found["z"], z)
    assert torch.equal(found["log_sigma"], log_sigma)
    assert found["metadata"] == metadata


def test_writing_into_a_mapped_latent_leaves_the_file_alone(tmp_path):
    save_latent(tmp_path / "a.pt", latent(0), latent(1), {})
    before = (tmp_path / "a.pt").read_bytes()
    load_latent(tmp_path / "a.pt", mmap=True)["z"].zero_()
    assert (tmp_path / "a.pt").read_bytes() == before


@pytest.mark.parametrize(
    "z", [latent(0).double(), latent(0).transpose(1, 3), latent(0, (8, *SHAPE))[3], latent(0).half()]
)
def test_latents_that_others_wrote_are_read_too(tmp_path, z):
    torch.save({"z": z, "log_sigma": latent(1), "metadata": {}}, tmp_path / "a.pt")
    assert torch.equal(load_latent(tmp_path / "a.pt", mmap=True)["z"], z)
    torch.save(
        {"z": z, "log_sigma": latent(1), "metadata": {}}, tmp_path / "old.pt", _use_new_zipfile_serialization=False
    )
    assert torch.equal(load_latent(tmp_path / "old.pt")["z"], z)


def test_a_large_split_is_not_looked_into_file_by_file_when_it_is_opened(tmp_path, monkeypatch):
    subjects = [f"s{i:03}" for i in range(200)]
    for i, subject in enumerate(subjects):
        save_latent(latent_path(tmp_path, subject), latent(i), latent(i), {"autoencoder": {"sha256": "abc"}})
    describe(tmp_path, subjects)
    opened = []
    read = latent_files._mapped
    monkeypatch.setattr(latent_files, "_mapped", lambda path: opened.append(path) or read(path))
    dataset = LatentDataset(tmp_path, ram_limit_bytes=0)
    assert len(opened) <= 32
    save_latent(tmp_path / "s101.pt", latent(0), latent(0), {"autoencoder": {"sha256": "xyz"}})
    with pytest.raises(UserError, match=r"s101\.pt was made by the autoencoder xyz"):
        dataset[101]


@pytest.mark.slow  # makes 100,000 files
def test_a_hundred_thousand_subjects_open_in_seconds(tmp_path, record_property):
    for i in range(4):
        save_latent(tmp_path / f"real{i}", latent(i), latent(i), {"autoencoder": {"sha256": "abc"}})
    subjects = [f"sub-{i:06}" for i in range(100_000)]
    for i, subject in enumerate(subjects):
        os.link(tmp_path / f"real{i % 4}", tmp_path / f"{subject}.pt")
    describe(tmp_path, subjects)
    began = time.perf_counter()
    dataset = LatentDataset(tmp_path, ram_limit_bytes=0)
    seconds = time.perf_counter() - began
    record_property("seconds", seconds)
    assert len(dataset) == 100_000
    assert torch.equal(dataset[99_999], dataset.statistics.whiten(latent(3)))
    assert seconds < 20


@pytest.mark.slow  # a number of the machine: a thousand latents of 4 x 48^3 a second, from the page cache
def test_latents_of_full_size_are_read_at_a_thousand_a_second(tmp_path, record_property):
    shape, n = (4, 48, 48, 48), 64
    subjects = [f"s{i:02}" for i in range(n)]
    for i, subject in enumerate(subjects):
        save_latent(
            latent_path(tmp_path, subject), latent(i, shape), latent(i, shape), {"autoencoder": {"sha256": "abc"}}
        )
    dataset = LatentDataset(describe(tmp_path, subjects, shape), ram_limit_bytes=0)
    rates = []
    for _ in range(5):  # the first pass fills the page cache; the best is the machine's, not its other users'
        began = time.perf_counter()
        for i in range(n):
            dataset[i]
        rates.append(n / (time.perf_counter() - began))
    record_property("latents_per_s", max(rates))
    assert max(rates) > 500, f"{max(rates):.0f} latents a second"
