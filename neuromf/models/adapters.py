"""Low-rank adapters on a frozen network, which learn further latent channels (a lesion's mask) beside the image's.

An adapted network is called like any other. What it learns are its parameters: matrices A (r x in) and B (out x r,
zero at first) beside chosen layers, W x + (alpha / r) B A x (Hu 2021, arXiv 2106.09685), and the columns and rows of
the first and last layer that belong to the new channels (zero at first). The weights of the base are buffers that
`state_dict` leaves out: whoever trains, averages or saves the network meets what is learned alone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from neuromf.errors import UserError
from neuromf.models.state import refuse_differences
from neuromf.vision_shim import prepare_torchvision

_INNER = ("base", "base_layer")
"""What the wrapped layer is called in a widened one and in peft's."""


class Adapters(NamedTuple):
    """What is added to a network.

    channels: new latent channels, after those of the base.
    rank, alpha: r and alpha of the matrices.
    targets: kinds of layers, keys of a backbone's `ADAPTED`.
    """

    channels: int
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("attention",)


class WidenedInput(nn.Module):
    """A first layer that takes more channels: base(x[:C]) + new(x[C:]), `new` zero at first.

    Args:
        base: a linear layer or a convolution.
        added: how many of its inputs are new.
    """

    def __init__(self, base: nn.Linear | nn.Conv3d, added: int) -> None:
        super().__init__()
        self.base, self.new = base, _like(base, inputs=added, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C + added, I, J, K), or (B, N, C + added) for a linear layer."""
        known, new = x.split([_inputs(self.base), _inputs(self.new)], dim=_axis(self.base))
        return self.base(known) + self.new(new)

    def merged(self) -> nn.Module:
        """One plain layer that does the same."""
        whole = _like(self.base, inputs=_inputs(self.base) + _inputs(self.new), bias=self.base.bias is not None)
        return _filled(whole, torch.cat([self.base.weight, self.new.weight], dim=1), self.base.bias)


class WidenedOutput(nn.Module):
    """A last layer that gives more channels, those of `new` after those of the base; zero at first.

    Args:
        base: a linear layer or a convolution.
        added: how many more outputs it gets.
    """

    def __init__(self, base: nn.Linear | nn.Conv3d, added: int) -> None:
        super().__init__()
        self.base, self.new = base, _like(base, outputs=added, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C + added, I, J, K), or (B, N, C + added) of a linear layer."""
        return torch.cat([self.base(x), self.new(x)], dim=_axis(self.base))

    def merged(self) -> nn.Module:
        """One plain layer that does the same."""
        base, new = self.base, self.new
        own = base.weight.new_zeros(len(base.weight)) if base.bias is None else base.bias
        whole = _like(base, outputs=len(base.weight) + len(new.weight), bias=True)
        return _filled(whole, torch.cat([base.weight, new.weight]), torch.cat([own, new.bias]))


def adapt(network: nn.Module, adapters: Adapters) -> nn.Module:
    """Freeze a network and add what is to be learned; its image channels answer as before, the new ones zero.

    Args:
        network: a backbone, or a wrapper of one; changed in place.
        adapters: what to add.

    Raises:
        UserError: a network that has no place for them.
    """
    prepare_torchvision()
    from peft import LoraConfig, inject_adapter_in_model

    backbone = _backbone(network)
    cells = getattr(network_patch(network), "patch", 1) ** 3
    first, last = backbone.ENDS
    backbone.set_submodule(first, WidenedInput(backbone.get_submodule(first), adapters.channels * cells))
    backbone.set_submodule(last, WidenedOutput(backbone.get_submodule(last), adapters.channels * cells))
    names = _targets(backbone, adapters.targets)
    config = LoraConfig(r=adapters.rank, lora_alpha=adapters.alpha, target_modules=names)  # type: ignore[arg-type]
    inject_adapter_in_model(config, backbone)
    for layer in (backbone.get_submodule(first), backbone.get_submodule(last)):
        layer.new.requires_grad_(True)
    _freeze(network)
    return network


def load_base(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put the weights of a plain network under an adapted one.

    Raises:
        UserError: they are of another network.
    """
    own = {_plain_name(name): buffer for name, buffer in _frozen(network).items()}
    refuse_differences(
        "the base does not fit the adapters", weights, own, "give the run that the adapters were trained on"
    )
    for name, buffer in own.items():
        buffer.copy_(weights[name])


def merge(network: nn.Module, plain: nn.Module) -> nn.Module:
    """Load an adapted network into a plain one with all its channels, which then answers the same to rounding.

    Args:
        network: adapted; left as it is.
        plain: built for the base's and the new channels.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    twin = copy.deepcopy(network)
    for name, module in list(twin.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            twin.set_submodule(name, module.get_base_layer())
        elif isinstance(module, WidenedInput | WidenedOutput):
            twin.set_submodule(name, module.merged())
    found = dict(twin.named_parameters()) | dict(twin.named_buffers())
    plain.load_state_dict({name: found[name].detach() for name in plain.state_dict()})
    return plain


def frozen_count(network: nn.Module) -> int:
    """Number of weights that are held and not trained."""
    return sum(buffer.numel() for buffer in _frozen(network).values())


def _frozen(network: nn.Module) -> dict[str, Tensor]:
    """The weights of the base by name."""
    return {
        f"{path}.{name}".lstrip("."): module._buffers[name]
        for path, module in network.named_modules()
        for name in getattr(module, "frozen_names", ())
    }


def _freeze(network: nn.Module) -> None:
    """Turn every parameter that is not to be trained into a buffer that no checkpoint holds."""
    for module in network.modules():
        names = [name for name, p in module._parameters.items() if p is not None and not p.requires_grad]
        for name in names:
            value = module._parameters.pop(name)
            assert value is not None
            module.register_buffer(name, value.detach(), persistent=False)
        if names:
            module.frozen_names = tuple(names)  # type: ignore[assignment]


def _plain_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _INNER)


def _backbone(network: nn.Module) -> Any:
    for module in network.modules():
        if hasattr(module, "ENDS"):
            return module
    raise UserError(
        f"{type(network).__name__} takes no adapters", "adapters are made for the networks maisi-unet and mit"
    )


def network_patch(network: nn.Module) -> nn.Module:
    """The module, wrapper or backbone, that folds cells into channels; the backbone where none does."""
    found = [module for module in network.modules() if hasattr(module, "patch")]
    return found[0] if found else network


def _targets(backbone: Any, kinds: tuple[str, ...]) -> list[str]:
    endings = tuple(f".{ending}" for kind in kinds for ending in backbone.ADAPTED[kind])
    names = [name for name, module in backbone.named_modules() if name.endswith(endings) and hasattr(module, "weight")]
    if not names:
        raise UserError(f"{type(backbone).__name__} has no {' or '.join(kinds)} to adapt", "choose other targets")
    return names


def _axis(layer: nn.Module) -> int:
    return -1 if isinstance(layer, nn.Linear) else 1


def _inputs(layer: nn.Linear | nn.Conv3d) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def _like(layer: nn.Module, *, inputs: int | None = None, outputs: int | None = None, bias: bool) -> Any:
    """A layer of the same kind with other numbers of channels and zero weights."""
    if isinstance(layer, nn.Linear):
        new: nn.Module = nn.Linear(inputs or layer.in_features, outputs or layer.out_features, bias=bias)
    elif isinstance(layer, nn.Conv3d):
        new = type(layer)(
            inputs or layer.in_channels,
            outputs or layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            bias=bias,
        )
    else:
        raise TypeError(f"a linear layer or a 3-D convolution expected, got {type(layer).__name__}")
    for parameter in new.parameters():
        nn.init.zeros_(parameter)
    return new


@torch.no_grad()
def _filled(layer: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    layer.to(weight)
    layer.weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)
    return layer
