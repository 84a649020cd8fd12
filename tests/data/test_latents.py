from __future__ import annotations

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats

from neuromf.data.latents import (
    LatentDataset,
    LatentStatistics,
    compute_statistics,
    latent_path,
    load_latent,
    load_latent_folder_info,
    save_latent,
)
from neuromf.data.moments import ChannelMoments, IncrementalPCA
from neuromf.data.splits import split_hash
from neuromf.errors import UserError
from neuromf.files import read_json, write_json

SHAPE = (4, 5, 6, 7)
SCALE = torch.tensor([1.0, 0.2, 3.0, 50.0]).view(4, 1, 1, 1)
SHIFT = torch.tensor([0.0, 10.0, -2.0, 1000.0]).view(4, 1, 1, 1)


def latent(seed: int) -> torch.Tensor:
    z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
    z[1] += 0.7 * z[0] + z[1] ** 2
    return SCALE * z + SHIFT + 0.3 * seed


def make_folder(folder, n=6, train=4):
    subjects = [f"s{i}" for i in range(n)]
    for i, subject in enumerate(subjects):
        metadata = {"autoencoder": {"sha256": "abc"}}
        save_latent(latent_path(folder, subject), latent(i), torch.full(SHAPE, -2.0), metadata)
    splits = {"train": subjects[:train], "val": subjects[train:], "test": []}
    statistics = compute_statistics(latent_path(folder, s) for s in splits["train"])
    digest = split_hash(splits)
    write_json(folder / "latent_stats.json", statistics.to_dict() | {"split_hash": digest})
    write_json(folder / "splits.json", splits | {"hash": digest})
    dataset = {
        "format": "neuromf-latents",
        "format_version": 1,
        "complete": True,
        "latent_shape": list(SHAPE),
        "autoencoder": {"sha256": "abc"},
        "splits": {"hash": digest},
    }
    write_json(folder / "dataset.json", dataset)
    return folder


# files


def test_a_latent_file_round_trips_and_loads_with_weights_only(tmp_path):
    z, log_sigma = latent(0).double(), torch.randn(SHAPE)
    save_latent(tmp_path / "a.pt", z, log_sigma, {"subject": "a", "affine": np.eye(4).tolist(), "n": None})
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert content["z"].dtype == content["log_sigma"].dtype == torch.float32
    assert torch.equal(content["z"], z.float())
    for mmap in (False, True):
        loaded = load_latent(tmp_path / "a.pt", mmap=mmap)
        assert torch.equal(loaded["log_sigma"], log_sigma)
        assert loaded["metadata"] == {"subject": "a", "affine": np.eye(4).tolist(), "n": None}


def test_the_same_content_gives_the_same_bytes_and_a_view_stores_only_itself(tmp_path):
    batch = torch.stack([latent(i) for i in range(8)])
    save_latent(tmp_path / "a.pt", batch[3], batch[3], {})
    save_latent(tmp_path / "b.pt", batch[3].clone(), batch[3].clone(), {})
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    assert (tmp_path / "a.pt").stat().st_size < 3 * 4 * batch[3].numel()


def test_damaged_and_foreign_files_are_named(tmp_path):
    save_latent(tmp_path / "a.pt", latent(0), latent(0), {})
    (tmp_path / "cut.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:500])
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("hello")
    for name in ("cut.pt", "other.pt", "text.pt", "absent.pt"):
        with pytest.raises(UserError, match=name):
            load_latent(tmp_path / name)


def test_ids_cannot_leave_the_folder(tmp_path):
    with pytest.raises(UserError):
        latent_path(tmp_path, "../outside")


FULL_DISK = """
import resource, signal, sys, torch
from neuromf.data.latents import save_latent
from neuromf.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
z = torch.zeros(4, 32, 32, 32)
try:
    save_latent(sys.argv[1] + "/a.pt", z, z, {})
except UserError as error:
    print(error.message)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs RLIMIT_FSIZE (POSIX)")
def test_a_full_disk_is_said_and_leaves_no_file(tmp_path):
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "disk is full" in result.stdout
    assert list(tmp_path.iterdir()) == []


# statistics


def test_streaming_statistics_equal_those_of_all_values_at_once(tmp_path):
    parts = [latent(i) for i in range(5)]
    log_sigmas = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(90 + i)) for i in range(5)]
    for i, (z, log_sigma) in enumerate(zip(parts, log_sigmas, strict=True)):
        save_latent(tmp_path / f"{i}.pt", z, log_sigma, {})
    found = compute_statistics(sorted(tmp_path.glob("*.pt")))

    values = torch.stack(parts).double().transpose(0, 1).flatten(1).numpy()
    sigma2 = torch.exp(2 * torch.stack(log_sigmas).double()).transpose(0, 1).flatten(1).numpy().mean(1)
    np.testing.assert_allclose(found.mean, values.mean(1), rtol=1e-12)
    np.testing.assert_allclose(found.std, values.std(1), rtol=1e-12)
    np.testing.assert_allclose(found.skewness, stats.skew(values, axis=1), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.kurtosis, stats.kurtosis(values, axis=1, fisher=False), rtol=1e-9)
    np.testing.assert_allclose(found.correlation, np.corrcoef(values), rtol=1e-9)
    share = sigma2 / (sigma2 + values.var(1))
    np.testing.assert_allclose(found.sigma2_share_per_channel, share, rtol=1e-9)
    assert found.sigma2_share == pytest.approx(sigma2.sum() / (sigma2.sum() + values.var(1).sum()))
    assert (found.files, found.voxels) == (5, values.shape[1])

    flat = torch.stack(parts).flatten(1).double().numpy()
    energy = np.linalg.svd(flat - flat.mean(0), compute_uv=False)[:4] ** 2
    np.testing.assert_allclose(found.pca_explained_variance, energy / energy.sum(), rtol=1e-4)


def test_moments_do_not_lose_digits_far_from_zero():
    moments = ChannelMoments(1)
    offset = 1e6
    for i in range(10):
        values = torch.arange(8).double().view(1, 2, 2, 2) + offset + i
        moments.update(values, torch.zeros_like(values))
    everything = np.concatenate([np.arange(8) + i for i in range(10)])
    assert float(moments.std) == pytest.approx(everything.std(), rel=1e-12)


def test_pca_finds_the_directions_across_blocks():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(300, 3, generator=generator)).Q
    scores = torch.randn(230, 3, generator=generator) * torch.tensor([5.0, 3.0, 1.0])
    data = scores @ basis.T + 0.05 * torch.randn(230, 300, generator=generator) + 7
    pca = IncrementalPCA()
    for row in data:
        pca.update(row)
    exact = torch.linalg.svdvals((data - data.mean(0)).double()) ** 2
    found = pca.explained_variance_ratio()
    assert len(found) == 50
    np.testing.assert_allclose(found[:3], (exact / exact.sum())[:3], rtol=1e-3)


def test_statistics_survive_json():
    found = LatentStatistics((0.1,), (2.0,), (0.0,), (3.0,), ((1.0,),), 0.2, (0.2,), (0.6, 0.4), 3, 81)
    assert LatentStatistics.from_dict(json.loads(json.dumps(found.to_dict())) | {"split": "train"}) == found


def test_a_constant_channel_is_refused_by_number(tmp_path):
    for i in range(2):
        z = latent(i)
        z[2] = 0.1
        save_latent(tmp_path / f"{i}.pt", z, z, {})
    with pytest.raises(UserError, match=r"channel 2 has standard deviation 0"):
        compute_statistics(sorted(tmp_path.glob("*.pt")))


def statistics_of(mean, std) -> LatentStatistics:
    c = len(mean)
    return LatentStatistics(tuple(mean), tuple(std), (0.0,) * c, (3.0,) * c, (), 0, (), (), 1, 1)


@pytest.mark.parametrize("lead", [(), (4,), (2,)])
def test_whitening_scales_channels_and_never_the_batch(lead):
    # B == C == 4 is the case in which a wrong broadcast raises nothing.
    statistics = statistics_of([1.0, 2.0, 3.0, 4.0], [1.0, 10.0, 100.0, 1000.0])
    z = torch.randn(*lead, 4, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    white = statistics.whiten(z)
    for c in range(4):
        torch.testing.assert_close(white[..., c, :, :, :], (z[..., c, :, :, :] - (c + 1)) / 10**c)
    torch.testing.assert_close(statistics.unwhiten(white), z)


def test_whitening_refuses_another_number_of_channels():
    with pytest.raises(ValueError, match="C = 2"):
        statistics_of([0.0, 0.0], [1.0, 1.0]).whiten(torch.zeros(2, 4, 3, 3, 3))


# dataset


@pytest.mark.parametrize("ram_limit_bytes", [1 << 30, 0])
def test_the_training_split_is_white_in_memory_and_from_disk(tmp_path, ram_limit_bytes):
    dataset = LatentDataset(make_folder(tmp_path), ram_limit_bytes=ram_limit_bytes)
    assert dataset.in_memory == (ram_limit_bytes > 0)
    assert (len(dataset), dataset.shape, dataset.subjects) == (4, SHAPE, ["s0", "s1", "s2", "s3"])
    white = torch.stack([dataset[i] for i in range(len(dataset))])
    assert white.dtype == torch.float32
    values = white.transpose(0, 1).flatten(1)
    torch.testing.assert_close(values.mean(1), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(values.std(1), torch.ones(4), atol=1e-2, rtol=0)
    torch.testing.assert_close(dataset.statistics.unwhiten(dataset[1]), latent(1), rtol=1e-4, atol=1e-3)


def test_the_held_back_split_uses_the_training_statistics(tmp_path):
    folder = make_folder(tmp_path)
    val = LatentDataset(folder, "val")
    assert torch.equal(val[0], LatentDataset(folder).statistics.whiten(latent(4)))


def test_missing_latents_are_listed(tmp_path):
    folder = make_folder(tmp_path)
    (folder / "s1.pt").unlink()
    with pytest.raises(UserError, match=r"1 of 4 latents are missing.*s1\.pt"):
        LatentDataset(folder)


def add_copies(folder) -> None:
    """The mirrored copies of make_folder's training latents, and two augmented ones: latents 10 more apart each."""
    write_json(folder / "dataset.json", read_json(folder / "dataset.json") | {"flip_copies": True, "copies": 2})
    for kind, shift in (("flipped", 10), ("copies/1", 20), ("copies/2", 30)):
        for i in range(4):
            z = latent(shift + i)
            save_latent(latent_path(folder, f"s{i}", kind), z, z, {"autoencoder": {"sha256": "abc"}})


def test_copies_follow_the_originals_and_are_whitened_like_them(tmp_path):
    folder = make_folder(tmp_path)
    add_copies(folder)
    plain, dataset = LatentDataset(folder), LatentDataset(folder, copies=True)
    assert dataset.subjects == plain.subjects * 4
    assert dataset.statistics == plain.statistics
    for place, seed in ((1, 1), (4, 10), (9, 21), (15, 33)):
        assert torch.equal(dataset[place], plain.statistics.whiten(latent(seed)))


def test_copies_that_are_not_there_are_refused(tmp_path):
    folder = make_folder(tmp_path)
    with pytest.raises(UserError, match=r"(?s)no copies of the train split.*--copies N"):
        LatentDataset(folder, copies=True)
    add_copies(folder)
    with pytest.raises(UserError, match="no copies of the val split"):
        LatentDataset(folder, "val", copies=True)
    (folder / "copies" / "2" / "s3.pt").unlink()
    with pytest.raises(UserError, match=r"1 of 16 latents are missing in .*2: s3\.pt"):
        LatentDataset(folder, copies=True)


def test_another_shape_or_autoencoder_is_refused(tmp_path):
    folder = make_folder(tmp_path)
    wrong = latent(2)[:, 1:]
    save_latent(folder / "s2.pt", wrong, wrong, {"autoencoder": {"sha256": "abc"}})
    with pytest.raises(UserError, match=r"s2\.pt has shape"):
        LatentDataset(folder)
    save_latent(folder / "s2.pt", latent(2), latent(2), {"autoencoder": {"sha256": "xyz"}})
    with pytest.raises(UserError, match="autoencoder xyz"):
        LatentDataset(folder)


def test_folders_that_do_not_fit_together_are_refused(tmp_path):
    with pytest.raises(UserError, match="not a folder of latents"):
        load_latent_folder_info(tmp_path)
    folder = make_folder(tmp_path)
    assert load_latent_folder_info(folder).splits["val"] == ["s4", "s5"]
    with pytest.raises(UserError, match=r"(?s)no split 'trian'.*train"):
        LatentDataset(folder, "trian")
    with pytest.raises(UserError, match=r"test split .* is empty"):
        LatentDataset(folder, "test")
    dataset = read_json(folder / "dataset.json")
    write_json(folder / "dataset.json", dataset | {"complete": False})
    with pytest.raises(UserError, match="not finished"):
        load_latent_folder_info(folder)
    write_json(folder / "dataset.json", dataset | {"format_version": 99})
    with pytest.raises(UserError, match="version 99"):
        load_latent_folder_info(folder)
    write_json(folder / "dataset.json", dataset)
    write_json(folder / "splits.json", {"train": ["s0"], "val": [], "test": []})
    with pytest.raises(UserError, match="do not match"):
        load_latent_folder_info(folder)
