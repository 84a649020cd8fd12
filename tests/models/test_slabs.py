from __future__ import annotations

import pytest
import torch

from neuromf.errors import UserError
from neuromf.models.kl_network import KLArchitecture, build_kl_network, posterior
from neuromf.models.slabs import Slabs

CPU = torch.device("cpu")
SHAPES = {
    "published": KLArchitecture(4, (8, 16, 32), (2, 1, 1), 4, transposed=False),
    "builtin": KLArchitecture(8, (4, 8, 16), (0, 1, 1), 1, transposed=True),
}


def network(name: str):
    torch.manual_seed(0)
    built = build_kl_network(SHAPES[name]).eval().requires_grad_(False)
    for p in built.parameters():  # norms that scale and shift, too
        p.add_(0.05 * torch.randn(p.shape))
    return built


def budget(rows: int, size: tuple[int, int, int]) -> int:
    """So small that the finest level is cut into slabs of about so many rows."""
    return rows * 8 * size[1] * size[2] * 4 * 6


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("rows", [1, 3, 7, 1000])
def test_slabs_make_what_the_whole_network_makes(name, rows):
    whole, size = network(name), (24, 12, 16)
    x = torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(1))
    slabs = Slabs(whole, CPU, budget(rows, size))
    with torch.inference_mode():
        expected_mean, expected_sigma = posterior(whole, x)
        expected = whole.decode(expected_mean)
    mean, log_sigma = slabs.encode(x)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(log_sigma, expected_sigma, rtol=1e-4, atol=1e-5)
    decoded = slabs.decode(expected_mean)
    spread = float(expected.max() - expected.min())
    assert float((decoded - expected).abs().max()) < 1e-5 * spread


def test_a_slab_that_does_not_fit_is_halved_and_nothing_is_lost(monkeypatch):
    whole, size = network("builtin"), (16, 8, 8)
    z = torch.randn(1, 8, 4, 2, 2, generator=torch.Generator().manual_seed(2))
    slabs = Slabs(whole, CPU, budget(100, size))
    real, refused = slabs._slab, []

    def tight(forward, inputs, start, stop, scale):
        if stop - start > 3:
            refused.append(stop - start)
            raise torch.OutOfMemoryError
        return real(forward, inputs, start, stop, scale)

    monkeypatch.setattr(slabs, "_slab", tight)
    with torch.inference_mode():
        expected = whole.decode(z)
    torch.testing.assert_close(slabs.decode(z), expected, rtol=1e-4, atol=1e-5)
    assert refused


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_one_row_that_does_not_fit_is_the_users_to_know(monkeypatch, error):
    slabs = Slabs(network("builtin"), CPU, 1)

    def full(*_):
        raise error

    monkeypatch.setattr(slabs, "_slab", full)
    with pytest.raises(UserError, match="a single row of 2 x 2 voxels does not fit the memory of cpu") as caught:
        slabs.decode(torch.zeros(1, 8, 2, 2, 2))
    assert "--device cpu" in caught.value.hint


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch):
    slabs = Slabs(network("builtin"), CPU, 1)

    def broken(*_):
        raise RuntimeError("size mismatch")

    monkeypatch.setattr(slabs, "_slab", broken)
    with pytest.raises(RuntimeError, match="size mismatch"):
        slabs.decode(torch.zeros(1, 8, 2, 2, 2))
