"""MedicalNet (Chen et al. 2019), 3-D ResNets trained on 23 data sets: one feature vector per volume."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from neuromf.models.extractors.extractor import Extractor, load_strictly, read_state
from neuromf.weights import WeightsFile

Depth = Literal[10, 50]
_DILATIONS = {"layer3": 2, "layer4": 4}


class MedicalNet(Extractor):
    """The spatial mean of the last feature map: D = 512 for ResNet-10, 2048 for ResNet-50."""

    def __init__(self, depth: Depth, weights: WeightsFile, device: torch.device | str = "cpu") -> None:
        super().__init__(
            f"medicalnet-{depth}",
            weights.sha256,
            "clip to [0, 1], the volume's own grid (WDM pads to 256^3 instead), spatial mean",
            device,
        )
        self.network = load_strictly(medicalnet_network(depth), read_state(weights.path), weights.path, device)

    @torch.inference_mode()
    def __call__(self, volumes: Tensor) -> dict[str, Tensor]:
        """(B, 1, I, J, K) -> {"volume": (B, 1, D)}, one volume at a time."""
        volumes = volumes.to(self.device, torch.float32).clamp(0, 1)
        return {"volume": torch.stack([self.network(volume).float().cpu() for volume in volumes.split(1)])}


def medicalnet_network(depth: Depth) -> nn.Module:
    """MONAI's 3-D ResNet with MedicalNet's dilations: (B, 1, I, J, K) -> (B, D).

    MONAI loads the same files into a network whose last two stages stride; in MedicalNet's own they dilate (by 2
    and 4) at an eighth of the size. The tensors are the same, the features are not.
    """
    from monai.networks.nets import resnet

    build: Any = {10: resnet.resnet10, 50: resnet.resnet50}[depth]
    network: nn.Module = build(
        spatial_dims=3, n_input_channels=1, conv1_t_stride=2, feed_forward=False, shortcut_type="B",
        bias_downsample=False,
    )  # fmt: skip
    for name, dilation in _DILATIONS.items():
        for module in network.get_submodule(name).modules():
            if isinstance(module, nn.Conv3d):
                module.stride = (1, 1, 1)
                if module.kernel_size == (3, 3, 3):
                    module.dilation = module.padding = (dilation,) * 3
    return network
