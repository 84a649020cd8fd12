"""The Inception network of the FID (Heusel et al. 2017), converted from TensorFlow: 2048 features of a picture.

It is torchvision's Inception-v3 with three differences of the original graph: 1008 classes, average pools that leave
the padding out, and a maximum pool where the last block should have an average one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuromf.models.extractors.extractor import load_strictly, read_state
from neuromf.models.extractors.slices import SliceExtractor
from neuromf.vision_shim import prepare_torchvision
from neuromf.weights import WeightsFile

SIZE = 299


def load_inception(weights: WeightsFile, device: torch.device | str = "cpu") -> SliceExtractor:
    """Read torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`, or pytorch-fid's copy of it.

    Raises:
        UserError: the file is not that network's.
    """
    state = {name: value for name, value in read_state(weights.path).items() if not name.startswith("fc.")}
    network = load_strictly(inception_network(), state, weights.path, device)
    return SliceExtractor(
        "inception",
        weights.sha256,
        f"clip to [0, 1], three equal channels, bilinear to {SIZE} x {SIZE} (as pytorch-fid), 2 x - 1",
        network=network,
        of_volume=lambda volumes: volumes.clamp(0, 1),
        of_slices=_picture,
        device=device,
    )


def inception_network() -> nn.Module:
    """torchvision's Inception-v3 with the three differences, up to its last pool; pictures in [-1, 1] -> (n, 2048)."""
    prepare_torchvision()
    from torchvision.models import inception as vision

    whole = vision.Inception3(
        num_classes=1008,
        aux_logits=False,
        inception_blocks=[
            vision.BasicConv2d,
            _with_pool(vision.InceptionA, _average),
            vision.InceptionB,
            _with_pool(vision.InceptionC, _average),
            vision.InceptionD,
            _with_pool(vision.InceptionE, _average),
            vision.InceptionAux,
        ],
        init_weights=False,
    )
    whole.Mixed_7c = _with_pool(vision.InceptionE, _maximum)(2048)
    kept = {name: module for name, module in whole.named_children() if name not in ("dropout", "fc")}
    return nn.Sequential(OrderedDict(**kept, flatten=nn.Flatten()))


def _with_pool(block: type[Any], pool: Callable[[Tensor], Tensor]) -> type[Any]:
    """The block with another pool in its last branch; running the old one, too, costs 5 % and none of its code."""

    def branches(self: Any, x: Tensor) -> list[Tensor]:
        return [*block._forward(self, x)[:-1], self.branch_pool(pool(x))]

    return type(block.__name__, (block,), {"_forward": branches})


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, kernel_size=3, stride=1, padding=1, count_include_pad=False)


def _maximum(x: Tensor) -> Tensor:
    return F.max_pool2d(x, kernel_size=3, stride=1, padding=1)


def _picture(slices: Tensor) -> Tensor:
    pictures = F.interpolate(slices.expand(-1, 3, -1, -1), (SIZE, SIZE), mode="bilinear", align_corners=False)
    return 2 * pictures - 1
