"""LPIPS (Zhang et al. 2018, version 0.1, AlexNet) of slices: how different two volumes look."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from neuromf.errors import UserError
from neuromf.models.extractors.extractor import load_strictly, read_state
from neuromf.models.extractors.slices import AXES, SLICES, slice_numbers
from neuromf.vision_shim import prepare_torchvision
from neuromf.weights import WeightsFile

LEAST = 32  # pixels that AlexNet's strides leave anything of


class Lpips:
    """Two volumes to one number, 0 where they are equal: the mean over slices of three planes.

    The trunk is torchvision's AlexNet, from the weights folder; the weights on top come with the package lpips.

    Args:
        weights: of `lpips-alex`.
        device: where it runs.

    Raises:
        UserError: the file is not AlexNet's.
    """

    name = "lpips-alex"

    def __init__(self, weights: WeightsFile, device: torch.device | str = "cpu") -> None:
        prepare_torchvision()
        import lpips

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torchvision, about how lpips asks for an untrained trunk
            self.network = lpips.LPIPS(net="alex", version="0.1", pnet_rand=True, verbose=False)
        numbered = {name.split(".", 1)[1]: name for name in self.network.net.state_dict()}
        state = {}
        for name, value in read_state(weights.path).items():
            if not name.startswith("classifier."):
                number = name.removeprefix("features.")
                state[numbered.get(number, name)] = value
        load_strictly(self.network.net, state, weights.path, device)
        self.network.requires_grad_(False).eval().to(device)
        self.sha256, self.device = weights.sha256, torch.device(device)
        self.preprocessing = f"clip to [0, 1], three equal channels, 2 x - 1; {SLICES} slices of each plane"

    @torch.inference_mode()
    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """(B, 1, I, J, K) twice -> (B,) float64 on the CPU.

        Raises:
            UserError: an axis is too short for the network.
        """
        if min(a.shape[2:]) < LEAST:
            raise UserError(f"LPIPS needs at least {LEAST} voxels per axis, got {tuple(a.shape[2:])}")
        total = torch.zeros(len(a), dtype=torch.float64)
        for axis in AXES.values():
            numbers = torch.tensor(slice_numbers(a.shape[axis], SLICES))
            pictures = [
                2 * x.float().clamp(0, 1).index_select(axis, numbers).movedim(axis, 1).flatten(0, 1) - 1 for x in (a, b)
            ]
            values = self.network(*(x.expand(-1, 3, -1, -1).to(self.device) for x in pictures))
            total += values.double().cpu().view(len(a), -1).mean(1)
        return total / len(AXES)
