from __future__ import annotations

import pytest

from neuromf.launch import first_host, join_slurm

STEP = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "gpu[03-04]",
        "SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "2"}  # fmt: skip


def test_a_task_of_srun_becomes_a_rank():
    environment = dict(STEP)
    assert join_slurm(environment)
    assert {k: environment[k] for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")} == {
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu03",
    }  # fmt: skip
    other = {**STEP, "SLURM_PROCID": "0"}
    join_slurm(other)
    assert other["MASTER_PORT"] == environment["MASTER_PORT"]


@pytest.mark.parametrize("changed", [{"RANK": "0"}, {"SLURM_NTASKS": "1"}])
def test_other_launchers_and_single_tasks_are_left_alone(changed):
    environment = {**STEP, **changed}
    assert not join_slurm(environment)
    assert environment == {**STEP, **changed}
    assert not join_slurm({})


def test_what_the_user_set_stays():
    environment = {**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    join_slurm(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.1", "29500")


@pytest.mark.parametrize(
    ("nodes", "host"), [("node7", "node7"), ("a-b[001-004,7]", "a-b001"), ("n[1-2]-ib,x", "n1-ib"), ("a,b", "a")]
)
def test_the_first_host_of_a_compressed_list(nodes, host):
    assert first_host(nodes) == host
