"""What every extractor is, and how its weights are read."""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from neuromf.errors import UserError
from neuromf.models.state import refuse_differences

_COUNTER = "num_batches_tracked"  # of batch norms; files of before torch 0.4.1 lack it, and evaluation never reads it


class Extractor(ABC):
    """Volumes (B, 1, I, J, K) to features, {plane: (B, S, D)}; frozen, in evaluation mode.

    Attributes:
        name: by which every number made with it is called.
        sha256: of the weights file (of the user's own code for a function of theirs).
        preprocessing: what is done to the volumes before the network, in words.
        planes: the keys of what it returns.
    """

    planes: ClassVar[tuple[str, ...]] = ("volume",)

    def __init__(self, name: str, sha256: str, preprocessing: str, device: torch.device | str = "cpu") -> None:
        self.name = name
        self.sha256 = sha256
        self.preprocessing = preprocessing
        self.device = torch.device(device)

    @abstractmethod
    def __call__(self, volumes: Tensor) -> dict[str, Tensor]:
        """(B, 1, I, J, K) -> {plane: (B, S, D)} on the CPU."""


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch file, plain or under `state_dict`, without the `module.` of nn.DataParallel.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read as weights: {reason}", "get it again: neuromf weights fetch") from error
    if isinstance(values, Mapping) and isinstance(values.get("state_dict"), Mapping):
        values = values["state_dict"]
    if not isinstance(values, Mapping) or not values or not all(isinstance(v, Tensor) for v in values.values()):
        raise UserError(f"{path} holds no state dict (names with tensors)", "give the published file as it is")
    return {name.removeprefix("module."): value for name, value in values.items()}


def load_strictly(network: nn.Module, state: Mapping[str, Tensor], path: Path, device: torch.device | str) -> nn.Module:
    """Give a network its weights, freeze it and move it.

    Raises:
        UserError: names or shapes differ; all differences are told.
    """
    expected = {name: value for name, value in network.state_dict().items() if not name.endswith(_COUNTER)}
    found = {name: value for name, value in state.items() if not name.endswith(_COUNTER)}
    refuse_differences(
        f"{path} does not fit {type(network).__name__}", found, expected, "give the published file as it is"
    )
    network.load_state_dict({name: value.float() for name, value in found.items()}, strict=False)
    return network.requires_grad_(False).eval().to(device)
