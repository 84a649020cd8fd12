"""Everything that defines a training run, and what must agree between its sections."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import yaml
from pydantic import BaseModel, model_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from neuromf.config.sections import (
    NETWORKS,
    AdaptersConfig,
    EmaConfig,
    GuardsConfig,
    GuidanceConfig,
    IntervalsConfig,
    NetworkConfig,
    ObjectiveConfig,
    TimesConfig,
    TrackingConfig,
    TrainingConfig,
    UNetConfig,
)
from neuromf.errors import UserError

ENVIRONMENT_PREFIX = "NEUROMF_"
RENAMED = {"training.flip": "training.augmentation"}
RESERVED_ENVIRONMENT = {"NEUROMF_WEIGHTS", "NEUROMF_TEST_DATA", "NEUROMF_TEST_GOLDEN"}


class TrainConfig(BaseSettings):
    """Everything that defines a training run."""

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX,
        env_nested_delimiter="__",
        env_parse_none_str="null",
        extra="forbid",
        frozen=True,
    )

    preset: str = ""
    network: NetworkConfig = UNetConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    guidance: GuidanceConfig = GuidanceConfig()
    times: TimesConfig = TimesConfig()
    training: TrainingConfig = TrainingConfig(updates=10_000)
    ema: EmaConfig = EmaConfig()
    intervals: IntervalsConfig = IntervalsConfig()
    guards: GuardsConfig = GuardsConfig()
    adapters: AdaptersConfig = AdaptersConfig()
    tracking: TrackingConfig = TrackingConfig()

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
        faults = [*_channel_faults(self.objective), *_head_faults(self), *_guidance_faults(self)]
        faults += [*_time_faults(self), *_adapter_faults(self)]
        if self.network.precondition and self.objective.prediction != "x":
            faults.append("network.precondition=true makes a data estimate: set objective.prediction=x")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def to_yaml(self) -> str:
        """The resolved settings as YAML, readable by `--preset` and `from_yaml`."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def _channel_faults(objective: ObjectiveConfig) -> Iterator[str]:
    if isinstance(objective.lp, tuple) and isinstance(objective.channel_weights, tuple):
        n, m = len(objective.lp), len(objective.channel_weights)
        if n != m:
            yield f"objective.lp has {n} channels and objective.channel_weights {m}"


def _time_faults(config: TrainConfig) -> Iterator[str]:
    network, name = config.network, config.objective.name
    seen = getattr(network, "conditioning", "t+h" if getattr(network, "time_token", False) else "h")
    if seen == "t" and name != "rectflow":
        yield f"network.conditioning=t does not show r to the network, and {name} needs it: use t+h"
    if seen == "h" and name == "rectflow":
        yield "rectflow trains r = t alone, and this network sees h = t - r alone: " + (
            "set network.time_token=true" if network.name == "mit" else "set network.conditioning=t"
        )


def _head_faults(config: TrainConfig) -> Iterator[str]:
    blocks, wanted = config.network.v_head_blocks, config.objective.tangent == "v-head"
    if wanted and not blocks:
        yield "objective.tangent=v-head needs a second head: set network.v_head_blocks to 1 or more"
    if blocks and not wanted:
        yield (
            f"network.v_head_blocks={blocks} trains nothing with objective.name={config.objective.name} and tangent "
            f"{config.objective.tangent}: set it to 0, or objective.tangent=v-head"
        )


def _guidance_faults(config: TrainConfig) -> Iterator[str]:
    name, network = config.objective.name, config.network
    if not config.guidance.enabled:
        if network.guidance:
            yield "network.guidance=true takes scales that nothing draws: set guidance.enabled=true too"
        return
    if name not in ("meanflow", "imf", "pmf"):
        yield f"guidance.enabled=true belongs to meanflow, imf and pmf, not to {name}"
    if not network.classes:
        yield "guidance.enabled=true needs network.classes=true (and latents with classes)"
    if config.guidance.label_drop == 0:
        yield "guidance.enabled=true compares with the network without a class: set guidance.label_drop above 0"
    if name == "meanflow" and network.guidance:
        yield "meanflow has one fixed scale: set network.guidance=false"
    if name in ("imf", "pmf") and not network.guidance:
        yield f"{name} draws a scale for every sample: set network.guidance=true"


def _adapter_faults(config: TrainConfig) -> Iterator[str]:
    if config.adapters.base is None:
        return
    network = config.network
    if network.name == "mlp":
        yield "adapters are made for maisi-unet and mit, and this network is an mlp"
    if network.v_head_blocks:
        yield "a frozen base has lost its second head: set network.v_head_blocks=0 and objective.tangent=boundary"
    if network.classes or network.guidance:
        yield "adapters.base with classes or guidance cannot be adapted: take a base without them"
    if config.training.init_from:
        yield "training.init_from and adapters.base both say what to start from: set training.init_from=null"
    if config.objective.perceptual_weight:
        yield "objective.perceptual_weight compares decoded images, and pairs hold masks too: set it to 0"


class _StrictEnvironment(EnvSettingsSource):
    """The environment's `NEUROMF_SECTION__KEY` variables; one that names no setting is an error."""

    def __call__(self) -> dict[str, Any]:
        known = [ENVIRONMENT_PREFIX + key.upper().replace(".", "__") for key in known_keys()]
        for name in os.environ:
            if name.startswith(ENVIRONMENT_PREFIX) and name not in RESERVED_ENVIRONMENT and name not in known:
                raise UserError(f"the environment variable {name} names no setting", nearest_names(name, known))
        return super().__call__()


def nearest_names(name: str, known: Sequence[str]) -> str:
    """The new name of a renamed setting, else the three nearest names, for lists too long to print."""
    if name in RENAMED:
        return f"it is called {RENAMED[name]} now"
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
        sections = [field.annotation] if (model, name) != (TrainConfig, "network") else list(NETWORKS.values())
        models = [section for section in sections if isinstance(section, type) and issubclass(section, BaseModel)]
        if models:  # the networks share some settings
            keys += dict.fromkeys(key for section in models for key in known_keys(section, f"{prefix}{name}."))
        elif name != "preset":  # a label of the resolved settings; another preset is chosen with --preset
            keys.append(prefix + name)
    return keys
