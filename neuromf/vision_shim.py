"""Make a CUDA build of torchvision importable beside a CPU-only torch.

The published torchvision wheel links against CUDA. With a CPU-only torch its compiled part cannot be loaded,
and `import torchvision` then stops at "operator torchvision::nms does not exist", taking torchmetrics, lpips
and peft down with it. Only the schemas of two operators are missing; none of our code calls them. Call
`prepare_torchvision()` before the first import of any of these packages.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

_OPERATORS = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
# A torch Library withdraws its operators when it is collected, so it must outlive the call.
_declared: list[Any] = []


def prepare_torchvision() -> bool:
    """Declare the operator schemas torchvision needs at import, if its own compiled part cannot.

    Does nothing where torchvision is absent, already imported, or loads by itself; may be called often.

    Returns:
        Whether the schemas are declared by this module.
    """
    if _declared:
        return True
    if "torchvision" in sys.modules or _compiled_part_loads():
        return False
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in _OPERATORS:
        library.define(name + _SCHEMA)
    _declared.append(library)
    return True


def _compiled_part_loads() -> bool:
    """True when there is no torchvision to repair, or when its `_C` library loads and brings the operators."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True
    import torch

    folder = Path(spec.origin).parent
    for path in (folder / f"_C{suffix}" for suffix in EXTENSION_SUFFIXES):
        if path.is_file():
            try:
                torch.ops.load_library(str(path))
            except (ImportError, OSError):
                return False
            return True
    return False
