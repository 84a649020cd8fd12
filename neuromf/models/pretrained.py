"""NVIDIA's rectified-flow U-Nets (MAISI, NV-Generate) as the start of ours.

Their time runs to 1000 and their velocity points to the data, v = x_0 - eps, so that the average velocity at r = t is
u(z_tau, tau, tau) = -UNet(z_tau, 1000 tau). The sign goes into the last layer's weights, the factor is the network's
`t_scale`. Their input is the raw latent times the file's scale factor: whiten with mean 0 and std 1 / scale_factor.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neuromf.errors import UserError

CODES = {"mri": 8, "T1": 9, "T2": 10, "FLAIR": 11, "SWI": 20}
"""NVIDIA's number of each contrast."""

_NULL = 0  # their "no contrast"
_CLASSES = "net.class_embedding.weight"
ARCHITECTURE: dict[str, Any] = {
    "name": "maisi-unet",
    "channels": [64, 128, 256, 512],
    "attention_levels": [False, False, True, True],
    "head_channels": 32,
    "res_blocks": 2,
    "norm_groups": 32,
    "conditioning": "t",
    "time_scale": 1.0,
    "t_scale": 1000.0,
    "patch": 1,
    "pad": False,
    "v_head_blocks": 0,
    "guidance": False,
}
"""The `network` settings of their weights; classes and spacing are the target's."""


class RectifiedFlow(NamedTuple):
    """Weights under the names of `MaisiUNet`, sign turned, and the factor on the raw latents they were trained with."""

    state: dict[str, Tensor]
    scale_factor: float


def load_rectified_flow(path: str | Path, contrasts: int | Sequence[int] = range(1, 128)) -> RectifiedFlow:
    """Read NVIDIA's file of a rectified-flow U-Net; no code is unpickled.

    Args:
        path: `diff_unet_3d_rflow-*.pt`.
        contrasts: NVIDIA's code of each of our classes, in their order (the null class is theirs); or one code, for
            a network without classes: that contrast becomes a part of the time embedding.

    Raises:
        UserError: absent, damaged, of another kind, or a code it does not have.
    """
    values = _read(Path(path))
    state = {f"net.{name}": value.float() for name, value in values["unet_state_dict"].items()}
    if _CLASSES not in state:
        raise UserError(
            f"{path} is a U-Net without contrasts",
            "give a rectified-flow file (diff_unet_3d_rflow-*.pt); the older DDPM ones have another architecture",
        )
    table = state.pop(_CLASSES)
    wanted = [contrasts] if isinstance(contrasts, int) else list(contrasts)
    absent = [code for code in wanted if not 0 <= code < len(table)]
    if absent:
        known = ", ".join(f"{name} {code}" for name, code in CODES.items())
        raise UserError(f"{path} knows the contrasts 0 to {len(table) - 1}, not {absent}", f"among them: {known}")
    if isinstance(contrasts, int):
        state["net.time_embed.2.bias"] = state["net.time_embed.2.bias"] + table[contrasts]
    else:
        state[_CLASSES] = table[[*wanted, _NULL]]
    for name in ("net.out.2.conv.weight", "net.out.2.conv.bias"):
        state[name] = -state[name]
    return RectifiedFlow(state, float(values["scale_factor"]))


def rectified_flow_settings(target: Mapping[str, Any]) -> dict[str, Any]:
    """The `network` settings of these weights, for `warm_start.convert` into a network of settings `target`.

    Raises:
        UserError: the target is not told the spacing, and these networks are.
    """
    if target.get("spacing_mm") is None:
        raise UserError(
            "NVIDIA's networks are told the spacing of the volumes, and this one is not",
            "set network.spacing_mm to your volumes' spacing, such as [1.0, 1.0, 1.0], and network.t_scale=1000",
        )
    return {**ARCHITECTURE, "classes": bool(target.get("classes")), "spacing_mm": target["spacing_mm"]}


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} does not exist", "NVIDIA's file is called diff_unet_3d_rflow-*.pt")
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read as weights: {reason}", "download it again") from error
    if not isinstance(values, Mapping) or not {"unet_state_dict", "scale_factor"} <= values.keys():
        raise UserError(
            f"{path} is no file of a rectified-flow U-Net: it lacks 'unet_state_dict' or 'scale_factor'",
            "give NVIDIA's diff_unet_3d_rflow-*.pt; for a run of ours give its folder",
        )
    return dict(values)
