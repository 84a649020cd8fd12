"""How much memory a training run will need: its arithmetic done on tensors that hold no data."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from neuromf.config import TrainConfig
from neuromf.losses.forward_mode import forward_mode
from neuromf.models.adapters import frozen_count
from neuromf.models.blocks import recompute_blocks
from neuromf.models.networks import parameter_count
from neuromf.training.objective import Objective
from neuromf.training.optim import parameter_groups

GIB = 1 << 30
MARGIN = 1.1
LATENTS_HELD = 12
"""Tensors of a batch's size that the objective makes around the network: x, eps, z_t, V, its target and the like."""
CPU_CONVOLUTIONS = 1.5
"""On CPUs oneDNN copies what it convolves into layouts of its own: without this, U-Nets take 1.1 to 1.5 times the
estimate."""


class Memory(NamedTuple):
    """Bytes of one process.

    parameters: their number, not bytes.
    weights, gradients, optimizer, averages: held through the run.
    activations: most that the pass with a tape holds at once.
    derivative: what du/dt on the samples with r < t adds to that.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    averages: int
    activations: int
    derivative: int

    @property
    def total(self) -> int:
        """All of it, and a tenth for buffers and the allocator's gaps."""
        return int(MARGIN * sum(self[1:]))


def estimate(objective: Objective, shape: Sequence[int], config: TrainConfig, *, half: bool, on_cpu: bool) -> Memory:
    """Estimate the memory of one process, beside what the libraries take.

    The passes of an update run on the `meta` device, and every storage that is made and dropped is counted.

    Args:
        objective: on any device; a copy on `meta` is evaluated.
        shape: (C, I, J, K) of a latent.
        config: resolved settings.
        half: the ordinary pass in bf16.
        on_cpu: whether a CPU will compute.
    """
    ghost = copy.deepcopy(objective).to("meta")
    if config.training.recompute:
        recompute_blocks(ghost.network)
    size = config.training.batch_size
    latents = LATENTS_HELD * size * math.prod(shape) * 4
    # The recomputation of blocks happens where no such mode reaches: their attention is counted at its dearest then.
    devices = nullcontext() if config.training.recompute else AsOnDevices(half)
    activations = _with_tape(ghost, (size, *shape), devices)
    derivative = _without_tape(ghost, (_moving(config), *shape))
    if on_cpu and any(isinstance(part, nn.Conv3d) for part in ghost.network.modules()):
        activations, derivative = int(CPU_CONVOLUTIONS * activations), int(CPU_CONVOLUTIONS * derivative)
    if not on_cpu:  # the allocator hands one pass's memory on to the next; a CPU's keeps both
        derivative = max(derivative - activations, 0)
    parameters = parameter_count(ghost)
    return Memory(
        parameters=parameters,
        weights=4 * (parameters + frozen_count(ghost.network)),
        gradients=4 * parameters,
        optimizer=4 * _moments(ghost, config),
        averages=4 * parameter_count(ghost.network) * len(config.ema.names),
        activations=activations + latents,
        derivative=derivative,
    )


def _moments(objective: Objective, config: TrainConfig) -> int:
    """How many numbers the optimiser keeps: two a parameter, and one where Muon takes it."""
    muon = parameter_groups(objective).matrices.values() if config.training.optimizer == "muon" else ()
    return 2 * parameter_count(objective) - sum(p.numel() for p in muon)


def _moving(config: TrainConfig) -> int:
    """Most samples with r < t that a micro-batch has."""
    if config.objective.name == "rectflow":
        return 0
    return min(config.training.batch_size, math.ceil(config.training.batch_size * (1 - config.times.data_proportion)))


def _with_tape(objective: Objective, shape: tuple[int, ...], devices: AbstractContextManager[Any]) -> int:
    """Most bytes that forward and backward hold, without the weights' gradients: those are counted apart."""
    z, t = torch.zeros(shape, device="meta"), torch.zeros(shape[0], device="meta")
    config = objective.config
    for p in objective.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with Held(objective.parameters()) as held, devices:
        outputs = list(objective.heads(z, t, t)) if config.tangent == "v-head" else [objective.u(z, t, t)]
        if config.fm_weight:
            outputs.append(objective.u(z, t, t))
        loss = torch.stack([output.float().square().mean() for output in outputs]).sum()
        del outputs
        loss.backward()
    return held.peak


@torch.no_grad()
def _without_tape(objective: Objective, shape: tuple[int, ...]) -> int:
    """Most bytes that the derivative holds, as `losses.derivative` takes it."""
    if not shape[0]:
        return 0
    z, t = torch.zeros(shape, device="meta"), torch.zeros(shape[0], device="meta")
    with Held(objective.parameters()) as held, sdpa_kernel(SDPBackend.MATH):
        if objective.config.derivative == "exact" and objective.config.name != "alphaflow":
            forward_mode(lambda z_, t_: objective.u(z_, t, t_), (z, t), (z, t))
        else:
            objective.u(z, t, t)
    return held.peak


class Held(TorchDispatchMode):
    """Counts the bytes of the storages that operations make and something still holds, and keeps the `peak`.

    Args:
        given: tensors that are there already; views of them are not counted.
    """

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._bytes = {tensor.untyped_storage()._cdata: 0 for tensor in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._hold(tensor.untyped_storage())
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._bytes:
            self._bytes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._bytes.pop(key)


class AsOnDevices(TorchFunctionMode):
    """What CPUs and GPUs do and `meta` does not: fused attention, and autocast if it is on.

    Autocast, by CUDA's lists: products run in bf16, norms and softmax in float32. A norm's input and output stay whole,
    so that half precision saves far less than half of the activations.
    """

    LOW = (F.linear, F.conv3d, torch.matmul, Tensor.matmul, torch.bmm, torch.baddbmm, torch.einsum)
    WHOLE = (F.group_norm, F.layer_norm, F.softmax, torch.softmax, Tensor.softmax)
    ATTENTION = (F.scaled_dot_product_attention,)

    def __init__(self, half: bool) -> None:
        super().__init__()
        self.half = half

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, low = kwargs or {}, func in (*self.LOW, *self.ATTENTION)
        if self.half and (low or func in self.WHOLE):
            dtype = torch.bfloat16 if low else torch.float32
            args, kwargs = tree_map_only(Tensor, lambda x: x.to(dtype), (args, kwargs))
        return FusedAttention.apply(*args[:3]) if func in self.ATTENTION else func(*args, **kwargs)


class FusedAttention(torch.autograd.Function):
    """The memory of an attention kernel that never holds the matrix of all pairs: inputs, result, their gradients."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """A result without values, (..., N, d)."""
        result = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients without values."""
        q, k, v, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def available(device: str) -> tuple[int, str]:
    """Memory of the device a run would use, in bytes, and its name."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory, torch.cuda.get_device_name(0)
    import psutil

    return psutil.virtual_memory().total, "this machine's memory"


def resident() -> int:
    """Bytes that this process holds in memory now."""
    import psutil

    return int(psutil.Process().memory_info().rss)
