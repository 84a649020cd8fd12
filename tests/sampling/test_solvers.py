from __future__ import annotations

import pytest
import torch

from neuromf.errors import UserError
from neuromf.sampling.solvers import SOLVERS, euler, evaluations, heun, jump, one_step, time_grid

DECAY = 2.0
E = torch.tensor(1.0, dtype=torch.float64).exp().item()


def linear_v(z, r, t):
    """dz/dt = DECAY z, so that z_0 = exp(-DECAY) z_1; r is not looked at."""
    return DECAY * z


def linear_u(z, r, t):
    """The average velocity of `linear_v`: (1 - exp(-DECAY (t - r))) z / (t - r)."""
    h = (t - r)[:, None]
    return (1 - torch.exp(-DECAY * h)) * z / h


@pytest.fixture
def noise():
    return torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("nfe", [1, 2, 5, 10, 25, 50])
def test_the_grid_runs_evenly_from_noise_to_data(nfe):
    times = time_grid(nfe)
    assert len(times) == nfe + 1
    assert (times[0], times[-1]) == (1.0, 0.0)
    assert times == pytest.approx([1 - i / nfe for i in range(nfe + 1)], abs=1e-15)


@pytest.mark.parametrize("nfe", [0, -3])
def test_no_evaluation_is_refused(nfe):
    with pytest.raises(UserError, match="--nfe 1"):
        time_grid(nfe)


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_the_jump_is_exact_for_the_true_average_velocity(noise, steps):
    torch.testing.assert_close(jump(linear_u, noise, time_grid(steps)), noise * E**-DECAY, rtol=1e-12, atol=0)


def test_one_step_is_noise_less_its_average_velocity(noise):
    seen = []
    found = one_step(lambda z, r, t: seen.append((r.tolist(), t.tolist())) or linear_u(z, r, t), noise)
    assert seen == [([0.0] * 3, [1.0] * 3)]
    one = torch.ones(3, dtype=torch.float64)
    assert torch.equal(found, noise - linear_u(noise, 0 * one, one))


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2)])
def test_the_integrators_have_their_order(noise, solver, order):
    # Heun's last interval is an Euler step, whose error is also of second order in the step.
    error = [(solver(linear_v, noise, time_grid(n)) - noise * E**-DECAY).abs().max() for n in (50, 100)]
    assert error[0] / error[1] == pytest.approx(2**order, rel=0.15)


@pytest.mark.parametrize("solver", [euler, heun])
def test_the_integrators_ask_only_for_instantaneous_velocities(noise, solver):
    def v(z, r, t):
        assert torch.equal(r, t)
        return DECAY * z

    solver(v, noise, time_grid(4))


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("name", SOLVERS)
def test_the_evaluations_are_counted_right(noise, name, steps):
    calls = []
    SOLVERS[name](lambda z, r, t: calls.append(t) or linear_v(z, r, t), noise, time_grid(steps))
    assert len(calls) == evaluations(name, steps)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_last_step_of_an_x_prediction_returns_the_estimate_itself(noise, name):
    answer, asked = torch.full_like(noise, 7.0), []

    def x_hat(z, r, t):
        asked.append(t[0].item())
        return answer

    assert torch.equal(SOLVERS[name](linear_u if name == "meanflow" else linear_v, noise, time_grid(4), x_hat), answer)
    assert asked == [0.25]
