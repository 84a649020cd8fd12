"""Images with masks -> a folder of pair latents, which is an ordinary folder of latents with more channels.

The images are prepared and encoded as the scans of the base were; how masks become channels is measured first
(`mask_strategy`). Resumable: a pair is encoded again only if a file of it, or a setting, has changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neuromf import __version__
from neuromf.data.bids import Selection, parse_name
from neuromf.data.latents import (
    DATASET_FILE,
    FORMAT,
    FORMAT_VERSION,
    SPLITS_FILE,
    STATISTICS_FILE,
    Latent,
    compute_statistics,
    latent_path,
    load_latent,
    save_latent,
)
from neuromf.data.pairs import Pair, find_pairs, image_files, load_mask, mask_on_grid
from neuromf.data.preprocessing import Preprocessing, preprocess
from neuromf.data.splits import split_hash
from neuromf.data.volumes import load_volume, save_volume
from neuromf.errors import ScanError, UserError
from neuromf.files import read_json, remove_leftovers, sha256_file, write_json
from neuromf.models.autoencoder import Autoencoder
from neuromf.models.mask_codec import PAIR, PairLayout, encode_mask, mask_channels
from neuromf.pipeline.cohort import Cohort, read_cohort
from neuromf.pipeline.encode_sharing import alone
from neuromf.pipeline.mask_strategy import REPORT_FILE, compare_strategies
from neuromf.pipeline.sharing import claim

MASKS_FOLDER = "masks"
_NO_NOISE = -30.0  # log sigma of a channel that no autoencoder made
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PairSource:
    """Where pairs come from, and how they are read.

    Attributes:
        images: a folder, a table with a column `mask`, or a BIDS dataset.
        masks: their folder, where `images` does not say.
        labels: values of the masks that count; empty takes masks of two values.
        selection: which images of a BIDS dataset.
        fractions, seed: of the splits.
        mask: the strategy: auto, autoencoder or downsample.
    """

    images: Path
    masks: Path | None = None
    labels: tuple[int, ...] = ()
    selection: Selection = field(default_factory=Selection)
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    seed: int = 0
    mask: str = "auto"


@dataclass(frozen=True)
class PairReport:
    """What became of the pairs: how many, their layout, the mask test, and images that have no mask."""

    out: Path
    pairs: int
    kept: int
    layout: PairLayout
    test: dict[str, Any]
    unmasked: list[str]

    def lines(self) -> list[str]:
        """In words."""
        left = f"; {len(self.unmasked)} images without a mask are left out" if self.unmasked else ""
        return [
            f"{self.pairs} pairs in {self.out}, {self.kept} of them encoded before{left}",
            f"masks: {self.layout.strategy}, {self.layout.mask_channels} channels. {self.test['explanation']}",
        ]


class _Found(NamedTuple):
    """A pair on the grid: its mask (1, I, J, K), the latent of its image, and what is written beside them."""

    pair: Pair
    mask: NDArray[np.bool_]
    image: Tensor
    log_sigma: Tensor
    metadata: dict[str, Any]
    kept: bool


@dataclass(frozen=True)
class _Job:
    out: Path
    source: PairSource
    autoencoder: Autoencoder
    preprocessing: Preprocessing
    record: dict[str, Any]

    @property
    def settings_sha256(self) -> str:
        """Of what decides how a pair's files become numbers, the strategy apart."""
        return _digest([self.preprocessing.digest, self.record["sha256"], list(self.source.labels)])


def mask_path(folder: Path, subject: str) -> Path:
    """Where the mask of a pair lies, on the grid of the latents."""
    return folder / MASKS_FOLDER / f"{subject}.nii.gz"


def encode_pairs(
    source: PairSource,
    out: Path,
    *,
    autoencoder: Autoencoder,
    base: Mapping[str, Any],
    progress: Progress | None = None,
) -> PairReport:
    """Encode pairs into `<out>/<image>.pt` with statistics, splits, the mask test and the masks beside them.

    Args:
        source: where they come from.
        out: the folder; the same settings complete it.
        autoencoder: that of the base.
        base: its data.json: autoencoder, preprocessing, affine.
        progress: callback (description, done, total).

    Raises:
        UserError: no pairs, a missing partner, another folder; or pairs that cannot be used, all of them by name.
    """
    inputs = image_files(source.images, source.masks)
    cohort = read_cohort(inputs, selection=source.selection, fractions=source.fractions, seed=source.seed)
    found = find_pairs(cohort.sources, source.masks)
    preprocessing = Preprocessing.from_dict(base["preprocessing"])
    job = _Job(out, source, autoencoder, preprocessing, dict(base["autoencoder"]))
    identity = _identity(job)
    keys = ["format", "format_version", "autoencoder.sha256", "preprocessing", "pairs.labels", "pairs.mask"]
    claim(out, DATASET_FILE, {**identity, "complete": False}, keys, "latents")
    with alone(out):
        ready = _prepare_all(job, found.pairs, progress)
        test, layout = _strategy(job, ready, progress)
        kept = _write_all(job, ready, layout, progress)
        _finish(job, cohort, [entry.pair.scan.subject for entry in ready], layout, identity, base)
    return PairReport(out, len(ready), kept, layout, test, found.unmasked)


def _identity(job: _Job) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "autoencoder": job.record,
        "preprocessing": job.preprocessing.to_dict(),
        "cleaning": None,
        "pairs": {"labels": list(job.source.labels), "mask": job.source.mask},
    }


def _prepare_all(job: _Job, pairs: Sequence[Pair], progress: Progress | None) -> list[_Found]:
    """Every pair on the grid, its image encoded. One that cannot be used stops all: few cases are not lost quietly."""
    ready: list[_Found] = []
    refused: list[str] = []
    for done, pair in enumerate(pairs, 1):
        try:
            ready.append(_prepare(job, pair))
        except ScanError as error:
            refused.append(f"{error.message}" + (f" ({error.hint})" if error.hint else ""))
        if progress:
            progress("reading pairs", done, len(pairs))
    if refused:
        raise UserError(
            f"{len(refused)} of {len(pairs)} pairs cannot be used:\n  " + "\n  ".join(refused),
            "mend them, or move them out of the folder (or the table): nothing was trained",
        )
    return ready


def _prepare(job: _Job, pair: Pair) -> _Found:
    if pair.scan.fault is not None:
        raise ScanError(*pair.scan.fault)
    volume = load_volume(pair.scan.path)
    mask = load_mask(pair.mask, volume, job.source.labels)
    prepared = preprocess(volume, job.preprocessing)
    on_grid = mask_on_grid(pair.mask, mask, volume.affine, prepared.record)
    hashes = {"sha256": sha256_file(pair.scan.path), "mask_sha256": sha256_file(pair.mask)}
    there = _finished(job, pair, hashes)
    if there is not None:
        channels = int(job.record["latent_channels"])
        image, log_sigma = there["z"][:channels].clone(), there["log_sigma"][:channels].clone()
        return _Found(pair, on_grid, image, log_sigma, there["metadata"], True)
    posterior = job.autoencoder.encode(torch.from_numpy(prepared.array)[None].to(job.autoencoder.device))
    image, log_sigma = posterior.mean[0].cpu().float(), posterior.log_sigma[0].cpu().float()
    if not (image.isfinite().all() and log_sigma.isfinite().all()):
        raise ScanError(f"{pair.scan.path}: the autoencoder gives NaN or Inf", "look at its intensities for outliers")
    metadata = {
        "subject": pair.scan.subject,
        "input": {"name": pair.scan.path.name, "mask": pair.mask.name, **hashes},
        "autoencoder": job.record,
        "preprocessing": prepared.record,
        "settings_sha256": job.settings_sha256,
        "neuromf_version": __version__,
    }
    return _Found(pair, on_grid, image, log_sigma, metadata, False)


def _finished(job: _Job, pair: Pair, hashes: Mapping[str, str]) -> Latent | None:
    """The latent of a pair, if an earlier call made it of the same files by the same settings."""
    path = latent_path(job.out, pair.scan.subject)
    if not path.is_file():
        return None
    try:
        latent = load_latent(path)
    except UserError:
        return None
    metadata = latent["metadata"]
    same = metadata.get("settings_sha256") == job.settings_sha256
    return latent if same and {key: metadata["input"].get(key) for key in hashes} == hashes else None


def _strategy(job: _Job, ready: Sequence[_Found], progress: Progress | None) -> tuple[dict[str, Any], PairLayout]:
    """The mask test, made once for the same masks, and the layout it leads to."""
    of = _digest(
        [job.settings_sha256, job.source.mask, sorted(entry.metadata["input"]["mask_sha256"] for entry in ready)]
    )
    path = job.out / REPORT_FILE
    test: dict[str, Any] = read_json(path) if path.is_file() else {}
    if test.get("of") != of:
        masks = [entry.mask for entry in ready]
        test = compare_strategies(masks, job.autoencoder, job.source.mask, progress).to_dict() | {"of": of}
        write_json(path, test)
    suffixes = {name.suffix for entry in ready if (name := parse_name(entry.pair.scan.path.name))}
    layout = PairLayout(
        image_channels=int(job.record["latent_channels"]),
        mask_channels=mask_channels(test["strategy"], job.autoencoder),
        strategy=test["strategy"],
        threshold=test["threshold"],
        suffix=suffixes.pop() if len(suffixes) == 1 else "T1w",
    )
    return test, layout


def _write_all(job: _Job, ready: Sequence[_Found], layout: PairLayout, progress: Progress | None) -> int:
    """Write the latents that are not there; returns how many were."""
    kept = 0
    for done, entry in enumerate(ready, 1):
        mark = {"strategy": layout.strategy, "mask_channels": layout.mask_channels}
        if entry.kept and entry.metadata.get(PAIR) == mark:
            kept += 1
        else:
            mask = encode_mask(torch.from_numpy(entry.mask)[None], layout.strategy, job.autoencoder)[0]
            z = torch.cat([entry.image, mask])
            log_sigma = torch.cat([entry.log_sigma, torch.full_like(mask, _NO_NOISE)])
            affine = np.asarray(entry.metadata["preprocessing"]["affine"])
            save_volume(mask_path(job.out, entry.pair.scan.subject), entry.mask, affine, dtype=np.uint8)
            save_latent(latent_path(job.out, entry.pair.scan.subject), z, log_sigma, {**entry.metadata, PAIR: mark})
        if progress:
            progress("writing pairs", done, len(ready))
    return kept


def _finish(
    job: _Job,
    cohort: Cohort,
    subjects: Sequence[str],
    layout: PairLayout,
    identity: Mapping[str, Any],
    base: Mapping[str, Any],
) -> None:
    """Splits, statistics of the training split, and last the file that declares the folder complete."""
    _refuse_others(job.out, subjects)
    splits = cohort.splits(subjects)
    statistics = compute_statistics(_files(job.out, splits["train"]))
    digest, described = split_hash(splits), cohort.to_dict(subjects)
    size = [n // job.autoencoder.factor for n in job.preprocessing.size]
    for folder in (job.out, job.out / MASKS_FOLDER):
        remove_leftovers(folder)
    write_json(job.out / STATISTICS_FILE, statistics.to_dict() | {"split": "train", "split_hash": digest})
    write_json(job.out / SPLITS_FILE, splits | {"hash": digest})
    write_json(
        job.out / DATASET_FILE,
        {
            **identity,
            **described,
            PAIR: layout.to_dict(),
            "complete": True,
            "latent_shape": [layout.image_channels + layout.mask_channels, *size],
            "affine": base["affine"],
            "splits": described["splits"] | {"hash": digest},
            "counts": {name: len(members) for name, members in splits.items()},
            "neuromf_version": __version__,
        },
    )


def _refuse_others(out: Path, subjects: Sequence[str]) -> None:
    """Refuse latents of pairs that are not among the inputs any more."""
    foreign = sorted(path.name for path in out.glob("*.pt") if path.stem not in set(subjects))
    if foreign:
        raise UserError(
            f"{out} holds {len(foreign)} pairs that are not among the inputs, the first is {foreign[0]}",
            "give another --data, or delete those files",
        )


def _files(out: Path, subjects: Sequence[str]) -> Iterator[Path]:
    return (latent_path(out, subject) for subject in subjects)


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
