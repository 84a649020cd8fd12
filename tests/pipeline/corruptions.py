"""Real scans made worse by known amounts, each set through the whole of `evaluate`: the table of docs/evaluation.md.

`python -m tests.pipeline.corruptions SHARED_DATA OUT` writes OUT/table.md. The crops of one scan stay on one side: a
third of the groups is what copies are made of ("train"), a third is the reference, a third is fresh.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import ndimage

from neuromf.data.preprocessing import Preprocessing, preprocess
from neuromf.data.volumes import load_volume, save_volume
from neuromf.metrics.protocol import Record, mean_record
from neuromf.metrics.similarity import ms_ssim, psnr, ssim
from neuromf.models.autoencoder import load_autoencoder
from neuromf.pipeline.evaluate import EvaluateReport, evaluate

SIZE = (32, 48, 32)
SETS = ("train", "real", "fresh")
STRENGTHS: dict[str, tuple[float, ...]] = {
    "blur": (0.5, 1.0, 1.5),  # sigma in voxels
    "noise": (0.1, 0.15, 0.2),  # standard deviation; 1 is the range of the data, and more leaves the unit scale
    "shuffle": (0.25, 0.5, 1.0),  # share of an image whose grey levels are exchanged
    "copies": (0.1, 0.3, 0.6),  # share of the volumes that are training volumes
}
COPY_NOISE = 0.005
_BANDS = 8


Case = tuple[str, float]


class Evaluated(NamedTuple):
    """Records and reports by (corruption, strength), `("none", 0.0)` among them; and which volumes were copies."""

    metrics: dict[Case, dict[str, Record]]
    reports: dict[Case, EvaluateReport]
    copies: dict[float, set[str]]


def evaluate_all(data: Path, out: Path) -> Evaluated:
    """Write all sets below `out`, evaluate each against the reference, and write the table."""
    volumes = dict(zip(SETS, prepared(data), strict=True))
    folders = {name: write(out / name, volumes[name]) for name in ("train", "real")}
    autoencoder = load_autoencoder("builtin")
    reports: dict[Case, EvaluateReport] = {}
    metrics: dict[Case, dict[str, Record]] = {}
    copies: dict[float, set[str]] = {}

    def measure(name: str, strength: float, changed: np.ndarray, train: Path | None) -> None:
        folder = write(out / f"{name}-{strength}", changed)
        reports[name, strength] = evaluate(
            folder, folders["real"], train=train, autoencoder=autoencoder, cache=out / "features", batch_size=16
        )
        paired = {} if name == "copies" else _to_original(changed, volumes["fresh"])
        metrics[name, strength] = reports[name, strength].metrics | paired

    measure("none", 0.0, volumes["fresh"], folders["train"])
    for name in ("blur", "noise", "shuffle"):
        for strength in STRENGTHS[name]:
            changed = np.stack([CORRUPT[name](v, strength, seed) for seed, v in enumerate(volumes["fresh"])])
            measure(name, strength, changed, None)
    for strength in STRENGTHS["copies"]:
        changed, chosen = with_copies(volumes["fresh"], volumes["train"], strength)
        measure("copies", strength, changed, folders["train"])
        copies[strength] = {f"v{i:03d}.nii.gz" for i in chosen}
    done = Evaluated(metrics, reports, copies)
    (out / "table.md").write_text(tables(done))
    return done


def prepared(data: Path) -> Iterator[np.ndarray]:
    """Volumes (N, I, J, K) of the three sets, by groups of crops that may be of one scan."""
    rows = list(csv.DictReader((data / "hippocampus/subjects.csv").open()))
    groups = sorted({row["scan_group"] for row in rows})
    order = np.random.default_rng(0).permutation(len(groups))
    side = {groups[g]: i % len(SETS) for i, g in enumerate(order)}
    spec = Preprocessing(size=SIZE, spacing_mm=1.0, centre="grid")
    for number in range(len(SETS)):
        chosen = [row["id"] for row in rows if side[row["scan_group"]] == number]
        scans = (load_volume(data / f"hippocampus/images/{subject}.nii.gz") for subject in chosen)
        yield np.stack([preprocess(scan, spec).array[0] for scan in scans])


def write(folder: Path, volumes: np.ndarray) -> Path:
    for i, volume in enumerate(volumes):
        save_volume(folder / f"v{i:03d}.nii.gz", volume, np.eye(4), dtype=np.float32)
    return folder


def blur(volume: np.ndarray, sigma: float, seed: int) -> np.ndarray:
    return ndimage.gaussian_filter(volume, sigma, mode="nearest")


def noise(volume: np.ndarray, deviation: float, seed: int) -> np.ndarray:
    return volume + np.random.default_rng(seed).normal(0, deviation, volume.shape).astype(np.float32)


def shuffle(volume: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Exchange bands of grey levels, each keeping its order within, and blend with the volume as it was."""
    order = np.random.default_rng(seed).permutation(_BANDS)
    band = (volume * _BANDS).clip(0, _BANDS - 1).astype(int)
    exchanged = volume + (order[band] - band) / _BANDS
    return ((1 - share) * volume + share * exchanged).astype(np.float32)


CORRUPT: Mapping[str, Callable[[np.ndarray, float, int], np.ndarray]] = {
    "blur": blur,
    "noise": noise,
    "shuffle": shuffle,
}


def with_copies(fresh: np.ndarray, train: np.ndarray, share: float) -> tuple[np.ndarray, list[int]]:
    """Replace a share of the volumes by training ones, every other one mirrored, with a little noise."""
    rng = np.random.default_rng(1)
    places = rng.permutation(len(fresh))[: round(share * len(fresh))].tolist()
    sources = rng.permutation(len(train))[: len(places)].tolist()
    changed = fresh.copy()
    for number, (i, j) in enumerate(zip(places, sources, strict=True)):
        copy = train[j][::-1] if number % 2 else train[j]
        changed[i] = noise(copy, COPY_NOISE, i)
    return changed, places


class Detection(NamedTuple):
    """How many copies an audit flagged (`recall`), and how many fresh volumes (`false_alarms`), as shares."""

    recall: float
    false_alarms: float


def detection(report: EvaluateReport, kind: str, copies: set[str]) -> Detection:
    flagged = {Path(path).name for path in report.content["details"][f"flagged_{kind}"]}
    fresh = report.content["sets"]["generated"]["n"] - len(copies)
    return Detection(len(flagged & copies) / max(len(copies), 1), len(flagged - copies) / fresh)


def _to_original(changed: np.ndarray, fresh: np.ndarray) -> dict[str, Record]:
    """Each volume against itself as it was: what SSIM, MS-SSIM and PSNR are made for."""
    pairs = [
        (torch.from_numpy(a)[None, None], torch.from_numpy(b)[None, None]) for a, b in zip(changed, fresh, strict=True)
    ]
    functions = {"ssim": ssim, "ms_ssim": ms_ssim, "psnr_db": psnr}
    values = {
        name: torch.cat([function(a, b) for a, b in pairs]).clamp(max=100.0) for name, function in functions.items()
    }
    return {f"{name}_to_original": mean_record(x, "higher") for name, x in values.items()}


METRICS = (
    "frechet_builtin", "frechet_builtin_ratio", "kid_builtin", "mmd_builtin", "precision_builtin", "recall_builtin",
    "density_builtin", "coverage_builtin", "ssim_nearest", "psnr_nearest_db", "ms_ssim_pairs_generated",
    "ssim_to_original", "ms_ssim_to_original", "psnr_db_to_original",
    "spectrum_distance", "high_frequency_energy_generated", "intensity_wasserstein", "memorized_share_pixels",
    "memorized_share_builtin",
)  # fmt: skip


def tables(done: Evaluated) -> str:
    """One table of each corruption, and how well copies were told from fresh volumes, as Markdown."""
    parts = [table(done.metrics, corruption) for corruption in STRENGTHS]
    lines = ["| copies among the volumes | by | flagged of the copies | flagged of the others |", "|---|---|---|---|"]
    for case, report in done.reports.items():
        copies = done.copies.get(case[1], set()) if case[0] == "copies" else set()
        for kind in ("pixels", "builtin") if case[0] in ("none", "copies") else ():
            found = detection(report, kind, copies)
            recall = f"{found.recall:.3g}" if copies else ""
            n = report.content["sets"]["generated"]["n"]
            lines.append(f"| {len(copies)} of {n} | {kind} | {recall} | {found.false_alarms:.3g} |")
    return "\n\n".join([*parts, "\n".join(lines)]) + "\n"


def table(metrics: Mapping[Case, Mapping[str, Record]], corruption: str) -> str:
    """Metrics by strength, with their intervals, as Markdown."""
    columns = [("none", 0.0), *((corruption, s) for s in STRENGTHS[corruption])]
    lines = ["| metric | " + " | ".join("as they are" if s == 0 else f"{c} {s:g}" for c, s in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for metric in METRICS:
        cells = [_cell(metrics[column].get(metric)) for column in columns]
        if any(cells[1:]):
            lines.append(f"| `{metric}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return ""
    interval = "" if entry["low"] is None else f" ({entry['low']:.3g} to {entry['high']:.3g})"
    return f"{entry['value']:.3g}{interval}"


if __name__ == "__main__":
    evaluate_all(Path(sys.argv[1]), Path(sys.argv[2]))
