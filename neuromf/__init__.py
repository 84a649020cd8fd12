"""NeuroMF: 3-D brain MRI in one network evaluation.

`import neuromf` is cheap: torch and MONAI are imported by the modules that need them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from neuromf.generator import Generator

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(
    source: str, *, ema: str | None = None, checkpoint: Literal["newest", "best"] = "newest", device: str = "auto"
) -> Generator:
    """Load a trained generator from a run folder, `"builtin"`, or a hub id.

    Args:
        source: path of a run folder (or an exported generator), `"builtin"`, or a hub repository id.
        ema: which moving average to use; the run's own choice (`ema.select`) when None.
        checkpoint: a run's `newest`, or the `best` by its validation loss.
        device: `auto`, `cpu`, `cuda` or `mps`.

    Example:
        >>> import neuromf
        >>> volumes = neuromf.load("runs/cpu-small").sample(4, nfe=1)  # doctest: +SKIP
    """
    from neuromf.generator import load as load_generator

    return load_generator(source, ema=ema, checkpoint=checkpoint, device=device)
