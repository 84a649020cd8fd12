from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from neuromf.errors import UserError
from neuromf.files import read_json, write_json
from neuromf.training import checkpoint
from neuromf.training.checkpoint import Best, Checkpoint

POSIX = pytest.mark.skipif(os.name != "posix", reason="size limits of POSIX systems")


def at(update: int, healthy: bool = True) -> Checkpoint:
    """A checkpoint whose every number is `update`."""
    full = lambda: {"layer.weight": torch.full((3, 2), float(update)), "bias": torch.full((2,), float(update))}
    return Checkpoint(
        update,
        8,
        healthy,
        full(),
        {"0.9": full(), "0.9995": full()},
        {"optimizer": {"lr": 0.1, "n": update}, "epoch": [(1.0, True)]},
    )


def steps(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_what_is_saved_is_loaded(tmp_path):
    folder = checkpoint.save(tmp_path, at(7), keep=2)
    assert folder == tmp_path / "checkpoints" / "step_00000007"
    loaded, expected = checkpoint.load(folder), at(7)
    assert loaded.update == 7
    assert loaded.state == expected.state
    assert loaded.averages.keys() == expected.averages.keys()
    for found, weights in (
        (loaded.model, expected.model),
        *((loaded.averages[d], expected.averages[d]) for d in ("0.9", "0.9995")),
    ):
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_it_says_whose_latents_the_weights_belong_to(tmp_path):
    said = lambda update: read_json(checkpoint.save(tmp_path, at(update), keep=2) / "checkpoint.json")
    assert said(1)["autoencoder_sha256"] is None
    write_json(tmp_path / "data.json", {"autoencoder": {"name": "haar", "sha256": "a" * 64}})
    assert said(2)["autoencoder_sha256"] == "a" * 64


def test_only_the_newest_are_kept(tmp_path):
    for update in (5, 10, 15, 20):
        checkpoint.save(tmp_path, at(update), keep=2)
    assert steps(tmp_path) == ["step_00000015", "step_00000020"]


def test_every_so_many_updates_one_stays_for_good(tmp_path):
    for update in (5, 10, 15, 20, 25):
        checkpoint.save(tmp_path, at(update), keep=1, keep_every=10)
    assert steps(tmp_path) == ["step_00000010", "step_00000020", "step_00000025"]


def test_the_last_one_from_before_a_divergence_stays(tmp_path):
    assert "no checkpoint" in checkpoint.last_good(tmp_path)
    for update, healthy in ((5, True), (10, True), (15, False), (20, False), (25, False)):
        checkpoint.save(tmp_path, at(update, healthy), keep=2)
    assert [folder.name[-2:] for folder in sorted((tmp_path / checkpoint.FOLDER).iterdir())] == ["10", "20", "25"]
    assert "step_00000010" in checkpoint.last_good(tmp_path)
    checkpoint.save(tmp_path, at(30), keep=2)
    assert [folder.name[-2:] for folder in sorted((tmp_path / checkpoint.FOLDER).iterdir())] == ["25", "30"]


def test_saving_a_step_again_replaces_it(tmp_path):
    checkpoint.save(tmp_path, at(5), keep=2)
    checkpoint.save(tmp_path, at(5)._replace(model={"other": torch.ones(1)}), keep=2)
    assert set(checkpoint.load(checkpoint.newest(tmp_path)[0]).model) == {"other"}


def test_without_checkpoints_there_is_no_newest(tmp_path):
    assert checkpoint.newest(tmp_path) == (None, [])


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "ema_0.9.safetensors", "state.pt"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, name, harm):
    older, newer = (checkpoint.save(tmp_path, at(update), keep=2) for update in (5, 10))
    assert checkpoint.newest(tmp_path) == (newer, [])
    harm(newer / name)
    assert checkpoint.newest(tmp_path) == (older, [newer])


@pytest.mark.parametrize("harm", [truncate, Path.unlink])
def test_a_checkpoint_without_its_list_is_damaged(tmp_path, harm):
    harm(checkpoint.save(tmp_path, at(5), keep=2) / "checkpoint.json")
    assert checkpoint.newest(tmp_path)[0] is None


def test_damaged_later_ones_do_not_crowd_out_the_good(tmp_path):
    older, newer = (checkpoint.save(tmp_path, at(update), keep=2) for update in (5, 10))
    truncate(newer / "state.pt")
    saved = checkpoint.save(tmp_path, at(7), keep=1)  # the run went on from 5 and was stopped
    assert checkpoint.newest(tmp_path) == (saved, [newer])
    assert not older.exists()


KILLED = """
import os, sys, torch
from pathlib import Path
from neuromf.training import checkpoint
weights = {"a": torch.ones(3)}
for update in (5, 10):
    if update == 10:
        checkpoint.torch.save = lambda *_: os._exit(9)
    checkpoint.save(Path(sys.argv[1]), checkpoint.Checkpoint(update, 8, True, weights, {}, {}), keep=1)
"""

FULL_DISK = """
import resource, sys, torch
from pathlib import Path
from neuromf.errors import UserError
from neuromf.training import checkpoint
big = {"a": torch.zeros(100_000)}
part = sys.argv[2]
saved = checkpoint.Checkpoint(10, 8, True, big if part == "model" else {}, {}, big if part == "state" else {})
checkpoint.save(Path(sys.argv[1]), saved._replace(update=5), keep=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    checkpoint.save(Path(sys.argv[1]), saved, keep=1)
except UserError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def run_code(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, timeout=120
    )


@POSIX
def test_a_kill_while_saving_leaves_the_one_before(tmp_path):
    assert run_code(KILLED, str(tmp_path)).returncode == 9
    newest, damaged = checkpoint.newest(tmp_path)
    assert newest is not None
    assert (newest.name, damaged) == ("step_00000005", [])
    leftovers = [name for name in steps(tmp_path) if name != newest.name]
    assert len(leftovers) == 1
    assert not leftovers[0].startswith("step_")
    checkpoint.save(tmp_path, at(10), keep=2)
    assert steps(tmp_path) == ["step_00000005", "step_00000010"]


@POSIX
@pytest.mark.parametrize("part", ["model", "state"])
def test_a_full_disk_is_said_and_the_one_before_is_kept(tmp_path, part):
    done = run_code(FULL_DISK, str(tmp_path), part)
    assert done.returncode == 2, done.stderr[-800:]
    assert "disk is full" in done.stdout
    assert steps(tmp_path) == ["step_00000005"]


def test_an_average_that_was_not_kept_is_refused_with_the_kept_ones(tmp_path):
    folder = checkpoint.save(tmp_path, at(5), keep=1)
    assert torch.equal(checkpoint.load_average(folder, "0.9")["bias"], torch.full((2,), 5.0))
    with pytest.raises(UserError, match=r"0\.9, 0\.9995"):
        checkpoint.load_average(folder, "0.99")


def test_the_list_names_every_file(tmp_path):
    folder = checkpoint.save(tmp_path, at(5), keep=1)
    listed = set(read_json(folder / "checkpoint.json")["sha256"])
    assert listed == {path.name for path in folder.iterdir()} - {"checkpoint.json"}


# --- the best --------------------------------------------------------------------------------------------------------

WEIGHTS = {"layer.weight": torch.arange(6.0).reshape(3, 2), "bias": torch.ones(2)}


def keep(run: Path, update: int, loss: float | None) -> bool:
    return checkpoint.keep_best(run, update, "0.9", loss, {name: w * update for name, w in WEIGHTS.items()})


def test_the_weights_of_the_lowest_validation_are_kept(tmp_path):
    assert checkpoint.best(tmp_path) is None
    kept = [keep(tmp_path, update, loss) for update, loss in ((10, 2.0), (20, 0.1 + 0.2), (30, None), (40, 0.5))]
    assert kept == [True, True, False, False]
    assert checkpoint.best(tmp_path) == Best(20, "0.9", 0.1 + 0.2)
    weights, best = checkpoint.load_best(tmp_path)
    assert best.update == 20
    assert weights.keys() == WEIGHTS.keys()
    assert all(torch.equal(weights[name], WEIGHTS[name] * 20) for name in WEIGHTS)


def test_an_equal_validation_changes_nothing(tmp_path):
    """A resumed run validates some updates again; the file stays the same."""
    keep(tmp_path, 10, 1.0)
    assert not keep(tmp_path, 20, 1.0)
    assert not keep(tmp_path, 10, 1.0)
    assert checkpoint.best(tmp_path).update == 10


def test_rotation_leaves_the_best_alone_and_nothing_is_resumed_from_it(tmp_path):
    keep(tmp_path, 5, 1.0)
    assert checkpoint.newest(tmp_path) == (None, [])
    for update in (5, 10, 15):
        checkpoint.save(tmp_path, at(update), keep=1)
    assert steps(tmp_path) == ["best.safetensors", "step_00000015"]
    assert checkpoint.best(tmp_path).update == 5


@pytest.mark.parametrize("harm", [truncate, flip])
def test_a_damaged_best_is_refused_and_replaced(tmp_path, harm):
    keep(tmp_path, 5, 1.0)
    harm(tmp_path / "checkpoints" / checkpoint.BEST)
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load_best(tmp_path)
    assert keep(tmp_path, 10, 0.9)
    assert checkpoint.load_best(tmp_path)[1].update == 10


def test_a_run_that_never_validated_has_no_best(tmp_path):
    with pytest.raises(UserError, match="no best weights"):
        checkpoint.load_best(tmp_path)


KILLED_AT_BEST = """
import os, sys, torch
from pathlib import Path
from neuromf import files
from neuromf.training import checkpoint
run, weights = Path(sys.argv[1]), {"a": torch.ones(3)}
checkpoint.keep_best(run, 5, "0.9", 2.0, weights)
files._fsync = lambda path: os._exit(9)
checkpoint.keep_best(run, 10, "0.9", 1.0, weights)
"""


@POSIX
def test_a_kill_while_keeping_the_best_leaves_the_best_before(tmp_path):
    assert run_code(KILLED_AT_BEST, str(tmp_path)).returncode == 9
    assert checkpoint.load_best(tmp_path)[1] == Best(5, "0.9", 2.0)
    checkpoint.save(tmp_path, at(10), keep=1)
    assert steps(tmp_path) == ["best.safetensors", "step_00000010"]
