"""Agreement with numbers that the published reference implementations produced (see the golden README)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from neuromf.config import TrainingConfig
from neuromf.losses.derivative import exact
from neuromf.losses.meanflow import lp_loss, meanflow_terms, weighted
from neuromf.losses.path import velocity_from_x
from neuromf.losses.times import logit_normal, mix_uniform, pair
from neuromf.sampling.solvers import jump, time_grid
from neuromf.training.ema import WeightAverage, half_life_decay
from neuromf.training.optim import learning_rate

WEIGHTS = ("W1", "Wt", "b1", "W2", "b2", "Wu", "bu")
TANGENT = {"loss_imf_nohead_2d": "boundary", "loss_meanflow_2d": "velocity"}
CLAMP = 0.05


class TinyNetwork:
    """The golden README's network: U(z, k = (t, h)) on flattened samples, float64."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = {name: weights[name].clone().requires_grad_() for name in WEIGHTS}

    def __call__(self, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        w = self.weights
        times = torch.stack([t, t - r], dim=1)
        hidden = torch.tanh(z.flatten(1) @ w["W1"] + times @ w["Wt"] + w["b1"])
        hidden = torch.tanh(hidden @ w["W2"] + w["b2"])
        return (hidden @ w["Wu"] + w["bu"]).reshape(z.shape)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found.detach(), expected, rtol=tolerance, atol=tolerance)


@pytest.fixture
def network(golden):
    return TinyNetwork(golden("net"))


def terms_of(case: str, case_data: dict[str, Tensor], network: TinyNetwork):
    d = case_data
    return meanflow_terms(network, d["x"], d["e"], d["r"], d["t"], tangent=TANGENT[case])


@pytest.mark.parametrize("case", TANGENT)
def test_the_terms_agree(golden, network, case):
    d = golden(case)
    terms = terms_of(case, d, network)
    assert torch.equal(terms.moving, ~d["fm_mask"])
    assert terms.moving.any()
    close(terms.z, d["z_t"])
    close(terms.target, d["v_g"])
    close(terms.u, d["u"])
    close(terms.V, d["V"])
    close(terms.tangent[terms.moving], d["tangent"][terms.moving])
    close(terms.du_dt[terms.moving], d["du_dt"][terms.moving])


@pytest.mark.parametrize("combination", range(4))
@pytest.mark.parametrize("case", TANGENT)
def test_the_loss_and_the_gradients_of_all_weights_agree(golden, network, case, combination):
    d = golden(case)
    terms = terms_of(case, d, network)
    raw = lp_loss(terms.V, terms.target, reduction="sum")
    loss = weighted(raw, float(d["norm_p"][combination]), float(d["norm_eps"][combination]))
    loss.mean().backward()
    close(raw, d["raw_u"])
    close(loss, d["wloss_u"][combination])
    close(loss.mean(), d["loss"][combination])
    for name in WEIGHTS:
        close(network.weights[name].grad, d[f"grad_{name}"][combination], 1e-10)


def test_an_x_prediction_has_the_derivative_of_the_reference_above_and_below_the_clamp(golden, network):
    d = golden("loss_pmf_nohead_2d")
    assert (d["t"] < CLAMP).any()
    u = lambda z, r, t: velocity_from_x(z, network(z, r, t), t, CLAMP)
    close(u(d["z_t"], d["r"], d["t"]), d["u"])
    close(u(d["z_t"], d["t"], d["t"]), d["tangent"])
    close(exact(u, d["z_t"], d["r"], d["t"], d["tangent"]), d["du_dt"], 1e-10)


# --- time samplers -------------------------------------------------------------------------------------------

PARAMETERS = {"Pa": (-0.4, 1.0), "Pb": (0.8, 0.8)}


@pytest.mark.parametrize("share", ["0", "0.5", "0.75"])
@pytest.mark.parametrize("parameters", PARAMETERS)
@pytest.mark.parametrize("code", ["meanflow", "imf", "pmf"])
def test_the_pairs_of_each_code_come_from_the_same_normals(golden, code, parameters, share):
    d = golden("time_samplers")
    key = next(k for k in (f"{code}_{parameters}_dp{s}" for s in (share, f"{float(share):.1f}")) if f"{k}_t" in d)
    equal = torch.arange(17) < int(17 * float(share))
    first = logit_normal(d["normal_t"], *PARAMETERS[parameters])
    second = logit_normal(d["normal_r"], *PARAMETERS[parameters])
    r, t = pair(first, second, equal, "mask-then-sort" if code == "pmf" else "sort-then-mask")
    close(t, d[f"{key}_t"], 1e-14)
    close(r, d[f"{key}_r"], 1e-14)


def test_the_uniform_mixture_of_pmf(golden):
    d = golden("time_samplers")
    times = []
    for normal, uniform in (("normal_t", "pmf_unif_t"), ("normal_r", "pmf_unif_r")):
        times.append(mix_uniform(logit_normal(d[normal], *PARAMETERS["Pb"]), d[uniform], d["pmf_unif_mask"], 0.1))
    assert (d["pmf_unif_mask"] < 0.1).any()
    r, t = pair(times[0], times[1], torch.arange(17) < 8, "mask-then-sort")
    close(t, d["pmf_Pb_dp0.5_unif_t"], 1e-14)
    close(r, d["pmf_Pb_dp0.5_unif_r"], 1e-14)


def test_the_orders_of_py_meanflow_with_separate_parameters_for_r(golden):
    d = golden("time_samplers")
    parameters = {"Pa": ((-0.4, 1.0), (-0.4, 1.0)), "Pdefault": ((-0.6, 1.6), (-4.0, 1.6))}
    keys = [key for key in d if key.startswith("pymf_v") and key.endswith("_t")]
    assert len(keys) >= 4
    for key in keys:
        _, version, name, ratio, _ = key.split("_")
        of_t, of_r = parameters[name]
        equal = d["pymf_unif"] < 1 - float(ratio.removeprefix("ratio"))
        first, second = logit_normal(d["normal_t"], *of_t), logit_normal(d["normal_r"], *of_r)
        r, t = pair(first, second, equal, "min" if version == "v1" else "sort-then-mask")
        close(t, d[key], 1e-14)
        close(r, d[key[:-1] + "r"], 1e-14)


# --- sampling ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("dimension", ["2d", "3d"])
@pytest.mark.parametrize("kind", ["meanflow", "pmf"])
def test_samples_agree_in_any_number_of_steps(golden, network, kind, dimension, steps):
    d = golden("sampling")
    u = network if kind == "meanflow" else lambda z, r, t: velocity_from_x(z, network(z, r, t), t, CLAMP)
    close(torch.tensor(time_grid(steps), dtype=torch.float64), d[f"t_steps{steps}"], 1e-15)
    with torch.no_grad():
        found = jump(u, d[f"{dimension}_noise"], time_grid(steps))
    close(found, d[f"{dimension}_{kind}_steps{steps}"], 1e-11)


# --- weight averages and learning rates ------------------------------------------------------------------------


class Vector(torch.nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(value.clone())


def follow(path: Tensor, decays: list[float]) -> Tensor:
    """The average after each of the updates that `path` (K + 1, n) records."""
    network = Vector(path[0])
    average = WeightAverage(network, decays[0])
    states = [average.weights["value"].clone()]
    for value, decay in zip(path[1:], decays, strict=True):
        average.decay = decay
        network.value.data = value.clone()
        average.update(network)
        states.append(average.weights["value"].clone())
    return torch.stack(states).double()


@pytest.mark.parametrize("decay", [0.9, 0.99, 0.9999])
def test_the_average_of_a_constant_decay(golden, decay):
    d = golden("ema")
    close(follow(d["params"], [decay] * 40), d[f"const_{decay:g}"], 2e-6)  # averages are float32


@pytest.mark.parametrize("kimg", [500, 1000, 2000])
def test_half_life_decays_of_any_batch(golden, kimg):
    d = golden("ema")
    for suffix, batch in (("", 1024), ("_batch32", 32), ("_batch256", 256)):
        found = [half_life_decay(1000 * kimg, batch, int(k)) for k in d["steps"]]
        close(torch.tensor(found, dtype=torch.float64), d[f"edm_beta_{kimg}kimg{suffix}"], 1e-13)


@pytest.mark.parametrize("kimg", ["0.5", "1.0"])
def test_the_average_of_a_half_life_that_leaves_its_ramp(golden, kimg):
    d = golden("ema")
    decays = [half_life_decay(1000 * float(kimg), 1024, k) for k in range(1, 41)]
    key = next(k for k in (f"edm_{kimg}kimg", f"edm_{float(kimg):g}kimg") if k in d)
    close(torch.tensor(decays, dtype=torch.float64), d[f"edm_beta_{key[4:]}_steps1to40"], 1e-13)
    close(follow(d["params"], decays), d[key], 2e-6)


def test_learning_rates_by_finished_updates(golden):
    d = golden("lr")

    def rates(updates: int, **settings) -> Tensor:
        config = TrainingConfig(updates=updates, lr=1e-4, **settings)
        return torch.tensor([learning_rate(int(k), updates, config) for k in d["steps"]], dtype=torch.float64)

    close(rates(1000, schedule="constant", warmup_steps=70), d["warmup_const_10x7"], 1e-13)
    close(rates(1000, schedule="constant", warmup_steps=0), d["warmup_const_0x7"], 1e-13)
    cosine = rates(141, schedule="cosine", warmup_steps=70, lr_final=1e-5)
    close(cosine, d["warmup_cosine_10x7_of30_min0.1"], 1e-13)
