"""What a diagnosis says of runs that are known to be well, or ill in one way."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import pytest

from neuromf.config import parse_overrides
from neuromf.training.diagnosis import RULES, Diagnosis, diagnose
from neuromf.training.diagnosis_evidence import SEVERITIES, Evidence, Finding, Sizes

EPOCHS, EPOCH_UPDATES = 200, 500
SETTINGS: dict[str, Any] = {
    "network": {"conditioning": "t+h"},
    "objective": {
        "name": "imf",
        "prediction": "x",
        "t_min": 0.01,
        "tangent": "boundary",
        "derivative": "exact",
        "fd_step": 1e-3,
        "norm_p": 0.5,
        "loss_reduction": "mean",
    },
    "times": {"data_proportion": 0.75, "one_step_share": 0.0, "gap_curriculum": 0.0},
    "training": {"updates": 100_000, "warmup_steps": 100, "lr": 1e-4, "clip": 1.0, "precision": "bf16"},
    "ema": {"decays": [0.9995, 0.9999], "select": 0.9995},
}
SIZES = Sizes(samples=8_000, batch=16, dimension=4 * 48**3)


def rising(progress: float, start: float, end: float, rate: float = 5.0) -> float:
    """From start to end, most of it early, as learning curves go."""
    return end + (start - end) * math.exp(-rate * progress)


def healthy(epoch: int, epochs: int = EPOCHS) -> dict[str, Any]:
    """One epoch of a run as it should be; a tenth of scatter, and now and then a spike of the r < t part."""
    at = (epoch - 1) / (epochs - 1)
    scatter = 1 + 0.1 * math.sin(7.3 * epoch)
    spike = 4.0 if epoch % 37 == 5 else 1.0
    fm, mf = rising(at, 1.4, 0.45) * scatter, rising(at, 2.0, 0.7) / scatter * spike
    raw = 0.75 * fm + 0.25 * mf
    cosine, jvp = rising(at, 0.2, 0.8), rising(at, 0.3, 2.4) * spike**0.5
    block = {"conv_in": 3e-4, "time_embed": 1e-5, "down_block_0": 4e-5, "middle_block": 1e-5, "up_block_0": 3e-4}
    return {
        "epoch": epoch,
        "global_step": epoch * EPOCH_UPDATES,
        "loss_mean": raw / math.sqrt(raw + 1),
        "raw_loss_mean": raw,
        "raw_loss_fm_mean": fm,
        "raw_loss_mf_mean": mf,
        "velocity_norms": {
            "u_norm": rising(at, 1.4, 1.15),
            "compound_v_norm": rising(at, 1.45, 1.2) * spike**0.2,
            "target_v_norm": 1.41,
            "v_tilde_norm": 1.1,
            "jvp_norm": jvp,
        },
        "cosine_sim_V_vc": cosine,
        "cosine_sim_vtilde_vc": cosine + 0.02 * scatter,
        "adaptive_weight": {"mean": raw + 1, "std": 0.5},
        "x_hat_stats": {"mean": 0.0, "std": rising(at, 0.25, 0.8), "min": -rising(at, 2.5, 7.5), "max": 7.0 * spike},
        "grad_clip_fraction": rising(at, 0.6, 0.1),
        "grad_norm_mean": rising(at, 1.1, 0.4),
        "block_grad_norms": {**block, "out": 1e-3} if epoch > 1 else dict.fromkeys(block, 0.0) | {"out": 5e-4},
        "relative_update_norm": 1e-4,
        "ema_divergence": 0.01,
        "learning_rate": 1e-6 + 1e-4 * (1 + math.cos(math.pi * at)) / 2,
        "val_raw_loss": 1.15 * rising(at, 1.5, 0.5) if epoch % 10 == 0 else None,
        "sampling": {
            "t_mean": 0.53 * (1 + 0.01 * math.sin(epoch)),
            "h_zero_frac": 0.75,
            "count": 8_000,
            "expected": {"t_mean": 0.533, "h_zero_frac": 0.75},
        },
        "per_channel_loss": [raw * share for share in (0.8, 1.2, 0.9, 1.1)] if epoch % 10 == 0 else None,
        "generated_samples": {"nfe_consistency": {"mse_1vs10": rising(at, 0.3, 0.12)}} if epoch % 25 == 0 else None,
    }


def run(
    change: Callable[[float, dict[str, Any]], None] | None = None,
    settings: dict[str, Any] | None = None,
    sizes: Sizes = SIZES,
    **evidence: Any,
) -> Evidence:
    """The healthy run with its summaries changed (given the progress from 0 to 1), and some settings."""
    summaries = [healthy(epoch) for epoch in range(1, EPOCHS + 1)]
    for n, summary in enumerate(summaries):
        if change is not None:
            change(n / (EPOCHS - 1), summary)
    values = copy.deepcopy(SETTINGS)
    for key, value in (settings or {}).items():
        section, name = key.split(".")
        values[section][name] = value
    return Evidence(summaries, values, sizes, **evidence)


def setting(path: str, curve: Callable[[float], Any]) -> Callable[[float, dict[str, Any]], None]:
    """A change that puts a curve at a dotted path."""

    def change(at: float, summary: dict[str, Any]) -> None:
        *groups, name = path.split(".")
        for group in groups:
            summary = summary.get(group) if summary.get(group) is not None else summary.setdefault(group, {})
        summary[name] = curve(at)

    return change


def both(*changes: Callable[[float, dict[str, Any]], None]) -> Callable[[float, dict[str, Any]], None]:
    def change(at: float, summary: dict[str, Any]) -> None:
        for each in changes:
            each(at, summary)

    return change


def exploding(at: float, summary: dict[str, Any]) -> None:
    for name in ("raw_loss_mean", "raw_loss_mf_mean", "raw_loss_fm_mean"):
        summary[name] *= math.exp(12 * max(at - 0.4, 0))
    summary["adaptive_weight"]["mean"] = summary["raw_loss_mean"] + 1


def with_loss(loss: Callable[[dict[str, Any]], float]) -> Callable[[float, dict[str, Any]], None]:
    return lambda at, summary: summary.update(loss_mean=loss(summary))


def generated(at: float, summary: dict[str, Any]) -> None:
    summary["generated_samples"] = {"nfe_consistency": {"mse_1vs10": 0.1 + at}} if summary["epoch"] % 25 == 0 else None


def dead_middle(at: float, summary: dict[str, Any]) -> None:
    summary["block_grad_norms"]["middle_block"] = 1e-9


# id -> severity, the run, and what must be quoted
MODES: dict[str, tuple[str, Evidence, str]] = {
    "masked_divergence": ("problem", run(both(exploding, with_loss(lambda s: 2.0))), "loss_mean 2 "),
    "divergence": (
        "problem",
        run(both(exploding, with_loss(lambda s: s["raw_loss_mean"] ** 0.5))),
        "raw_loss_fm_mean 0.56",
    ),
    "halted": ("problem", run(halted={"global_step": 100_100, "raw_loss_mean": 55.0}), "epoch 55"),
    "finite_difference_in_bf16": (
        "problem",
        run(settings={"objective.derivative": "finite-difference"}),
        "objective.fd_step 0.001",
    ),
    "warmup_starvation": ("problem", run(settings={"training.warmup_steps": 60_000}), "warm-up updates 60,000"),
    "too_few_updates": (
        "problem",
        run(setting("cosine_sim_V_vc", lambda at: 0.3), {"training.updates": 2_000}, Sizes(updates=2_000)),
        "updates 2,000",
    ),
    "ema_window": ("warning", run(settings={"ema.select": "0.99995"}), "EMA window 20,000"),
    "mf_dominates": ("problem", run(setting("raw_loss_mf_mean", lambda at: 2 + 18 * at)), "mf/fm"),
    "direction_not_learned": (
        "problem",
        run(setting("cosine_sim_V_vc", lambda at: 0.1 + 0.2 * at)),
        "chance 0.001504",
    ),
    "velocity_overshoot": (
        "problem",
        run(setting("velocity_norms.compound_v_norm", lambda at: 1.41 * (1 + at))),
        "|V|/|v_c| 1.99",
    ),
    "correction_hurts": ("problem", run(setting("cosine_sim_vtilde_vc", lambda at: 0.97)), "cosine_sim_vtilde_vc 0.97"),
    "derivative_grows": (
        "warning",
        run(setting("velocity_norms.jvp_norm", lambda at: math.exp(4 * at))),
        "velocity_norms.u_norm",
    ),
    "loss_falls_cosine_flat": ("warning", run(setting("cosine_sim_V_vc", lambda at: 0.6)), "cosine_sim_V_vc 0.6 "),
    "cosine_high_at_start": ("warning", run(setting("cosine_sim_V_vc", lambda at: 0.95)), "cosine_sim_V_vc 0.95"),
    "mode_collapse": ("problem", run(setting("x_hat_stats.std", lambda at: 0.8 * (1 - at))), "x_hat_stats.std 0.008"),
    "x_hat_extremes": ("warning", run(setting("x_hat_stats.max", lambda at: 5 + 60 * at**2)), "x_hat_stats.max"),
    "dead_blocks": ("warning", run(dead_middle), "middle_block 1e-09"),
    "out_dominates": ("warning", run(setting("block_grad_norms.out", lambda at: 0.01)), "out 0.01"),
    "clipping": ("warning", run(setting("grad_clip_fraction", lambda at: 0.99)), "grad_clip_fraction 0.99"),
    "overfitting": (
        "warning",
        run(lambda at, s: s.update(val_raw_loss=0.6 + 0.5 * at if s["epoch"] % 10 == 0 else None)),
        "val_raw_loss 1.0",
    ),
    "channel_imbalance": (
        "warning",
        run(setting("per_channel_loss", lambda at: {"0": 1.0, "1": 1 + 40 * at})),
        "channel 1 41",
    ),
    "weight_apart_from_loss": (
        "warning",
        run(setting("adaptive_weight.mean", lambda at: 2.5 * math.exp(at))),
        "adaptive_weight.mean 6.7",
    ),
    "sampler_drift": ("warning", run(setting("sampling.t_mean", lambda at: 0.53 + 0.2 * at)), "sampling.t_mean 0.72"),
    "nfe_gap": ("warning", run(generated), "mse_1vs10"),
}


def found(evidence: Evidence) -> dict[str, Finding]:
    return {finding.id: finding for finding in diagnose(evidence).findings}


def test_a_healthy_run_has_no_finding_at_all() -> None:
    assert found(run()) == {}


@pytest.mark.parametrize("stop", [1, 2, 5, 20, 100])
def test_a_healthy_run_has_no_problem_while_it_goes(stop: int) -> None:
    evidence = run()
    assert diagnose(Evidence(evidence.summaries[:stop], evidence.settings, evidence.sizes)).problems == []


@pytest.mark.parametrize("mode", MODES)
def test_each_failure_mode_is_recognised_with_its_numbers(mode: str) -> None:
    severity, evidence, quoted = MODES[mode]
    finding = found(evidence)[mode]
    assert finding.severity == severity
    assert quoted in "; ".join(map(str, finding.numbers))
    assert finding.evidence >= 1
    epochs = set(evidence.epochs)
    assert all(set(figure.epochs or ()) <= epochs for figure in finding.numbers)


def test_no_failure_mode_is_left_without_a_test() -> None:
    assert set(MODES) == {rule.__name__ for rule in RULES}


@pytest.mark.parametrize("mode", MODES)
def test_what_is_suggested_can_be_typed(mode: str) -> None:
    setting = found(MODES[mode][1])[mode].setting
    pairs = re.findall(r"[a-z_]+\.[a-z_]+=[^\s;]+", setting)
    assert pairs or "neuromf" in setting or "config.yaml" in setting
    parse_overrides(pairs)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in ("halted", "too_few_updates")])
def test_a_mode_alone_brings_few_others(mode: str) -> None:
    assert len(found(MODES[mode][1])) <= 3


# --- the two histories of record ------------------------------------------------------------------------------


def test_the_divergence_of_record() -> None:
    losses = [
        (274, 160, 45, 44),
        (553, 298, 378, 332),
        (4034, 2773, 2675, 2527),
        (367835, 48745, 23234, 2736),
        (2177681, 296164, 34540, 11039),
    ]
    summaries = [
        {"epoch": epoch, "loss_mean": 2.0, "per_channel_loss": list(each)}
        for epoch, each in zip((24, 99, 124, 199, 224), losses, strict=True)
    ]
    findings = found(Evidence(summaries, {"training": {"warmup_steps": 5_000}}, Sizes(updates=6_750)))
    masked, imbalance, warmup = (
        findings[name] for name in ("masked_divergence", "channel_imbalance", "warmup_starvation")
    )
    assert {masked.severity, imbalance.severity, warmup.severity} == {"problem"}
    assert "loss_mean 2 (epoch 24); loss_mean 2 (epoch 224)" in "; ".join(map(str, masked.numbers))
    assert [figure.value for figure in masked.numbers if "summed" in figure.name] == [523, 2_519_424]
    assert "channel 0 2,177,681 (epoch 224)" in "; ".join(map(str, imbalance.numbers))
    assert "197 times" in imbalance.title
    assert "5,000 of 6,750 updates (74%)" in warmup.title


def test_the_plateau_of_record() -> None:
    summaries = [
        {
            "epoch": epoch,
            "velocity_norms": {"compound_v_norm": 2.82, "target_v_norm": 1.41},
            "cosine_sim_V_vc": 0.25,
            "cosine_sim_vtilde_vc": 0.42,
        }
        for epoch in range(1, 241)
    ]
    settings = {"training": {"epochs": 240}, "ema": {"decays": [0.9999]}}
    findings = found(Evidence(summaries, settings, Sizes(samples=990, batch=128, dimension=4 * 48**3)))
    assert "about 1,900 against 100,000" in findings["too_few_updates"].title
    assert "10,000 updates, 5.4 times the run's" in findings["ema_window"].title
    assert "|V| is 2 times |v_c|" in findings["velocity_overshoot"].title
    assert "0.42 is above cos(V) 0.25" in findings["correction_hurts"].title
    assert "0.0015" in findings["direction_not_learned"].title
    assert {finding.severity for finding in findings.values()} == {"problem"}


# --- what it rests on -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("summaries", [[{}], [{"epoch": 1}] * 3, [dict.fromkeys(healthy(1))] * 12])
def test_nothing_known_is_nothing_found(summaries: list[dict[str, Any]]) -> None:
    assert found(Evidence(summaries)) == {}


def test_a_field_of_another_kind_is_as_if_absent() -> None:
    strange = [dict.fromkeys(healthy(1), "x"), {name: [None] for name in healthy(1)}, {"raw_loss_mean": math.nan}]
    assert found(Evidence(strange)) == {}


def test_two_bad_epochs_are_no_divergence() -> None:
    def spike(at: float, summary: dict[str, Any]) -> None:
        if summary["epoch"] > EPOCHS - 2:
            summary["raw_loss_mean"] *= 1_000

    assert "divergence" not in found(run(spike))


@pytest.mark.parametrize(
    ("updates", "planned", "phase"),
    [(50, 1_000, "early"), (500, 1_000, "mid"), (900, 1_000, "late"), (900, None, "early"), (90_000, None, "late")],
)
def test_the_phase_is_the_share_of_the_plan_or_else_of_what_a_run_needs(
    updates: int, planned: int | None, phase: str
) -> None:
    judged = Evidence([{}], {}, Sizes(updates=updates, planned=planned)).phase
    assert judged.name == phase
    assert f"{updates:,}" in judged.judged_by


def test_a_run_inside_its_warm_up_is_early() -> None:
    settings = {"training": {"warmup_steps": 600, "updates": 1_000}}
    assert Evidence([{"global_step": 500}], settings).phase.name == "early"


def test_the_direction_may_still_come_while_a_run_is_young() -> None:
    changed = run(setting("cosine_sim_V_vc", lambda at: 0.3))
    for stop, severity in ((10, "note"), (100, "warning"), (200, "problem")):
        part = Evidence(changed.summaries[:stop], changed.settings, changed.sizes)
        assert found(part)["direction_not_learned"].severity == severity


def test_findings_come_by_severity_and_then_by_evidence() -> None:
    diagnosis: Diagnosis = diagnose(
        run(
            both(exploding, dead_middle, setting("cosine_sim_vtilde_vc", lambda at: 0.86)),
            {"training.warmup_steps": 60_000, "training.updates": 99_000, "ema.select": "0.9998"},
        )
    )
    order = [(SEVERITIES.index(finding.severity), -finding.evidence) for finding in diagnosis.findings]
    assert order == sorted(order)
    assert {finding.severity for finding in diagnosis.findings} == set(SEVERITIES)


def test_a_warm_up_is_seen_in_the_learning_rates_where_no_setting_tells_it() -> None:
    summaries = [{"epoch": e, "global_step": 10 * e, "learning_rate": min(e, 60) * 1e-5} for e in range(1, 101)]
    assert "600 of 1,000 updates" in found(Evidence(summaries))["warmup_starvation"].title


def test_a_half_life_too_long_is_only_noted_because_its_ramp_bounds_it() -> None:
    settings = {"ema.select": "2000kimg"}
    assert found(run(settings=settings))["ema_window"].severity == "note"


def test_the_first_updates_belong_to_the_last_layer() -> None:
    young = [{**healthy(1), "global_step": 400, "block_grad_norms": {"out": 1.0, "down_block_0": 0.0, "conv_in": 0.0}}]
    assert {"out_dominates", "dead_blocks"}.isdisjoint(found(Evidence(young)))


def test_the_cosine_of_points_is_not_judged() -> None:
    evidence = MODES["direction_not_learned"][1]
    points = Evidence(evidence.summaries, evidence.settings, evidence.sizes._replace(dimension=4))
    assert "direction_not_learned" not in found(points)


def test_a_warm_start_knows_the_direction() -> None:
    evidence = MODES["cosine_high_at_start"][1]
    settings = {**evidence.settings, "training": {**evidence.settings["training"], "init_from": "runs/flow"}}
    assert "cosine_high_at_start" not in found(Evidence(evidence.summaries, settings, evidence.sizes))


def test_the_report_reads_as_its_findings() -> None:
    text = "\n".join(diagnose(MODES["overfitting"][1]).lines())
    assert text.startswith("phase: late (100,000 of 100,000 updates")
    assert "found: 0 problems, 1 warning, 0 notes" in text
    assert "warning: overfitting" in text
    assert "try:" in text
    assert max(map(len, text.splitlines())) <= 160
