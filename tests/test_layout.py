"""Imports point one way, as DESIGN draws it, so that each part can be read without those to its left."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Left to right; a module may import from those to the right of its own, and from its own folder.
LAYERS = [
    {"neuromf_cli"},
    {"neuromf.pipeline"},
    {"neuromf.generator"},
    {"neuromf.training"},
    {"neuromf.losses", "neuromf.models", "neuromf.data", "neuromf.sampling", "neuromf.metrics", "neuromf.reporting"},
    {"neuromf.weights"},
    {"neuromf.files", "neuromf.devices", "neuromf.launch", "neuromf.vision_shim", "neuromf.conditions"},
    {"neuromf.errors"},
]
SIBLINGS = LAYERS[4]
# Only left of the siblings; it imports only what is right of them.
CONFIG = "neuromf.config"
TORCH_ONLY = ("neuromf/losses/", "neuromf/sampling/", "neuromf/metrics/distances.py")
CHEAP = (
    "neuromf/__init__.py",
    "neuromf/config/",
    "neuromf/errors.py",
    "neuromf/files.py",
    "neuromf/launch.py",
    "neuromf/weights/",
    "neuromf_cli/",
)
HEAVY = {"torch", "monai", "numpy", "scipy", "matplotlib", "nibabel", "accelerate", "torchvision", "torchmetrics"}

REPOSITORY = Path(__file__).resolve().parent.parent
FILES = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for top in ("neuromf", "neuromf_cli")
    for path in (REPOSITORY / top).rglob("*.py")
)


def imported(file: str, *, at_import_time: bool = False) -> set[str]:
    """Names of all modules a file imports; with `at_import_time` not those inside functions or TYPE_CHECKING."""
    tree = ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in _top_level(tree) if at_import_time else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}, line {node.lineno}: imports are absolute here"
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def _top_level(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _top_level(child)


def unit(module: str) -> str | None:
    """The part of the layout that a module belongs to: `neuromf.data.latents` -> `neuromf.data`."""
    parts = module.split(".")
    if parts[0] == "neuromf_cli":
        return "neuromf_cli"
    return ".".join(parts[:2]) if parts[0] == "neuromf" and len(parts) > 1 else None


def rank(name: str) -> int | None:
    return next((i for i, layer in enumerate(LAYERS) if name in layer), None)


def as_module(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@pytest.mark.parametrize("file", FILES)
def test_imports_point_to_the_right(file: str) -> None:
    own = unit(as_module(file))
    if own in (None, "neuromf.assets"):
        return
    others = {unit(module) for module in imported(file)} - {own, None}
    if own == CONFIG:
        assert others <= LAYERS[-2] | LAYERS[-1]
        return
    place = rank(own or "")
    assert place is not None, f"{own} has no place in the layout: give it one in LAYERS"
    for other in others:
        other_place = rank(other or "")
        if other == CONFIG:
            assert place < LAYERS.index(SIBLINGS), f"{file} reads config; it takes plain arguments"
        elif other_place is not None:
            assert other_place > place, f"{file} imports {other}, which is not to its right"


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith(TORCH_ONLY)])
def test_the_mathematics_knows_torch_and_nothing_else(file: str) -> None:
    allowed = {*sys.stdlib_module_names, "torch", "neuromf", "__future__"}
    folder = as_module(file).rsplit(".", 1)[0] if not file.endswith("__init__.py") else as_module(file)
    for module in imported(file):
        assert module.split(".")[0] in allowed, f"{file} imports {module}"
        if module.startswith("neuromf."):
            assert module.startswith((folder, "neuromf.errors")), f"{file} imports {module}"


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith(CHEAP)])
def test_what_help_needs_imports_nothing_heavy(file: str) -> None:
    names = {module.split(".")[0] for module in imported(file, at_import_time=True)}
    assert not names & HEAVY
    if file.startswith("neuromf_cli/"):
        library = {unit(module) for module in imported(file, at_import_time=True)} - {"neuromf_cli", None}
        assert library <= {"neuromf.errors", "neuromf.files", "neuromf.launch", CONFIG}


def test_the_rules_are_not_vacuous() -> None:
    assert len(FILES) > 40
    assert "neuromf.errors" in imported("neuromf_cli/console.py")
    assert "neuromf.pipeline.encode" in imported("neuromf_cli/commands/encode.py")
    assert "neuromf.pipeline.encode" not in imported("neuromf_cli/commands/encode.py", at_import_time=True)
