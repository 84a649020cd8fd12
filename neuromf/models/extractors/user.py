"""A feature extractor of the user's own: a function in a Python file."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from neuromf.errors import UserError
from neuromf.files import sha256_file
from neuromf.models.extractors.extractor import Extractor

FUNCTION = "features"
_HINT = f"write `module:my_features.py` for its function `{FUNCTION}`, or `module:my_features.py:other_name`"


class UserExtractor(Extractor):
    """`module:FILE[:FUNCTION]`, a function of volumes (B, 1, I, J, K) that returns (B, D); named after the file.

    Example:
        >>> # my_features.py: the mean of each octant
        >>> def features(volumes):
        ...     return torch.nn.functional.adaptive_avg_pool3d(volumes, 2).flatten(1)
    """

    def __init__(self, spec: str, device: torch.device | str = "cpu") -> None:
        file, _, function = spec.partition(":")
        path = Path(file).expanduser()
        self.function = _import(path, function or FUNCTION)
        super().__init__(path.stem, sha256_file(path), f"{path.name}:{function or FUNCTION}", device)

    @torch.inference_mode()
    def __call__(self, volumes: Tensor) -> dict[str, Tensor]:
        """(B, 1, I, J, K) -> {"volume": (B, 1, D)}.

        Raises:
            UserError: the function fails, or returns something else.
        """
        try:
            rows = self.function(volumes.to(self.device))
        except Exception as error:
            raise UserError(f"{self.preprocessing} failed: {type(error).__name__}: {error}", "mend it") from error
        if not isinstance(rows, Tensor) or rows.ndim != 2 or len(rows) != len(volumes):
            shape = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise UserError(
                f"{self.preprocessing} returned {shape} for {len(volumes)} volumes",
                f"it has to return a tensor ({len(volumes)}, D)",
            )
        return {"volume": rows.detach().float().cpu()[:, None]}


def _import(path: Path, function: str) -> Callable[[Tensor], Tensor]:
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"{path} is not a Python file", _HINT)
    spec = importlib.util.spec_from_file_location(f"neuromf_user_{path.stem}", path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{path} cannot be imported: {type(error).__name__}: {error}", "mend it") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise UserError(f"{path} has no function '{function}'", _HINT)
    return found
