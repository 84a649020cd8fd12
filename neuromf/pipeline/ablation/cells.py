"""The cells of a plan: which runs it needs, and which of them are one and the same."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from neuromf import config
from neuromf.config import TrainConfig
from neuromf.errors import UserError
from neuromf.files import sha256_text
from neuromf.pipeline.ablation.plan import AblationPlan, Experiment, label
from neuromf.pipeline.run_folder import FREE_TO_CHANGE

SHOWN_FAULTS = 5
LONGEST_NAME = 60


@dataclass(frozen=True)
class Run:
    """One training; cells of the same settings and data share it.

    Attributes:
        name: of its folder: the settings in which it differs, its seed and its identity.
        preset, overrides: what `neuromf train` is called with.
        data: a folder of latents.
        config: the settings these come to.
    """

    name: str
    identity: str
    preset: str
    overrides: tuple[str, ...]
    data: str
    config: TrainConfig


@dataclass(frozen=True)
class Cell:
    """One line of the results: a run, sampled with a number of evaluations.

    `factors` holds the level of everything the experiment varies, as text; the seed apart.
    """

    experiment: str
    factors: Mapping[str, str]
    seed: int
    nfe: int
    run: Run

    @property
    def name(self) -> str:
        """The cell in words, as in `lp: objective.lp=1.5, seed 0, 1 evaluation`."""
        levels = [f"{key}={value}" for key, value in self.factors.items() if key != "nfe"]
        plural = "evaluation" if self.nfe == 1 else "evaluations"
        return f"{self.experiment}: {', '.join([*levels, f'seed {self.seed}', f'{self.nfe} {plural}'])}"


def cells_of(plan: AblationPlan, latents: str, digests: Mapping[str, str]) -> list[Cell]:
    """All cells of a plan, in its order; those of equal identity hold the same `Run`.

    Args:
        plan: checked.
        latents: the folder of latents that cells without data of their own are trained on.
        digests: what identifies the data, by folder of latents.

    Raises:
        UserError: settings that the schema refuses, with the cells they are of.
    """
    runs: dict[str, Run] = {}
    cells, faults = [], []
    for name, experiment in plan.experiments.items():
        for seed, factors, settings in _combinations(plan, experiment):
            data = str(settings.pop("data", latents))
            try:
                run = _run(plan.preset, settings, seed, data, digests.get(data, data), factors)
            except UserError as error:
                where = ", ".join(f"{key}={value}" for key, value in factors.items())
                faults.append(f"cell {name}: {where or 'the only one'}, seed {seed}: {error}")
                continue
            run = runs.setdefault(run.identity, run)
            nfes = experiment.nfe
            varied = len(nfes) > 1
            cells += [Cell(name, {**factors, **({"nfe": str(nfe)} if varied else {})}, seed, nfe, run) for nfe in nfes]
    if faults:
        more = f"\nand {len(faults) - SHOWN_FAULTS} more cells" if len(faults) > SHOWN_FAULTS else ""
        raise UserError("\n".join(faults[:SHOWN_FAULTS]) + more, "mend the plan; nothing was started")
    return cells


def runs_of(cells: list[Cell]) -> list[Run]:
    """The runs that cells need, each once, in order."""
    return list({cell.run.identity: cell.run for cell in cells}.values())


def data_of(plan: AblationPlan) -> list[str]:
    """Folders of latents that experiments name beside the plan's own."""
    found: list[str] = []
    for experiment in plan.experiments.values():
        for settings in (experiment.settings, *experiment.variants.values()):
            found += [str(settings["data"])] if "data" in settings else []
        found += [str(value) for value in experiment.grid.get("data", [])]
    return list(dict.fromkeys(found))


def folder_of(run: Run, runs: Path) -> Path:
    """Where a run lies: under any name that ends with its identity, so that a relabelled plan finds it."""
    return next(iter(sorted(runs.glob(f"*-{run.identity}"))), runs / run.name)


def _combinations(plan: AblationPlan, experiment: Experiment) -> Iterator[tuple[int, dict[str, str], dict[str, Any]]]:
    """(seed, levels, settings) of each training of an experiment; later settings replace earlier ones."""
    variants = list(experiment.variants.items()) or [("", {})]
    for (variant, together), values in product(variants, product(*experiment.grid.values())):
        single = dict(zip(experiment.grid, values, strict=True))
        levels = {"variant": variant} if variant else {}
        levels |= {key: label(value) for key, value in single.items()}
        for seed in experiment.seeds:
            yield seed, levels, {**plan.settings, **experiment.settings, **together, **single}


def _run(
    preset: str, settings: Mapping[str, Any], seed: int, data: str, digest: str, factors: Mapping[str, str]
) -> Run:
    preset = str(settings.get("preset", preset))
    words = [f"{key}={json.dumps(value)}" for key, value in settings.items() if key != "preset"]
    overrides = (*words, f"training.seed={seed}")
    resolved = config.load(preset, overrides)
    identity = _identity(resolved, digest)
    return Run(f"{_readable(factors)}seed{seed}-{identity}", identity, preset, overrides, data, resolved)


def _identity(resolved: TrainConfig, digest: str) -> str:
    """Ten digits of the hash of everything that decides what is learned."""
    values = resolved.model_dump(mode="json")
    for key in FREE_TO_CHANGE:
        *sections, last = key.split(".")
        target = values
        for section in sections:
            target = target[section]
        target.pop(last, None)
    return sha256_text(json.dumps([values, digest], sort_keys=True))[:10]


def _readable(factors: Mapping[str, str]) -> str:
    """Levels as the beginning of a folder's name; characters that a path must not hold become `_`."""
    text = "-".join(f"{key.rsplit('.', 1)[-1]}_{os.path.basename(value)}" for key, value in factors.items())  # noqa: PTH119
    safe = "".join(c if c.isalnum() or c in "._-" else "_" for c in text)[:LONGEST_NAME].lstrip(".")
    return f"{safe}-" if safe else ""
