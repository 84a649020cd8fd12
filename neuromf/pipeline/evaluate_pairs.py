"""What `evaluate --pairs` measures beside the image metrics: generated masks against the real ones.

Overlap with the nearest training mask (a copy has 1; held-back real masks say what is usual), volume and place of what
is marked, and how much it differs in the image from its surroundings: a mask that marks nothing visible has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage, stats

from neuromf.data.latents import load_latent_folder_info
from neuromf.data.volumes import load_volume, nifti_stem
from neuromf.errors import UserError
from neuromf.metrics import protocol
from neuromf.metrics.lesions import Lesions, describe_masks, nearest_dice
from neuromf.metrics.protocol import Record
from neuromf.models.mask_codec import PairLayout
from neuromf.pipeline.evaluation_run import Run
from neuromf.pipeline.pairs import mask_path
from neuromf.pipeline.volume_folder import mask_beside

_RING_VOXELS = 2
_AXES = ("left_right", "back_front", "down_up")

Masks = NDArray[np.bool_]


class RealMasks(NamedTuple):
    """Masks (N, I, J, K) of real pairs on the grid of the latents: of training, of held-back pairs, and by subject."""

    train: Masks
    held_back: Masks
    by_subject: dict[str, Masks]
    affine: NDArray[np.float64]


def measure_pairs(run: Run, pairs: Path) -> None:
    """Measure generated masks and put the records into `run.results`.

    Args:
        run: its generated volumes have masks beside them.
        pairs: the folder of encoded pairs that the model was trained on.

    Raises:
        UserError: no folder of pairs, masks missing there or beside the generated volumes, or another grid.
    """
    real = read_real(pairs)
    generated = read_generated(run.sets["generated"].paths)
    if generated.shape[1:] != real.train.shape[1:]:
        raise UserError(
            f"the generated masks have {generated.shape[1:]} voxels, the pairs in {pairs} {real.train.shape[1:]}",
            "give the pairs that the model was trained on",
        )
    groups: dict[str, Callable[[], dict[str, Record]]] = {
        "mask_dice_nearest": partial(_nearest, generated, real, run.seed),
        "lesion_volume_ml": partial(_distributions, generated, real, run.seed),
        "lesion_contrast": partial(_contrasts, run, generated, real),
    }
    for done, (name, measure) in enumerate(groups.items(), 1):
        run.results.attempt(name, measure)
        run.tell("masks", done, len(groups))


def read_real(pairs: Path) -> RealMasks:
    """The masks of a folder of pairs.

    Raises:
        UserError: not a folder of pairs, or masks missing in it.
    """
    info = load_latent_folder_info(pairs)
    if PairLayout.of(info.dataset) is None:
        raise UserError(f"{pairs} holds images without masks", "give the --data folder of `neuromf lora`")
    by_subject: dict[str, Masks] = {}
    affine = np.eye(4)
    for subject in (subject for subjects in info.splits.values() for subject in subjects):
        path = mask_path(pairs, subject)
        if not path.is_file():
            raise UserError(f"{path} is missing", "run the same `neuromf lora` command again: it writes it")
        volume = load_volume(path, constant=True)
        by_subject[subject], affine = volume.array > 0, volume.affine
    parts = {name: [by_subject[subject] for subject in subjects] for name, subjects in info.splits.items()}
    train, held_back = np.stack(parts["train"]), [*parts["val"], *parts["test"]]
    affine = affine if info.dataset.get("affine") is None else np.asarray(info.dataset["affine"])
    return RealMasks(train, np.stack(held_back) if held_back else train[:0], by_subject, affine)


def read_generated(images: Sequence[Path]) -> Masks:
    """The masks beside generated images, (N, I, J, K).

    Raises:
        UserError: an image without a mask.
    """
    paths = [mask_beside(image) for image in images]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(paths)} generated volumes have no mask beside them, such as {missing[0]}",
            "volumes with masks are made by sampling a run of `neuromf lora`",
        )
    return np.stack([load_volume(path, constant=True).array > 0 for path in paths])


def _nearest(generated: Masks, real: RealMasks, seed: int) -> dict[str, Record]:
    """Dice with the training mask that is most alike, of generated and of held-back real masks."""
    found = {"generated": nearest_dice(generated, real.train)}
    if len(real.held_back):
        found["real"] = nearest_dice(real.held_back, real.train)
    empty = float(np.mean([not mask.any() for mask in generated]))
    counts = {"generated": len(generated), "train": len(real.train)}
    return {
        **{f"mask_dice_nearest_{name}": _mean(values, seed) for name, values in found.items()},
        "mask_empty_share": {"value": empty, "low": None, "high": None, "n": counts, "better": "lower"},
    }


def _distributions(generated: Masks, real: RealMasks, seed: int) -> dict[str, Record]:
    """Volume, number of parts and place of what is marked, and Kolmogorov-Smirnov tests against all real pairs."""
    everyone = np.concatenate([real.train, real.held_back])
    made, known = (_marked(describe_masks(masks, real.affine)) for masks in (generated, everyone))
    if not len(made.volume_ml):
        raise UserError("no generated mask marks anything")
    records: dict[str, Record] = {}
    for name, found in (("generated", made), ("real", known)):
        records[f"lesion_volume_ml_{name}"] = _mean(found.volume_ml, seed)
        records[f"lesion_parts_{name}"] = _mean(found.parts.astype(float), seed)
    records["lesion_volume_ks"] = _ks(made.volume_ml, known.volume_ml)
    for axis, name in enumerate(_AXES):
        records[f"lesion_place_ks_{name}"] = _ks(made.centre_mm[:, axis], known.centre_mm[:, axis])
    return records


def _contrasts(run: Run, generated: Masks, real: RealMasks) -> dict[str, Record]:
    """Mean intensity inside the mask less that of a shell around it."""
    made = [contrast(image[0], mask) for image, mask in zip(run.sets["generated"].array, generated, strict=True)]
    records = {"lesion_contrast_generated": _mean(_known(made), run.seed)}
    named = [real.by_subject.get(nifti_stem(path)) for path in run.sets["real"].paths]
    shown = [contrast(v[0], m) for v, m in zip(run.sets["real"].array, named, strict=True) if m is not None]
    if shown:
        records["lesion_contrast_real"] = _mean(_known(shown), run.seed)
    return records


def contrast(image: NDArray[np.float32], mask: Masks) -> float:
    """Mean of an image (I, J, K) inside its mask less that of a shell of two voxels around it; NaN if it is empty."""
    if not mask.any():
        return float("nan")
    shell = ndimage.binary_dilation(mask, iterations=_RING_VOXELS) & ~mask
    return float(image[mask].mean() - image[shell].mean()) if shell.any() else float("nan")


def _marked(found: Lesions) -> Lesions:
    """Without the empty masks, which are counted apart."""
    keep = found.volume_ml > 0
    return Lesions(found.volume_ml[keep], found.parts[keep], found.centre_mm[keep])


def _known(values: Sequence[float]) -> NDArray[np.float64]:
    found = np.asarray(values, dtype=np.float64)
    found = found[np.isfinite(found)]
    if not len(found):
        raise UserError("no mask marks anything")
    return found


def _mean(values: NDArray[np.float64], seed: int) -> Record:
    return protocol.mean_record(torch.from_numpy(np.ascontiguousarray(values)), "equal", seed=seed)


def _ks(a: NDArray[np.float64], b: NDArray[np.float64]) -> Record:
    test = stats.ks_2samp(a, b)
    counts = {"generated": len(a), "real": len(b)}
    return {
        "value": float(test.statistic),
        "low": None,
        "high": None,
        "p_value": float(test.pvalue),
        "n": counts,
        "better": "lower",
    }
