"""Presets: where they lie, and how they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from neuromf.errors import UserError, did_you_mean


def preset_folders() -> list[Path]:
    """Where presets lie: inside the installed wheel, or beside the package in an editable install."""
    package = Path(__file__).resolve().parent.parent
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
