"""From a name to an extractor."""

from __future__ import annotations

import torch

from neuromf.errors import UserError, did_you_mean
from neuromf.models.extractors.extractor import Extractor
from neuromf.models.extractors.inception import load_inception
from neuromf.models.extractors.lpips_alex import Lpips
from neuromf.models.extractors.medicalnet import MedicalNet
from neuromf.models.extractors.radimagenet import load_radimagenet
from neuromf.models.extractors.user import UserExtractor
from neuromf.weights import locate

FOREIGN = {
    "inception": "inception",
    "radimagenet": "radimagenet",
    "radimagenet-mr": "radimagenet",
    "medicalnet-10": "medicalnet-10",
    "medicalnet-50": "medicalnet-50",
}
"""Extractors with weights of others, and which weights they need."""

LPIPS = "lpips"
"""Not features, but a similarity that needs weights of others, too."""

USER_PREFIX = "module:"


def load_extractor(spec: str, device: torch.device | str = "cpu") -> Extractor:
    """The extractor of a name in `FOREIGN`, or of `module:FILE[:FUNCTION]`.

    Raises:
        UserError: no such name; its weights are not here (the hint says how to get them) or not the right ones.
    """
    if spec.startswith(USER_PREFIX):
        extractor = UserExtractor(spec.removeprefix(USER_PREFIX), device)
        if extractor.name in (*FOREIGN, "builtin"):
            raise UserError(f"a file called {extractor.name}.py would pass as '{extractor.name}'", "rename it")
        return extractor
    check_name(spec)
    assert spec in FOREIGN, f"'{spec}' needs no weights, or is no extractor"
    weights = locate(FOREIGN[spec])
    if spec == "inception":
        return load_inception(weights, device)
    if spec.startswith("radimagenet"):
        return load_radimagenet(spec, weights, device)
    return MedicalNet(10 if spec == "medicalnet-10" else 50, weights, device)


def check_name(spec: str) -> None:
    """Refuse what is no name of features.

    Raises:
        UserError: the nearest names are suggested.
    """
    if spec not in ("builtin", *FOREIGN, LPIPS) and not spec.startswith(USER_PREFIX):
        known = ["builtin", *FOREIGN, LPIPS, f"{USER_PREFIX}FILE.py"]
        raise UserError(f"no features '{spec}'", did_you_mean(spec, known))


def load_lpips(device: torch.device | str = "cpu") -> Lpips:
    """LPIPS.

    Raises:
        UserError: its weights are not here, or not the right ones.
    """
    return Lpips(locate("lpips-alex"), device)
