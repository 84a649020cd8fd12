"""Weights by name: whether they fit a network, said in a way that can be read, and which they are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from torch import Tensor

from neuromf.errors import UserError

_LISTED = 6


def refuse_differences(what: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], hint: str) -> None:
    """Compare names and shapes; every difference counts.

    Raises:
        UserError: `what`, the missing, unexpected and misshapen tensors, and `hint`.
    """
    shapes = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(value.shape)}"
        for name, value in expected.items()
        if name in found and found[name].shape != value.shape
    ]
    lines = [
        *_listing("missing", expected.keys() - found.keys()),
        *_listing("not known", found.keys() - expected.keys()),
        *_listing("other shape", shapes),
    ]
    if lines:
        raise UserError(f"{what}:\n  " + "\n  ".join(lines), hint)


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and values: the same for the same weights, in whatever file they lie."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _listing(title: str, names: Iterable[str]) -> list[str]:
    listed = sorted(names)
    more = f", ... ({len(listed) - _LISTED} more)" if len(listed) > _LISTED else ""
    return [f"{title} ({len(listed)}): " + ", ".join(listed[:_LISTED]) + more] if listed else []
