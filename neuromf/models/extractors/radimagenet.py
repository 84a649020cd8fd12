"""ResNet-50 of RadImageNet (Mei et al. 2022) on slices: "2.5-D", by NV-Generate's rule and by one for MR.

NV-Generate's rule (compute_fid_2-5d_ct.py) is for CT in Hounsfield units: clip to +-1000, all slices of a volume scaled
together by their least and largest value, three channels in the order BGR minus (0.406, 0.456, 0.485), every slice
of three planes. Scaling each volume by itself hides differences of brightness, so the variant for MR does without.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from neuromf.models.extractors.extractor import load_strictly, read_state
from neuromf.models.extractors.slices import SLICES, SliceExtractor
from neuromf.vision_shim import prepare_torchvision
from neuromf.weights import WeightsFile

_BGR_MEAN = (0.406, 0.456, 0.485)
_CT_LIMIT = 1000.0
_KERAS_EPSILON = 1.001e-5
# nn.Sequential(*resnet50.children()): the names of RadImageNet's own PyTorch release.
_BACKBONE = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


def load_radimagenet(name: str, weights: WeightsFile, device: torch.device | str = "cpu") -> SliceExtractor:
    """`radimagenet` (NV-Generate's rule) or `radimagenet-mr` (ours).

    Three layouts are read: Keras' network as converted by Warvito/radimagenet-models (convolutions with biases),
    RadImageNet's own (`backbone.0.weight`), and torchvision's names.

    Raises:
        UserError: the file is of none of them.
    """
    state = torchvision_names(read_state(weights.path))
    network = load_strictly(resnet50(keras="conv1.bias" in state), state, weights.path, device)
    literal = name == "radimagenet"
    rule = "clip to +-1000, each volume scaled by its own extremes" if literal else "clip to [0, 1]"
    return SliceExtractor(
        name,
        weights.sha256,
        f"{rule}, BGR minus {_BGR_MEAN}, spatial mean",
        network=network,
        of_volume=ct_scale if literal else lambda volumes: volumes.clamp(0, 1),
        of_slices=_bgr,
        count=None if literal else SLICES,
        device=device,
    )


def resnet50(*, keras: bool) -> nn.Module:
    """torchvision's ResNet-50 without classes: (n, 3, H, W) -> (n, 2048), the mean of the last feature map.

    Keras' one has biases, strides in the first convolution of a block instead of the second, and another epsilon.
    """
    prepare_torchvision()
    from torchvision.models.resnet import Bottleneck
    from torchvision.models.resnet import resnet50 as build

    network: nn.Module = build(weights=None)
    network.fc = nn.Identity()
    if keras:
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.bias = nn.Parameter(torch.zeros(module.out_channels))
            elif isinstance(module, nn.BatchNorm2d):
                module.eps = _KERAS_EPSILON
            elif isinstance(module, Bottleneck):
                module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride
    return network


def torchvision_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`backbone.4.0.conv1.weight` -> `layer1.0.conv1.weight`; a classifier is left out."""
    named = {}
    for name, value in state.items():
        first, _, rest = name.removeprefix("backbone.").partition(".")
        if first != "fc":
            named[f"{_BACKBONE.get(first, first)}.{rest}"] = value
    return named


def ct_scale(volumes: Tensor) -> Tensor:
    """Clip to +-1000 Hounsfield units, then each volume by its own extremes to [0, 1]; (B, 1, I, J, K)."""
    volumes = volumes.clamp(-_CT_LIMIT, _CT_LIMIT)
    low, high = volumes.amin((1, 2, 3, 4), keepdim=True), volumes.amax((1, 2, 3, 4), keepdim=True)
    return (volumes - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny)


def _bgr(slices: Tensor) -> Tensor:
    """Three channels minus the means the network was trained with; grey has no order of channels."""
    return slices - torch.tensor(_BGR_MEAN, device=slices.device).view(1, 3, 1, 1)
