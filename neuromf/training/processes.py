"""Several processes at one run: how they share an update, and what they tell each other after it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import NamedTuple

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn

from neuromf.config import TrainConfig
from neuromf.devices import torch_device
from neuromf.errors import UserError
from neuromf.models.blocks import blocks_of
from neuromf.training.optim import MuonWithAdamW


def make_accelerator(device: str, precision: str) -> Accelerator:
    """Accelerate for `auto`, `cpu`, `cuda` or `mps`; `auto` precision is bf16 on CUDA, float32 elsewhere.

    Started by `accelerate launch` or `torchrun` it joins the other processes; alone it is the only one.

    Raises:
        UserError: the device is not there, or the accelerate config asks for what the loop cannot do.
    """
    where = torch_device(device)
    half = precision == "bf16" or (precision == "auto" and where.type == "cuda")
    AcceleratorState._reset_state()  # a second run in one process may use another precision
    accelerator = Accelerator(mixed_precision="bf16" if half else "no", cpu=where.type == "cpu")
    if accelerator.distributed_type == DistributedType.MULTI_CPU and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # Accelerate shards on accelerators only; this is the state it makes there.
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        accelerator.state.distributed_type = DistributedType.FSDP
    if accelerator.distributed_type not in _KNOWN:
        raise UserError(
            f"`neuromf train` cannot run under {accelerator.distributed_type.value}",
            "use one process, several (DDP), FSDP 2 or DeepSpeed in `accelerate config`",
        )
    return accelerator


_KNOWN = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.FSDP,
    DistributedType.DEEPSPEED,
)


def prepare(
    accelerator: Accelerator, objective: nn.Module, network: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """`accelerator.prepare` of the objective, with FSDP's units at the network and its blocks.

    Weights are gathered in float32: the derivative needs it, and autocast makes the ordinary pass cheap as it is.
    They stay gathered until the backward pass is through: a process whose micro-batch has no r < t sample calls the
    network less often than the others, and would miss their next gathering.

    Args:
        accelerator: of this process.
        objective: an `nn.Module` whose forward is the loss.
        network: inside it; called with `forward` and `heads`.
        optimizer: of the objective's parameters.

    Returns:
        The module to call in training, and the optimiser.

    Raises:
        UserError: FSDP 1, or an optimiser that needs whole matrices under FSDP.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        module, ready = accelerator.prepare(objective, optimizer)
        return module, ready
    from torch.distributed.fsdp import MixedPrecisionPolicy, register_fsdp_forward_method
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise UserError(
            "this accelerate config asks for FSDP 1, under which a loss cannot call parts of the module it wraps",
            "set fsdp_version: 2 in it (`accelerate to-fsdp2` converts a file)",
        )
    if isinstance(optimizer, MuonWithAdamW):
        raise UserError(
            "training.optimizer=muon needs whole matrices, and FSDP spreads them over processes",
            "set training.optimizer=adamw, or use DDP: launch without FSDP",
        )
    plugin.mixed_precision_policy = MixedPrecisionPolicy()
    plugin.reshard_after_forward = False
    plugin.cpu_ram_efficient_loading = False  # every process has built the same weights from the seed
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    units = {type(module).__name__ for module in (network, *blocks_of(network))}
    plugin.transformer_cls_names_to_wrap = sorted(units)
    module, ready = accelerator.prepare(objective, optimizer)
    if hasattr(network, "heads"):
        register_fsdp_forward_method(network, "heads")
    return module, ready


# --- sharing an update -----------------------------------------------------------------------------------------------


def shared_out(config: TrainConfig, batch: int | None, processes: int) -> TrainConfig:
    """The settings with which `processes` make updates of `batch` samples, so that a run goes on as it began.

    Args:
        config: its `training.batch_size` is the largest micro-batch that a process takes.
        batch: samples per update of the run so far; None, for a new one, leaves the settings alone.
        processes: how many there are now.

    Raises:
        UserError: they cannot share an update equally.
    """
    training = config.training
    if batch is None or batch == training.batch_size * training.accumulation * processes:
        return config
    if batch % processes:
        fitting = ", ".join(str(n) for n in range(1, batch + 1) if batch % n == 0)
        raise UserError(
            f"the updates of this run have {batch} samples, which {processes} processes cannot share equally",
            f"resume it with one of {fitting} processes",
        )
    each = batch // processes
    size = max(n for n in range(1, min(each, training.batch_size) + 1) if each % n == 0)
    changed = training.model_copy(update={"batch_size": size, "accumulation": each // size})
    return config.model_copy(update={"training": changed})


# --- after an update -------------------------------------------------------------------------------------------------


class Heard(NamedTuple):
    """What all processes know after an update: the figures of all its samples, and a signal that any of them got."""

    record: dict[str, Tensor]
    signal: int


def exchange(accelerator: Accelerator, record: Mapping[str, Tensor], signal: int) -> Heard:
    """Gather an update's per-sample figures and stopping signals from all processes, in one exchange.

    Every process then sees the same numbers, so that guards, epochs and stops need no further agreement.

    Args:
        accelerator: of this process.
        record: figures of its samples, each (B,), in the same order of names everywhere.
        signal: number of the signal it was stopped by, 0 without.

    Returns:
        Figures (B x processes,), float32, and the largest signal number.
    """
    if accelerator.num_processes == 1:
        return Heard(dict(record), signal)
    table = torch.stack([value.float() for value in record.values()], dim=1)
    flag = table.new_full((len(table), 1), float(signal))
    whole = accelerator.gather(torch.cat([table, flag], dim=1))
    *columns, flags = whole.unbind(dim=1)
    return Heard(dict(zip(record, columns, strict=True)), int(flags.max()))


def peak_memory(device: torch.device) -> int | None:
    """Most bytes that this process has held so far: allocated on a CUDA device, resident on a CPU; None elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
