"""Figures that explain a run, as pure functions: gradients by block, distances of weights, draws, generated samples.

`telemetry` writes what these compute; docs/diagnostics.md lists every field. A figure that is not finite, or that
nothing was there to compute from, is None (null on disk).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neuromf.config import ObjectiveConfig, TimesConfig
from neuromf.training.draws import draw_times
from neuromf.training.sharding import whole

TIME_BINS = 5
EXPECTED_PAIRS = 20_000

# --- numbers -----------------------------------------------------------------------------------------------------


def finite(value: Tensor | float) -> float | None:
    """The number, or None where it is NaN or infinite (JSON has neither)."""
    number = float(value)
    return number if math.isfinite(number) else None


def mean(values: Tensor) -> float | None:
    """Over all elements, None of none."""
    return finite(values.double().mean()) if values.numel() else None


def std(values: Tensor) -> float | None:
    """Over all elements, divided by their number; None of none."""
    return finite(values.double().std(correction=0)) if values.numel() else None


def mean_by_time(values: Tensor, t: Tensor, bins: int = TIME_BINS) -> list[float | None]:
    """Means of (N,) values over equal bins of t in [0, 1]; 1 belongs to the last, None where a bin is empty."""
    index = (t * bins).long().clamp(max=bins - 1)
    return [mean(values[index == b]) for b in range(bins)]


def step_figures(record: Mapping[str, Tensor]) -> dict[str, float | None]:
    """One update's per-sample record (each (B,)) as the live view shows it, with one wait for the device.

    Returns:
        raw_loss, raw_fm and raw_mf (None without such a sample), loss, V_ratio = |V| / |v_c|, cosine of V and v_c.
    """
    names = ("raw", "moving", "weighted", "V_norm", "v_norm", "cosine_V")
    raw, moving, weighted, V, v, cosine = torch.stack([record[name].float() for name in names]).cpu()
    still = moving == 0
    return {
        "raw_loss": float(raw.mean()),
        "raw_fm": float(raw[still].mean()) if still.any() else None,
        "raw_mf": float(raw[~still].mean()) if not still.all() else None,
        "loss": float(weighted.mean()),
        "V_ratio": float(V.mean() / v.mean().clamp(min=1e-12)),
        "cosine": float(cosine.mean()),
    }


# --- weights and gradients ---------------------------------------------------------------------------------------


def block_of(network: nn.Module, parameter: str) -> str:
    """The block that a parameter belongs to.

    That is the part of the backbone it lies in, wrappers left out, and the members of a list one by one
    (`down_blocks.2.resnets.0...` is `down_block_2`); the U-Net's second time is called by what it embeds.

    Args:
        network: a backbone, wrapped or not.
        parameter: its name in `network.named_parameters()`.
    """
    head, _, rest = parameter.partition(".")
    part = getattr(network, head)
    if head in ("network", "net"):
        return block_of(part, rest)
    if isinstance(part, nn.ModuleList):
        return f"{head.removesuffix('s')}_{rest.partition('.')[0]}"
    if head == "second_embed":
        return "r_embed" if network.conditioning == "r+t" else "h_embed"
    return head


@torch.no_grad()
def block_grad_norms(network: nn.Module) -> dict[str, float | None]:
    """Root mean square of the gradient's elements, by block; None where a block has no gradient."""
    blocks: dict[str, list[Tensor]] = {}
    for name, p in network.named_parameters():
        blocks.setdefault(block_of(network, name), []).extend([] if p.grad is None else [p.grad])
    return {
        name: finite(_norm(gradients) / math.sqrt(sum(g.numel() for g in gradients))) if gradients else None
        for name, gradients in blocks.items()
    }


@torch.no_grad()
def relative_distance(values: Iterable[Tensor], reference: Iterable[Tensor]) -> float | None:
    """||values - reference|| / ||reference|| over all tensors together; None where the reference is zero."""
    known = list(reference)
    length = _norm(known)
    return finite(_norm(a - b for a, b in zip(values, known, strict=True)) / length) if length else None


def _norm(tensors: Iterable[Tensor]) -> float:
    """Euclidean norm of all elements together, with one wait for the device."""
    norms = torch.stack([whole(torch.linalg.vector_norm(tensor.float())) for tensor in tensors])
    return float(norms.cpu().double().square().sum().sqrt())


class StepProbe:
    """One update looked at closely. It costs a few passes over the weights and a copy of them, freed with it.

    Make it between the backward pass and clipping; ask for `figures` after the optimiser's step.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.blocks = block_grad_norms(network)
        self.before = [p.detach().clone() for p in network.parameters()]

    def figures(self) -> dict[str, Any]:
        """`block_grad_norms` before clipping, and `relative_update_norm` = ||theta_new - theta_old|| / ||theta_old||.

        The latter is 0 where the update was skipped.
        """
        moved = relative_distance(self.network.parameters(), self.before)
        return {"block_grad_norms": self.blocks, "relative_update_norm": moved}


# --- draws -------------------------------------------------------------------------------------------------------


def sampling_figures(r: Tensor, t: Tensor) -> dict[str, float | None]:
    """Mean and spread of t, mean of h = t - r, and share of h = 0, of pairs (N,)."""
    return {"t_mean": mean(t), "t_std": std(t), "h_mean": mean(t - r), "h_zero_frac": mean((r == t).float())}


def expected_sampling(times: TimesConfig, objective: ObjectiveConfig, progress: float) -> dict[str, float | None]:
    """`sampling_figures` as the settings mean them, from 20,000 pairs of a fixed key.

    Args:
        times, objective: the sections that say how pairs are drawn.
        progress: share of the training that is done; it matters under a curriculum of gaps alone.
    """
    return dict(_expected(times, objective, progress if times.gap_curriculum else 1.0))


@lru_cache(maxsize=4)
def _expected(times: TimesConfig, objective: ObjectiveConfig, progress: float) -> dict[str, float | None]:
    return sampling_figures(*draw_times(0, "expected", 0, EXPECTED_PAIRS, times, objective, progress))


# --- generated samples -------------------------------------------------------------------------------------------


def describe_samples(samples: Mapping[int, Tensor]) -> dict[str, Any]:
    """What samples look like by number of evaluations (NFE), and how far those with more are from those with one.

    Args:
        samples: NFE -> (B, C, I, J, K) whitened, all from the same noise; 1 among them.

    Returns:
        `stats`: per NFE `mean` and `std`, lists over the channels, and `min` and `max` over everything.
        `nfe_consistency`: `mse_1vsN` over all elements, `cosine_1vsN` over a sample's elements, averaged over samples.
    """
    one = samples[1]
    consistency: dict[str, float | None] = {}
    for nfe, others in samples.items():
        if nfe != 1:
            consistency[f"mse_1vs{nfe}"] = mean((one - others).square())
            consistency[f"cosine_1vs{nfe}"] = mean(F.cosine_similarity(one.flatten(1), others.flatten(1), dim=1))
    return {
        "stats": {f"nfe_{nfe}": _channel_statistics(latents) for nfe, latents in samples.items()},
        "nfe_consistency": consistency,
    }


def _channel_statistics(latents: Tensor) -> dict[str, Any]:
    channels = latents.unbind(dim=1)
    return {
        "mean": [mean(channel) for channel in channels],
        "std": [std(channel) for channel in channels],
        "min": finite(latents.min()),
        "max": finite(latents.max()),
    }
