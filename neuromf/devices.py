"""Where tensors live: the words a user may say, turned into a torch device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch

from neuromf.errors import UserError

# By controller: the limit, what is used, and the line of memory.stat for what could be dropped.
_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def torch_device(name: str) -> torch.device:
    """`auto` is CUDA, else MPS, else the CPU.

    Args:
        name: auto, cpu, cuda or mps.

    Raises:
        UserError: the device is not there.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    if name == "cuda" and not cuda:
        raise UserError("no CUDA device is available", "use --device cpu, or install a CUDA build of torch")
    if name == "mps" and not mps:
        raise UserError("no MPS device is available", "use --device cpu")
    return torch.device(name)


def free_memory(device: torch.device) -> int:
    """Bytes that could be taken on a device now; of a CPU, what machine, container and job give without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return min([int(psutil.virtual_memory().available), *left_in_groups()])


def left_in_groups(of: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """Bytes that each of Linux's control groups around a process leaves it: SLURM and containers set their limits so.

    What a group has read from files and not used lately counts as free: the kernel drops that before it kills.

    Args:
        of: says which groups the process is in.
        mount: of the groups, version 1 or 2.
    """
    for line in of.read_text().splitlines() if of.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        limit, used, cache = _FILES[controllers]
        root = mount / controllers
        # Inside a container the path may be that of the host, of which only the root is to be seen.
        for group in (PurePosixPath(path), *PurePosixPath(path).parents):
            folder = root / str(group).lstrip("/")
            try:
                most, taken = int((folder / limit).read_text()), int((folder / used).read_text())
                stat = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # absent, or "max": no limit
                continue
            yield max(0, most - taken + int(stat.get(cache, 0)))
