from __future__ import annotations

import math

import pytest
import torch

from neuromf.metrics.spectrum import (
    axis_power_spectra,
    high_frequency_energy_ratio,
    radial_power_spectrum,
    spectra,
    spectrum_distance,
)


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


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_plane_wave_shows_along_its_own_axis_alone(axis: int) -> None:
    size, spacing = (24, 20, 15), (2.0, 1.0, 1.0)
    found = axis_power_spectra(5.0 + _wave(size, axis, 3), spacing)
    for other, (frequency, power) in enumerate(found):
        assert len(frequency) == size[other] // 2
        if other == axis:
            assert int(power[0].argmax()) == 2
            assert float(frequency[2]) == pytest.approx(3 / (size[axis] * spacing[axis]))
        else:
            assert float(power[0].max()) < 1e-20


def test_white_noise_is_flat_along_every_axis() -> None:
    noise = 3 * torch.randn(8, 1, 24, 20, 27, generator=torch.Generator().manual_seed(1))
    for frequency, power in axis_power_spectra(noise, (1, 1, 1)):
        torch.testing.assert_close(
            power.mean(0), torch.full((len(frequency),), 9.0, dtype=torch.float64), rtol=0.1, atol=0
        )


def test_blur_along_one_axis_shows_there() -> None:
    noise = torch.randn(4, 1, 16, 16, 16, generator=torch.Generator().manual_seed(2))
    smooth = (noise + noise.roll(1, 3)) / 2
    before, after = (axis_power_spectra(x, (1, 1, 1)) for x in (noise, smooth))
    lost = [float(a.power.mean(0)[-1] / b.power.mean(0)[-1]) for a, b in zip(after, before, strict=True)]
    assert lost[1] < 0.01
    assert min(lost[0], lost[2]) > 0.3


def test_one_transform_gives_what_the_three_functions_give() -> None:
    x = torch.rand(3, 1, 12, 10, 14, generator=torch.Generator().manual_seed(3))
    found = spectra(x, (1.0, 2.0, 1.5), window="hann")
    torch.testing.assert_close(found.radial.power, radial_power_spectrum(x, (1.0, 2.0, 1.5), window="hann").power)
    torch.testing.assert_close(found.high_share, high_frequency_energy_ratio(x, (1.0, 2.0, 1.5), window="hann"))
    for mine, theirs in zip(found.axes, axis_power_spectra(x, (1.0, 2.0, 1.5), window="hann"), strict=True):
        torch.testing.assert_close(mine.power, theirs.power)
