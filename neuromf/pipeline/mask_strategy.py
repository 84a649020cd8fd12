"""Which way masks become latent channels: measured on the masks themselves, and written down.

A mask goes there and back both ways; Dice of what comes back with what went in decides. Through the autoencoder it has
as many channels as an image and keeps its edges if the autoencoder, which learned heads, can show them; as block means
it has one channel and loses what is small against a latent cell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from neuromf.metrics.lesions import dice
from neuromf.models.autoencoder import Autoencoder
from neuromf.models.mask_codec import STRATEGIES, Strategy, decode_mask, encode_mask, mask_channels

REPORT_FILE = "mask_vae_test.json"
LEAST_DICE = 0.85
"""From here on the autoencoder is good enough for masks."""
MOST_MASKS = 64
THRESHOLDS = tuple(round(0.1 + 0.05 * n, 2) for n in range(17))


class RoundTrip(NamedTuple):
    """How well masks come back one way.

    threshold: the level that counts as inside, of `THRESHOLDS` the one with the highest mean.
    dice: of each mask at that threshold.
    channels: a mask takes.
    """

    threshold: float
    dice: list[float]
    channels: int

    @property
    def mean(self) -> float:
        """Of all masks."""
        return float(np.mean(self.dice))


class MaskTest(NamedTuple):
    """Both ways measured, and the choice."""

    trips: dict[str, RoundTrip]
    strategy: Strategy
    explanation: str

    @property
    def chosen(self) -> RoundTrip:
        """The round trip of the chosen way."""
        return self.trips[self.strategy]

    def to_dict(self) -> dict[str, Any]:
        """What mask_vae_test.json says."""
        return {
            "strategy": self.strategy,
            "explanation": self.explanation,
            "least_dice": LEAST_DICE,
            "n": len(self.chosen.dice),
            "threshold": self.chosen.threshold,
            "round_trips": {
                name: {
                    "dice_mean": trip.mean,
                    "dice_median": float(np.median(trip.dice)),
                    "dice_min": min(trip.dice),
                    "threshold": trip.threshold,
                    "channels": trip.channels,
                    "dice": [round(value, 4) for value in trip.dice],
                }
                for name, trip in self.trips.items()
            },
        }


def compare_strategies(
    masks: Sequence[NDArray[np.bool_]],
    autoencoder: Autoencoder,
    wanted: str = "auto",
    progress: Callable[[str, int, int], None] | None = None,
) -> MaskTest:
    """Measure both ways on at most 64 masks and choose one.

    Args:
        masks: (1, I, J, K) each, of the training grid.
        autoencoder: that of the images.
        wanted: a strategy asked for, or `auto`.
        progress: callback (description, done, total).
    """
    step = -(-len(masks) // MOST_MASKS)
    tested = list(masks[::step])
    levels: dict[Strategy, list[NDArray[np.float64]]] = {name: [] for name in STRATEGIES}
    for done, mask in enumerate(tested, 1):
        for name in STRATEGIES:
            levels[name].append(_dice_by_threshold(mask, name, autoencoder))
        if progress:
            progress("masks there and back", done, len(tested))
    trips: dict[str, RoundTrip] = {n: _best(np.stack(values), n, autoencoder) for n, values in levels.items()}
    strategy, explanation = _choose(trips, wanted)
    return MaskTest(trips, strategy, explanation)


def _dice_by_threshold(mask: NDArray[np.bool_], strategy: Strategy, autoencoder: Autoencoder) -> NDArray[np.float64]:
    """Dice at each of `THRESHOLDS`, (T,)."""
    volume = torch.from_numpy(mask)[None]
    level = decode_mask(encode_mask(volume, strategy, autoencoder), strategy, autoencoder)[0].numpy()
    return np.array([dice(level >= threshold, mask) for threshold in THRESHOLDS])


def _best(values: NDArray[np.float64], strategy: Strategy, autoencoder: Autoencoder) -> RoundTrip:
    mean = values.mean(axis=0)
    # Of thresholds about as good, the one nearest to the middle: generated levels scatter.
    good = [n for n in range(len(mean)) if mean[n] >= mean.max() - 0.005]
    at = min(good, key=lambda n: abs(THRESHOLDS[n] - 0.5))
    return RoundTrip(THRESHOLDS[at], values[:, at].tolist(), mask_channels(strategy, autoencoder))


def _choose(trips: dict[str, RoundTrip], wanted: str) -> tuple[Strategy, str]:
    through, means = trips["autoencoder"].mean, trips["downsample"].mean
    measured = f"Dice there and back: {through:.3f} through the autoencoder, {means:.3f} as block means"
    if wanted != "auto":
        asked: Strategy = "autoencoder" if wanted == "autoencoder" else "downsample"
        return asked, f"{measured}; {asked} was asked for"
    if through >= LEAST_DICE:
        return "autoencoder", f"{measured}; the autoencoder reaches {LEAST_DICE}"
    better: Strategy = "autoencoder" if through > means else "downsample"
    return better, (
        f"{measured}; the autoencoder does not reach {LEAST_DICE}, so the better of the two is taken: {better}"
        + ("" if trips[better].mean >= LEAST_DICE else "; generated masks cannot be sharper than that")
    )
