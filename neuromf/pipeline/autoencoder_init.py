"""Starting weights of a small KL autoencoder: a linear wavelet code, with everything else near zero.

A fresh network spends thousands of CPU updates on learning to copy grey values through a dozen layers and its
norms. Here the weights start such that the mean of the posterior is the 2 x 2 x 2 Haar transform of the
volume's 2 x 2 x 2 block means (8 numbers for 4^3 voxels), and the decoder its inverse. Training starts where a
linear code is, and improves from there; all weights are trained.
"""

from __future__ import annotations

import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from torch import Tensor, nn

from neuromf.models.haar import haar_matrix
from neuromf.models.kl_network import KLArchitecture, build_kl_network, posterior

_Conv = nn.Conv3d | nn.ConvTranspose3d
_CODE = 8  # wavelet coefficients carried along the main path
_BRANCH_GAIN = 0.3  # of the last convolution of each residual block
_ANCHOR = 20.0  # the last two channels of the main path hold plus and minus this constant
_LOG_SIGMA = -3.0
# Typical standard deviations of a voxel and of the eight averages: everything carried has about unit size.
_VOXEL_SD = 0.3
_CODE_SD = (0.25, 0.045, 0.045, 0.045, 0.022, 0.022, 0.022, 0.015)
_COARSE_FIRST = (0, 1, 2, 4, 3, 5, 6, 7)  # of haar_matrix's rows: mean, three slopes, three twists, the last


def wavelet_start(architecture: KLArchitecture, sample: Tensor, seed: int) -> AutoencoderKlMaisi:
    """Build the network and set its starting weights; needs three levels, transposed upsampling and one norm group.

    A group norm removes the scale of what passes, and its statistics depend on the field of view. Here there is
    one group, and two channels of the main path hold large opposite constants: they dominate the statistics, which
    are then nearly the same everywhere, so contrast survives and patches are coded like whole volumes. The closing
    norms start as almost the identity, the others give each channel unit variance over `sample` (B, 1, I, J, K).
    """
    assert len(architecture.channels) == 3, f"three levels are needed, got channels {architecture.channels}"
    assert 4 <= architecture.latent_channels <= _CODE, f"4 to 8 channels, got {architecture.latent_channels}"
    assert architecture.transposed, "the start is worked out for transposed upsampling"
    assert architecture.norm_groups == 1, f"one norm group is needed, got {architecture.norm_groups}"
    network = build_kl_network(architecture)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, module in network.named_modules():
            if isinstance(module, _Conv):
                _random(name, module, generator)
        _encoder_path(network)
        _decoder_path(network)
        _latent_path(network)
        _calibrate_norms(network, sample)
    _freeze_anchors(network)
    return network


def _random(name: str, conv: _Conv, generator: torch.Generator) -> None:
    """Variance-keeping weights and zero biases; anchors on the main path, where the branches add nothing yet."""
    transposed = isinstance(conv, nn.ConvTranspose3d)
    output_axis = 1 if transposed else 0
    fan_in = conv.weight.shape[0] * 27 / 8 if transposed else conv.weight[0].numel()
    gain = _BRANCH_GAIN if ".conv2." in name else 1.0
    conv.weight.normal_(0.0, gain * fan_in**-0.5, generator=generator)
    assert conv.bias is not None
    conv.bias.zero_()
    if ".conv1." in name:
        return
    outputs, inputs = conv.weight.movedim(output_axis, 0), conv.weight.movedim(1 - output_axis, 0)
    if len(inputs) > _CODE:
        inputs[-2:] = 0.0
    if len(outputs) > _CODE:
        outputs[-2:] = 0.0
        if ".conv2." in name:
            outputs[:_CODE] = 0.0
        else:
            conv.bias[-2:] = torch.tensor([_ANCHOR, -_ANCHOR])


def _encoder_path(network: nn.Module) -> None:
    """Haar averages of 2^3 blocks, kept at every second voxel, then again of their means."""
    haar = haar_matrix()[_COARSE_FIRST, :].view(_CODE, 2, 2, 2) / 8**0.5
    first, *middle, last = _main_path(network, "encoder")
    _clear(first.weight, 0)
    first.weight[:_CODE, 0, 1:, 1:, 1:] = haar / _VOXEL_SD
    strided = [conv for conv in middle if conv.stride[0] == 2]
    for conv in middle:
        _clear(conv.weight, 0)
        if conv is strided[-1]:
            code_sd = torch.tensor(_CODE_SD).view(-1, 1, 1, 1)
            conv.weight[:_CODE, 0, :2, :2, :2] = haar * _VOXEL_SD / code_sd
        else:
            conv.weight[:_CODE, :_CODE, 0, 0, 0] = torch.eye(_CODE)
    _pass_on(last, 1.0)


def _decoder_path(network: nn.Module) -> None:
    """The inverse: eight averages to 2^3 block means, then each mean to 2^3 equal voxels."""
    haar = haar_matrix()[_COARSE_FIRST, :].view(_CODE, 2, 2, 2) * 8**0.5
    first, *middle, last = _main_path(network, "decoder")
    _clear(first.weight, 0)
    count = min(_CODE, first.weight.shape[1])
    first.weight[:count, :count, 1, 1, 1] = torch.eye(count)
    ups = [conv for conv in middle if isinstance(conv, nn.ConvTranspose3d)]
    for conv in middle:
        if conv not in ups:
            _clear(conv.weight, 0)
            conv.weight[:_CODE, :_CODE, 0, 0, 0] = torch.eye(_CODE)
    for conv in ups:
        _clear(conv.weight, 1)
    code_sd = torch.tensor(_CODE_SD).view(-1, 1, 1, 1)
    ups[0].weight[:_CODE, 0, 1:, 1:, 1:] = haar * code_sd / _VOXEL_SD
    ups[1].weight[0, 0, 1:, 1:, 1:] = 1.0
    _pass_on(last, _VOXEL_SD)


def _latent_path(network: nn.Module) -> None:
    """Pass the code both ways, with next to no noise."""
    for name in ("quant_conv_mu", "post_quant_conv"):
        weight, bias = _latent_conv(network, name)
        weight.copy_(torch.eye(len(weight))[:, :, None, None, None])
        bias.zero_()
    weight, bias = _latent_conv(network, "quant_conv_log_sigma")
    weight.zero_()
    bias.fill_(2 * _LOG_SIGMA)


def _main_path(network: nn.Module, half: str) -> list[_Conv]:
    """The convolutions of the encoder or decoder outside the residual branches, in order."""
    return [
        module
        for name, module in network.get_submodule(half).named_modules()
        if isinstance(module, _Conv) and ".conv1." not in name and ".conv2." not in name
    ]


def _norms(network: nn.Module, half: str) -> list[nn.GroupNorm]:
    """The norms of the encoder or decoder, in order; the last one closes it."""
    return [module for module in network.get_submodule(half).modules() if isinstance(module, nn.GroupNorm)]


def _latent_conv(network: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """Weight (C, C, 1, 1, 1) and bias (C,) of one of the three convolutions around the latent."""
    return network.get_parameter(f"{name}.conv.weight"), network.get_parameter(f"{name}.conv.bias")


def _clear(weight: Tensor, output_axis: int) -> None:
    """Zero what flows into the carried channels."""
    weight.narrow(output_axis, 0, min(_CODE, weight.shape[output_axis])).zero_()


def _pass_on(last: _Conv, gain: float) -> None:
    """Let the last convolution pass the carried channels, and nothing else."""
    count = min(_CODE, last.weight.shape[0])
    last.weight.zero_()
    last.weight[:count, :count, 1, 1, 1] = gain * torch.eye(count)
    assert last.bias is not None
    last.bias.zero_()


def _calibrate_norms(network: AutoencoderKlMaisi, sample: Tensor) -> None:
    """Set scale and shift of every norm from what it sees when the network reconstructs `sample`."""
    norms = [_norms(network, half) for half in ("encoder", "decoder")]
    closing = {half[-1] for half in norms}

    def calibrate(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, nn.GroupNorm)
        x = inputs[0]
        mean, std = x.mean((1, 2, 3, 4), keepdim=True), x.std((1, 2, 3, 4), keepdim=True)
        normed = (x - mean) / std
        channel_std = normed.std((0, 2, 3, 4)).clamp(min=0.01)
        norm.weight.copy_(1 / channel_std)
        norm.bias.copy_(-normed.mean((0, 2, 3, 4)) / channel_std)
        norm.weight[-2:] = norm.bias[-2:] = 0.0
        if norm in closing:
            norm.weight[:_CODE] = std.mean()
            norm.bias[:_CODE] = mean.mean()

    handles = [norm.register_forward_pre_hook(calibrate) for half in norms for norm in half]
    network.decode(posterior(network, sample)[0])
    for handle in handles:
        handle.remove()


def _freeze_anchors(network: nn.Module) -> None:
    """Keep the anchors constant and unread: no gradient for the weights into them, out of them, or of their norm."""
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            for parameter in (module.weight, module.bias):
                _freeze(parameter, 0)
        elif isinstance(module, _Conv):
            _freeze(module.weight, 0, 1)
            assert module.bias is not None
            _freeze(module.bias, 0)


def _freeze(parameter: Tensor, *axes: int) -> None:
    """No gradient for the last two entries along each of `axes` that is wide enough to hold anchors."""
    mask = torch.ones_like(parameter, requires_grad=False)
    for axis in axes:
        if mask.shape[axis] > _CODE:
            mask.movedim(axis, 0)[-2:] = 0.0
    parameter.register_hook(mask.mul)
