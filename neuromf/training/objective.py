"""The objective as a module: its forward is the loss, so that what Accelerate wraps is what gradients flow through.

The ordinary pass runs as Accelerate prepares it (DDP, autocast, checkpointing). The derivative du/dt calls the bare
network without a tape, on the r < t share only, in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from neuromf.config import ObjectiveConfig
from neuromf.losses.derivative import derivative
from neuromf.losses.meanflow import Tangent, Terms, lp_loss, meanflow_terms, rectflow_terms, weighted
from neuromf.losses.path import average_velocity, data_estimate


class Loss(NamedTuple):
    """What a step needs: the scalar to differentiate, and detached per-sample figures for the telemetry."""

    value: Tensor
    record: dict[str, Tensor]


class Objective(nn.Module):
    """Loss of a network on whitened latents, for the objective a configuration names.

    Args:
        network: maps (z, r, t) to u or x_hat.
        config: the `objective` section.
        channel_weights: (C,) factors of the raw loss, or None.
    """

    channel_weights: Tensor | None

    def __init__(self, network: nn.Module, config: ObjectiveConfig, channel_weights: Tensor | None = None) -> None:
        super().__init__()
        self.network, self.config = network, config
        self.derivative = derivative(config.derivative, config.fd_step)
        self.register_buffer("channel_weights", channel_weights, persistent=False)

    def u(self, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        """Average velocity u(z_t, r, t), (B, C, I, J, K), from whichever quantity the network predicts."""
        return average_velocity(self.network(z, r, t), z, t, self.config.prediction, self.config.t_min)

    def terms(self, x: Tensor, eps: Tensor, r: Tensor, t: Tensor) -> Terms:
        """The compound velocity and its target at these draws."""
        if self.config.name == "rectflow":
            return rectflow_terms(self.u, x, eps, t)
        tangent: Tangent = "velocity" if self.config.name == "meanflow" else "boundary"
        return meanflow_terms(self.u, x, eps, r, t, tangent=tangent, derivative=self.derivative)

    def raw_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """|V - target|^lp per sample, (B,)."""
        return lp_loss(
            prediction,
            target,
            lp=self.config.lp,
            reduction=self.config.loss_reduction,
            channel_weights=self.channel_weights,
        )

    def forward(self, x: Tensor, eps: Tensor, r: Tensor, t: Tensor) -> Loss:
        """The weighted loss averaged over the batch.

        Args:
            x: whitened latents (B, C, I, J, K).
            eps: noise of the same shape.
            r, t: (B,), r <= t.
        """
        config = self.config
        terms = self.terms(x, eps, r, t)
        raw = self.raw_loss(terms.V, terms.target)
        adapted = weighted(raw, config.norm_p, config.norm_eps)
        loss = adapted.mean()
        if config.fm_weight:
            flow = self.raw_loss(self.u(terms.z, t, t), terms.target)
            loss = loss + config.fm_weight * weighted(flow, config.norm_p, config.norm_eps).mean()
        return Loss(loss, self._record(terms, raw.detach(), adapted.detach(), r, t))

    @torch.no_grad()
    def _record(self, terms: Terms, raw: Tensor, adapted: Tensor, r: Tensor, t: Tensor) -> dict[str, Tensor]:
        """Per-sample figures, each (B,): norms are root mean squares over a sample's elements."""
        V, u, v = terms.V.detach().float(), terms.u.detach().float(), terms.target
        x_hat = data_estimate(u, terms.z, t, "u")
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


def _rms(value: Tensor) -> Tensor:
    return value.float().flatten(1).square().mean(1).sqrt()


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(a.float().flatten(1), b.float().flatten(1), dim=1)
