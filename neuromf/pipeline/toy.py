"""`neuromf toy`: the whole method on data whose answer is known, judged by the gates P2-T1 to P2-T8.

The same training loop, draws, objective and sampler as for brains; the data and the ruler are all that differs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from neuromf import config as settings
from neuromf.config import TrainConfig
from neuromf.devices import torch_device
from neuromf.files import read_json, write_json, write_text
from neuromf.generator import Generator, load
from neuromf.metrics.torus import ks_uniform
from neuromf.pipeline.recorder import Silent
from neuromf.pipeline.run_folder import RESULT_FILE
from neuromf.pipeline.side_by_side import Job, side_by_side
from neuromf.pipeline.toy_problems import Measured, Problem, data_faults
from neuromf.pipeline.toy_task import Task, problem_of, train_task
from neuromf.pipeline.workers import cores
from neuromf.reporting.tables import markdown_table
from neuromf.reporting.torus import torus_figure
from neuromf.training.objective import Draws, Objective
from neuromf.training.telemetry import SUMMARY

SAMPLES, EVALUATIONS = 2_000, (1, 2, 5)
DISTANCE_LIMIT, KS_LIMIT = 0.05, 0.01
LOSS_EPOCHS = (1, 10, 100)
_SAMPLING_BATCH = 500


class Gate(NamedTuple):
    """One criterion, over all seeds; `required` ones decide the exit code."""

    id: str
    criterion: str
    required: bool
    passed: bool
    found: str


class Trial(NamedTuple):
    """One trained run: its epochs, its samples by number of evaluations, and its part of the table."""

    config: TrainConfig
    folder: Path
    problem: Problem
    generator: Generator
    epochs: list[dict[str, Any]]
    measured: dict[int, Measured]
    rows: list[dict[str, Any]]
    seconds: float


@dataclass(frozen=True)
class ToyReport:
    """What `toy` found; `rows` has a line per run and number of evaluations.

    `seconds` are those of each run's last training, `wall_s` those of this call.
    """

    out: Path
    problem: str
    facts: dict[str, Any]
    rows: list[dict[str, Any]]
    gates: list[Gate]
    seconds: dict[str, float]
    wall_s: float

    @property
    def failed(self) -> list[str]:
        """The required gates that failed, one line each."""
        return [f"{g.id}: {g.criterion}: {g.found}" for g in self.gates if g.required and not g.passed]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "out": str(self.out),
            "figure": str(self.out / "figure2.png"),
            "problem": self.problem,
            "facts": self.facts,
            "rows": self.rows,
            "gates": [gate._asdict() for gate in self.gates],
            "passed": not self.failed,
            "seconds": self.seconds,
            "wall_s": self.wall_s,
        }

    def lines(self) -> list[str]:
        """Facts, table, gates."""
        gates = [
            {
                "gate": gate.id,
                "kind": "required" if gate.required else "reported",
                "": "passed" if gate.passed else "FAILED" if gate.required else "not so",
                "criterion": gate.criterion,
                "found": gate.found,
            }
            for gate in self.gates
        ]
        return [
            ", ".join([self.problem, *(f"{name} {_short(value)}" for name, value in self.facts.items())]),
            "",
            markdown_table(self.rows).rstrip(),
            "",
            markdown_table(gates).rstrip(),
            "",
            f"look at {self.out / 'figure2.png'} (this took {self.wall_s:.0f} s)",
        ]


def toy(
    preset: str = "toy-torus",
    out: Path = Path("runs/toy-torus"),
    *,
    seeds: Sequence[int] = (0, 1, 2),
    overrides: Sequence[str] = (),
    both: bool = True,
    cells: int = 8,
    device: str = "auto",
    jobs: int | None = 1,
    progress: Any = None,
) -> ToyReport:
    """Train on a torus, sample, and check the gates; the same call continues or repeats the judgement.

    Args:
        preset: a `mlp` network gets points in R^4, any other volumes.
        out: a run folder per seed, `table.md`, `toy.json`, `figure2.png`.
        seeds: of data, weights, draws and noise; the required gates must hold for each.
        overrides: `key=value` settings.
        both: also train the other prediction (x or u) with the first seed, for the report.
        cells: per axis of the volumes.
        device: auto, cpu, cuda or mps.
        jobs: runs trained at a time, each in a process of its own if there are several (a script that calls this
            then needs the `__main__` guard of multiprocessing); None is one per CPU core, and one on a GPU.
        progress: `message` and `step` of the training listener are used.

    Raises:
        UserError: wrong settings, or the folder holds something else.
    """
    listener = progress or Silent()
    chosen = settings.load(preset, overrides).objective.prediction
    wanted = [(chosen, seed) for seed in seeds] + [("u" if chosen == "x" else "x", seeds[0])] * both
    tasks = [
        Task(
            settings.load(preset, [*overrides, f"training.seed={seed}", f"objective.prediction={prediction}"]),
            out / f"{prediction}-seed{seed}",
            cells,
            device,
        )
        for prediction, seed in wanted
    ]
    began = time.perf_counter()
    jobs = jobs or (cores() if torch_device(device).type == "cpu" else 1)
    unfinished = [task for task in tasks if not (task.folder / RESULT_FILE).exists()]
    if min(jobs, len(unfinished)) > 1:
        side_by_side([Job(task.folder.name, partial(train_task, task)) for task in unfinished], jobs, listener)
    trials = []
    for task in tasks:
        listener.message(f"{task.config.objective.prediction}-prediction, seed {task.config.training.seed}")
        trials.append(_trial(task, listener))
    return _finish(out, trials, len(seeds), time.perf_counter() - began)


def _trial(task: Task, listener: Any) -> Trial:
    config, folder = task.config, task.folder
    problem = problem_of(task)
    result = train_task(task, listener)
    generator = load(folder, device=task.device)
    measured = {nfe: problem.measure(_samples(generator, nfe, config.training.seed)) for nfe in EVALUATIONS}
    rows = [_row(config, nfe, found) for nfe, found in measured.items()]
    return Trial(config, folder, problem, generator, read_json(folder / SUMMARY), measured, rows, result.seconds)


def _samples(generator: Generator, nfe: int, seed: int) -> torch.Tensor:
    blocks = torch.arange(SAMPLES).split(_SAMPLING_BATCH)
    return torch.cat([generator.sample_latents(block.tolist(), nfe=nfe, seed=seed) for block in blocks])


def _row(config: TrainConfig, nfe: int, found: Measured) -> dict[str, Any]:
    first, second = ks_uniform(found.angles)
    residual = {} if found.residual is None else {"residual": float(found.residual.mean())}
    return {
        "prediction": config.objective.prediction,
        "seed": config.training.seed,
        "evaluations": nfe,
        "distance": float(found.distance.mean()),
        "abs(norm - 1)": float(found.norm_error.mean()),
        **residual,
        "KS p (a)": first,
        "KS p (b)": second,
    }


def _finish(out: Path, trials: list[Trial], judged: int, wall_s: float) -> ToyReport:
    first = trials[0]
    report = ToyReport(
        out,
        first.problem.name,
        first.problem.facts,
        [row for trial in trials for row in trial.rows],
        judge(trials[:judged], trials[judged:]),
        {trial.folder.name: round(trial.seconds, 1) for trial in trials},
        round(wall_s, 1),
    )
    _draw(first, out / "figure2.png")
    write_text(out / "table.md", markdown_table(report.rows))
    write_json(out / "toy.json", report.to_dict())
    return report


def _draw(trial: Trial, path: Path) -> None:
    def series(name: str) -> tuple[list[int], list[float]]:
        points = [(e["epoch"], e[name]) for e in trial.epochs if e.get(name) is not None]
        return [x for x, _ in points], [y for _, y in points]

    found, problem = trial.measured[1], trial.problem
    points = _samples(trial.generator, 1, trial.config.training.seed)
    shown = points if found.residual is None else points[:4]
    torus_figure(
        path,
        losses={"validation, fixed (t, r, noise)": series("val_raw_loss"), "training": series("raw_loss_mean")},
        angles=found.angles,
        distance=found.distance,
        points=shown,
        truth=problem.manifold.points(found.angles[: len(shown)]),
        heading=f"{problem.name}: one network evaluation, mean distance {float(found.distance.mean()):.3f}",
    )


# --- gates --------------------------------------------------------------------------------------------------


def judge(trials: Sequence[Trial], others: Sequence[Trial] = ()) -> list[Gate]:
    """The gates P2-T1 to P2-T8 over runs of the chosen prediction, and, for the last one, of the other."""
    return [
        _data_gate(trials),
        _loss_gate(trials),
        _derivative_gate(trials),
        _falling_gate(trials),
        _distance_gate(trials),
        _angles_gate(trials),
        _steps_gate(trials),
        _predictions_gate(trials, others),
    ]


def _data_gate(trials: Sequence[Trial]) -> Gate:
    faults = [fault for trial in trials for fault in data_faults(trial.problem)]
    return Gate("P2-T1", "torus data valid", True, not faults, ", ".join(faults) or "on the manifold, whitened")


def _loss_gate(trials: Sequence[Trial]) -> Gate:
    losses = [e["raw_loss_mean"] for trial in trials for e in trial.epochs]
    passed = all(loss is not None and math.isfinite(loss) and loss > 0 for loss in losses)
    return Gate("P2-T2", "raw loss finite, positive", True, passed, f"{len(losses)} epochs")


def _derivative_gate(trials: Sequence[Trial]) -> Gate:
    trial = trials[0]
    objective = Objective(trial.generator.network.cpu(), trial.config.objective)
    x = torch.stack(trial.problem.split.train.__getitems__(range(4)))
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    terms = objective.terms(x, Draws(eps, torch.full((4,), 0.25), torch.full((4,), 0.75)))
    passed = terms.du_dt.shape == x.shape and bool(torch.isfinite(terms.du_dt).all()) and bool(terms.du_dt.any())
    return Gate("P2-T3", "du/dt has the shape of z", True, passed, str(tuple(terms.du_dt.shape)))


def _falling_gate(trials: Sequence[Trial]) -> Gate:
    """Raw loss on fixed (t, r, eps) at epochs 1 > 10 > 100; a shorter run ends with its last epoch."""
    found, passed = [], True
    for trial in trials:
        by_epoch = {e["epoch"]: e["val_raw_loss"] for e in trial.epochs if e.get("val_raw_loss") is not None}
        last = max(by_epoch)
        epochs = sorted({min(epoch, last) for epoch in LOSS_EPOCHS})
        losses = [by_epoch.get(epoch, math.nan) for epoch in epochs]
        passed = passed and len(epochs) == 3 and losses[0] > losses[1] > losses[2]
        found.append(" > ".join(_short(loss) for loss in losses) + f" (epochs {', '.join(map(str, epochs))})")
    return Gate("P2-T4", "raw validation loss falls", True, passed, "; ".join(found))


def _distance_gate(trials: Sequence[Trial]) -> Gate:
    found = [_value(trial, 1, "distance") for trial in trials]
    passed = all(value < DISTANCE_LIMIT for value in found)
    return Gate("P2-T5", f"1 evaluation: mean distance < {DISTANCE_LIMIT:g}", True, passed, _list(found))


def _angles_gate(trials: Sequence[Trial]) -> Gate:
    found = [_value(trial, 1, f"KS p ({name})") for trial in trials for name in "ab"]
    passed = all(value > KS_LIMIT for value in found)
    return Gate("P2-T6", f"1 evaluation: KS p > {KS_LIMIT:g} for both angles", True, passed, _list(found))


def _steps_gate(trials: Sequence[Trial]) -> Gate:
    one, five = ([_value(trial, nfe, "distance") for trial in trials] for nfe in (1, 5))
    passed = all(b <= a for a, b in zip(one, five, strict=True))
    return Gate("P2-T7", "5 steps at least as close as 1", False, passed, f"{_list(one)} against {_list(five)}")


def _predictions_gate(trials: Sequence[Trial], others: Sequence[Trial]) -> Gate:
    both = {trial.config.objective.prediction: _value(trial, 1, "distance") for trial in (trials[0], *others)}
    passed = len(both) == 2 and all(value < DISTANCE_LIMIT for value in both.values())
    found = ", ".join(f"{name}: {_short(value)}" for name, value in sorted(both.items()))
    return Gate("P2-T8", "x- and u-prediction both converge", False, passed, found)


def _value(trial: Trial, nfe: int, name: str) -> float:
    return float(next(row[name] for row in trial.rows if row["evaluations"] == nfe))


def _list(values: Sequence[float]) -> str:
    return ", ".join(_short(value) for value in values)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
