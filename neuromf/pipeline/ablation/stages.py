"""What is done for the cells of a plan: stages, each one command, each finished where its last file lies.

Nothing else is remembered of a finished stage, so a launcher may be killed at any moment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from neuromf.data.latents import DATASET_FILE
from neuromf.errors import UserError
from neuromf.files import read_json, sha256_text
from neuromf.pipeline.ablation.cells import Cell, Run, folder_of
from neuromf.pipeline.ablation.plan import AblationPlan, Phantoms
from neuromf.pipeline.render import TABLE
from neuromf.pipeline.run_folder import RESULT_FILE
from neuromf.pipeline.sample_folder import MANIFEST

METRICS = "metrics.json"


@dataclass(frozen=True)
class Stage:
    """One command of `neuromf`.

    Attributes:
        name: also that of its log.
        words: what follows `neuromf`.
        needs: names of the stages that must be finished before.
        finished: whether its last file is there.
    """

    name: str
    words: tuple[str, ...]
    needs: tuple[str, ...]
    finished: Callable[[], bool]


class Place(NamedTuple):
    """The folders of an ablation."""

    out: Path

    @property
    def runs(self) -> Path:
        """One run folder for each training."""
        return self.out / "runs"

    @property
    def logs(self) -> Path:
        """What each stage said, and which failed."""
        return self.out / "logs"

    @property
    def results(self) -> Path:
        """Tables."""
        return self.out / "results"

    def phantoms(self, recipe: Phantoms) -> Path:
        """Invented heads and their latents; other recipes lie beside them."""
        return self.out / "data" / f"phantoms-{digest_of(recipe)}"

    def latents(self, plan: AblationPlan) -> str:
        """What cells without data of their own are trained on."""
        return str(self.phantoms(plan.phantoms) / "latents" if plan.phantoms else Path(plan.data))


def digest_of(recipe: Phantoms) -> str:
    """What identifies invented heads and their latents, before they are made."""
    return sha256_text(recipe.model_dump_json())[:8]


def samples_of(cell: Cell, plan: AblationPlan, place: Place) -> Path:
    """The folder of a cell's samples."""
    drawn = plan.sample
    return folder_of(cell.run, place.runs) / f"generated-nfe{cell.nfe}-n{drawn.n}-seed{drawn.seed}"


def evaluation_of(cell: Cell, plan: AblationPlan, place: Place) -> Path:
    """The folder of a cell's metrics; other settings of `evaluate` give another."""
    settings = sha256_text(plan.evaluate.model_dump_json())[:8]
    return samples_of(cell, plan, place) / f"evaluation-{settings}"


def stages_of(plan: AblationPlan, cells: Sequence[Cell], place: Place, device: str = "auto") -> list[Stage]:
    """Every stage of a plan, each once, in an order in which they could be done."""
    stages = {stage.name: stage for stage in _preparation(plan, place)}
    first = tuple(stages)[-1:]
    for cell in cells:
        latents_made = first if cell.run.data == place.latents(plan) else ()
        for stage in (
            _training(cell.run, place, latents_made, device),
            _sampling(cell, plan, place, device),
            _evaluation(cell, plan, place, device),
        ):
            stages.setdefault(stage.name, stage)
    return list(stages.values())


def stage_names(cell: Cell) -> tuple[str, str, str]:
    """Names of the stages of a cell: train, sample, evaluate."""
    identity = cell.run.name
    return f"{identity}.train", f"{identity}.sample-nfe{cell.nfe}", f"{identity}.evaluate-nfe{cell.nfe}"


def _preparation(plan: AblationPlan, place: Place) -> list[Stage]:
    """Invent heads and encode them."""
    recipe = plan.phantoms
    if recipe is None:
        return []
    folder = place.phantoms(recipe)
    grid = ("--size", str(recipe.size), "--spacing", f"{recipe.spacing_mm:g}", "--seed", str(recipe.seed))
    shares = ",".join(f"{share:g}" for share in recipe.fractions)
    heads, latents = folder / "heads", folder / "latents"
    render = ("render", "--n", str(recipe.heads), "--out", str(heads), *grid)
    encode = ("encode", str(heads), "--out", str(latents), *grid, "--fractions", shares)
    return [
        Stage("data.render", render, (), (heads / TABLE).is_file),
        Stage(
            "data.encode",
            (*encode, "--autoencoder", recipe.autoencoder),
            ("data.render",),
            lambda: bool(_value(latents / DATASET_FILE, "complete")),
        ),
    ]


def _training(run: Run, place: Place, needs: tuple[str, ...], device: str) -> Stage:
    folder = folder_of(run, place.runs)
    words = ("train", "--preset", run.preset, *run.overrides, "--data", run.data, "--out", str(folder))
    return Stage(f"{run.name}.train", (*words, "--device", device), needs, (folder / RESULT_FILE).is_file)


def _sampling(cell: Cell, plan: AblationPlan, place: Place, device: str) -> Stage:
    drawn, folder = plan.sample, samples_of(cell, plan, place)
    words = (
        "sample", str(folder_of(cell.run, place.runs)), "--decode", "--n", str(drawn.n), "--nfe", str(cell.nfe),
        "--seed", str(drawn.seed), "--batch-size", str(drawn.batch_size), "--out", str(folder), "--device", device,
    )  # fmt: skip
    train, sample, _ = stage_names(cell)
    return Stage(sample, words, (train,), partial(_drawn, folder / MANIFEST, drawn.n))


def _evaluation(cell: Cell, plan: AblationPlan, place: Place, device: str) -> Stage:
    by, out = plan.evaluate, evaluation_of(cell, plan, place)
    real, train = by.real, by.train
    if plan.phantoms is not None and real is None:
        real = place.phantoms(plan.phantoms) / "heads"
    assert real is not None, "a plan without phantoms names the real scans"
    options = {
        "--latents": cell.run.data if by.held_back else None,
        "--train": None if by.held_back else train,
        "--features": ",".join(by.features) or None,
        "--limit": by.limit,
        "--autoencoder": by.autoencoder,
        "--batch-size": by.batch_size,
        "--seed": by.seed,
        "--cache": place.out / "features",
        "--out": out,
        "--device": device,
    }
    given = [str(word) for option, value in options.items() if value is not None for word in (option, value)]
    _, sample, evaluate = stage_names(cell)
    words = ("evaluate", str(samples_of(cell, plan, place) / "volumes"), str(real), *given)
    return Stage(evaluate, words, (sample,), (out / METRICS).is_file)


def _drawn(manifest: Path, n: int) -> bool:
    return int(_value(manifest, "n") or 0) >= n


def _value(file: Path, key: str) -> Any:
    """A value of a JSON file; None where it is absent or damaged."""
    try:
        return read_json(file).get(key)
    except (UserError, AttributeError):
        return None
