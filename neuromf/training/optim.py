"""Optimisers and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from neuromf.config import TrainingConfig
from neuromf.errors import UserError

MuonScale = Literal["match_rms_adamw", "original"]


class ParameterGroups(NamedTuple):
    """Trainable parameters by name: hidden matrices, and everything else."""

    matrices: dict[str, nn.Parameter]
    rest: dict[str, nn.Parameter]


def parameter_groups(module: nn.Module) -> ParameterGroups:
    """Which parameters Muon takes and which it leaves to AdamW.

    Muon takes what has two axes or more, both longer than 1 once a kernel (out, in, k, k, k) is seen as (out, in k^3),
    except in embeddings and in the modules that a backbone lists in `ADAMW_MODULES` (first and last layers).

    Args:
        module: a backbone, or anything that holds one.

    Raises:
        UserError: no backbone in it says what its first and last layers are.
    """
    parts = dict(module.named_modules())
    if not any(hasattr(part, "ADAMW_MODULES") for part in parts.values()):
        raise UserError(
            f"Muon cannot tell the first and last layers of {type(module).__name__} from the hidden ones",
            "list them in the network's ADAMW_MODULES, or set training.optimizer=adamw",
        )
    left = [f"{path}." for path, part in parts.items() if isinstance(part, nn.Embedding)]
    for path, part in parts.items():
        left += [f"{path}.{name}.".lstrip(".") for name in getattr(part, "ADAMW_MODULES", ())]
    groups = ParameterGroups({}, {})
    for name, p in module.named_parameters():
        if p.requires_grad:
            hidden = _is_matrix(p) and not f"{name}.".startswith(tuple(left))
            (groups.matrices if hidden else groups.rest)[name] = p
    return groups


def _is_matrix(p: Tensor) -> bool:
    return p.ndim >= 2 and min(p.shape[0], p[0].numel()) > 1


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan 2024) on hidden matrices and AdamW on the rest, both torch's own, as one optimiser.

    `param_groups` are the matrices and the rest; the state lies under the parameters themselves, a matrix's momentum
    as (out, in k^3). Muon needs whole matrices: it does not work on parameters that FSDP has sharded.

    Args:
        groups: see `parameter_groups`.
        lr: of both groups.
        betas: AdamW's.
        weight_decay: of both groups, decoupled.
        momentum: Muon's, in Nesterov's form.
        scale: factor on the rate of an (m, n) matrix. `match_rms_adamw`: 0.2 sqrt(max(m, n)), which makes the updates
            as large as AdamW's, so that its rates hold (Liu 2025); `original`: sqrt(max(1, m / n)).
    """

    def __init__(
        self,
        groups: ParameterGroups,
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        momentum: float,
        scale: MuonScale,
    ) -> None:
        nothing: list[dict[str, list[Tensor]]] = [{"params": []}]
        muon = torch.optim.Muon(nothing, lr=lr, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn=scale)
        adamw = torch.optim.AdamW(nothing, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
        matrices = {**muon.defaults, "params": list(groups.matrices.values())}
        rest = {**adamw.defaults, "params": list(groups.rest.values())}
        super().__init__([matrices, rest], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both; parameters without a gradient are left alone.

        Returns:
            The loss of `closure`, where there is one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        matrices, rest = self.param_groups
        # Views are made anew each time: moving a network or lending it averaged weights exchanges its storage.
        views = {_as_matrix(p): self.state[p] for p in matrices["params"] if p.grad is not None}
        muon = torch.optim.Muon([{**matrices, "params": list(views)}])
        muon.state.update(views)
        muon.step()
        adamw = torch.optim.AdamW([{**rest}])
        adamw.state = self.state
        adamw.step()
        return loss


def _as_matrix(p: Tensor) -> Tensor:
    """(out, in, ...) as (out, in k^3), on the same storage and with the same gradient."""
    if p.ndim < 2:
        raise UserError("Muon needs whole matrices and FSDP has sharded them", "set training.optimizer=adamw")
    assert p.grad is not None
    matrix = p.detach().view(p.shape[0], -1)
    matrix.grad = p.grad.reshape(matrix.shape)
    return matrix


def build_optimizer(module: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """The configured optimiser on every trainable parameter.

    Raises:
        UserError: Muon with a torch that lacks it, or a network it does not know its way about in.
    """
    if config.optimizer == "adamw":
        parameters = [p for p in module.parameters() if p.requires_grad]
        # Fused, a step goes once over memory: 7 ms for 39 with 8 M parameters on one core.
        return torch.optim.AdamW(
            parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
    if not hasattr(torch.optim, "Muon"):
        raise UserError(
            f"training.optimizer=muon needs torch 2.10 or later, this is {torch.__version__}",
            "update torch, or set training.optimizer=adamw",
        )
    return MuonWithAdamW(
        parameter_groups(module),
        lr=config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        momentum=config.muon_momentum,
        scale=config.muon_scale,
    )


def learning_rate(update: int, updates: int, config: TrainingConfig, *, start: float = 0.0) -> float:
    """The rate of update number `update` (0 is the first).

    A linear warm-up rises from `start` at the first update to `lr` at update `warmup_steps`; then constant, half a
    cosine down to `lr_final`, or a line to it. Without warm-up the first update has `lr`.

    Args:
        update: number of finished updates.
        updates: how many the schedule spans; its end is the last of them, and later ones keep that rate.
        config: the `training` section.
        start: rate at the beginning of the warm-up.
    """
    warmup = min(config.warmup_steps, updates)
    if update < warmup:
        return start + (config.lr - start) * update / warmup
    if config.schedule == "constant":
        return config.lr
    progress = min((update - warmup) / max(updates - 1 - warmup, 1), 1.0)
    fall = (1 + math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else 1 - progress
    return config.lr_final + (config.lr - config.lr_final) * fall
