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

_CODE = 8  # wavelet coefficients carried along the main path
_BRANCH_GAIN = 0.3  # of the last convolution of each residual block
_BIAS_SD = 1.5  # of the idle channels of the main path
_LOG_SIGMA = -3.0
# Standard deviations of the eight averages over typical volumes, so that latents start near unit size.
_SCALE = (0.35, 0.08, 0.08, 0.04, 0.08, 0.04, 0.04, 0.03)


def wavelet_start(architecture: KLArchitecture, sample: Tensor, seed: int) -> AutoencoderKlMaisi:
    """Build the network and set its starting weights; needs three levels, transposed upsampling and one norm group.

    A group norm removes the scale of what passes. With one group, and idle channels that hold large constants,
    its statistics are nearly the same for every patch, so contrast survives: the two closing norms start as almost
    the identity, the others give each channel zero mean and unit variance over `sample` (B, 1, I, J, K).
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
        _calibrate_norms(network, sample)
    return network


def _random(name: str, conv: nn.Conv3d | nn.ConvTranspose3d, generator: torch.Generator) -> None:
    """Variance-keeping weights; zero biases, but for the idle channels of the main path."""
    transposed = isinstance(conv, nn.ConvTranspose3d)
    fan_in = conv.weight.shape[0] * 27 / 8 if transposed else conv.weight[0].numel()
    gain = _BRANCH_GAIN if ".conv2." in name else 1.0
    conv.weight.normal_(0.0, gain * fan_in**-0.5, generator=generator)
    assert conv.bias is not None
    conv.bias.zero_()
    if ".conv2." in name:
        _clear(conv.weight, 0)  # the branches do not disturb the code
    elif ".conv1." not in name:
        conv.bias[_CODE:].normal_(0.0, _BIAS_SD, generator=generator)


def _encoder_path(network: nn.Module) -> None:
    """Haar transform of 2^3 blocks, kept at every second voxel, then again on its mean channel."""
    haar = haar_matrix().view(_CODE, 2, 2, 2) / 8**0.5  # averages and half differences
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
    _pass_on(last)


def _decoder_path(network: nn.Module) -> None:
    """The inverse: eight coefficients to 2^3 block means, then each mean to 2^3 equal voxels."""
    haar = haar_matrix().view(_CODE, 2, 2, 2) * 8**0.5
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
            conv.weight[0, 0, 1:, 1:, 1:] = 1.0
    _pass_on(last)


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


def _pass_on(last: nn.Conv3d | nn.ConvTranspose3d) -> None:
    """Let the last convolution pass the carried channels, and nothing else."""
    count = min(_CODE, last.weight.shape[0])
    last.weight.zero_()
    last.weight[:count, :count, 1, 1, 1] = torch.eye(count)
    assert last.bias is not None
    last.bias.zero_()


def _calibrate_norms(network: AutoencoderKlMaisi, sample: Tensor) -> None:
    """Set scale and shift of every norm from what it sees when the network reconstructs `sample`."""
    closing = {network.encoder.blocks[-2], network.decoder.blocks[-2]}

    def calibrate(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        mean, std = x.mean((1, 2, 3, 4), keepdim=True), x.std((1, 2, 3, 4), keepdim=True)
        normed = (x - mean) / std
        channel_std = normed.std((0, 2, 3, 4)).clamp(min=0.02)
        norm.weight.copy_(1 / channel_std)
        norm.bias.copy_(-normed.mean((0, 2, 3, 4)) / channel_std)
        if norm in closing:
            norm.weight[:_CODE] = std.mean()
            norm.bias[:_CODE] = mean.mean()

    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    handles = [norm.register_forward_pre_hook(calibrate) for norm in norms]
    network.decode(posterior(network, sample)[0])
    for handle in handles:
        handle.remove()
