"""Agreement with numbers that the published reference implementations produced (see the golden README)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuromf.conditions import Condition
from neuromf.config import GuidanceConfig, ObjectiveConfig
from neuromf.losses.guidance import interval_from_uniform, scale_from_uniform
from neuromf.losses.path import velocity_from_x
from neuromf.losses.times import logit_normal, mix_uniform, pair
from neuromf.sampling.solvers import jump, time_grid
from neuromf.training.objective import Draws, Objective

CLAMP = 0.05
CLASSES = 3
SUM = {"prediction": "u", "loss_reduction": "sum"}
CLIPPED = {"name": "pmf", "prediction": "x", "t_min": CLAMP, "loss_reduction": "sum"}
CASES: dict[str, dict[str, Any]] = {
    "meanflow": {"objective": {"name": "meanflow", **SUM}},
    "meanflow_cfg": {
        "objective": {"name": "meanflow", **SUM},
        "guidance": {"enabled": True, "omega": 1.8, "kappa": 0.5, "interval": (0.2, 0.7)},
    },
    "imf": {"objective": {"tangent": "v-head", **SUM}},
    "imf_nohead": {"objective": SUM},
    "imf_cfg": {"objective": {"tangent": "v-head", **SUM}, "guidance": {"enabled": True}},
    "pmf": {"objective": {"tangent": "v-head", **CLIPPED}},
    "pmf_nohead": {"objective": CLIPPED},
}
SECOND_HEAD = {name for name, case in CASES.items() if case["objective"].get("tangent") == "v-head"}


class TinyNetwork(nn.Module):
    """The golden README's network: U and Vh of (z, k = (t, h)) and the conditions, on flattened samples, float64."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        arrays = {name: value for name, value in weights.items() if name != "num_classes"}
        self.w = nn.ParameterDict({name: nn.Parameter(value.clone()) for name, value in arrays.items()})

    def trunk(self, z: Tensor, r: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
        w = self.w
        inside = z.flatten(1) @ w["W1"] + torch.stack([t, t - r], dim=1) @ w["Wt"] + w["b1"]
        if condition is not None:
            inside = inside + w["Ey"][condition.label]
            if condition.omega is not None:
                q = torch.cat([1 - 1 / condition.omega[:, None], condition.interval], dim=1)
                inside = inside + q @ w["Wc"]
        return torch.tanh(torch.tanh(inside) @ w["W2"] + w["b2"])

    def forward(self, z: Tensor, r: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        return (self.trunk(z, r, t, condition) @ self.w["Wu"] + self.w["bu"]).reshape(z.shape)

    def heads(self, z: Tensor, r: Tensor, t: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        v = self.trunk(z, r, t, condition) @ self.w["Wv"] + self.w["bv"]
        return self(z, r, t, condition), v.reshape(z.shape)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found.detach(), expected, rtol=tolerance, atol=tolerance)


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the array's largest entry."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-300))


@pytest.fixture
def network(golden):
    return TinyNetwork(golden("net"))


def objective_of(case: str, network: TinyNetwork, **settings) -> Objective:
    chosen = CASES[case]
    config = ObjectiveConfig(**{**chosen["objective"], **settings})
    return Objective(network, config, guidance=GuidanceConfig(**chosen.get("guidance", {})), classes=CLASSES)


def draws_of(case: str, d: dict[str, Tensor]) -> Draws:
    """The stored draws; of the class drop, the reference's rule (the first n) is part of the draws."""
    if "y" not in d:
        return Draws(d["e"], d["r"], d["t"])
    condition = Condition(d["y"])
    if "omega" in d:
        condition = Condition(d["y"], d["omega"], torch.stack([d["t_min"], d["t_max"]], dim=1))
    dropped = torch.arange(len(d["y"])) < (d["unif_drop"] < 0.1).sum()
    assert torch.equal(torch.where(dropped, CLASSES, d["y"]), d["y_in"])
    return Draws(d["e"], d["r"], d["t"], condition, dropped)


@pytest.mark.parametrize("case", CASES)
def test_the_terms_agree(golden, network, case):
    d = golden(f"loss_{case}_2d")
    terms = objective_of(case, network).terms(d["x"], draws_of(case, d))
    assert torch.equal(terms.moving, ~d["fm_mask"])
    assert terms.moving.any()
    close(terms.z, d["z_t"])
    close(terms.target, d["v_g"])
    close(terms.u, d["u"])
    close(terms.V, d["V"])
    close(terms.tangent[terms.moving], d["tangent"][terms.moving])
    close(terms.du_dt[terms.moving], d["du_dt"][terms.moving])
    if case in SECOND_HEAD:
        close(terms.v, d["v_head"])


@pytest.mark.parametrize("combination", range(4))
@pytest.mark.parametrize("case", CASES)
def test_the_loss_and_the_gradients_of_all_weights_agree(golden, network, case, combination):
    d = golden(f"loss_{case}_2d")
    norms = {"norm_p": float(d["norm_p"][combination]), "norm_eps": float(d["norm_eps"][combination])}
    loss = objective_of(case, network, **norms)(d["x"], *draws_of(case, d))
    loss.value.backward()
    close(loss.record["raw"], d["raw_u"])
    close(loss.record["weighted"], d["wloss_u"][combination])
    if case in SECOND_HEAD:
        close(loss.record["raw_v"], d["raw_v"])
    close(loss.value, d["loss"][combination])
    compared = [key.removeprefix("grad_") for key in d if key.startswith("grad_")]
    assert len(compared) >= 7
    for name in compared:
        expected = d[f"grad_{name}"][combination]
        found = network.w[name].grad
        assert (found is None and not expected.any()) or relative(found, expected) < 1e-10, name


@pytest.mark.parametrize("combination", range(4))
@pytest.mark.parametrize("case", ["imf", "pmf"])
def test_the_gradients_of_the_average_velocity_alone_agree(golden, network, case, combination):
    d = golden(f"loss_{case}_2d")
    norms = {"norm_p": float(d["norm_p"][combination]), "norm_eps": float(d["norm_eps"][combination])}
    objective_of(case, network, vhead_weight=0.0, **norms)(d["x"], *draws_of(case, d)).value.backward()
    compared = [key.removeprefix("gradu_") for key in d if key.startswith("gradu_")]
    assert len(compared) >= 7
    for name in compared:
        expected, found = d[f"gradu_{name}"][combination], network.w[name].grad
        if not expected.any():
            assert found is None or not found.any(), name
        else:
            assert relative(found, expected) < 1e-10, name


@pytest.mark.parametrize("beta", ["1.0", "2.0"])
def test_guidance_scales_come_from_the_same_uniforms(golden, beta):
    d = golden("time_samplers")
    close(scale_from_uniform(d["cfg_unif_omega"], 8.0, float(beta)), d[f"imf_omega_beta{beta}"], 1e-14)


def test_guidance_intervals_come_from_the_same_uniforms(golden):
    d = golden("time_samplers")
    interval = interval_from_uniform(d["cfg_unif_tmin"], d["cfg_unif_tmax"], torch.arange(17) < 8)
    close(interval[:, 0], d["imf_t_min"], 1e-15)
    close(interval[:, 1], d["imf_t_max"], 1e-15)


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


KINDS = {
    "meanflow": (False, None, 1.0),
    "pmf": (True, None, 1.0),
    "pmf_noise2": (True, None, 2.0),
    "imf_cfg": (False, (2.5, 0.2, 0.8), 1.0),
    "pmf_cfg": (True, (2.5, 0.2, 0.8), 1.0),
}


STORED = [("2d", kind) for kind in KINDS] + [("3d", "meanflow"), ("3d", "pmf")]


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize(("dimension", "kind"), STORED)
def test_samples_agree_in_any_number_of_steps(golden, network, kind, dimension, steps):
    d = golden("sampling")
    predicts_data, guidance, scale = KINDS[kind]
    noise = d[f"{dimension}_noise"]
    condition = None
    if guidance:
        labels = torch.tensor([0, 1, 2, 0])[: len(noise)]
        omega = torch.full((len(noise),), guidance[0], dtype=torch.float64)
        condition = Condition(labels, omega, torch.tensor(guidance[1:], dtype=torch.float64).expand(len(noise), 2))
    output = lambda z, r, t: network(z, r, t, condition)
    u = (lambda z, r, t: velocity_from_x(z, output(z, r, t), t, CLAMP)) if predicts_data else output
    close(torch.tensor(time_grid(steps), dtype=torch.float64), d[f"t_steps{steps}"], 1e-15)
    with torch.no_grad():
        found = jump(u, scale * noise, time_grid(steps))
    assert relative(found, d[f"{dimension}_{kind}_steps{steps}"]) < 1e-12
