"""Latent files, their statistics, and the dataset that training reads.

Three spaces, three words. *volume*: (1, I, J, K), p0 -> 0 and p99.5 -> 1. *latent*: (C, I/4, J/4, K/4) as the
autoencoder gives it; files hold the posterior mean and log sigma, never a noisy draw (a draw would put a floor
under every loss). *whitened*: (latent - mean_c) / std_c with the training split's statistics.

A latent folder: `<subject>.pt` per scan; `flipped/<subject>.pt` and `copies/<n>/<subject>.pt` of the training split
where copies were asked for; and `dataset.json`, `latent_stats.json`, `splits.json`, `encode_report.json`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from neuromf.data.latent_files import Latent as Latent
from neuromf.data.latent_files import load_latent as load_latent
from neuromf.data.latent_files import save_latent as save_latent
from neuromf.data.moments import ChannelMoments, IncrementalPCA
from neuromf.data.sources import check_subject
from neuromf.data.splits import SPLITS, split_hash
from neuromf.errors import UserError, did_you_mean
from neuromf.files import read_json

FORMAT = "neuromf-latents"
FORMAT_VERSION = 1
DATASET_FILE, STATISTICS_FILE, SPLITS_FILE = "dataset.json", "latent_stats.json", "splits.json"
FLIPPED_FOLDER, COPIES_FOLDER = "flipped", "copies"
_RAM_LIMIT_BYTES = 1 << 30
# Files looked into when a folder is opened, spread over it; each one is looked at again when it is read.
_LOOKED_INTO = 16


def latent_path(folder: str | Path, subject: str, copy: str = "") -> Path:
    """Where the latent of `subject` lies, or a copy of it (a name of `copies_of`).

    The id is checked, so it cannot lead outside the folder.
    """
    return Path(folder) / copy / f"{check_subject(subject)}.pt"


def copies_of(description: Mapping[str, Any]) -> list[str]:
    """The copies each training scan has, from dataset.json, as the names of their subfolders."""
    mirrored = [FLIPPED_FOLDER] if description.get("flip_copies") else []
    return mirrored + [copy_name(n) for n in range(1, description.get("copies", 0) + 1)]


def copy_name(n: int) -> str:
    """The subfolder of the n-th augmented copies, n from 1."""
    return f"{COPIES_FOLDER}/{n}"


@dataclass(frozen=True)
class LatentStatistics:
    """What the latents of a training split look like, per channel; raw latents, not whitened ones.

    Attributes:
        mean, std, skewness, kurtosis: (C,) over all voxels; a Gaussian has skewness 0 and kurtosis 3.
        correlation: (C, C) between channels, voxel by voxel.
        sigma2_share: E[sigma^2] / (E[sigma^2] + Var[z]), all channels: how much of a drawn latent is noise.
        sigma2_share_per_channel: (C,) the same per channel.
        pca_explained_variance: ratios of up to 50 leading components of whole latents.
        files: how many latents; voxels: how many values per channel.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    skewness: tuple[float, ...]
    kurtosis: tuple[float, ...]
    correlation: tuple[tuple[float, ...], ...]
    sigma2_share: float
    sigma2_share_per_channel: tuple[float, ...]
    pca_explained_variance: tuple[float, ...]
    files: int
    voxels: int

    def whiten(self, z: Tensor) -> Tensor:
        """(z - mean_c) / std_c for (C, I, J, K) or (B, C, I, J, K)."""
        mean, std = self._scale(z)
        return (z - mean).div_(std)

    def unwhiten(self, z: Tensor) -> Tensor:
        """std_c z + mean_c, the inverse of `whiten`, same shapes."""
        mean, std = self._scale(z)
        return z * std + mean

    def _scale(self, z: Tensor) -> tuple[Tensor, Tensor]:
        # (C, 1, 1, 1) lines up with the fourth axis from the right, with or without a batch axis before it.
        channels = len(self.mean)
        if z.ndim not in (4, 5) or z.shape[-4] != channels:
            raise ValueError(f"(C, I, J, K) or (B, C, I, J, K) with C = {channels} expected, got {tuple(z.shape)}")
        shape = (channels, 1, 1, 1)
        return z.new_tensor(self.mean).view(shape), z.new_tensor(self.std).view(shape)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LatentStatistics:
        """The statistics stored by `to_dict`; other keys are ignored.

        Raises:
            UserError: a key is missing.
        """
        try:
            return cls(**{name: _frozen(values[name]) for name in cls.__dataclass_fields__})
        except KeyError as error:
            raise UserError(f"latent statistics without {error}", "run `neuromf encode` again") from error


def compute_statistics(paths: Iterable[str | Path]) -> LatentStatistics:
    """Statistics of latent files, one at a time (memory does not depend on their number).

    Args:
        paths: the files of the *training* split; statistics of others would leak into training.

    Raises:
        UserError: no file, files of different shape, or a channel that never changes (it cannot be whitened).
    """
    moments: ChannelMoments | None = None
    pca, shape, files = IncrementalPCA(), torch.Size(), 0
    for path in paths:
        latent = load_latent(path)
        z = latent["z"]
        if moments is None:
            moments, shape = ChannelMoments(z.shape[0]), z.shape
        if z.shape != shape:
            raise UserError(f"{path} has shape {tuple(z.shape)}, the files before it {tuple(shape)}")
        moments.update(z, latent["log_sigma"])
        pca.update(z)
        files += 1
    if moments is None:
        raise UserError("there is no latent to compute statistics from")
    _refuse_constant(moments)
    noise = moments.sigma2
    variance = moments.std**2
    return LatentStatistics(
        mean=_tuple(moments.mean),
        std=_tuple(moments.std),
        skewness=_tuple(moments.skewness),
        kurtosis=_tuple(moments.kurtosis),
        correlation=tuple(_tuple(row) for row in moments.correlation),
        sigma2_share=float(noise.sum() / (noise + variance).sum()),
        sigma2_share_per_channel=_tuple(noise / (noise + variance)),
        pca_explained_variance=tuple(pca.explained_variance_ratio()),
        files=files,
        voxels=moments.count,
    )


def class_names(description: Mapping[str, Any]) -> list[str]:
    """The classes that latents carry, in the order of their numbers, from dataset.json or a run's data.json."""
    return list((description.get("classes") or {}).get("names", []))


class LatentFolderInfo(NamedTuple):
    """A finished latent folder: its dataset.json, the training split's statistics, and the splits."""

    folder: Path
    dataset: dict[str, Any]
    statistics: LatentStatistics
    splits: dict[str, list[str]]


def load_latent_folder_info(folder: str | Path) -> LatentFolderInfo:
    """Read what describes a latent folder, and check that its parts belong together.

    Raises:
        UserError: not a latent folder, not finished, or files of different runs in it.
    """
    folder = Path(folder)
    hint = "run `neuromf encode SCANS --out FOLDER` (again): it keeps what is done and finishes the rest"
    if not (folder / DATASET_FILE).is_file():
        raise UserError(f"{folder} is not a folder of latents (it has no {DATASET_FILE})", hint)
    dataset = read_json(folder / DATASET_FILE)
    if dataset.get("format") != FORMAT or dataset.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{folder / DATASET_FILE} is '{dataset.get('format')}' version {dataset.get('format_version')};"
            f" this program reads '{FORMAT}' version {FORMAT_VERSION}",
            hint,
        )
    if not dataset.get("complete"):
        raise UserError(f"the latents in {folder} are not finished", hint)
    splits = {name: list(read_json(folder / SPLITS_FILE).get(name, [])) for name in SPLITS}
    statistics = read_json(folder / STATISTICS_FILE)
    expected = dataset["splits"]["hash"]
    if not expected == split_hash(splits) == statistics.get("split_hash"):
        raise UserError(f"{SPLITS_FILE}, {STATISTICS_FILE} and {DATASET_FILE} in {folder} do not match", hint)
    return LatentFolderInfo(folder, dataset, LatentStatistics.from_dict(statistics), splits)


class LatentDataset(Dataset[Tensor]):
    """The whitened latents of one split.

    Held in memory when they take less than 1 GiB, else read from disk item by item (memory-mapped).

    Args:
        folder: written by `neuromf encode`.
        split: train, val or test.
        copies: also give the copies of the training scans: first all originals, then each kind of copy. So copies
            make the set, and an epoch, longer.
        statistics: whiten with these instead of the folder's own.

    Attributes:
        labels: (N,) int64, the class of each item, None where the latents carry none.
        subjects: the id of each item, copies included; shape: (C, I, J, K) of an item; info: the folder's description.

    Raises:
        UserError: unknown or empty split, files missing, of different shapes, or of another autoencoder.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str = "train",
        *,
        copies: bool = False,
        statistics: LatentStatistics | None = None,
        ram_limit_bytes: int = _RAM_LIMIT_BYTES,
    ) -> None:
        self.info = load_latent_folder_info(folder)
        if split not in SPLITS:
            raise UserError(f"no split '{split}'", did_you_mean(split, SPLITS))
        subjects = self.info.splits[split]
        if not subjects:
            counts = ", ".join(f"{name} {len(self.info.splits[name])}" for name in SPLITS)
            raise UserError(f"the {split} split of {folder} is empty ({counts})", "encode more subjects")
        kinds = ["", *(self._copies(split) if copies else [])]
        paths = [latent_path(folder, subject, kind) for kind in kinds for subject in subjects]
        self.subjects = subjects * len(kinds)
        self.statistics = statistics or self.info.statistics
        self.shape = tuple(int(n) for n in self.info.dataset["latent_shape"])
        self._paths = paths
        self.labels = self._labels()
        self._check_files()
        n_bytes = 4 * len(paths) * torch.Size(self.shape).numel()
        in_ram = n_bytes < ram_limit_bytes
        self._whitened = torch.stack([self._read(path) for path in paths]) if in_ram else None

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Tensor:
        """(C, I, J, K) float32, whitened."""
        return self._read(self._paths[index]) if self._whitened is None else self._whitened[index]

    @property
    def in_memory(self) -> bool:
        """Whether the split is held in memory."""
        return self._whitened is not None

    def _copies(self, split: str) -> list[str]:
        kinds = copies_of(self.info.dataset)
        if split != "train" or not kinds:
            raise UserError(
                f"there are no copies of the {split} split in {self.info.folder}",
                "copies of training scans are made by `neuromf encode` with --copies N or --flip-copies",
            )
        return kinds

    def _labels(self) -> Tensor | None:
        names = class_names(self.info.dataset)
        if not names:
            return None
        of, number = self.info.dataset["classes"]["of"], {name: n for n, name in enumerate(names)}
        return torch.tensor([number[of[subject]] for subject in self.subjects])

    def _read(self, path: Path) -> Tensor:
        return self.statistics.whiten(self._sound(path).float())

    def _sound(self, path: Path) -> Tensor:
        """The latent of a file, which is one of this dataset's."""
        hint = "run the same `neuromf encode` command again: it rewrites what is of other settings"
        latent = load_latent(path, mmap=True)
        if tuple(latent["z"].shape) != self.shape:
            raise UserError(f"{path} has shape {tuple(latent['z'].shape)}, the dataset {self.shape}", hint)
        expected = self.info.dataset["autoencoder"]["sha256"]
        found = latent["metadata"].get("autoencoder", {}).get("sha256")
        if found != expected:
            raise UserError(f"{path} was made by the autoencoder {found}, the dataset by {expected}", hint)
        return latent["z"]

    def _check_files(self) -> None:
        """Whether all files are there, by one listing of each folder: 100,000 are too many to ask for each."""
        folders = {path.parent for path in self._paths}
        there = {folder: {entry.name for entry in os.scandir(folder)} for folder in folders if folder.is_dir()}
        missing = [path for path in self._paths if path.name not in there.get(path.parent, ())]
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            names = ", ".join(path.name for path in missing[:5])
            raise UserError(
                f"{len(missing)} of {len(self._paths)} latents are missing in {missing[0].parent}: {names}{more}",
                "run the same `neuromf encode` command again: it writes what is missing",
            )
        for path in self._paths[:: max(1, len(self._paths) // _LOOKED_INTO)]:
            self._sound(path)


def _refuse_constant(moments: ChannelMoments) -> None:
    constant = (moments.std <= 1e-7 * moments.mean.abs()) | (moments.std == 0)
    if constant.any():
        channels: Sequence[int] = constant.nonzero().flatten().tolist()
        raise UserError(
            f"latent channel {', '.join(map(str, channels))} has standard deviation 0 over the training split,"
            " so it cannot be whitened",
            "the autoencoder does not use it, or all scans are alike: use another autoencoder or more scans",
        )


def _tuple(values: Tensor) -> tuple[float, ...]:
    return tuple(float(v) for v in values)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list | tuple) else value
