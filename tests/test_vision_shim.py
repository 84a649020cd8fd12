"""In fresh interpreters: what is declared or imported in one would decide the others."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

torchvision_installed = importlib.util.find_spec("torchvision") is not None


def _python(code: str) -> str:
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.strip()


@pytest.mark.skipif(not torchvision_installed, reason="torchvision is not installed")
def test_after_the_shim_lpips_runs_and_torchmetrics_imports() -> None:
    out = _python(
        "from neuromf.vision_shim import prepare_torchvision\n"
        "prepare_torchvision(); prepare_torchvision()\n"
        "import torch, torchmetrics.image, lpips\n"
        "distance = lpips.LPIPS(net='alex', pretrained=False, pnet_rand=True, verbose=False)\n"
        "print(tuple(distance(torch.zeros(1, 3, 64, 64), torch.ones(1, 3, 64, 64)).shape))\n"
    )
    assert out == "(1, 1, 1, 1)"


@pytest.mark.skipif(not torchvision_installed, reason="torchvision is not installed")
def test_it_declares_the_operators_exactly_when_torchvision_cannot_load_its_own() -> None:
    out = _python(
        "import subprocess, sys\n"
        "alone = subprocess.run([sys.executable, '-c', 'import torchvision'], capture_output=True).returncode == 0\n"
        "from neuromf.vision_shim import prepare_torchvision\n"
        "declared = prepare_torchvision()\n"
        "import torchvision\n"
        "print(declared != alone)\n"
    )
    assert out == "True"


def test_without_torchvision_nothing_happens() -> None:
    out = _python(
        "import importlib.util, sys\n"
        "importlib.util.find_spec = lambda name: None\n"
        "from neuromf.vision_shim import prepare_torchvision\n"
        "print(prepare_torchvision(), 'torch' in sys.modules)\n"
    )
    assert out == "False False"
