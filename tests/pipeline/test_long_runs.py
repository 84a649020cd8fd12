"""Runs that go wrong, and runs of several processes, as a user starts them: by the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from neuromf.files import read_json
from neuromf.training import checkpoint
from neuromf.training.telemetry import SUMMARY

FSDP = """\
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config: {fsdp_version: 2}
num_machines: 1
num_processes: 2
"""


def command(latents: Path, out: Path, *words: str, preset: str = "imf-xpred") -> list[str]:
    return ["-m", "neuromf_cli", "train", "--preset", preset, "--data", str(latents), "--out", str(out), *words]


def start(words: list[str], *launcher: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *launcher, *words], capture_output=True, text=True, env=environment, timeout=300, check=False
    )


# A network without normalisation at a thousand times a rate that works; the warm-up leaves time for checkpoints.
WILD = """\
network: {name: mlp, width: 64, depth: 3}
objective: {prediction: u, norm_p: 0.0}
times: {distribution: uniform, data_proportion: 0.5}
training: {updates: 300, batch_size: 4, lr: 3.0, schedule: constant, warmup_steps: 200, clip: null}
ema: {decays: [0.5], select: 0.5}
intervals: {checkpoint_updates: 2, keep_checkpoints: 1}
"""


def test_a_thousandfold_rate_is_halted_and_the_last_good_checkpoint_named(latents, tmp_path):
    (tmp_path / "wild.yaml").write_text(WILD)
    ended = start(command(latents, tmp_path / "run", preset=str(tmp_path / "wild.yaml")))
    assert ended.returncode == 3, ended.stderr
    good = checkpoint.last_healthy(tmp_path / "run")
    assert good is not None
    assert f"the last good checkpoint is {good}" in ended.stderr
    assert checkpoint.intact(good)
    weights = checkpoint.load(good).model.values()
    assert all(bool(w.isfinite().all()) for w in weights)
    assert read_json(tmp_path / "run/diagnostics/halted.json")["guards"]["state"] in ("diverging", "non-finite")


LAUNCHERS = {
    "accelerate": ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
    "accelerate, FSDP": ("-m", "accelerate.commands.launch", "--config_file", "fsdp.yaml"),
    "torchrun": ("-m", "torch.distributed.run", "--nproc-per-node", "2"),
}


@pytest.mark.parametrize(
    "launcher",
    ["accelerate", *(pytest.param(name, marks=pytest.mark.slow) for name in ("accelerate, FSDP", "torchrun"))],
)
def test_launchers_start_two_processes(latents, small, in_tmp, launcher):
    Path("fsdp.yaml").write_text(FSDP)
    settings = [w for w in small if not w.startswith(("training.updates", "training.batch_size"))]
    words = command(latents, Path("run"), *settings, "training.updates=3", "training.batch_size=2")
    ended = start([*words, "--device", "cpu", "--json"], *LAUNCHERS[launcher])
    assert ended.returncode == 0, ended.stderr
    check_pair(ended.stdout)


def test_the_tasks_of_srun_find_each_other_and_keep_their_exit_code(latents, small, in_tmp):
    """SLURM itself is not here: its variables are."""
    settings = [w for w in small if not w.startswith(("training.updates", "training.batch_size"))]
    words = command(latents, Path("run"), *settings, "training.updates=400", "training.batch_size=2")
    slurm = {"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": str(os.getpid())}
    tasks = [
        subprocess.Popen(
            [sys.executable, *words, "--device", "cpu"],
            env=os.environ | {"OMP_NUM_THREADS": "1", "SLURM_PROCID": str(k), "SLURM_LOCALID": str(k), **slurm},
            stderr=subprocess.PIPE,
            text=True,
        )
        for k in range(2)
    ]
    assert tasks[0].stderr is not None
    while "update 1/400" not in (line := tasks[0].stderr.readline()):
        assert line, tasks[1].communicate()[1]
    tasks[1].send_signal(signal.SIGUSR1)
    said = [task.communicate(timeout=100)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [75, 75], said
    assert "SIGUSR1 after update" in said[0]
    assert said[1] == ""
    newest, _ = checkpoint.newest(Path("run"))
    assert newest is not None
    assert checkpoint.load(newest).batch == 4


def check_pair(output: str) -> None:
    assert json.loads(output)["updates"] == 3
    newest, _ = checkpoint.newest(Path("run"))
    assert newest is not None
    assert checkpoint.load(newest).batch == 4
    assert read_json(Path("run") / SUMMARY)[-1]["sampling"]["count"] == 3 * 4
    assert read_json(Path("run/environment.json"))["processes"] == 2
