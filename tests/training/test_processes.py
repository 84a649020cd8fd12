from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from neuromf.errors import UserError
from neuromf.files import read_json
from neuromf.models.networks import build_network
from neuromf.training import checkpoint
from neuromf.training.processes import exchange, make_accelerator, shared_out
from neuromf.training.telemetry import SUMMARY
from tests.training import two_processes
from tests.training.two_processes import EVERYTHING, STOP, UPDATES, gradients, learn, settings


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """Two processes (gloo) have trained, stopped, resumed, and done the same under FSDP."""
    out = tmp_path_factory.mktemp("pair")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, two_processes.__file__, str(out)],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for process in started:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
    return out


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """One process with the whole batch."""
    folder = tmp_path_factory.mktemp("alone")
    learn(settings(EVERYTHING), folder)
    return folder


def found(pair: Path, rank: int) -> dict:
    return json.loads((pair / f"found_{rank}.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    newest, damaged = checkpoint.newest(folder)
    assert newest is not None
    assert not damaged
    saved = checkpoint.load(newest)
    assert saved.update == UPDATES
    assert saved.batch == EVERYTHING
    return saved.model | {f"average {name}": value for name, value in saved.averages["0.5"].items()}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(
            value, theirs[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def drift(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Distance of two runs' weights, as a share of the way they went: AdamW enlarges rounding of tiny gradients."""
    torch.manual_seed(0)
    start = build_network(settings(1).network.model_dump(), two_processes.SHAPE).state_dict()
    assert ours.keys() == theirs.keys()
    apart = sum(float((ours[name] - theirs[name]).square().sum()) for name in start)
    way = sum(float((theirs[name] - value).square().sum()) for name, value in start.items())
    return (apart / way) ** 0.5


# --- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["", "fsdp_"])
def test_two_processes_have_the_loss_and_the_gradient_of_one_with_twice_the_batch(pair, kind):
    loss, grads = gradients(settings(EVERYTHING))
    first, second = (torch.load(pair / f"{kind}gradients_{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in grads)
    assert found(pair, 0)[f"{kind}loss"] == found(pair, 1)[f"{kind}loss"] == pytest.approx(loss, rel=1e-6)
    assert_same(first, grads, 1e-6)
    assert max(float(g.abs().max()) for g in grads.values()) > 1e-3


# --- runs ----------------------------------------------------------------------------------------------------------


def test_two_processes_train_what_one_with_twice_the_batch_trains(pair, alone):
    assert drift(weights(pair / "two"), weights(alone)) < 0.02
    raw = found(pair, 0)["raw"]
    assert len(raw) == UPDATES
    assert raw == found(pair, 1)["raw"]  # every process knows the figures of all samples
    ours, theirs = (read_json(folder / SUMMARY) for folder in (pair / "two", alone))
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a["sampling"]["count"] == b["sampling"]["count"]
        for name in ("raw_loss_mean", "raw_loss_mf_mean", "grad_norm_mean", "val_raw_loss", "relative_update_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-3), name


@pytest.mark.parametrize("kind", ["", "fsdp_"])
def test_a_signal_to_one_process_stops_all_after_the_same_update(pair, kind):
    one, other = (found(pair, rank)[f"{kind}stopped"] for rank in (0, 1))
    assert one == other
    assert one.startswith(f"SIGUSR1 after update {STOP + 1}")
    if not kind:
        assert found(pair, 0)["folder"][-1] == f"step_{STOP + 1:08d}"


def test_a_stopped_pair_resumes_bit_for_bit(pair):
    assert any(f"resumed after update {STOP + 1}" in text for text in found(pair, 0)["messages"])
    assert_same(weights(pair / "stopped"), weights(pair / "two"), 0)


def test_a_stopped_pair_resumes_as_one(pair):
    """One process takes as many of an update's samples at once as each of the two did, twice."""
    learn(settings(EVERYTHING // 2), pair / "resumed-as-one")
    assert drift(weights(pair / "resumed-as-one"), weights(pair / "two")) < 0.02


def test_sharded_weights_train_and_resume_as_whole_ones_do(pair, alone):
    assert drift(weights(pair / "fsdp"), weights(alone)) < 0.02
    learn(settings(EVERYTHING // 2), pair / "fsdp-resumed-as-one")
    assert drift(weights(pair / "fsdp-resumed-as-one"), weights(alone)) < 0.02
    ours, theirs = (read_json(folder / SUMMARY)[-1] for folder in (pair / "fsdp", alone))
    for name in ("val_raw_loss", "ema_divergence", "relative_update_norm"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name


# --- how an update is shared ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("processes", "expected"),
    [(1, (16, 4)), (2, (16, 2)), (4, (16, 1)), (8, (8, 1)), (64, (1, 1))],
)
def test_other_numbers_of_processes_keep_the_batch_of_an_update(processes, expected):
    shared = shared_out(settings(16), 64, processes).training
    assert (shared.batch_size, shared.accumulation) == expected


def test_a_new_run_and_the_same_processes_change_nothing():
    config = settings(16, 2)
    assert shared_out(config, None, 3) is config
    assert shared_out(config, 96, 3) is config


def test_processes_that_cannot_share_an_update_are_told_who_can():
    with pytest.raises(UserError, match=r"64 samples, which 3 processes.*\n.*1, 2, 4, 8, 16, 32, 64"):
        shared_out(settings(16), 64, 3)


def test_alone_nothing_is_exchanged():
    record = {"raw": torch.rand(3), "moving": torch.tensor([True, False, True])}
    heard = exchange(make_accelerator("cpu", "fp32"), record, 15)
    assert heard.signal == 15
    assert heard.record["moving"] is record["moving"]
