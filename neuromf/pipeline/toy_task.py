"""One run of the toy: its settings, its data, its training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from neuromf.config import TrainConfig
from neuromf.pipeline.toy_problems import Problem, blob_problem, flat_problem
from neuromf.pipeline.train import TrainingData, train_on
from neuromf.training.loop import TrainResult


class Task(NamedTuple):
    """One run to train; its folder's name is what progress lines begin with."""

    config: TrainConfig
    folder: Path
    cells: int
    device: str


def problem_of(task: Task) -> Problem:
    """Points for an `mlp`, volumes for every other network; drawn from the run's seed."""
    seed = task.config.training.seed
    return flat_problem(seed) if task.config.network.name == "mlp" else blob_problem(seed, task.cells)


def train_task(task: Task, listener: Any) -> TrainResult:
    """Train one run, or go on with it, in this process."""
    problem = problem_of(task)
    data = TrainingData(problem.description(), problem.split.train, problem.split.held_back)
    return train_on(task.config, data, task.folder, device=task.device, listener=listener)
