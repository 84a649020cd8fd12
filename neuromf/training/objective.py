"""The objective as a module: its forward is the loss, so that what Accelerate wraps is what gradients flow through.

The ordinary pass runs as Accelerate prepares it (DDP, autocast, checkpointing). Everything under stop-gradient (the
derivative du/dt, tangents, guidance) calls the bare network without a tape; the derivative in float32, on the r < t
share only. All draws are arguments, so that published numbers test the whole of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from neuromf.conditions import Condition
from neuromf.config import GuidanceConfig, ObjectiveConfig
from neuromf.losses.derivative import Field, derivative
from neuromf.losses.guidance import guided_velocity, inside, mixed_velocity
from neuromf.losses.meanflow import (
    Heads,
    Tangent,
    Terms,
    alphaflow_terms,
    channel_losses,
    flow_alpha,
    imf_terms,
    lp_loss,
    meanflow_terms,
    pmf_target,
    rectflow_terms,
    uncertainty_weighted,
    weighted,
)
from neuromf.losses.path import average_velocity, data_estimate, interpolate, velocity

Perceptual = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_hat, x, corner): (B, C, I, J, K) twice, (B, 3) in [0, 1) -> (B,), a distance of decoded crops."""


class Draws(NamedTuple):
    """Everything random about a batch.

    eps: (B, C, I, J, K) noise.
    r, t: (B,), r <= t.
    condition: labels, guidance scales and intervals, or None.
    dropped: (B,) bool, samples trained without their class, or None.
    corner: (B, 3) in [0, 1), where the decoded crops of the perceptual term begin, or None.
    """

    eps: Tensor
    r: Tensor
    t: Tensor
    condition: Condition | None = None
    dropped: Tensor | None = None
    corner: Tensor | None = None


class Loss(NamedTuple):
    """What a step needs: the scalar to differentiate, and detached per-sample figures for the telemetry."""

    value: Tensor
    record: dict[str, Tensor]


class Objective(nn.Module):
    """Loss of a network on whitened latents, for the objective a configuration names.

    Args:
        network: maps (z, r, t) and, where there are any, a condition to u or x_hat; with a second head it has `heads`.
        config: the `objective` section.
        channel_weights: (C,) factors of the raw loss, or None.
        guidance: the `guidance` section.
        classes: K, the number of classes; label K is "no class".
        channels: C, needed for learned channel weights.
        perceptual: distance of decoded crops, where the configuration gives it a weight.
    """

    channel_weights: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        config: ObjectiveConfig,
        channel_weights: Tensor | None = None,
        *,
        guidance: GuidanceConfig | None = None,
        classes: int = 0,
        channels: int = 0,
        perceptual: Perceptual | None = None,
    ) -> None:
        super().__init__()
        self.network, self.config, self.guidance = network, config, guidance or GuidanceConfig()
        self.classes, self.perceptual = classes, perceptual
        self.derivative = derivative(config.derivative, config.fd_step)
        self.register_buffer("channel_weights", channel_weights, persistent=False)
        self.log_variances = nn.Parameter(torch.zeros(channels)) if config.channel_weights == "learned" else None

    def own_state(self) -> dict[str, Tensor]:
        """What the objective itself learns, beside the network: the learned channel weights."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("network.")}

    # --- the network as velocities ---------------------------------------------------------------------------

    def u(self, z: Tensor, r: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """Average velocity u(z_t, r, t), (B, C, I, J, K), from whichever quantity the network predicts."""
        return self._velocity(self.network(z, r, t, *_given(condition)), z, t)

    def x_hat(self, z: Tensor, r: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """The data estimate at (z_t, r, t), (B, C, I, J, K): an x-prediction's own output."""
        return data_estimate(self.network(z, r, t, *_given(condition)), z, t, self.config.prediction)

    def heads(self, z: Tensor, r: Tensor, t: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        """(u, v) at (z_t, r, t): the average velocity, and the second head's instantaneous one."""
        network: Any = self.network
        u, v = network.heads(z, r, t, *_given(condition))
        return self._velocity(u, z, t), self._velocity(v, z, t)

    def v(self, z: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """The network's own instantaneous velocity at z_t: the second head at h = 0, or u(z_t, t, t)."""
        if self.config.tangent == "v-head":
            return self.heads(z, t, t, condition)[1]
        return self.u(z, t, t, condition)

    def _velocity(self, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
        return average_velocity(output, z, t, self.config.prediction, self.config.t_min)

    def _estimate(self, u: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """The data estimate that a velocity stands for; an x-prediction's own output, below its clamp too."""
        return data_estimate(u, z, t if self.config.prediction == "u" else t.clamp(min=self.config.t_min), "u")

    # --- the loss --------------------------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        eps: Tensor,
        r: Tensor,
        t: Tensor,
        condition: Condition | None = None,
        dropped: Tensor | None = None,
        corner: Tensor | None = None,
        *,
        progress: float = 0.0,
    ) -> Loss:
        """The weighted loss averaged over the batch.

        Args:
            x: whitened latents (B, C, I, J, K).
            eps, r, t, condition, dropped, corner: see `Draws`.
            progress: share of the training that is done (alphaflow's schedule).
        """
        config, draws = self.config, Draws(eps, r, t, condition, dropped, corner)
        alpha = self.flow_alpha(progress)
        seen = self._seen(condition, dropped)
        terms = self.terms(x, draws, alpha)
        raw, weighed = self._raw(terms)
        one = torch.ones_like(raw)
        scale = torch.where(terms.moving, (alpha or 1.0) * one, one)  # alphaflow's weight; 1 for the other objectives
        adapted = scale * weighted(weighed, config.norm_p, config.norm_eps)
        loss = adapted.mean()
        record = self._record(terms, raw.detach(), adapted.detach(), r, t)
        if self.log_variances is not None:
            loss = loss + self.log_variances.sum()
        if terms.v is not None:
            raw_v = self.raw_loss(terms.v, terms.target)
            loss = loss + config.vhead_weight * weighted(raw_v, config.norm_p, config.norm_eps).mean()
            record["raw_v"] = raw_v.detach()
        if config.fm_weight:
            flow = self.raw_loss(self.u(terms.z, t, t, seen), terms.target)
            loss = loss + config.fm_weight * weighted(flow, config.norm_p, config.norm_eps).mean()
        if config.perceptual_weight:
            distance = self._perceptual(terms, x, t, corner)
            loss = loss + config.perceptual_weight * distance.mean()
            record["perceptual"] = distance.detach()
        return Loss(loss, record)

    def terms(self, x: Tensor, draws: Draws, alpha: float | None = None) -> Terms:
        """The compound velocity and its target at these draws.

        Args:
            x: whitened latents (B, C, I, J, K).
            draws: of the batch.
            alpha: flow_alpha of alphaflow; None for the other objectives.
        """
        eps, r, t = draws.eps, draws.r, draws.t
        seen = self._seen(draws.condition, draws.dropped)
        u, name = self._field(seen), self.config.name
        if name == "rectflow":
            return rectflow_terms(u, x, eps, t)
        u_moving = self._field(None if seen is None else seen.select((r < t).nonzero().squeeze(1)))
        if alpha:
            return alphaflow_terms(u, x, eps, r, t, alpha, u_moving=u_moving)
        common: dict[str, Any] = {"derivative": self.derivative, "u_moving": u_moving}
        if name in ("meanflow", "alphaflow"):
            return meanflow_terms(u, x, eps, r, t, v_g=self._mixed(x, draws), **common)
        v_g, tangent = self._target_and_tangent(x, draws)
        heads: Heads | None = partial(self.heads, condition=seen) if self.config.tangent == "v-head" else None
        return imf_terms(u, x, eps, r, t, v_g=v_g, tangent=tangent, heads=heads, **common)

    def flow_alpha(self, progress: float) -> float | None:
        """alphaflow's flow_alpha at this share of the training; None for the other objectives."""
        if self.config.alpha_schedule is None:
            return None
        return flow_alpha(progress, *self.config.alpha_schedule, self.config.alpha_slope)

    def raw_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """|V - target|^lp per sample, (B,)."""
        config = self.config
        return lp_loss(
            prediction, target, lp=config.lp, reduction=config.loss_reduction, channel_weights=self.channel_weights
        )

    def _raw(self, terms: Terms) -> tuple[Tensor, Tensor]:
        """(B,) twice: the raw loss that is reported, and the one that is weighted and differentiated."""
        if self.log_variances is None:
            raw = self.raw_loss(terms.V, terms.target)
            return raw, raw
        each = channel_losses(terms.V, terms.target, lp=self.config.lp, reduction=self.config.loss_reduction)
        return each.sum(dim=1), uncertainty_weighted(each, self.log_variances)

    # --- conditions and guidance -----------------------------------------------------------------------------

    def _seen(self, condition: Condition | None, dropped: Tensor | None) -> Condition | None:
        """The condition the network trains on: "no class" where the label was dropped."""
        if condition is None or condition.label is None or dropped is None:
            return condition
        return condition._replace(label=torch.where(dropped, self.classes, condition.label))

    def _null(self, label: Tensor) -> Tensor:
        return torch.full_like(label, self.classes)

    def _field(self, condition: Condition | None) -> Field:
        return partial(self.u, condition=condition)

    @torch.no_grad()
    def _mixed(self, x: Tensor, draws: Draws) -> Tensor | None:
        """MeanFlow's guided target, None without guidance (Geng 2025a, section 4.2)."""
        guidance, label = self.guidance, _label(draws)
        if not guidance.enabled or label is None:
            return None
        t, v = draws.t, velocity(x, draws.eps)
        z = interpolate(x, draws.eps, t)
        null, cond = (self.u(z, t, t, Condition(y)) for y in (self._null(label), label))
        v_g = mixed_velocity(v, null, cond, guidance.omega, guidance.kappa)
        acts = inside(t, t.new_tensor(guidance.interval).expand(len(t), 2))
        return _where(acts & ~_dropped(draws), v_g, v)

    def _target_and_tangent(self, x: Tensor, draws: Draws) -> tuple[Tensor, Tangent | None]:
        """imf's and pmf's target, and the tangent where it is not the boundary value of the trained condition."""
        eps, t, config = draws.eps, draws.t, self.config
        v = pmf_target(x, eps, t, config.t_min) if config.name == "pmf" else velocity(x, eps)
        z, condition, label = interpolate(x, eps, t), draws.condition, _label(draws)
        if self.guidance.enabled and condition is not None and label is not None:
            return self._guided(z, t, v, condition, label, _dropped(draws))
        if config.tangent == "boundary":
            return v, None
        seen = self._seen(condition, draws.dropped)
        return v, lambda at: self.v(z[at], t[at], None if seen is None else seen.select(at))

    @torch.no_grad()
    def _guided(
        self, z: Tensor, t: Tensor, v: Tensor, condition: Condition, label: Tensor, dropped: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Improved MeanFlow's guided target, and its tangent, the network's velocity at the same scale (Geng 2025b)."""
        assert condition.omega is not None, "guidance draws a scale for every sample"
        assert condition.interval is not None, "guidance draws an interval for every sample"
        omega = torch.where(inside(t, condition.interval), condition.omega, 1.0)
        whole = torch.stack([torch.zeros_like(t), torch.ones_like(t)], dim=1)
        v_cond = self.v(z, t, Condition(label, omega, whole))
        v_null = self.v(z, t, Condition(self._null(label), torch.ones_like(omega), whole))
        return _where(dropped, v, guided_velocity(v, v_cond, v_null, omega)), v_cond

    def _perceptual(self, terms: Terms, x: Tensor, t: Tensor, corner: Tensor | None) -> Tensor:
        """Distance of decoded crops of x_hat and x where t < perceptual_t_max, else zero, (B,)."""
        assert self.perceptual is not None, "the perceptual term needs a decoder"
        assert corner is not None, "the perceptual term needs the corners of its crops"
        at = (t < self.config.perceptual_t_max).nonzero().squeeze(1)
        x_hat = self._estimate(terms.u[at], terms.z[at], t[at])
        distance = self.perceptual(x_hat, x[at], corner[at]) if len(at) else x_hat.new_zeros(0)
        return torch.zeros_like(t).index_copy(0, at, distance.to(t))

    # --- figures ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _record(self, terms: Terms, raw: Tensor, adapted: Tensor, r: Tensor, t: Tensor) -> dict[str, Tensor]:
        """Per-sample figures, each (B,): norms are root mean squares over a sample's elements."""
        V, u, v = terms.V.detach().float(), terms.u.detach().float(), terms.target
        x_hat = self._estimate(u, terms.z, t)
        return {
            "raw": raw,
            "weighted": adapted,
            "denominator": raw + self.config.norm_eps,
            "moving": terms.moving,
            "r": r,
            "t": t,
            "u_norm": _rms(u),
            "V_norm": _rms(V),
            "v_norm": _rms(v),
            "v_tilde_norm": _rms(terms.tangent),
            "jvp_norm": _rms(terms.du_dt),
            "cosine_V": _cosine(V, v),
            "cosine_v_tilde": _cosine(terms.tangent, v),
            "relative_error": _rms(V - v) / _rms(v).clamp(min=1e-12),
            "x_mean": x_hat.flatten(1).mean(1),
            "x_square": x_hat.flatten(1).square().mean(1),
            "x_min": x_hat.flatten(1).amin(1),
            "x_max": x_hat.flatten(1).amax(1),
        }


def _given(condition: Condition | None) -> tuple[Condition, ...]:
    """Arguments for a network that may know no conditions."""
    return () if condition is None else (condition,)


def _label(draws: Draws) -> Tensor | None:
    return None if draws.condition is None else draws.condition.label


def _dropped(draws: Draws) -> Tensor:
    return torch.zeros_like(draws.t, dtype=torch.bool) if draws.dropped is None else draws.dropped


def _where(choose: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a where a sample is chosen, else b; (B,), (B, ...), (B, ...)."""
    return torch.where(choose.reshape(-1, *(1,) * (a.ndim - 1)), a, b)


def _rms(value: Tensor) -> Tensor:
    return value.float().flatten(1).square().mean(1).sqrt()


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(a.float().flatten(1), b.float().flatten(1), dim=1)
