from __future__ import annotations

import math

import pytest
import torch

from neuromf.metrics.spectrum import high_frequency_energy_ratio, radial_power_spectrum, spectrum_distance


def _wave(size: tuple[int, int, int], axis: int, cycles: int) -> torch.Tensor:
    """A plane wave with `cycles` periods along one axis, amplitude 1: variance 1/2."""
    phase = 2 * math.pi * cycles * torch.arange(size[axis], dtype=torch.float64) / size[axis]
    shape = [1, 1, 1]
    shape[axis] = size[axis]
    return torch.cos(phase).view(shape).expand(size)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_plane_wave_puts_its_power_in_the_shell_of_its_frequency(axis: int) -> None:
    size, spacing = (24, 24, 24), (2.0, 2.0, 2.0)
    frequency, power = radial_power_spectrum(5.0 + _wave(size, axis, 6), spacing)
    peak = int(power[0].argmax())
    assert float(frequency[peak]) == pytest.approx(6 / 48)  # cycles/mm
    others = torch.cat([power[0, :peak], power[0, peak + 1 :]])
    assert float(others.max()) < 1e-20 * float(power[0, peak])


def test_anisotropic_voxels_share_one_frequency_axis_in_cycles_per_mm() -> None:
    size, spacing = (32, 16, 16), (1.0, 2.0, 2.0)  # 32 mm a side
    for axis, cycles in ((0, 4), (1, 4), (2, 4)):
        frequency, power = radial_power_spectrum(_wave(size, axis, cycles), spacing)
        assert float(frequency[power[0].argmax()]) == pytest.approx(4 / 32)
    assert float(frequency[-1]) == pytest.approx(0.25)  # the coarser axis' Nyquist


@pytest.mark.parametrize("window", ["none", "hann"])
def test_white_noise_is_flat_at_its_variance(window) -> None:
    noise = 3 * torch.randn(8, 1, 24, 20, 28, generator=torch.Generator().manual_seed(0))
    power = radial_power_spectrum(noise, (1, 1, 1), window=window).power.mean(0)
    assert power[2:].mean() == pytest.approx(9, rel=0.05)
    assert power[4:].max() / power[4:].min() < 1.3


def test_the_mean_and_the_taper_leave_no_trace() -> None:
    constant = torch.full((1, 1, 16, 16, 16), 7.0)
    for window in ("none", "hann"):
        assert float(radial_power_spectrum(constant, (1, 1, 1), window=window).power.max()) < 1e-12


def test_the_high_frequency_share_of_white_noise_is_the_share_of_coefficients() -> None:
    noise = torch.randn(6, 1, 20, 20, 20, generator=torch.Generator().manual_seed(1))
    f = torch.fft.fftfreq(20)
    radius = (f[:, None, None] ** 2 + f[None, :, None] ** 2 + f[None, None, :] ** 2).sqrt()
    expected = float((radius >= 0.25 - 1e-9).sum() / (20**3 - 1))
    assert float(high_frequency_energy_ratio(noise, (1, 1, 1)).mean()) == pytest.approx(expected, rel=0.01)


def test_a_wave_below_the_cutoff_has_no_high_frequency_energy() -> None:
    low, high = _wave((16, 16, 16), 0, 3), _wave((16, 16, 16), 0, 4)
    assert float(high_frequency_energy_ratio(low, (1, 1, 1))) == pytest.approx(0, abs=1e-12)
    assert float(high_frequency_energy_ratio(high, (1, 1, 1))) == pytest.approx(1)
    assert float(high_frequency_energy_ratio(low, (1, 1, 1), cutoff=0.1)) == pytest.approx(1)


def test_the_spectrum_distance_is_in_powers_of_ten() -> None:
    power = torch.rand(10, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 1
    assert spectrum_distance(power, power).value == 0
    estimate = spectrum_distance(10 * power, power)
    assert estimate.value == pytest.approx(1)
    assert estimate.low < 1 < estimate.high
