"""Starting weights of a small KL autoencoder: a linear wavelet code, with everything else near zero.

A fresh network spends thousands of CPU updates on learning to copy grey values through a dozen layers and its
norms. Here the weights start such that the mean of the posterior is the 2 x 2 x 2 Haar transform of the
volume's 2 x 2 x 2 block means (8 numbers for 4^3 voxels), and the decoder its inverse. Training starts where a
linear code is, and improves from there; all weights are trained.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neuromf.models.haar import haar_matrix
from neuromf.models.kl_network import KLArchitecture, build_kl_network

_CODE = 8  # wavelet coefficients carried along the main path
_BRANCH_GAIN = 0.3  # of the last convolution of each residual block
_BIAS_SD = 1.5  # of the idle channels of the main path
_LOG_SIGMA = -3.0
# Standard deviations of the eight coefficients over typical volumes, so that latents start near unit size.
_SCALE = (2.8, 0.5, 0.5, 0.25, 0.5, 0.25, 0.25, 0.15)


def wavelet_start(architecture: KLArchitecture, seed: int) -> nn.Module:
    """Build the network and set its starting weights; needs three levels, transposed upsampling and one norm group.

    A group norm removes the scale of what passes. With one group, and idle channels that hold large constants,
    its statistics are nearly the same for every patch, so the norms on the main path start as almost the
    identity, and contrast survives.
    """
    assert len(architecture.channels) == 3 and architecture.latent_channels >= 4, "three levels, 4 or more channels"
    assert architecture.transposed and architecture.norm_groups == 1, "transposed upsampling and one norm group"
    network = build_kl_network(architecture)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, module in network.named_modules():
            if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
                _random(name, module, generator)
        _encoder_path(network)
        _decoder_path(network)
        _latent_path(network, architecture.latent_channels)
    return network


def _random(name: str, conv: nn.Conv3d | nn.ConvTranspose3d, generator: torch.Generator) -> None:
    """Variance-keeping weights; zero biases, but for the idle channels of the main path."""
    transposed = isinstance(conv, nn.ConvTranspose3d)
    fan_in = conv.weight.shape[0] * 27 / 8 if transposed else conv.weight[0].numel()
    gain = _BRANCH_GAIN if ".conv2." in name else 1.0
    conv.weight.normal_(0.0, gain * fan_in**-0.5, generator=generator)
    assert conv.bias is not None
    conv.bias.zero_()
    if ".conv1." not in name and ".conv2." not in name:
        conv.bias[_CODE:].normal_(0.0, _BIAS_SD, generator=generator)


def _encoder_path(network: nn.Module) -> None:
    """Haar transform of 2^3 blocks, kept at every second voxel, then again on its mean channel."""
    haar = haar_matrix().view(_CODE, 2, 2, 2)
    convs = _main_path(network.encoder)
    first, *middle, last = convs
    _clear(first.weight, 0)
    first.weight[:_CODE, 0, 1:, 1:, 1:] = haar
    strided = 0
    for conv in middle:
        _clear(conv.weight, 0)
        if conv.stride[0] == 1:  # a shortcut
            conv.weight[:_CODE, :_CODE, 0, 0, 0] = torch.eye(_CODE)
        elif strided == 0:
            conv.weight[:_CODE, :_CODE, 0, 0, 0] = torch.eye(_CODE)
            strided += 1
        else:
            conv.weight[:_CODE, 0, :2, :2, :2] = haar
    _through_norm(network.encoder, last, _CODE)


def _decoder_path(network: nn.Module) -> None:
    """The inverse: eight coefficients to 2^3 block means, then each mean to 2^3 equal voxels."""
    haar = haar_matrix().view(_CODE, 2, 2, 2)
    convs = _main_path(network.decoder)
    first, *middle, last = convs
    _clear(first.weight, 0)
    count = min(_CODE, first.weight.shape[1])
    first.weight[:count, :count, 1, 1, 1] = torch.eye(count)
    first_up = True
    for conv in middle:
        if not isinstance(conv, nn.ConvTranspose3d):
            _clear(conv.weight, 0)
            conv.weight[:_CODE, :_CODE, 0, 0, 0] = torch.eye(_CODE)
            continue
        _clear(conv.weight, 1)
        if first_up:
            conv.weight[:_CODE, 0, 1:, 1:, 1:] = haar
            first_up = False
        else:
            conv.weight[0, 0, 1:, 1:, 1:] = 8**-0.5
    _through_norm(network.decoder, last, 1)


def _latent_path(network: nn.Module, channels: int) -> None:
    """Unit size for the latents, no noise to speak of, and the inverse scale on the way back."""
    scale = torch.ones(channels)
    scale[: min(_CODE, channels)] = torch.tensor(_SCALE)[: min(_CODE, channels)]
    for conv, diagonal in ((network.quant_conv_mu.conv, 1 / scale), (network.post_quant_conv.conv, scale)):
        conv.weight.copy_(torch.diag(diagonal)[:, :, None, None, None])
        conv.bias.zero_()
    network.quant_conv_log_sigma.conv.weight.zero_()
    network.quant_conv_log_sigma.conv.bias.fill_(2 * _LOG_SIGMA)


def _main_path(half: nn.Module) -> list[nn.Conv3d | nn.ConvTranspose3d]:
    """The convolutions outside the residual branches, in order."""
    return [
        module
        for name, module in half.named_modules()
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d) and ".conv1." not in name and ".conv2." not in name
    ]


def _clear(weight: Tensor, output_axis: int) -> None:
    """Zero what flows into the carried channels."""
    weight.narrow(output_axis, 0, min(_CODE, weight.shape[output_axis])).zero_()


def _through_norm(half: nn.Module, last: nn.Conv3d | nn.ConvTranspose3d, count: int) -> None:
    """Make the closing norm nearly the identity on the carried channels, and let the last convolution pass them."""
    norm = half.blocks[-2]
    biases = [conv.bias for conv in _main_path(half)[:-1] if conv.bias is not None]
    # Idle channels hold constants of the last main-path layer and a random mix of earlier ones: measured below.
    del biases
    count = min(count, last.weight.shape[0])
    last.weight.zero_()
    last.bias.zero_()
    for channel in range(count):
        last.weight[channel, channel, 1, 1, 1] = 1.0
    norm.weight.fill_(1.0)
