"""What a launcher of several processes (`torchrun`, `accelerate launch`, `srun`) has told this one."""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping

_PORTS = range(20_000, 40_000)


def process_rank() -> int:
    """Which of the processes this is; 0, the main one, without a launcher."""
    return int(os.environ.get("RANK", "0"))


def process_count() -> int:
    """How many processes there are for this command."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join_slurm(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Let the tasks of one `srun` find each other, as those of `torchrun` do, by setting its variables.

    `srun` ends with the exit code of its tasks, so that a job script sees code 75 (run me again), which `torchrun`
    turns into 1.

    Args:
        environment: read for SLURM's variables, written with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT.

    Returns:
        Whether this is one of several tasks that no other launcher has set up.
    """
    if "RANK" in environment or "SLURM_PROCID" not in environment or int(environment.get("SLURM_NTASKS", "1")) == 1:
        return False
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST", "localhost")
    environment.update(
        RANK=environment["SLURM_PROCID"],
        WORLD_SIZE=environment["SLURM_NTASKS"],
        LOCAL_RANK=environment.get("SLURM_LOCALID", "0"),
        MASTER_ADDR=environment.get("MASTER_ADDR") or first_host(nodes),
        MASTER_PORT=environment.get("MASTER_PORT") or _port(environment),
    )
    return True


def _port(environment: MutableMapping[str, str]) -> str:
    """One that every task of a step arrives at, and other steps on the node mostly do not."""
    step = int(environment.get("SLURM_JOB_ID", "0")) * 7 + int(environment.get("SLURM_STEP_ID", "0"))
    return str(_PORTS[step % len(_PORTS)])


def first_host(nodes: str) -> str:
    """The first host of SLURM's compressed list.

    Example:
        >>> first_host("gpu[03-05,09],login"), first_host("a1,a2")
        ('gpu03', 'a1')
    """
    found = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\]([^,]*))?", nodes)
    return "".join(part or "" for part in found.groups()) if found else nodes
