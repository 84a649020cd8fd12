"""The training loop of the built-in autoencoder: one process, on a CPU, in bfloat16.

Loss of a patch x with posterior N(mu, sigma^2) and y = decode(mu + sigma eps), all means over elements:
    L = |y - x| + mse_weight (y - x)^2 + kl_weight (mu^2 + sigma^2 - 1 - 2 log sigma) / 2
The KL term is small: it brings the latents near unit size and gives log sigma its meaning, the noise that the
decoder does not notice.
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
_SAMPLE_PATCH = 32  # of the volumes that the starting weights are scaled by
_BLANK, _BLANK_SKIPPED = 0.02, 0.85  # crops of a lower mean are mostly drawn again


@dataclass(frozen=True)
class AutoencoderSettings:
    """Everything that decides the result, beside the label maps and templates.

    Attributes:
        architecture: of the network.
        minutes, updates: training ends at whichever comes first; the learning rate falls to zero as a cosine.
        stages: (share of the training, patch size, batch size).
        lr, warmup_steps: peak learning rate of Adam, and its linear warm-up.
        mse_weight, kl_weight: of the loss above.
        ema_halflife_updates: of the averaged weights, which are the result.
        pool_volumes: training volumes drawn from the label maps and templates before the first update.
        phantom_volumes: as many drawn from procedural heads, on top.
        pool: how volumes are drawn.
        bfloat16: compute the convolutions in bfloat16; twice as fast, but on patches below 16 voxels the gradients
            of torch's CPU kernels are at times not finite (torch 2.13; such updates are skipped).
        seed: of everything. Bit-equal results also need `updates` to end the training, not `minutes`.
    """

    architecture: KLArchitecture = field(default_factory=KLArchitecture)
    minutes: float = 60.0
    updates: int = 5_000
    stages: tuple[tuple[float, int, int], ...] = ((0.3, 24, 8), (0.6, 32, 6), (0.1, 48, 2))
    lr: float = 6e-4
    warmup_steps: int = 200
    mse_weight: float = 10.0
    kl_weight: float = 2e-4
    ema_halflife_updates: float = 100.0
    pool_volumes: int = 1200
    phantom_volumes: int = 200
    pool: PoolSettings = field(default_factory=PoolSettings)
    bfloat16: bool = True
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


class Training:
    """Weights, their running average, the optimiser and the random stream: what a checkpoint holds."""

    def __init__(self, settings: AutoencoderSettings, sample: Tensor) -> None:
        self.settings = settings
        self.network = wavelet_start(settings.architecture, sample, settings.seed)
        self.ema = {name: value.clone() for name, value in self.network.state_dict().items()}
        self.optimiser = torch.optim.Adam(self.network.parameters(), settings.lr, betas=(0.9, 0.99))
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.update = 0
        self.elapsed_s = 0.0

    @property
    def progress(self) -> float:
        """Share of the training that is done."""
        settings = self.settings
        return min(1.0, max(self.update / settings.updates, self.elapsed_s / 60 / settings.minutes))

    def save(self, path: Path) -> None:
        """Write a checkpoint."""
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
        """Continue from a checkpoint."""
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
    decoded: Tensor, volume: Tensor, mean: Tensor, log_sigma: Tensor, mse_weight: float, kl_weight: float
) -> Tensor:
    """The loss at the top of this module, a scalar; (B, 1, I, J, K) volumes and (B, C, i, j, k) posteriors."""
    difference = decoded - volume
    kl = 0.5 * (mean.square() + (2 * log_sigma).exp() - 1 - 2 * log_sigma).mean()
    return difference.abs().mean() + mse_weight * difference.square().mean() + kl_weight * kl


def _stage(progress: float, settings: AutoencoderSettings) -> tuple[int, int]:
    """Patch size and batch size."""
    end = 0.0
    for share, patch, batch in settings.stages:
        end += share
        if progress < end:
            return patch, batch
    return settings.stages[-1][1], settings.stages[-1][2]


def draw_patches(pools: Sequence[np.ndarray], patch: int, batch: int, generator: torch.Generator) -> Tensor:
    """Random crops (batch, 1, patch, patch, patch) of arrays (N, I, J, K), turned and mirrored, mostly not blank."""

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    def share() -> float:
        return float(torch.rand((), generator=generator))

    crops: list[Tensor] = []
    while len(crops) < batch:
        pool = pools[below(len(pools))]
        volume = pool[below(len(pool))]
        window = tuple(slice(start, start + patch) for start in (below(n - patch + 1) for n in volume.shape))
        crop = torch.from_numpy(volume[window].astype(np.float32))
        if crop.mean() < _BLANK and share() < _BLANK_SKIPPED:
            continue
        order = torch.randperm(3, generator=generator).tolist()
        flips = [axis for axis in range(3) if share() < 0.5]
        crops.append(crop.permute(order).flip(flips)[None] * (0.85 + 0.3 * share()))
    return torch.stack(crops)


def fit(
    pools: Sequence[np.ndarray],
    settings: AutoencoderSettings,
    checkpoint: Path,
    *,
    log: Callable[[str], None] = lambda line: None,
    progress: Progress | None = None,
    checkpoint_every_s: float = 120.0,
) -> Training:
    """Train until `settings` says so, continuing from `checkpoint` if it exists.

    Args:
        pools: training volumes, arrays (N, I, J, K).
        log: called with one line of text every 50 updates.
    """
    side = min(_SAMPLE_PATCH, min(pools[0].shape[1:]))
    sample = draw_patches(pools, side, 16, torch.Generator().manual_seed(settings.seed))
    training = Training(settings, sample)
    if checkpoint.exists():
        training.load(checkpoint)
    last_save = time.monotonic()
    errors: list[float] = []
    while training.progress < 1:
        start = time.monotonic()
        volume = draw_patches(pools, *_stage(training.progress, settings), training.generator)
        errors.append(_update(training, volume))
        training.elapsed_s += time.monotonic() - start
        if training.update % 50 == 0:
            decibel = -10 * np.log10(np.mean(errors))
            log(f"update {training.update}, {training.elapsed_s:.0f} s: PSNR of the patches {decibel:.2f} dB")
            errors.clear()
        if progress is not None:
            progress("training", int(1000 * training.progress), 1000)
        if time.monotonic() - last_save > checkpoint_every_s or training.progress >= 1:
            training.save(checkpoint)
            last_save = time.monotonic()
    return training


def _update(training: Training, volume: Tensor) -> float:
    """One optimiser step on volumes (B, 1, I, J, K); returns the mean squared error."""
    settings, network = training.settings, training.network
    for group in training.optimiser.param_groups:
        group["lr"] = learning_rate(training.update, training.progress, settings)
    with torch.autocast("cpu", torch.bfloat16, enabled=settings.bfloat16):
        mean, log_sigma = posterior(network, volume)
        noise = torch.randn(mean.shape, generator=training.generator)
        decoded = network.decode(mean + log_sigma.exp() * noise).float()
    loss = autoencoder_loss(decoded, volume, mean.float(), log_sigma.float(), settings.mse_weight, settings.kl_weight)
    training.optimiser.zero_grad(set_to_none=True)
    loss.backward()
    training.update += 1
    if not torch.isfinite(torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)):
        return float((decoded.detach() - volume).square().mean())
    training.optimiser.step()
    # Early on the average must not remember the start.
    decay = min(0.5 ** (1 / settings.ema_halflife_updates), training.update / (training.update + 10))
    with torch.no_grad():
        for name, value in network.state_dict().items():
            training.ema[name].lerp_(value, 1 - decay)
    return float((decoded.detach() - volume).square().mean())
