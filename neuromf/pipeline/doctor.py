"""`neuromf doctor`: is everything there that the other commands need?

What it looks for may be broken, torch itself included, so each check imports what it needs, and an exception is a
finding. `doctor_jvp` checks the derivative.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

from neuromf import assets, weights
from neuromf.config import load, preset_files
from neuromf.errors import UserError
from neuromf.files import read_json, sha256_file

GIB = 1 << 30
LEAST_DISK, ENOUGH_DISK = 1 * GIB, 20 * GIB
OLDEST_PYTHON = (3, 11)
REINSTALL = "pip install --force-reinstall neuromf"


class Finding(NamedTuple):
    """What one check found, and what to do about it."""

    status: Literal["ok", "warning", "problem"]
    found: str
    advice: str = ""


class Check(NamedTuple):
    """A finding under the name of what was looked at."""

    name: str
    status: Literal["ok", "warning", "problem"]
    found: str
    advice: str


@dataclass(frozen=True)
class Environment:
    """The findings, in the order they were made."""

    checks: list[Check]

    @property
    def problems(self) -> list[str]:
        """What will not work, one line each."""
        return [f"{check.name}: {check.found}" for check in self.checks if check.status == "problem"]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"passed": not self.problems, "checks": [check._asdict() for check in self.checks]}

    def lines(self) -> list[str]:
        """A line per check, and below it what to do."""
        width = max(len(check.name) for check in self.checks)
        lines = []
        for check in self.checks:
            lines.append(f"{check.status:<7}  {check.name:<{width}}  {check.found}")
            if check.advice:
                lines.append(f"{'':<7}  {'':<{width}}  -> {check.advice}")
        return lines


def check_environment(device: str = "auto") -> Environment:
    """Look at interpreter, libraries, devices, disk, weights and presets; nothing is changed.

    Args:
        device: auto, cpu, cuda or mps; a problem if it is not there.
    """
    looks: dict[str, Callable[[], Finding]] = {
        "python": _python,
        "torch": _torch,
        "monai": partial(_library, "monai", "monai.apps.generation.maisi.networks.diffusion_model_unet_maisi"),
        "accelerate": partial(_library, "accelerate", "accelerate"),
        "libraries": _requirements,
        "torchvision": _torchvision,
        "device": partial(_device, device),
        "precision": partial(_precision, device),
        "disk": _disk,
        "weights": _weights,
        "autoencoder": _autoencoder,
        "presets": _presets,
    }
    return Environment([Check(name, *_guarded(look)) for name, look in looks.items()])


def _guarded(look: Callable[[], Finding]) -> Finding:
    try:
        return look()
    except UserError as error:
        return Finding("problem", error.message, error.hint)
    except Exception as error:  # a broken library can raise anything
        return Finding("problem", f"{type(error).__name__}: {error}".splitlines()[0], REINSTALL)


# --- libraries ----------------------------------------------------------------------------------------------


def _python() -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info[:2] < OLDEST_PYTHON:
        return Finding("problem", found, f"use Python {'.'.join(map(str, OLDEST_PYTHON))} or newer")
    return Finding("ok", found)


def _torch() -> Finding:
    version = metadata.version("torch")
    if version.startswith("2.9."):
        return Finding(
            "problem",
            f"{version}: Conv3d under autocast is four times slower in 2.9 (pytorch issue 166122)",
            "pip install --upgrade 'torch!=2.9.*'",
        )
    import torch

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return Finding("ok", f"{version}, {built}")


def _library(name: str, module: str) -> Finding:
    """Installed, and its import works."""
    version = metadata.version(name)
    import_module(module)
    return Finding("ok", version)


def _requirements() -> Finding:
    """Everything that the package declares is there in a version it accepts; torch has its own check."""
    from packaging.requirements import Requirement

    declared = [Requirement(line) for line in metadata.requires("neuromf") or ()]
    core = [one for one in declared if (one.marker is None or one.marker.evaluate({"extra": ""}))]
    faults = [fault for one in core if one.name != "torch" and (fault := _fault(one))]
    if faults:
        return Finding(
            "problem", "; ".join(faults), "pip install --upgrade neuromf, or -c constraints.txt of the source"
        )
    return Finding("ok", f"all {len(core)} that neuromf needs")


def _fault(requirement: Any) -> str:
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f"{requirement.name} is not installed"
    fits = requirement.specifier.contains(version, prereleases=True)
    return "" if fits else f"{requirement.name} is {version}, needed {requirement.specifier}"


def _torchvision() -> Finding:
    from neuromf.vision_shim import prepare_torchvision

    stood_in = prepare_torchvision()
    try:
        import_module("torchvision")
    except ImportError as error:
        return Finding("warning", f"{error}".splitlines()[0], "pip install --upgrade torchvision; only metrics need it")
    version = metadata.version("torchvision")
    if stood_in:
        return Finding("ok", f"{version}; its compiled part does not fit this torch, neuromf stands in for it")
    return Finding("ok", f"{version}, loads by itself")


# --- machine ------------------------------------------------------------------------------------------------


def _device(name: str) -> Finding:
    import torch

    from neuromf.devices import torch_device
    from neuromf.training.memory import available

    place = torch_device(name)
    if place.type == "cuda":
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return Finding("ok", "; ".join(f"{card.name}, {card.total_memory / GIB:.0f} GiB" for card in cards))
    memory, _ = available("cpu")
    found = f"{place.type}: {os.cpu_count()} cores, {torch.get_num_threads()} threads, {memory / GIB:.0f} GiB"
    if place.type == "mps" or name == "cpu":
        return Finding("ok", found)
    if shutil.which("nvidia-smi"):
        return Finding(
            "warning",
            f"{found}; there is an NVIDIA driver, and torch does not use it",
            "install a CUDA build of torch (pytorch.org), or update the driver",
        )

    return Finding("warning", f"{found}; no GPU", "`neuromf demo` runs here; the published network needs a GPU")


def _precision(name: str) -> Finding:
    import torch

    from neuromf.devices import torch_device

    place = torch_device(name)
    if place.type != "cuda":
        return Finding("ok", f"training.precision=auto is fp32 on {place.type}")
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return Finding("ok", "training.precision=auto is bf16")
    return Finding("warning", "this GPU only emulates bf16", "set training.precision=fp32")


def _disk() -> Finding:
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    found = f"{free / GIB:.1f} GiB free in {here}"
    if free < LEAST_DISK:
        return Finding("problem", found, "free some space, or work in another folder")
    if not os.access(here, os.W_OK):
        return Finding("warning", f"{here} cannot be written", "go to a folder of yours, or give --out")
    if free < ENOUGH_DISK:
        return Finding("warning", found, "a checkpoint of the published network takes 4 GiB; small presets fit")
    return Finding("ok", found)


# --- weights and presets --------------------------------------------------------------------------------------


def _weights() -> Finding:
    """The folder of foreign weights; the built-in autoencoder needs none."""
    folder = weights.folder()
    if not folder.is_dir():
        if os.environ.get(weights.VARIABLE):
            return Finding(
                "problem", f"{weights.VARIABLE}={folder} is no folder", f"make it, or unset {weights.VARIABLE}"
            )
        return Finding("ok", "none here; only --autoencoder maisi and some metrics need any: neuromf weights list")
    here = [listed for listed in weights.survey() if listed.present]
    damaged = [f"{listed.path} {problem}" for listed in here if (problem := weights.damage(listed.path))]
    if damaged:
        return Finding("problem", "; ".join(damaged), "remove it and get it again: neuromf weights fetch NAME")
    if not here:
        return Finding("warning", f"{folder} holds no known weights", "neuromf weights list")
    return Finding("ok", f"{folder}: {', '.join(listed.entry.name for listed in here)}")


def _autoencoder() -> Finding:
    """The built-in weights are those of their record."""
    path = Path(assets.__file__).parent / "autoencoder_builtin.safetensors"
    if not path.is_file():
        return Finding("problem", f"the built-in weights {path} are missing", REINSTALL)
    found, recorded = sha256_file(path), read_json(path.with_suffix(".json"))["sha256"]
    if found != recorded:
        return Finding("problem", f"{path} is damaged: sha256 {found[:12]}, recorded {recorded[:12]}", REINSTALL)
    return Finding("ok", f"built-in, sha256 {found[:12]} as recorded")


def _presets() -> Finding:
    names = preset_files()
    if not names:
        return Finding("problem", "no preset is installed", REINSTALL)
    faults = {}
    for name in names:
        try:
            load(name)
        except UserError as error:
            faults[name] = error
    if faults:
        first = next(iter(faults.values()))
        return Finding("problem", f"{', '.join(faults)}: {' '.join(first.message.split())}", first.hint)
    return Finding("ok", f"all {len(names)} load")
