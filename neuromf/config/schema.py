"""The settings of a run: typed, frozen, unknown keys refused.

Precedence: `key=value` on the command line > `NEUROMF_*` environment > `--config` YAML > preset > defaults.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from neuromf.errors import UserError, did_you_mean

ENVIRONMENT_PREFIX = "NEUROMF_"
RESERVED_ENVIRONMENT = {"NEUROMF_WEIGHTS", "NEUROMF_TEST_DATA", "NEUROMF_TEST_GOLDEN"}

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class NetworkConfig(_Section):
    """The backbone that predicts the average velocity."""

    name: Literal["maisi-unet"] = "maisi-unet"
    channels: tuple[Count, ...] = (64, 128, 256, 512)
    attention_levels: tuple[bool, ...] = (False, False, True, True)
    head_channels: Count = 32
    res_blocks: Count = 2
    norm_groups: Count = 32
    conditioning: Literal["t+h", "r+t", "h"] = "t+h"
    time_scale: Positive = 1.0
    patch: Count = 1
    """Fold blocks of patch^3 latent cells into channels (a cheap, wide network for CPUs)."""
    pad: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> NetworkConfig:
        if len(self.channels) != len(self.attention_levels):
            raise ValueError(
                f"network.channels has {len(self.channels)} levels and network.attention_levels "
                f"{len(self.attention_levels)}: give one entry per level in both"
            )
        uneven = [c for c in self.channels if c % self.norm_groups]
        if uneven:
            raise ValueError(f"network.norm_groups={self.norm_groups} does not divide channels {uneven}")
        return self


class ObjectiveConfig(_Section):
    """What is minimised; symbols as in the papers."""

    name: Literal["imf", "meanflow", "rectflow"] = "imf"
    prediction: Literal["u", "x"] = "x"
    t_min: Share = 0.01
    derivative: Literal["exact", "finite-difference"] = "exact"
    fd_step: Positive = 1e-3
    lp: Positive | tuple[Positive, ...] = 2.0
    loss_reduction: Literal["sum", "mean"] = "mean"
    norm_p: Annotated[float, Field(ge=0)] = 0.5
    norm_eps: Positive = 1.0
    fm_weight: Annotated[float, Field(ge=0)] = 0.0
    channel_weights: Literal["none", "precision"] | tuple[Positive, ...] = "none"

    @model_validator(mode="after")
    def _consistent(self) -> ObjectiveConfig:
        if self.prediction == "x" and self.t_min == 0:
            raise ValueError("objective.t_min=0 divides by zero with prediction 'x': use 0.01 to 0.05")
        return self


class TimesConfig(_Section):
    """How the pairs (r, t) are drawn."""

    distribution: Literal["logit-normal", "uniform"] = "logit-normal"
    mean: float = -0.4
    std: Positive = 1.0
    r_mean: float | None = None
    r_std: Positive | None = None
    uniform_share: Share = 0.0
    one_step_share: Share = 0.0
    """Share of the r < t samples whose pair is exactly (r, t) = (0, 1), the one that 1-NFE sampling uses."""
    data_proportion: Share = 0.75
    order: Literal["sort-then-mask", "mask-then-sort", "min"] = "sort-then-mask"


class TrainingConfig(_Section):
    """The optimisation."""

    seed: int = 0
    epochs: Count | None = None
    updates: Count | None = None
    batch_size: Count = 16
    """Samples per process and micro-batch."""
    accumulation: Count = 1
    lr: Positive = 1e-4
    lr_final: Annotated[float, Field(ge=0)] = 1e-6
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    betas: tuple[Share, Share] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Positive | None = 1.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    flip: Literal["auto"] | bool = "auto"
    """Also train on the left-right flipped copies of `encode --flip-copies`; auto: where they exist."""
    workers: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _one_length(self) -> TrainingConfig:
        if (self.epochs is None) == (self.updates is None):
            raise ValueError("set exactly one of training.epochs and training.updates (the other to null)")
        return self


class EmaConfig(_Section):
    """Moving averages of the weights; all are saved, one is selected for validation and sampling."""

    decays: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.9995, 0.999, 0.9999)
    select: float = 0.9995

    @model_validator(mode="after")
    def _known(self) -> EmaConfig:
        if self.select not in self.decays:
            raise ValueError(f"ema.select={self.select} is not among ema.decays={list(self.decays)}")
        return self


class IntervalsConfig(_Section):
    """How often the costly things happen, in epochs; checkpoints also by updates."""

    validation: Count = 10
    samples: Count = 25
    sample_count: Count = 4
    checkpoint_updates: Count = 500
    keep_checkpoints: Count = 2


class GuardsConfig(_Section):
    """What ends a run that has gone wrong."""

    divergence: bool = True
    divergence_warn: Positive = 10.0
    divergence_halt: Positive = 100.0
    nonfinite_limit: Count = 20


class TrainConfig(BaseSettings):
    """Everything that defines a training run."""

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True
    )

    preset: str = ""
    network: NetworkConfig = NetworkConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    times: TimesConfig = TimesConfig()
    training: TrainingConfig = TrainingConfig(updates=10_000)
    ema: EmaConfig = EmaConfig()
    intervals: IntervalsConfig = IntervalsConfig()
    guards: GuardsConfig = GuardsConfig()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The three layers of `load`, with the environment between the overrides and the files."""
        assert isinstance(init_settings, InitSettingsSource)
        layers = dict(init_settings.init_kwargs)
        files = layers.pop("_files", [])
        environment = [_StrictEnvironment(settings_cls)] if layers.pop("_environment", True) else []
        ranked = [layers, *reversed(files)]
        overrides, *lower = (InitSettingsSource(settings_cls, layer) for layer in ranked)
        return (overrides, *environment, *lower)

    @model_validator(mode="after")
    def _crossed(self) -> TrainConfig:
        if isinstance(self.objective.lp, tuple) and isinstance(self.objective.channel_weights, tuple):
            n, m = len(self.objective.lp), len(self.objective.channel_weights)
            if n != m:
                raise ValueError(f"objective.lp has {n} channels and objective.channel_weights {m}")
        return self

    def to_yaml(self) -> str:
        """The resolved settings as YAML, readable by `--preset` and `from_yaml`."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


class _StrictEnvironment(EnvSettingsSource):
    """The environment's `NEUROMF_SECTION__KEY` variables; one that names no setting is an error."""

    def __call__(self) -> dict[str, Any]:
        known = [ENVIRONMENT_PREFIX + key.upper().replace(".", "__") for key in known_keys()]
        for name in os.environ:
            if name.startswith(ENVIRONMENT_PREFIX) and name not in RESERVED_ENVIRONMENT and name not in known:
                raise UserError(f"the environment variable {name} names no setting", nearest_names(name, known))
        return super().__call__()


def nearest_names(name: str, known: Sequence[str]) -> str:
    """The three nearest names, for lists too long to print."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return (
        f"did you mean {' or '.join(repr(c) for c in close)}?"
        if close
        else ("run `neuromf presets show imf-xpred --resolved` for the valid names")
    )


def known_keys(model: type[BaseModel] = TrainConfig, prefix: str = "") -> list[str]:
    """All settings in dotted form, such as `training.lr`."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            keys += known_keys(section, f"{prefix}{name}.")
        elif name != "preset":  # a label of the resolved settings; another preset is chosen with --preset
            keys.append(prefix + name)
    return keys


# --- presets -----------------------------------------------------------------------------------------------


def preset_folders() -> list[Path]:
    """Where presets lie: inside the installed wheel, or beside the package in an editable install."""
    package = Path(__file__).resolve().parent
    return [folder for folder in (package / "presets", package.parent / "presets") if folder.is_dir()]


def preset_files() -> dict[str, Path]:
    """Shipped presets by name."""
    return {path.stem: path for folder in preset_folders() for path in sorted(folder.glob("*.yaml"))}


def find_preset(name_or_path: str) -> Path:
    """The file of a preset given by its name or as a path to YAML.

    Raises:
        UserError: no such preset; the nearest name is suggested.
    """
    presets = preset_files()
    if name_or_path in presets:
        return presets[name_or_path]
    path = Path(name_or_path)
    if path.is_file():
        return path
    if path.suffix in {".yaml", ".yml"}:
        raise UserError(f"the preset file {path} does not exist", "`neuromf presets copy NAME` makes one to edit")
    raise UserError(f"no preset '{name_or_path}'", did_you_mean(name_or_path, presets))


def preset_header(path: Path) -> list[str]:
    """The comment lines a preset opens with, without their `# `."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").strip())
    return lines


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        UserError: unreadable, or not a mapping.
    """
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, settings need `section: {{key: value}}`")
    return value


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`["training.lr=2e-4", ...]` as a nested dictionary; values are read as YAML.

    Raises:
        UserError: not of the form key=value, or an unknown key.
    """
    nested: dict[str, Any] = {}
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            raise UserError(f"'{item}' is not an override", "write section.key=value, such as training.lr=2e-4")
        if key not in known_keys():
            raise UserError(f"no setting '{key}'", nearest_names(key, known_keys()))
        *sections, name = key.split(".")
        target = nested
        for section in sections:
            target = target.setdefault(section, {})
        target[name] = _scalar(text)
    return nested


def _scalar(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"the value '{text}' is not valid YAML: {error}") from error
    if isinstance(value, str):  # YAML 1.1 reads 2e-4 as a word
        try:
            return float(value)
        except ValueError:
            return value
    return value


def load(preset: str = "imf-xpred", overrides: Sequence[str] = (), config: Path | None = None) -> TrainConfig:
    """Resolve preset, file, environment and overrides into one frozen configuration.

    Args:
        preset: a shipped name or a YAML path.
        overrides: `key=value` strings.
        config: a YAML file laid over the preset.

    Raises:
        UserError: every wrong key and value at once, each with what is allowed.
    """
    path = find_preset(preset)
    files = [read_yaml(path)] + ([read_yaml(config)] if config else [])
    changed = parse_overrides(overrides)
    _one_length(files, changed)
    for layer in (*files, changed):
        layer.pop("preset", None)
    return _build({**changed, "preset": path.stem, "_files": files}, source=str(preset))


def from_yaml(path: Path) -> TrainConfig:
    """A resolved configuration as a run folder stores it (no environment, no preset)."""
    return _build({**read_yaml(path), "_environment": False}, source=str(path))


def _one_length(files: list[dict[str, Any]], changed: dict[str, Any]) -> None:
    """Setting epochs in a layer unsets updates of the layers below it, and the other way round."""
    files.insert(0, {"training": {"updates": TrainConfig.model_fields["training"].default.updates}})
    from_environment = any(f"{ENVIRONMENT_PREFIX}TRAINING__{key}" in os.environ for key in ("EPOCHS", "UPDATES"))
    for layer in (*files, changed):
        section = layer.get("training")
        if not isinstance(section, dict):
            continue
        if from_environment and layer is not changed:
            section.pop("epochs", None)
            section.pop("updates", None)
        for key, other in (("epochs", "updates"), ("updates", "epochs")):
            if section.get(key) is not None:
                section.setdefault(other, None)


def _build(values: dict[str, Any], source: str) -> TrainConfig:
    try:
        return TrainConfig(**values)
    except ValidationError as error:
        raise UserError(f"the settings from {source} are not valid:\n" + "\n".join(_explain(error))) from error


def _explain(error: ValidationError) -> Iterator[str]:
    for fault in error.errors(include_url=False):
        where = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            yield f"  no setting '{where}': {nearest_names(where, known_keys())}"
        else:
            found = "" if fault["type"] == "value_error" else f" (found {fault['input']!r})"
            yield f"  {where + ': ' if where else ''}{fault['msg'].removeprefix('Value error, ')}{found}"
