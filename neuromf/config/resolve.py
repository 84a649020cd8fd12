"""Preset, file, environment and overrides become one frozen configuration."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from neuromf.config.presets import find_preset, read_yaml
from neuromf.config.schema import ENVIRONMENT_PREFIX, TrainConfig, known_keys, nearest_names
from neuromf.config.sections import NETWORKS
from neuromf.errors import UserError


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


def load(
    preset: str = "imf-xpred",
    overrides: Sequence[str] = (),
    config: Path | None = None,
    *,
    below: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """Resolve preset, file, environment and overrides into one frozen configuration.

    Args:
        preset: a shipped name or a YAML path.
        overrides: `key=value` strings.
        config: a YAML file laid over the preset.
        below: settings that the preset is laid over, in place of the defaults.

    Raises:
        UserError: every wrong key and value at once, each with what is allowed.
    """
    path = find_preset(preset)
    files = [*([dict(below)] if below else []), read_yaml(path), *([read_yaml(config)] if config else [])]
    changed = parse_overrides(overrides)
    _one_length(files, changed)
    for layer in (*files, changed):
        layer.pop("preset", None)
    return _build({**changed, "preset": path.stem, "_files": files}, source=str(preset))


def from_yaml(path: Path) -> TrainConfig:
    """A resolved configuration as a run folder stores it (no environment, no preset)."""
    return from_values(read_yaml(path), str(path))


def from_values(values: Mapping[str, Any], source: str) -> TrainConfig:
    """A resolved configuration from its plain values (no environment, no preset).

    Args:
        values: by section.
        source: where they are from, for messages.
    """
    return _build({**values, "_environment": False}, source=source)


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
        # A network's settings are reported under its name, which is no part of the key.
        parts = [str(part) for i, part in enumerate(fault["loc"]) if not (i == 1 and fault["loc"][0] == "network")]
        if fault["loc"][:1] == ("network",) and len(fault["loc"]) == 1:
            parts = ["network", "name"]
        where = ".".join(parts)
        if fault["type"] == "extra_forbidden":
            yield f"  {_unknown(where, fault['loc'])}"
        else:
            found = "" if fault["type"] == "value_error" else f" (found {_found(fault)!r})"
            yield f"  {where + ': ' if where else ''}{fault['msg'].removeprefix('Value error, ')}{found}"


def _found(fault: Any) -> Any:
    given = fault["input"]
    return given.get("name") if fault["type"] == "no_network" and isinstance(given, dict) else given


def _unknown(where: str, loc: tuple[int | str, ...]) -> str:
    """Why a key is refused: it belongs to another network, or to nothing."""
    if loc[0] == "network" and where in known_keys():
        name = where.removeprefix("network.")
        owners = [network for network, section in NETWORKS.items() if name in section.model_fields]
        return f"{where} is a setting of {' and '.join(owners)}, and this network is {loc[1]}"
    return f"no setting '{where}': {nearest_names(where, known_keys())}"
