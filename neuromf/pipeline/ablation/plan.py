"""The plan file of an ablation: what is varied, what is held, and what is compared; unknown keys refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from neuromf.config import known_keys, preset_folders, read_yaml
from neuromf.config.schema import nearest_names
from neuromf.errors import UserError, did_you_mean

Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
# What a plan of a single experiment may say without a section `experiments`.
SINGLE = ("grid", "variants", "seeds", "nfe")
RESERVED = ("data", "preset")


def _dotted(values: Any, prefix: str = "") -> Any:
    """`{training: {lr: 1}}` as `{training.lr: 1}`; what is no mapping is left to the checks."""
    if not isinstance(values, Mapping):
        return values
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat.update(_dotted(value, f"{name}.") if isinstance(value, Mapping) else {name: value})
    return flat


Settings = Annotated[dict[str, Any], BeforeValidator(_dotted)]
"""A run's settings by dotted key; `data` and `preset` may be among them."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Phantoms(_Part):
    """Invented heads to train on and compare with, so that a plan needs no data."""

    heads: Count = 200
    size: Count = 32
    spacing_mm: Annotated[float, Field(gt=0)] = 6.0
    seed: Whole = 0
    fractions: tuple[Share, Share, Share] = (0.7, 0.05, 0.25)
    autoencoder: str = "builtin"


class Experiment(_Part):
    """Cells that belong together: each level of the grid with each variant, seed and number of evaluations."""

    settings: Settings = {}
    grid: dict[str, list[Any]] = {}
    """Values by setting; all combinations are run."""
    variants: dict[str, Settings] = {}
    """Settings that go together, by a name."""
    seeds: tuple[Whole, ...] = (0,)
    nfe: tuple[Count, ...] = (1,)

    @property
    def factors(self) -> list[str]:
        """What is varied, seeds apart."""
        several = ["nfe"] if len(self.nfe) > 1 else []
        return [*(["variant"] if self.variants else []), *self.grid, *several]

    def levels(self, factor: str) -> list[str]:
        """The levels of a factor, as tables name them."""
        values: dict[str, list[Any]] = {"variant": list(self.variants), "nfe": list(self.nfe), **self.grid}
        return [label(value) for value in values[factor]]


class Sampling(_Part):
    """How many samples are drawn for each cell, and how."""

    n: Annotated[int, Field(ge=2)] = 2000
    seed: Whole = 0
    batch_size: Count = 8


class Evaluation(_Part):
    """What the samples are compared with, and by what."""

    real: Path | None = None
    """Scans that training did not see; the held-back heads where the plan has phantoms."""
    held_back: bool = True
    """`real` holds the scans that the latents were encoded from: only those of held-back subjects are compared."""
    train: Path | None = None
    """The training volumes, to look for copies; with `held_back` they are known."""
    autoencoder: str = "builtin"
    batch_size: Count = 4
    seed: Whole = 0
    limit: Count | None = None
    features: tuple[str, ...] = ()
    """As in `neuromf evaluate --features`; its default when empty."""


class Comparison(_Part):
    """Levels that are tested against each other: those of a factor, or cells picked by name."""

    name: str = ""
    experiment: str = ""
    factor: str = ""
    where: dict[str, Any] = {}
    """Only cells with these values, such as {nfe: 1}."""
    groups: dict[str, dict[str, Any]] = {}
    """Levels by name, each the `experiment` and the values of its cells."""
    test: Literal["auto", "welch", "anova"] = "auto"
    """auto: Welch's t for two levels, analysis of variance and Tukey's HSD for more."""
    block: Literal["seed"] | None = None
    """Take the additive effect of the seeds out of the analysis of variance."""
    baseline: Any = None
    """The level that the others' ratios refer to; the first when null."""

    @model_validator(mode="after")
    def _one_kind(self) -> Comparison:
        if bool(self.factor) == bool(self.groups):
            raise ValueError("give a factor, or groups of cells")
        if self.groups and len(self.groups) < 2:
            raise ValueError("groups needs at least two levels")
        if any("experiment" not in picked for picked in self.groups.values()):
            raise ValueError("each of the groups needs its experiment")
        return self


class AblationPlan(_Part):
    """A plan as it is run: every layer merged, every experiment named."""

    name: str
    preset: str = "imf-xpred"
    settings: Settings = {}
    data: str = "latents"
    phantoms: Phantoms | None = None
    experiments: dict[str, Experiment]
    sample: Sampling = Sampling()
    evaluate: Evaluation = Evaluation()
    metric: str = "kid_builtin"
    """What is compared: a name in the metrics.json of `neuromf evaluate`."""
    also: tuple[str, ...] = ()
    """Further metrics of the tables."""
    comparisons: tuple[Comparison, ...]

    @model_validator(mode="after")
    def _consistent(self) -> AblationPlan:
        faults = [*_grid_faults(self), *_key_faults(self), *_comparison_faults(self)]
        if self.phantoms is None and self.evaluate.real is None:
            faults.append("evaluate.real: name the scans that samples are compared with, or give phantoms: {}")
        if faults:
            raise ValueError("\n  ".join(faults))
        return self

    def to_yaml(self) -> str:
        """The plan in full, readable by `read_plan`."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def plan_files() -> dict[str, Path]:
    """Shipped plans by name."""
    return {path.stem: path for folder in preset_folders() for path in sorted((folder / "plans").glob("*.yaml"))}


def find_plan(name_or_path: str) -> Path:
    """The file of a plan given by its name or as a path to YAML.

    Raises:
        UserError: no such plan; the nearest name is suggested.
    """
    plans = plan_files()
    if name_or_path in plans:
        return plans[name_or_path]
    path = Path(name_or_path)
    if path.is_file():
        return path
    if path.suffix in {".yaml", ".yml"}:
        raise UserError(f"the plan {path} does not exist", f"shipped plans: {', '.join(plans)}")
    raise UserError(f"no plan '{name_or_path}'", did_you_mean(name_or_path, plans))


def read_plan(name_or_path: str) -> AblationPlan:
    """A plan, shipped or the user's, with what it extends.

    Raises:
        UserError: every wrong key and value, each with what is allowed.
    """
    path = find_plan(name_or_path)
    layers = list(_layers(path))
    merged: dict[str, Any] = {}
    for layer in layers:
        if "experiments" in layer:
            merged.pop("comparisons", None)  # they were of the experiments that these replace
        merged.update(layer)
    merged["name"] = layers[-1].get("name", path.stem)
    if not merged.get("experiments"):
        raise UserError(f"the plan {path} varies nothing", "give a grid, such as grid: {objective.lp: [1.5, 2.0]}")
    if "comparisons" not in merged:
        merged["comparisons"] = _automatic(merged["experiments"])
    try:
        return AblationPlan.model_validate(merged)
    except ValidationError as error:
        raise UserError(f"the plan {path} is not valid:\n" + "\n".join(_explain(error))) from error


def _layers(path: Path, seen: tuple[Path, ...] = ()) -> Iterator[dict[str, Any]]:
    """What a plan extends, then the plan; a plan of a single experiment gets its section."""
    if path in seen:
        raise UserError(f"the plan {path} extends itself", "remove the line `extends` from one of them")
    layer = read_yaml(path)
    extended = layer.pop("extends", None)
    if extended is not None:
        yield from _layers(find_plan(str(extended)), (*seen, path))
    single = {key: layer.pop(key) for key in SINGLE if key in layer}
    if single and "experiments" in layer:
        raise UserError(
            f"the plan {path} has experiments and {', '.join(single)}", f"put {', '.join(single)} into an experiment"
        )
    yield {**layer, "experiments": {str(layer.get("name", path.stem)): single}} if single else layer


def _automatic(experiments: Any) -> list[dict[str, Any]]:
    """One comparison for every factor; what is not of the right form is left to the checks."""
    found = []
    for name, experiment in experiments.items() if isinstance(experiments, Mapping) else ():
        try:
            factors = Experiment.model_validate(experiment).factors
        except ValidationError:
            continue
        found += [{"experiment": name, "factor": factor} for factor in factors]
    return found


# --- what must agree -----------------------------------------------------------------------------------------


def _grid_faults(plan: AblationPlan) -> Iterator[str]:
    for name, experiment in plan.experiments.items():
        where = f"experiments.{name}"
        levels = {**experiment.grid, "seeds": experiment.seeds, "nfe": experiment.nfe}
        for key, values in levels.items():
            if not len(values):
                yield f"{where}: {key} has no values, so there is no cell to run"
            elif len({label(value) for value in values}) < len(values):
                yield f"{where}: {key} has a value twice in {[label(value) for value in values]}"


def _key_faults(plan: AblationPlan) -> Iterator[str]:
    """Settings that do not exist, wherever they are named."""
    places = {"settings": list(plan.settings)}
    for name, experiment in plan.experiments.items():
        where = f"experiments.{name}"
        places |= {f"{where}.settings": list(experiment.settings), f"{where}.grid": list(experiment.grid)}
        places |= {f"{where}.variants.{variant}": list(keys) for variant, keys in experiment.variants.items()}
    known = [*known_keys(), *RESERVED]
    for where, keys in places.items():
        for key in keys:
            if key == "training.seed":
                yield f"{where}: training.seed is given by `seeds`"
            elif key not in known:
                yield f"{where}: no setting '{key}': {nearest_names(key, known)}"


def _comparison_faults(plan: AblationPlan) -> Iterator[str]:
    for number, comparison in enumerate(plan.comparisons, 1):
        where = f"comparisons, number {number}"
        picks = list(comparison.groups.values()) or [{"experiment": comparison.experiment}]
        for pick in picks:
            name = str(pick["experiment"])
            if name not in plan.experiments:
                yield f"{where}: no experiment '{name}': {did_you_mean(name, plan.experiments)}"
                continue
            experiment, factor = plan.experiments[name], comparison.factor
            known = ["experiment", "seed", "nfe", *experiment.factors]
            for key in [*pick, *comparison.where]:
                if key not in known:
                    yield f"{where}: experiment {name} does not vary '{key}': {did_you_mean(key, known[1:])}"
            if factor and factor not in experiment.factors:
                yield f"{where}: experiment {name} does not vary '{factor}': {did_you_mean(factor, experiment.factors)}"
            elif comparison.baseline is not None:
                levels = list(comparison.groups) or experiment.levels(factor)
                if label(comparison.baseline) not in levels:
                    yield f"{where}: no level '{label(comparison.baseline)}': {did_you_mean('', levels)}"


def label(value: Any) -> str:
    """A level as tables and folders name it.

    Example:
        >>> label(2.0), label(True), label([1.5, 2])
        ('2', 'true', '1.5,2')
    """
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list | tuple):
        return ",".join(label(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _explain(error: ValidationError) -> Iterator[str]:
    for fault in error.errors(include_url=False):
        where = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            known = _fields(fault["loc"][:-1])
            yield f"  no key '{where}' in a plan: {did_you_mean(str(fault['loc'][-1]), known)}"
        elif fault["type"] == "value_error":
            yield f"  {where + ': ' if where else ''}{fault['msg'].removeprefix('Value error, ')}"
        else:
            yield f"  {where}: {fault['msg']} (found {fault['input']!r})"


def _fields(loc: tuple[int | str, ...]) -> list[str]:
    """The keys that the section at `loc` knows."""
    sections: dict[int | str, type[BaseModel]] = {
        "phantoms": Phantoms, "experiments": Experiment, "sample": Sampling, "evaluate": Evaluation,
        "comparisons": Comparison,
    }  # fmt: skip
    return list(sections[loc[0]].model_fields) if loc else [*AblationPlan.model_fields, *SINGLE, "extends"]
