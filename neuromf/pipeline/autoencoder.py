"""Train the built-in autoencoder: a small KL autoencoder on synthetic volumes and templates, on a CPU.

Loss of a patch x with posterior N(mu, sigma^2) and y = decode(mu + sigma eps), all means over elements:
    L = |y - x| + mse_weight (y - x)^2 + kl_weight (mu^2 + sigma^2 - 1 - 2 log sigma) / 2
The small KL term has one free scale to set, so it brings the latents near unit size and gives log sigma a
meaning: the noise the decoder does not notice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuromf.files import atomic_path
from neuromf.models.kl_network import KLArchitecture, posterior
from neuromf.pipeline.autoencoder_data import PoolSettings
from neuromf.pipeline.autoencoder_init import wavelet_start

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class AutoencoderSettings:
    """Everything that decides the result.

    Attributes:
        architecture: of the network.
        minutes, updates: training ends at whichever comes first; the learning rate falls to zero as a cosine.
        stages: (share of the training, patch size, batch size): small patches first, larger ones to settle the
            group norms, whose statistics depend on the field of view.
        lr, warmup_steps: peak learning rate of Adam and its linear warm-up.
        mse_weight, kl_weight: of the loss above.
        ema_halflife_updates: of the averaged weights, which are the result.
        pool_volumes: training volumes drawn before the first update.
        pool: what they are drawn from.
        seed: of everything.
    """

    architecture: KLArchitecture = KLArchitecture()
    minutes: float = 45.0
    updates: int = 100_000
    stages: tuple[tuple[float, int, int], ...] = ((0.5, 24, 8), (0.4, 32, 6), (0.1, 48, 2))
    lr: float = 2e-3
    warmup_steps: int = 200
    mse_weight: float = 10.0
    kl_weight: float = 2e-4
    ema_halflife_updates: float = 100.0
    pool_volumes: int = 1200
    pool: PoolSettings = field(default_factory=PoolSettings)
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


class _State:
    """Weights, their running average and the optimiser; what a checkpoint holds."""

    def __init__(self, settings: AutoencoderSettings, sample: Tensor) -> None:
        self.network = wavelet_start(settings.architecture, sample, settings.seed)
        self.ema = {name: value.clone() for name, value in self.network.state_dict().items()}
        self.optimiser = torch.optim.Adam(self.network.parameters(), settings.lr, betas=(0.9, 0.99))
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.update = 0
        self.elapsed_s = 0.0

    def progress(self, settings: AutoencoderSettings) -> float:
        """Share of the training that is done."""
        return min(1.0, max(self.update / settings.updates, self.elapsed_s / 60 / settings.minutes))

    def save(self, path: Path) -> None:
        with atomic_path(path) as temporary:
            torch.save(
                {
                    "network": self.network.state_dict(),
                    "ema": self.ema,
                    "optimiser": self.optimiser.state_dict(),
                    "generator": self.generator.get_state(),
                    "update": self.update,
                    "elapsed_s": self.elapsed_s,
                },
                temporary,
            )

    def load(self, path: Path) -> None:
        values = torch.load(path, weights_only=True)
        self.network.load_state_dict(values["network"])
        self.ema = values["ema"]
        self.optimiser.load_state_dict(values["optimiser"])
        self.generator.set_state(values["generator"])
        self.update = values["update"]
        self.elapsed_s = values["elapsed_s"]


def learning_rate(update: int, progress: float, settings: AutoencoderSettings) -> float:
    """Linear warm-up, then a cosine to zero."""
    warm = min(1.0, (update + 1) / max(settings.warmup_steps, 1))
    return settings.lr * warm * 0.5 * (1 + float(np.cos(np.pi * progress)))


def autoencoder_loss(
    reconstruction: Tensor, volume: Tensor, mean: Tensor, log_sigma: Tensor, mse_weight: float, kl_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss at the top of this module, with its mean squared error and its KL per latent element."""
    difference = reconstruction - volume
    mse = difference.square().mean()
    kl = 0.5 * (mean.square() + (2 * log_sigma).exp() - 1 - 2 * log_sigma).mean()
    return difference.abs().mean() + mse_weight * mse + kl_weight * kl, mse, kl


def _stage(progress: float, settings: AutoencoderSettings) -> tuple[int, int]:
    """Patch size and batch size."""
    end = 0.0
    for share, patch, batch in settings.stages:
        end += share
        if progress < end:
            return patch, batch
    return settings.stages[-1][1:]


def draw_patches(pools: Sequence[np.ndarray], patch: int, batch: int, generator: torch.Generator) -> Tensor:
    """Random crops (B, 1, patch, patch, patch) in random axis order, mirrored at random, mostly not blank."""
    pool_index = torch.randint(len(pools), (), generator=generator)
    result = []
    while len(result) < batch:
        pool_index = torch.randint(len(pools), (), generator=generator)
        pool = pools[int(pool_index)]
        n = pool.shape[1]
        start = torch.randint(n - patch + 1, (3,), generator=generator).tolist()
        volume = pool[int(torch.randint(len(pool), (), generator=generator))]
        crop = torch.from_numpy(
            volume[tuple(slice(s, s + patch) for s in start)].astype(np.float32)  # a copy off the memory map
        )
        if crop.mean() < 0.02 and torch.rand((), generator=generator) < 0.85:
            continue
        order = torch.randperm(3, generator=generator).tolist()
        flips = [axis for axis in range(3) if torch.rand((), generator=generator) < 0.5]
        gain = 0.85 + 0.3 * torch.rand((), generator=generator)
        result.append(crop.permute(order).flip(flips)[None] * gain)
    return torch.stack(result)


def fit(
    pools: Sequence[np.ndarray],
    settings: AutoencoderSettings,
    checkpoint: Path,
    *,
    log: Callable[[str], None] = print,
    progress: Progress | None = None,
    checkpoint_s: float = 120.0,
) -> _State:
    """Train to `settings.updates`, continuing from `checkpoint` if it exists."""
    sample = draw_patches(pools, 32, 16, torch.Generator().manual_seed(settings.seed))
    state = _State(settings, sample)
    if checkpoint.exists():
        state.load(checkpoint)
    last_save = time.monotonic()
    window: list[tuple[float, float]] = []
    while state.progress(settings) < 1:
        start = time.monotonic()
        volume = draw_patches(pools, *_stage(state.progress(settings), settings), state.generator)
        loss, mse, kl = _update(state, volume, settings)
        state.elapsed_s += time.monotonic() - start
        window.append((mse, kl))
        if state.update % 50 == 0:
            mse, kl = np.mean(window, axis=0)
            log(
                f"{state.elapsed_s:.0f} s, update {state.update}, patch {volume.shape[2]}: loss {loss:.4f}, "
                f"PSNR {-10 * np.log10(mse):.2f} dB, KL {kl:.2f}"
            )
            window.clear()
        if progress is not None:
            progress("training", int(1000 * state.progress(settings)), 1000)
        if time.monotonic() - last_save > checkpoint_s or state.progress(settings) >= 1:
            state.save(checkpoint)
            last_save = time.monotonic()
    return state


def _update(state: _State, volume: Tensor, settings: AutoencoderSettings) -> tuple[float, float, float]:
    """One optimiser step; loss, mean squared error and KL."""
    for group in state.optimiser.param_groups:
        group["lr"] = learning_rate(state.update, state.progress(settings), settings)
    with torch.autocast("cpu", torch.bfloat16):
        mean, log_sigma = posterior(state.network, volume)
        noise = torch.randn(mean.shape, generator=state.generator)
        reconstruction = state.network.decode(mean + log_sigma.exp() * noise)
    loss, mse, kl = autoencoder_loss(
        reconstruction.float(), volume, mean.float(), log_sigma.float(), settings.mse_weight, settings.kl_weight
    )
    state.optimiser.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(state.network.parameters(), 1.0)
    state.optimiser.step()
    state.update += 1
    decay = min(0.5 ** (1 / settings.ema_halflife_updates), state.update / (state.update + 10))
    with torch.no_grad():
        for name, value in state.network.state_dict().items():
            state.ema[name].lerp_(value, 1 - decay)
    return float(loss.detach()), float(mse.detach()), float(kl.detach())
