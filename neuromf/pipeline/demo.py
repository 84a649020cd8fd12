"""`neuromf demo`: every step of the main job on embedded data, with nothing to download.

Invented heads -> latents -> two generators trained with the same budget (MeanFlow, rectified flow) -> 1 and 10
network evaluations each -> volumes -> distances to held-back heads -> one sheet of pictures and one table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from numpy.typing import NDArray

from neuromf import config
from neuromf.data.latents import LatentFolderInfo, load_latent, load_latent_folder_info
from neuromf.data.preprocessing import Preprocessing
from neuromf.files import write_json, write_text
from neuromf.models.autoencoder import Autoencoder, load_autoencoder
from neuromf.pipeline.decode import decode
from neuromf.pipeline.encode import encode
from neuromf.pipeline.evaluate import evaluate
from neuromf.pipeline.recorder import Silent
from neuromf.pipeline.render import Recipe, render
from neuromf.pipeline.run_folder import RESULT_FILE
from neuromf.pipeline.sample import sample
from neuromf.pipeline.side_by_side import Job, side_by_side
from neuromf.pipeline.train import train
from neuromf.pipeline.volume_folder import read_stored
from neuromf.pipeline.workers import cores
from neuromf.reporting.figures import comparison_sheet
from neuromf.reporting.tables import markdown_table

HEADS = 320
FRACTIONS = (0.76, 0.04, 0.2)
GENERATED = 64
RECIPE = Recipe(size=(32, 32, 32), spacing_mm=6.0)
MODELS = {"MeanFlow": "demo", "rectified flow": "demo-rectflow"}
EVALUATIONS = (1, 10)
SHOWN = 4


@dataclass(frozen=True)
class DemoReport:
    """What the demo made and measured; `rows` has one entry per model and number of evaluations."""

    out: Path
    sheet: Path
    rows: list[dict[str, Any]]
    ratio: float
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "out": str(self.out),
            "sheet": str(self.sheet),
            "rows": self.rows,
            "rectflow_over_meanflow_frechet_1nfe": self.ratio,
            "seconds": self.seconds,
        }

    def lines(self) -> list[str]:
        """The table and the sentence it comes to."""
        return [
            markdown_table(self.rows).rstrip(),
            "",
            f"with one evaluation, rectified flow is {self.ratio:.1f} times as far from real heads as MeanFlow",
            f"look at {self.sheet}; everything else is in {self.out} ({sum(self.seconds.values()):.0f} s)",
            "next, with your own scans: neuromf encode SCANS --out latents, then neuromf train --preset cpu-small",
        ]


def demo(out: Path, *, seed: int = 0, jobs: int | None = None, progress: Any = None) -> DemoReport:
    """Run the whole chain into one folder; run again, it continues where it stopped.

    Args:
        out: holds `heads/`, `latents/`, `runs/`, `sheet.png`, `table.md`, `demo.json`.
        seed: of the heads, the training and the noise.
        jobs: models trained at a time, each in a process of its own if there are two (a script that calls this then
            needs the `__main__` guard of multiprocessing); None is one per CPU core.
        progress: callback (description, done, total); `message` and `step` of the training listener are used if
            it has them.

    Raises:
        UserError: the folder holds something else, or the disk is full.
    """
    out, clock = Path(out), _Stopwatch()
    autoencoder = load_autoencoder("builtin")
    with clock("invent heads"):
        recipe = Recipe(RECIPE.size, RECIPE.spacing_mm, seed=seed * HEADS)
        render([], out / "heads", n=HEADS, recipe=recipe, progress=progress)
    with clock("encode"):
        spec = Preprocessing(size=RECIPE.size, spacing_mm=RECIPE.spacing_mm, centre="grid")
        encode([out / "heads"], out / "latents", autoencoder=autoencoder, preprocessing=spec, fractions=FRACTIONS,
               seed=seed, progress=progress)  # fmt: skip
    info = load_latent_folder_info(out / "latents")
    with clock("train both"):
        _train(out, seed, jobs or cores(), progress or Silent())
    rows = []
    for name, preset in MODELS.items():
        run = out / "runs" / preset
        for nfe in EVALUATIONS:
            with clock("sample and decode"):
                _generate(run, nfe, seed, progress)
            with clock("evaluate"):
                rows.append(_row(name, nfe, run, _measure(out, run, nfe, info, autoencoder, seed, progress)))
    return _finish(out, rows, info, autoencoder, clock.seconds)


def _train(out: Path, seed: int, processes: int, listener: Any) -> None:
    """Train what is not finished; both at once where there are cores for both."""
    missing = []
    for name, preset in MODELS.items():
        settings, run = config.load(preset, [f"training.seed={seed}"]), out / "runs" / preset
        if not (run / RESULT_FILE).exists():
            missing.append(Job(name, partial(_train_one, settings, out / "latents", run)))
    if min(processes, len(missing)) > 1:
        return side_by_side(missing, processes, listener)
    for job in missing:
        job.work(listener)
    return None


def _train_one(settings: config.TrainConfig, latents: Path, run: Path, listener: Any) -> None:
    train(settings, latents, run, device="cpu", listener=listener)


def _generate(run: Path, nfe: int, seed: int, progress: Any) -> None:
    folder = _generated(run, nfe)
    sample(str(run), GENERATED, nfe=nfe, seed=seed, out=folder, batch_size=16, device="cpu", progress=progress)
    decode(folder, device="cpu", progress=progress)


def _measure(
    out: Path, run: Path, nfe: int, info: LatentFolderInfo, autoencoder: Autoencoder, seed: int, progress: Any
) -> Mapping[str, Any]:
    def heads(split: str) -> list[Path]:
        return [out / "heads" / f"{subject}.nii.gz" for subject in info.splits[split]]

    folder = _generated(run, nfe)
    report = evaluate(
        folder / "volumes",
        heads("test"),
        autoencoder=autoencoder,
        train=heads("train") if (run.name, nfe) == ("demo", 1) else None,
        out=folder / "evaluation",
        seed=seed,
        progress=progress,
    )
    return report.metrics


def _row(name: str, nfe: int, run: Path, metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model": name,
        "evaluations": nfe,
        "Frechet (builtin)": metrics["frechet_builtin"]["value"],
        "KID (builtin)": metrics["kid_builtin"]["value"],
        "N": GENERATED,
    }


def _finish(
    out: Path, rows: list[dict[str, Any]], info: LatentFolderInfo, autoencoder: Autoencoder, seconds: dict[str, float]
) -> DemoReport:
    one = {row["model"]: row["Frechet (builtin)"] for row in rows if row["evaluations"] == 1}
    report = DemoReport(out, out / "sheet.png", rows, one["rectified flow"] / one["MeanFlow"], seconds)
    comparison_sheet(
        _pictures(out, info, autoencoder),
        report.sheet,
        spacing_mm=(RECIPE.spacing_mm,) * 3,
        heading="NeuroMF demo: invented heads, middle slices",
    )
    write_text(out / "table.md", markdown_table(rows))
    write_json(out / "demo.json", report.to_dict())
    return report


def _pictures(out: Path, info: LatentFolderInfo, autoencoder: Autoencoder) -> dict[str, Sequence[NDArray[Any]]]:
    """Rows of the sheet: real, reconstructed, and what each model makes with 1 and 10 evaluations."""
    subjects = info.splits["test"][:SHOWN]
    latents = torch.stack([load_latent(info.folder / f"{subject}.pt")["z"] for subject in subjects])
    pictures: dict[str, Sequence[NDArray[Any]]] = {
        "real": [read_stored(out / "heads" / f"{subject}.nii.gz") for subject in subjects],
        "reconstructed": list(autoencoder.decode(latents).clamp(0, 1).numpy()),
    }
    for name, preset in MODELS.items():
        for nfe in EVALUATIONS:
            folder = _generated(out / "runs" / preset, nfe) / "volumes"
            plural = "evaluation" if nfe == 1 else "evaluations"
            pictures[f"{name}: {nfe} {plural}"] = [read_stored(folder / f"sample_{i:06d}.nii.gz") for i in range(SHOWN)]
    return pictures


def _generated(run: Path, nfe: int) -> Path:
    return run / f"generated-nfe{nfe}"


class _Stopwatch:
    """Seconds by name, summed over repeats."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str) -> _Lap:
        return _Lap(self.seconds, name)


@dataclass
class _Lap:
    seconds: dict[str, float]
    name: str
    started: float = 0.0

    def __enter__(self) -> None:
        self.started = perf_counter()

    def __exit__(self, *error: object) -> None:
        self.seconds[self.name] = round(self.seconds.get(self.name, 0.0) + perf_counter() - self.started, 1)
