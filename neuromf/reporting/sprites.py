"""Volumes as pictures that a page can carry: the axial slices of one side by side in a JPEG, within a budget of bytes.

The page cuts the other two planes from the same picture, so that each voxel is carried once.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from neuromf.errors import UserError
from neuromf.reporting.figures import WINDOW

# (voxels averaged per axis, JPEG quality), from the best on; the first that fits is taken.
_STEPS = ((1, 90), (1, 80), (1, 65), (2, 85), (2, 65), (3, 75), (4, 70))
# What a browser of a phone draws at once.
_MOST_PIXELS = 1 << 24
_BLOCK = 8  # of a JPEG: slices begin at its multiples, or their edges would run into one another
_PICTURE_WIDTH = 1600


class Sprite(NamedTuple):
    """A volume in one picture.

    Attributes:
        data: `data:image/jpeg;base64,...`.
        size: (I, J, K), as carried.
        mm: extent of each axis.
        tile: width and height that a slice takes in the picture.
        columns: slices to a row.
    """

    data: str
    size: tuple[int, int, int]
    mm: tuple[float, float, float]
    tile: tuple[int, int]
    columns: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return self._asdict()


class Sprites(NamedTuple):
    """Volumes in pictures, and what was given up to fit the budget ("" if nothing)."""

    items: list[Sprite]
    note: str


def sprites(volumes: Sequence[ArrayLike], budget_bytes: int, *, spacing_mm: Sequence[float] = (1, 1, 1)) -> Sprites:
    """Volumes within a budget: at full size where that fits, else coarser, all of them alike.

    Args:
        volumes: (I, J, K) or (1, I, J, K) each, RAS+; [0, 1] is shown as black to white.
        budget_bytes: of all pictures together, as text in the page.
        spacing_mm: voxel size.

    Raises:
        UserError: they do not fit at the coarsest step.
    """
    arrays = [_volume(volume) for volume in volumes]
    for factor, quality in _STEPS:
        if any(math.prod(array.shape) / factor**3 > _MOST_PIXELS for array in arrays):
            continue
        made, total = list[Sprite](), 0
        for array in arrays:
            made.append(_sprite(array, factor, quality, spacing_mm))
            total += len(made[-1].data)
            if total > budget_bytes:
                break
        else:
            return Sprites(made, _said(factor))
    raise UserError(
        f"{len(arrays)} volumes of {' x '.join(map(str, arrays[0].shape))} voxels do not fit in"
        f" {budget_bytes / 1e6:.1f} MB",
        "show fewer of them",
    )


def _said(factor: int) -> str:
    if factor == 1:
        return ""
    return f"Shown at 1/{factor} of the resolution, to keep this file small; the volumes themselves are whole."


def _volume(volume: ArrayLike) -> NDArray[np.float32]:
    array = np.asarray(volume, dtype=np.float32)
    array = array[0] if array.ndim == 4 else array
    if array.ndim != 3:
        raise ValueError(f"a volume has three axes (I, J, K), got shape {array.shape}")
    return array


def _sprite(array: NDArray[np.float32], factor: int, quality: int, spacing_mm: Sequence[float]) -> Sprite:
    mm = tuple(float(n * s) for n, s in zip(array.shape, spacing_mm, strict=True))
    low, high = WINDOW
    grey = np.nan_to_num(_coarser(array, factor), nan=low).clip(low, high)
    grey = np.round((grey - low) / (high - low) * 255).astype(np.uint8)
    depth = grey.shape[2]
    columns = math.ceil(math.sqrt(depth * grey.shape[1] / grey.shape[0]))
    width, height = (-(-n // _BLOCK) * _BLOCK for n in grey.shape[:2])
    sheet = np.zeros((-(-depth // columns) * height, columns * width), dtype=np.uint8)
    for k in range(depth):
        slice_ = np.pad(grey[:, :, k].T, ((0, height - grey.shape[1]), (0, width - grey.shape[0])), mode="edge")
        top, left = (place * edge for place, edge in zip(divmod(k, columns), (height, width), strict=True))
        sheet[top : top + height, left : left + width] = slice_
    size = (grey.shape[0], grey.shape[1], grey.shape[2])
    return Sprite(_data_uri(Image.fromarray(sheet), "JPEG", quality), size, mm, (width, height), columns)  # type: ignore[arg-type]


def _coarser(array: NDArray[np.float32], factor: int) -> NDArray[np.float32]:
    """Means of blocks of voxels; what is left over at the end of an axis is averaged with its own edge."""
    if factor == 1:
        return array
    padded = np.pad(array, [(0, -n % factor) for n in array.shape], mode="edge")
    i, j, k = (n // factor for n in padded.shape)
    return padded.reshape(i, factor, j, factor, k, factor).mean(axis=(1, 3, 5))


def embedded(path: str | Path, limit_bytes: int) -> str:
    """A picture's file as a data URI: as it is where it is small enough, else narrower and as a JPEG.

    Raises:
        UserError: it cannot be read.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as picture:
            picture.load()
            if len(content) * 4 / 3 <= limit_bytes and picture.format == "PNG":
                return f"data:image/png;base64,{base64.b64encode(content).decode()}"
            flat = picture.convert("RGB")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable picture: {error}") from error
    text = ""
    for width, quality in ((_PICTURE_WIDTH, 85), (_PICTURE_WIDTH // 2, 75), (_PICTURE_WIDTH // 4, 60)):
        flat.thumbnail((width, 10 * width))
        text = _data_uri(flat, "JPEG", quality)
        if len(text) <= limit_bytes:
            break
    return text


def _data_uri(picture: Image.Image, kind: str, quality: int) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, quality=quality, optimize=True)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getbuffer()).decode()}"
