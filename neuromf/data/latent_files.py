"""One latent, one file: a `.pt` that torch reads with `weights_only=True`, written whole, and mapped into memory.

`torch.load` takes about a millisecond to begin with, longer than 48^3 voxels take to copy. What `save_latent` writes is
a zip archive of uncompressed parts, so its tensors are found by the archive's index instead; anything else goes
through `torch.load`. Neither runs code from a file.
"""

from __future__ import annotations

import collections
import io
import json
import math
import mmap as memory_map
import pickle
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from neuromf.errors import UserError
from neuromf.files import atomic_path

# Within a zip archive: where a part's own header says how long its name and extra field are, and where these begin.
_LENGTHS_AT, _NAME_AT = 26, 30


class Latent(TypedDict):
    """The content of one latent file: z (posterior mean) and log_sigma, (C, I, J, K) float32, and metadata."""

    z: Tensor
    log_sigma: Tensor
    metadata: dict[str, Any]


def save_latent(path: str | Path, z: Tensor, log_sigma: Tensor, metadata: Mapping[str, Any]) -> None:
    """Write one latent atomically; the same content gives the same bytes.

    Args:
        path: ends in `.pt`.
        z, log_sigma: (C, I, J, K), stored as float32.
        metadata: values JSON can hold, so that the file loads with `weights_only=True`.

    Raises:
        UserError: the disk is full or the folder cannot be written; no file is left then.
    """
    assert z.ndim == 4, f"a latent is (C, I, J, K), got {tuple(z.shape)}"
    assert z.shape == log_sigma.shape, f"z is {tuple(z.shape)}, log_sigma {tuple(log_sigma.shape)}"
    payload = {
        "z": _stored(z),
        "log_sigma": _stored(log_sigma),
        "metadata": json.loads(json.dumps(dict(metadata))),
    }
    # torch names the archive after the file it writes to; a buffer keeps the bytes independent of the name.
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_latent(path: str | Path, *, mmap: bool = False) -> Latent:
    """Read one latent file; `mmap` leaves the tensors on disk until they are used.

    Raises:
        UserError: absent, damaged, or not a latent file.
    """
    hint = "run the same `neuromf encode` command again: it rewrites what is missing or damaged"
    path = Path(path)
    content = _mapped(path) if mmap else None
    if content is not None:
        return content
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist", hint) from error
    except Exception as error:  # a damaged file makes the unpickler raise nearly any type
        if isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(path):
            raise UserError(f"{path} holds more than tensors and plain values; it is not opened", hint) from error
        raise UserError(f"{path} is not a readable latent file ({type(error).__name__})", hint) from error
    if not isinstance(content, dict) or not {"z", "log_sigma", "metadata"} <= content.keys():
        raise UserError(f"{path} is not a latent file: z, log_sigma and metadata are expected", hint)
    return content


class _Stored(NamedTuple):
    """A tensor as the archive's pickle describes it: part, first element, shape, strides."""

    part: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Unpickler(pickle.Unpickler):
    """Knows float32 tensors and plain values, and refuses all else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda part, offset, shape, stride, *_: _Stored(part, offset, shape, stride)
        if (module, name) == ("torch", "FloatStorage"):
            return "float32"
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        raise pickle.UnpicklingError(f"{module}.{name} is not opened")

    def persistent_load(self, identity: Any) -> str:
        kind, dtype, part, *_ = identity
        if (kind, dtype) != ("storage", "float32"):
            raise pickle.UnpicklingError(f"{kind} {dtype} is not opened")
        return str(part)


def _mapped(path: Path) -> Latent | None:
    """A file of `save_latent`, mapped; None if it is anything else, or damaged."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            parts = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            content = _Unpickler(io.BytesIO(archive.read(parts["data.pkl"]))).load()
            if archive.read(parts["byteorder"]).decode() != sys.byteorder:
                return None
            # Private: whoever writes into a tensor changes his own copy.
            mapped = memory_map.mmap(file.fileno(), 0, access=memory_map.ACCESS_COPY)
        z, log_sigma = (_tensor(mapped, parts, content[name]) for name in ("z", "log_sigma"))
        return {"z": z, "log_sigma": log_sigma, "metadata": content["metadata"]}
    except Exception:  # nearly any type, as above; `torch.load` says what it is
        return None


def _tensor(mapped: memory_map.mmap, parts: Mapping[str, zipfile.ZipInfo], stored: _Stored) -> Tensor:
    info = parts[f"data/{stored.part}"]
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError("compressed")
    at = info.header_offset + _LENGTHS_AT
    name, extra = (int.from_bytes(mapped[i : i + 2], "little") for i in (at, at + 2))
    start = info.header_offset + _NAME_AT + name + extra + 4 * stored.offset
    count = math.prod(stored.shape)
    flat = torch.frombuffer(mapped, dtype=torch.float32, count=count, offset=start)
    tensor = flat.view(stored.shape)
    if tensor.stride() != stored.stride:
        raise ValueError("not contiguous")
    return tensor


def _stored(value: Tensor) -> Tensor:
    # clone: a view would carry the whole storage it looks into along to the file.
    return value.detach().to("cpu", torch.float32).contiguous().clone()
