"""The folder of an ablation: whose it is, what is in it, and how far each cell is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuromf.data.latents import copies_of, load_latent_folder_info
from neuromf.errors import UserError
from neuromf.files import write_text
from neuromf.pipeline.ablation.cells import Cell, Run, cells_of, data_of, folder_of, runs_of
from neuromf.pipeline.ablation.plan import AblationPlan, read_plan
from neuromf.pipeline.ablation.stage_logs import failure_of
from neuromf.pipeline.ablation.stages import Place, Stage, digest_of, stage_names, stages_of
from neuromf.pipeline.run_folder import RESULT_FILE, describe_data

PLAN_FILE = "plan.yaml"
SHOWN_CHANGES = 8

Message = Callable[[str], None]


@dataclass(frozen=True)
class Ablation:
    """A plan with its cells and their stages, in a folder."""

    plan: AblationPlan
    place: Place
    cells: list[Cell]
    stages: list[Stage]

    @property
    def runs(self) -> list[Run]:
        """The trainings, each once."""
        return runs_of(self.cells)

    def state(self, cell: Cell) -> str:
        """How far a cell is, by its files: `finished`, `failed: STAGE`, or what has been done of it."""
        by_name = {stage.name: stage for stage in self.stages}
        train, sample, evaluate = (by_name[name] for name in stage_names(cell))
        if evaluate.finished():
            return "finished"
        for stage in (train, sample, evaluate):
            if not stage.finished() and failure_of(stage.name, self.place.logs) is not None:
                return f"failed: {stage.name.rsplit('.', 1)[-1]}"
        if train.finished():
            return "sampled" if sample.finished() else "trained"
        return "begun" if folder_of(cell.run, self.place.runs).is_dir() else "to do"


def open_ablation(plan: str, out: Path | None = None, *, device: str = "auto") -> Ablation:
    """Read a plan and work out its cells; nothing is written.

    Args:
        plan: a shipped name or a YAML path.
        out: `ablations/<name>` when None.
        device: that stages are told to use.

    Raises:
        UserError: a plan that is not valid, settings that no run can have, latents that are not there, or a folder
            of another plan.
    """
    content = read_plan(plan)
    place = Place(Path(out) if out is not None else Path("ablations") / content.name)
    _check_folder(place.out, content)
    latents = place.latents(content)
    cells = cells_of(content, latents, _digests(content, latents))
    return Ablation(content, place, cells, stages_of(content, cells, place, device))


def _check_folder(out: Path, plan: AblationPlan) -> None:
    """Refuse a folder of something else."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, an ablation needs a folder", "give another --out")
    if (out / PLAN_FILE).is_file():
        before = read_plan(str(out / PLAN_FILE)).name
        if before != plan.name:
            raise UserError(f"{out} holds the ablation '{before}', not '{plan.name}'", "give another --out")
    elif out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise UserError(f"{out} is not empty and is no ablation", "give another --out")


def claim(ablation: Ablation, message: Message) -> None:
    """Write the plan; say what differs from the one the folder was begun with, and what that means."""
    path = ablation.place.out / PLAN_FILE
    if path.is_file():
        before, now = (_flat(p.model_dump(mode="json")) for p in (read_plan(str(path)), ablation.plan))
        changed = [
            f"  {key}: {before.get(key, 'not there')} before, {now.get(key, 'not there')} now"
            for key in dict.fromkeys([*before, *now])
            if before.get(key) != now.get(key)
        ]
        if changed:
            more = [f"  and {len(changed) - SHOWN_CHANGES} more"] if len(changed) > SHOWN_CHANGES else []
            message("\n".join(["warning: the plan has changed since it began:", *changed[:SHOWN_CHANGES], *more]))
            message(_kept(ablation))
    write_text(path, ablation.plan.to_yaml())


def _kept(ablation: Ablation) -> str:
    """How many finished runs a changed plan still uses."""
    runs = ablation.place.runs
    present = {path.parent for path in runs.glob(f"*/{RESULT_FILE}")}
    wanted = {folder_of(run, runs) for run in ablation.runs}
    left = len(present - wanted)
    others = f"; {left} that it no longer has stay where they are" if left else ""
    return f"{len(present & wanted)} finished runs are still in it and are kept{others}"


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, Mapping):
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _digests(plan: AblationPlan, latents: str) -> dict[str, str]:
    """What identifies each folder of latents: its statistics, split and encoder; of invented heads, their recipe."""
    digests = {}
    for folder in [*([] if plan.phantoms else [latents]), *data_of(plan)]:
        digests[folder] = str(described(Path(folder))["digest"])
    return digests if plan.phantoms is None else {**digests, latents: digest_of(plan.phantoms)}


def described(folder: Path) -> dict[str, Any]:
    """The data.json of a folder of latents.

    Raises:
        UserError: there is none.
    """
    if not folder.exists():
        raise UserError(
            f"there are no latents at {folder}",
            f"make them with `neuromf encode SCANS --out {folder}`, or name others in the plan's `data`",
        )
    info = load_latent_folder_info(folder)
    return describe_data(info, copies=len(copies_of(info.dataset)))
