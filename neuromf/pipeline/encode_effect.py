"""What mirroring or brightening does to latents: does the autoencoder commute with it?

If E(flip x) were flip E(x), flipped latents would do and no copy need be encoded. Measured, on scans of the training
split, for T = the left-right flip and T = x 0.95:

* |T E(x) - E(T x)| / |E(x)|, on latents, and with both sides divided by the channels' standard deviation, where
  |E(x) - mean| is what it is compared with: the error training would see;
* PSNR and SSIM of D(T E(x)), and of D(E(T x)), with T x.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from neuromf.data.latents import LatentStatistics
from neuromf.metrics.similarity import WINDOW, psnr, ssim
from neuromf.models.autoencoder import Autoencoder
from neuromf.pipeline.encode_copies import HashedScan
from neuromf.pipeline.encode_scan import EncodeJob

Progress = Callable[[str, int, int], None]

SCANS = 8
GAIN = 0.95
_HARMLESS_ERROR, _HARMLESS_DB, _HARMLESS_SSIM, _VISIBLE_DB = 0.05, 0.5, 0.005, 60.0


class Agreement(NamedTuple):
    """How a latent that was changed agrees with the latent of the changed volume; see the module's text.

    Attributes:
        relative_error: on latents; relative_error_whitened: on whitened ones.
        psnr_db, ssim: of the decoded changed latent; psnr_db_encoded, ssim_encoded: of the changed volume's round trip.
    """

    relative_error: float
    relative_error_whitened: float
    psnr_db: float
    psnr_db_encoded: float
    ssim: float | None
    ssim_encoded: float | None


def agreement(
    autoencoder: Autoencoder, volume: Tensor, change: Callable[[Tensor], Tensor], statistics: LatentStatistics
) -> Agreement:
    """Compare T E(x) with E(T x) for one volume (1, 1, I, J, K); `change` is T, for volumes and latents alike."""
    changed = change(volume)
    z = autoencoder.encode(volume).mean.cpu()
    moved, encoded = change(z), autoencoder.encode(changed).mean.cpu()
    std = z.new_tensor(statistics.std).view(-1, 1, 1, 1)
    difference = moved - encoded
    decoded = autoencoder.decode(moved).cpu(), autoencoder.decode(encoded).cpu()
    fits = min(volume.shape[2:]) >= WINDOW
    similarity = [float(ssim(changed, d)) if fits else None for d in decoded]
    return Agreement(
        float(difference.norm() / z.norm()),
        float((difference / std).norm() / statistics.whiten(z).norm()),
        *(float(psnr(changed, d)) for d in decoded),
        *similarity,
    )


def measure_effect(
    job: EncodeJob,
    training: Sequence[HashedScan],
    statistics: LatentStatistics | None,
    before: Mapping[str, Any] | None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The effect on latents, as encode_report.json holds it; `before`, an earlier one, is kept if it is of the same.

    Args:
        job: the autoencoder and the preprocessing.
        training: scans of the training split, of which up to 8, evenly spaced, are measured.
        statistics: of the latents.
        before: an earlier result, or None.
        progress: called with (description, done, total).
    """
    assert statistics is not None, "the effect is measured after the statistics"
    step = max(len(training) / SCANS, 1)
    chosen = [training[int(i * step)] for i in range(min(SCANS, len(training)))]
    key = [job.identity, [entry.sha256 for entry in chosen], statistics.to_dict(), GAIN]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    if before and before.get("digest") == digest:
        return dict(before)
    found: dict[str, list[Agreement]] = {"flip": [], "gain": []}
    for done, entry in enumerate(chosen, start=1):
        volume = torch.from_numpy(job.preparation.read(entry.scan, entry.sha256)[1].array)[None]
        found["flip"].append(agreement(job.autoencoder, volume, lambda x: x.flip(2), statistics))
        found["gain"].append(agreement(job.autoencoder, volume, lambda x: GAIN * x, statistics))
        if progress is not None:
            progress("effect on latents", done, len(chosen))
    return {"digest": digest, "n": len(chosen), "gain_factor": GAIN} | {
        name: summarise(values) for name, values in found.items()
    }


def summarise(values: Sequence[Agreement]) -> dict[str, Any]:
    """Means over volumes, and whether changing latents instead of volumes is harmless.

    It is where the whitened error is at most 5 % and decoding loses at most 0.5 dB and 0.005 of SSIM by it.
    """
    means: dict[str, Any] = {name: _mean([getattr(v, name) for v in values]) for name in Agreement._fields}
    lost = [_visible(v.psnr_db_encoded) - _visible(v.psnr_db) for v in values]
    harmless = means["relative_error_whitened"] <= _HARMLESS_ERROR and float(np.mean(lost)) <= _HARMLESS_DB
    harmless &= (means["ssim_encoded"] or 0) - (means["ssim"] or 0) <= _HARMLESS_SSIM
    return means | {"harmless": bool(harmless)}


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean; None, as in `reconstruction`, where every PSNR is infinite or nothing was measured."""
    known = [v for v in values if v is not None and np.isfinite(v)]
    return float(np.mean(known)) if known else None


def _visible(decibel: float) -> float:
    """A PSNR, as far as a difference could be seen: rounding of exact autoencoders lies at 130 dB."""
    return min(decibel, _VISIBLE_DB)
