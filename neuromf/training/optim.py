"""Optimiser and learning-rate schedules."""

from __future__ import annotations

import math

import torch
from torch import nn

from neuromf.config import TrainingConfig


def build_optimizer(module: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW on every trainable parameter."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)


def learning_rate(update: int, updates: int, config: TrainingConfig) -> float:
    """The rate of update number `update` (0 is the first).

    A linear warm-up rises from 0 at the first update to `lr` at update `warmup_steps`; then constant, half a cosine
    down to `lr_final`, or a line to it, ending with the last update. Without warm-up the first update has `lr`.
    """
    warmup = min(config.warmup_steps, updates)
    if update < warmup:
        return config.lr * update / warmup
    if config.schedule == "constant":
        return config.lr
    progress = min((update - warmup) / max(updates - 1 - warmup, 1), 1.0)
    fall = (1 + math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else 1 - progress
    return config.lr_final + (config.lr - config.lr_final) * fall
