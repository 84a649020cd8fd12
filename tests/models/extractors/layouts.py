"""Names and shapes of the published files, written down without the networks that read them; values are random."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def random_state(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Convolutions of about unit gain, batch norms near the identity: features neither vanish nor explode."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes:
        classifier = name.startswith("classifier.")
        noise = torch.randn(() if classifier else shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
        elif classifier:  # of no use here, and 200 MB of one number
            state[name] = torch.zeros(1).expand(shape)
        elif len(shape) > 1:
            state[name] = noise * (1.5 / torch.Size(shape[1:]).numel()) ** 0.5
        elif name.endswith(("running_var", "bn.weight")) or name.rsplit(".", 1)[-1] == "weight":
            state[name] = 1 + 0.1 * noise.abs()
        else:
            state[name] = 0.1 * noise
    return state


def norm(name: str, width: int, *, counter: bool = False) -> Shapes:
    yield from ((f"{name}.{part}", (width,)) for part in ("weight", "bias", "running_mean", "running_var"))
    if counter:
        yield f"{name}.num_batches_tracked", ()


# --- Inception: torch-fidelity and pytorch-fid, 2015-12-05 -------------------------------------------------------

INCEPTION: dict[str, Sequence[tuple[str, int, int, tuple[int, int]]]] = {
    "Mixed_5b": [("branch1x1", 64, 192, (1, 1)), ("branch5x5_1", 48, 192, (1, 1)), ("branch5x5_2", 64, 48, (5, 5)),
                 ("branch3x3dbl_1", 64, 192, (1, 1)), ("branch3x3dbl_2", 96, 64, (3, 3)),
                 ("branch3x3dbl_3", 96, 96, (3, 3)), ("branch_pool", 32, 192, (1, 1))],
    "Mixed_5c": [("branch1x1", 64, 256, (1, 1)), ("branch5x5_1", 48, 256, (1, 1)), ("branch5x5_2", 64, 48, (5, 5)),
                 ("branch3x3dbl_1", 64, 256, (1, 1)), ("branch3x3dbl_2", 96, 64, (3, 3)),
                 ("branch3x3dbl_3", 96, 96, (3, 3)), ("branch_pool", 64, 256, (1, 1))],
    "Mixed_5d": [("branch1x1", 64, 288, (1, 1)), ("branch5x5_1", 48, 288, (1, 1)), ("branch5x5_2", 64, 48, (5, 5)),
                 ("branch3x3dbl_1", 64, 288, (1, 1)), ("branch3x3dbl_2", 96, 64, (3, 3)),
                 ("branch3x3dbl_3", 96, 96, (3, 3)), ("branch_pool", 64, 288, (1, 1))],
    "Mixed_6a": [("branch3x3", 384, 288, (3, 3)), ("branch3x3dbl_1", 64, 288, (1, 1)),
                 ("branch3x3dbl_2", 96, 64, (3, 3)), ("branch3x3dbl_3", 96, 96, (3, 3))],
    **{
        name: [("branch1x1", 192, 768, (1, 1)), ("branch7x7_1", c, 768, (1, 1)), ("branch7x7_2", c, c, (1, 7)),
               ("branch7x7_3", 192, c, (7, 1)), ("branch7x7dbl_1", c, 768, (1, 1)), ("branch7x7dbl_2", c, c, (7, 1)),
               ("branch7x7dbl_3", c, c, (1, 7)), ("branch7x7dbl_4", c, c, (7, 1)), ("branch7x7dbl_5", 192, c, (1, 7)),
               ("branch_pool", 192, 768, (1, 1))]
        for name, c in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192))
    },
    "Mixed_7a": [("branch3x3_1", 192, 768, (1, 1)), ("branch3x3_2", 320, 192, (3, 3)),
                 ("branch7x7x3_1", 192, 768, (1, 1)), ("branch7x7x3_2", 192, 192, (1, 7)),
                 ("branch7x7x3_3", 192, 192, (7, 1)), ("branch7x7x3_4", 192, 192, (3, 3))],
    **{
        name: [("branch1x1", 320, c, (1, 1)), ("branch3x3_1", 384, c, (1, 1)), ("branch3x3_2a", 384, 384, (1, 3)),
               ("branch3x3_2b", 384, 384, (3, 1)), ("branch3x3dbl_1", 448, c, (1, 1)),
               ("branch3x3dbl_2", 384, 448, (3, 3)), ("branch3x3dbl_3a", 384, 384, (1, 3)),
               ("branch3x3dbl_3b", 384, 384, (3, 1)), ("branch_pool", 192, c, (1, 1))]
        for name, c in (("Mixed_7b", 1280), ("Mixed_7c", 2048))
    },
}  # fmt: skip


def inception() -> Shapes:
    stem = [("Conv2d_1a_3x3", 32, 3, 3), ("Conv2d_2a_3x3", 32, 32, 3), ("Conv2d_2b_3x3", 64, 32, 3),
            ("Conv2d_3b_1x1", 80, 64, 1), ("Conv2d_4a_3x3", 192, 80, 3)]  # fmt: skip
    for name, out, into, side in stem:
        yield f"{name}.conv.weight", (out, into, side, side)
        yield from norm(f"{name}.bn", out)
    for block, branches in INCEPTION.items():
        for name, out, into, kernel in branches:
            yield f"{block}.{name}.conv.weight", (out, into, *kernel)
            yield from norm(f"{block}.{name}.bn", out)
    yield "fc.weight", (1008, 2048)
    yield "fc.bias", (1008,)


# --- ResNets -------------------------------------------------------------------------------------------------------


def _resnet(
    blocks: Sequence[int], kernel: Callable[[int], tuple[int, ...]], channels: int, *, bottleneck: bool, bias: bool,
    counter: bool,
) -> Shapes:  # fmt: skip
    def conv(name: str, out: int, into: int, side: int) -> Shapes:
        yield f"{name}.weight", (out, into, *kernel(side))
        if bias:
            yield f"{name}.bias", (out,)

    yield from conv("conv1", 64, channels, 7)
    yield from norm("bn1", 64, counter=counter)
    into = 64
    for stage, (count, width) in enumerate(zip(blocks, (64, 128, 256, 512), strict=True), 1):
        out = 4 * width if bottleneck else width
        for block in range(count):
            name = f"layer{stage}.{block}"
            steps = (
                [(width, into, 1), (width, width, 3), (out, width, 1)]
                if bottleneck
                else [(width, into, 3), (width, width, 3)]
            )
            for number, step in enumerate(steps, 1):
                yield from conv(f"{name}.conv{number}", *step)
                yield from norm(f"{name}.bn{number}", step[0], counter=counter)
            if block == 0 and into != out:
                yield from conv(f"{name}.downsample.0", out, into, 1)
                yield from norm(f"{name}.downsample.1", out, counter=counter)
            into = out


def radimagenet_keras() -> Shapes:
    """RadImageNet-ResNet50_notop.pth of Warvito/radimagenet-models: Keras' network, whose convolutions have biases."""
    return _resnet((3, 4, 6, 3), lambda n: (n, n), 3, bottleneck=True, bias=True, counter=True)


def radimagenet_own() -> Shapes:
    """RadImageNet's own PyTorch release, ResNet50.pt: the children of torchvision's ResNet-50 in a Sequential."""
    numbers = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
    for name, shape in _resnet((3, 4, 6, 3), lambda n: (n, n), 3, bottleneck=True, bias=False, counter=True):
        first, _, rest = name.partition(".")
        yield f"backbone.{numbers[first]}.{rest}", shape


def medicalnet(depth: int) -> Shapes:
    """Tencent/MedicalNet, resnet_{10,50}_23dataset.pth, below "state_dict"."""
    blocks = {10: (1, 1, 1, 1), 50: (3, 4, 6, 3)}[depth]
    for name, shape in _resnet(blocks, lambda n: (n, n, n), 1, bottleneck=depth == 50, bias=False, counter=False):
        yield f"module.{name}", shape


def alexnet() -> Shapes:
    """torchvision, alexnet-owt-7be5be79.pth."""
    for number, out, into, side in (
        (0, 64, 3, 11),
        (3, 192, 64, 5),
        (6, 384, 192, 3),
        (8, 256, 384, 3),
        (10, 256, 256, 3),
    ):
        yield f"features.{number}.weight", (out, into, side, side)
        yield f"features.{number}.bias", (out,)
    for number, out, into in ((1, 4096, 9216), (4, 4096, 4096), (6, 1000, 4096)):
        yield f"classifier.{number}.weight", (out, into)
        yield f"classifier.{number}.bias", (out,)
