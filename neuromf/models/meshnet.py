"""MeshNet: the small segmentation networks of brainchop, from brainchop's own weights files.

A stack of 3x3x3 convolutions with growing and shrinking dilation, then one 1x1x1 convolution to the classes: no
pooling, no skip connections, every layer at full size (Fedorov et al., arXiv 1612.00940; Fani et al., "MindGrab",
arXiv 2506.11860). A head at 1 mm has 256^3 voxels, a layer of 30 channels 1.9 GB: `segment` holds one layer at a time
and computes the next one in place, slab by slab. What remains is rounding.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn
from torch.nn import functional as F

from neuromf.errors import UserError, did_you_mean
from neuromf.models.state import refuse_differences
from neuromf.weights import WeightsFile, locate

_ZIP_MAGIC = b"PK"
_EPS = 1e-5
_ROWS = 32
"""Rows of a slab: few enough to stay small beside the layer, enough that copying the rows between slabs is little."""
_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "elu": nn.ELU, "gelu": nn.GELU}
_BELL = (1, 2, 4, 8, 16, 8, 4, 2, 1)
_STRUCTURES = (
    "background",
    "cerebral white matter",
    "cerebral cortex",
    "lateral ventricle",
    "inferior lateral ventricle",
    "cerebellar white matter",
    "cerebellar cortex",
    "thalamus",
    "caudate",
    "putamen",
    "pallidum",
    "third ventricle",
    "fourth ventricle",
    "brain stem",
    "hippocampus",
    "amygdala",
    "accumbens",
    "ventral diencephalon",
)


class MeshNetLayout(NamedTuple):
    """What a weights file does not say itself.

    Attributes:
        labels: name of each class, class 0 first; left and right share a class.
        channels: of every layer but the first input and the last output.
        dilations: of the 3x3x3 convolutions, in order.
        activation: after each of them.
        standardised: before it, each channel gets mean 0 and variance 1 over the whole volume (brainchop's `bnorm`),
            and the convolutions have no bias. Such a network must see the whole field of view.
    """

    labels: tuple[str, ...]
    channels: int
    dilations: tuple[int, ...] = _BELL
    activation: Literal["relu", "elu", "gelu"] = "elu"
    standardised: bool = False


LAYOUTS = {
    "mindgrab": MeshNetLayout(("background", "brain"), 15, (16, 8, 4, 2, 1) * 5, "gelu", standardised=True),
    "meshnet-tissue": MeshNetLayout(("background", "white matter", "grey matter"), 5, activation="relu"),
    "meshnet-18": MeshNetLayout(_STRUCTURES, 30),
    "meshnet-18-small": MeshNetLayout(_STRUCTURES, 21),
}
"""By their names in `neuromf weights list`."""


class MeshNet(nn.Module):
    """A MeshNet whose parameters have the names of brainchop's files.

    `forward` is the definition, and holds two whole layers; `segment` gives the same labels in a fraction of it.
    """

    def __init__(self, layout: MeshNetLayout) -> None:
        super().__init__()
        self.layout = layout
        activation = _ACTIVATIONS[layout.activation]
        layers: list[nn.Module] = []
        width = 1
        for dilation in layout.dilations:
            biased = not layout.standardised
            convolution = nn.Conv3d(width, layout.channels, 3, padding=dilation, dilation=dilation, bias=biased)
            if layout.standardised:
                layers.append(nn.Sequential(convolution, nn.InstanceNorm3d(layout.channels, eps=_EPS), activation()))
            else:
                layers += [convolution, activation()]
            width = layout.channels
        self.model = nn.Sequential(*layers, nn.Conv3d(width, len(layout.labels), 1))

    def forward(self, volume: Tensor) -> Tensor:
        """(B, 1, I, J, K) in [0, 1] -> logits (B, classes, I, J, K)."""
        return self.model(volume)

    @torch.inference_mode()
    def segment(self, volume: Tensor, *, rows: int = _ROWS) -> Tensor:
        """The most likely class of every voxel, computed on the network's device.

        Args:
            volume: (I, J, K) in [0, 1]; for the published weights at 1 mm, axes to the left, down and to the front.
            rows: of the first axis computed at once; changes memory, and the result by no more than rounding.

        Returns:
            (I, J, K) uint8 on the CPU.
        """
        convolutions = [module for module in self.modules() if isinstance(module, nn.Conv3d)]
        head = convolutions.pop()
        features = volume.to(head.weight)[None]
        layer = features.new_empty(self.layout.channels, *volume.shape)
        entering: Callable[[Tensor], Tensor] = torch.clone
        for convolution in convolutions:
            moments = _Moments(len(layer)) if self.layout.standardised else None
            _convolve(convolution, features, layer, entering, rows, moments)
            entering, features = self._leaving(moments), layer
        labels = torch.empty(volume.shape, dtype=torch.uint8)
        for start in range(0, len(labels), rows):
            logits = head(entering(features[:, start : start + rows]))
            labels[start : start + rows] = logits.argmax(0).to("cpu", torch.uint8)
        return labels

    def _leaving(self, moments: _Moments | None) -> Callable[[Tensor], Tensor]:
        """What happens between two convolutions, of rows (C, i, J, K) of a layer with these moments."""
        activation = _ACTIVATIONS[self.layout.activation]()
        if moments is None:
            return activation
        scale = (moments.variance + _EPS).rsqrt()
        device = next(self.parameters()).device
        factor, shift = (v.float().to(device)[:, None, None, None] for v in (scale, -moments.mean * scale))
        return lambda rows: activation(torch.addcmul(shift, rows, factor))


def _convolve(
    convolution: nn.Conv3d,
    source: Tensor,
    out: Tensor,
    entering: Callable[[Tensor], Tensor],
    rows: int,
    moments: _Moments | None,
) -> None:
    """One dilated convolution of whole volumes, slab by slab; `out` may be `source`, which is overwritten.

    Args:
        convolution: 3x3x3 with `same` padding.
        source: (C, I, J, K).
        out: (C', I, J, K).
        entering: applied to rows of `source` before they are convolved; the zeros beyond the edge come after it.
        rows: of a slab.
        moments: take in the output.
    """
    (channels, length, *plane), reach = source.shape, int(convolution.dilation[0])

    def read(first: int, last: int) -> Tensor:
        inside = entering(source[:, first : min(last, length)])
        return F.pad(inside, (0, 0, 0, 0, 0, last - first - inside.shape[1]))

    # Rows start - reach to start + reach; those behind are kept, for in `source` they may be overwritten.
    window = torch.cat([source.new_zeros(channels, reach, *plane), read(0, reach)], dim=1)
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        window = torch.cat([window, read(start + reach, stop + reach)], dim=1)
        result = F.conv3d(window, convolution.weight, convolution.bias, dilation=reach, padding=(0, reach, reach))
        if moments is not None:
            moments.add(result)
        out[:, start:stop] = result
        window = window[:, stop - start :]


class _Moments:
    """Mean and variance per channel, gathered slab by slab in float64, which not every device has."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.sums = torch.zeros(2, channels, dtype=torch.float64)

    def add(self, slab: Tensor) -> None:
        """Take in a slab, (C, i, J, K)."""
        values = slab.flatten(1)
        self.sums += torch.stack([values.sum(1), values.square().sum(1)]).cpu().double()
        self.count += values.shape[1]

    @property
    def mean(self) -> Tensor:
        """(C,)."""
        return self.sums[0] / self.count

    @property
    def variance(self) -> Tensor:
        """Of the population, (C,)."""
        return (self.sums[1] / self.count - self.mean.square()).clamp(min=0)


class LoadedMeshNet(NamedTuple):
    """A network with published weights, and which file they came from."""

    network: MeshNet
    weights: WeightsFile


def load_meshnet(name: str, *, device: torch.device | str = "cpu") -> LoadedMeshNet:
    """A network of `LAYOUTS` with its weights from the weights folder, ready to `segment`.

    Raises:
        UserError: no such network, or its weights are absent, damaged, or of another network.
    """
    if name not in LAYOUTS:
        raise UserError(f"no MeshNet '{name}'", did_you_mean(name, LAYOUTS))
    weights = locate(name)
    network = MeshNet(LAYOUTS[name])
    tensors = read_tensors(weights.path)
    refuse_differences(
        f"{weights.path} does not hold the network '{name}'",
        tensors,
        network.state_dict(),
        f"get the right file: neuromf weights path {name} tells where it belongs",
    )
    network.load_state_dict(tensors)
    return LoadedMeshNet(network.to(device).eval().requires_grad_(False), weights)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a brainchop `model.pth`: safetensors or a torch file, whatever its suffix; no code is unpickled.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        values: Any = (
            torch.load(path, map_location="cpu", weights_only=True)
            if content.startswith(_ZIP_MAGIC)
            else load_safetensors(content)
        )
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read as weights: {reason}", "download it again") from error
    if not isinstance(values, dict) or not all(isinstance(value, Tensor) for value in values.values()):
        raise UserError(f"{path} holds no tensors by name", "give brainchop's model.pth")
    return {name: value.float() for name, value in values.items()}
