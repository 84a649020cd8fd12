"""Where tensors live: the words a user may say, turned into a torch device."""

from __future__ import annotations

import torch

from neuromf.errors import UserError


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
    """Bytes that could be taken on a device now; of a CPU, what the machine could give without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return int(psutil.virtual_memory().available)
