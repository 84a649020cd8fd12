"""What velocities, estimates and gradients of a run tell. One function per failure mode: evidence in, a finding or None
out."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from neuromf.training.diagnosis_evidence import (
    COSINE_LEARNED,
    ENOUGH_UPDATES,
    Evidence,
    Figure,
    Finding,
    Series,
    Severity,
    finite,
    fold,
    graded,
    times,
)

OVERSHOOT_WARNS, OVERSHOOT_IS_PROBLEM = 1.5, 1.8
"""|V|/|v_c|; the mean velocity given z_t is shorter than v_c, so above 1 is noise and 2 the plateau of record."""

CHANCE_COUNTS = 0.1
"""Below 100 dimensions, as for the points of a toy, a cosine of 0.5 is within reach of chance and tells nothing."""

UNLEARNED: dict[str, Severity] = {"early": "note", "mid": "warning", "late": "problem"}
"""What an unlearned direction is in each phase: it comes late in healthy runs, too."""

COSINE_TOO_HIGH, FIRST_UPDATES = 0.8, 500
"""x_hat = 0 already gives (2t - 1)/sqrt(2 (1-t)^2 + 2 t^2), at most 0.71; in 500 updates little is added to that."""

HURTS_NOTED, HURTS_WARNS, HURTS_IS_PROBLEM = 0.05, 0.1, 0.15
"""cos(v_tilde) - cos(V): r < t samples have later t, where both are larger, so small gaps mean nothing."""

DERIVATIVE_GROWTH, VELOCITY_STABLE = 3.0, 1.5
"""Growth since a quarter of the run: before that |du/dt| grows in every run, by a factor of 4 to 10."""

COLLAPSED, SHRUNK, HALVED = 0.1, 0.3, 0.5
"""Standard deviation of x_hat, whose data have 1; a blurred but healthy estimate keeps 0.6 to 0.8."""

EXTREME, EXTREME_IS_PROBLEM, EXTREME_GROWTH = 10.0, 100.0, 2.0
"""Largest |x_hat| in standard deviations of the data, and its growth since a quarter of the run; 4 to 8 is usual."""

DEAD = 1e-3
"""RMS gradient of a block against the strongest one; a healthy small run has 0.03 in its middle block."""

OUT_DOMINATES, SETTLED_UPDATES = 10.0, 500
"""RMS gradient of `out` against the strongest other block, 3.4 in a healthy small run; starting at zero, `out` learns
alone for the first hundreds of updates."""

CLIPPED = 0.9
"""Share of clipped steps (SPEC 6); above it the clip, not the learning rate, sets the step."""

NFE_GAP_GROWTH = 1.5
"""Growth of the distance between 1- and 10-evaluation samples since a quarter of the run; a healthy one shrinks."""


def velocity_overshoot(run: Evidence) -> Finding | None:
    """|V|/|v_c| goes to 2."""
    norms = "velocity_norms."
    ratio = run.quotient(norms + "compound_v_norm", norms + "target_v_norm", "|V|/|v_c|")
    if ratio is None or ratio.end.value < OVERSHOOT_WARNS:
        return None
    u, derivative = run.series(norms + "u_norm"), run.series(norms + "jvp_norm")
    return Finding(
        "velocity_overshoot",
        graded(ratio.end.value, OVERSHOOT_IS_PROBLEM),
        f"velocity overshoot: |V| is {ratio.end.value:.3g} times |v_c|",
        (ratio.start, ratio.end, *(series.end for series in (u, derivative) if series)),
        "The best V is the mean of v_c given z_t, which is shorter than v_c. A longer V is noise that du/dt adds: at "
        "twice the length more of it is error than signal.",
        _calmer(run),
        ratio.end.value / OVERSHOOT_WARNS,
    )


def _calmer(run: Evidence) -> str:
    """What makes the correction (t - r) du/dt less noisy."""
    if run.setting("objective.derivative") == "finite-difference":
        return "objective.derivative=exact"
    if run.setting("objective.tangent") == "v-head":
        return "objective.tangent=boundary"
    share = finite(run.setting("times.data_proportion"))
    return "times.data_proportion=0.75" if share is None or share < 0.75 else run.slower()


def direction_not_learned(run: Evidence) -> Finding | None:
    """cos(V, v_c) < 0.5 at the end; less than a problem while the run may still learn it."""
    cosine = run.series("cosine_sim_V_vc")
    if cosine is None or cosine.end.value >= COSINE_LEARNED:
        return None
    chance = run.chance
    if chance is not None and chance > CHANCE_COUNTS:
        return None
    by_chance = "" if chance is None else f" (chance is 1/sqrt(D) = {chance:.2g})"
    yet = "" if run.phase.name == "late" else " yet"
    return Finding(
        "direction_not_learned",
        UNLEARNED[run.phase.name],
        f"the direction is not learned{yet}: cos(V, v_c) is {cosine.end.value:.3g}{by_chance}",
        (cosine.start, cosine.end, *(() if chance is None else (Figure("chance", chance),))),
        "A guess from z_t alone, which knows nothing of anatomy, already comes to 0.3 or 0.4. One-step samples of such "
        "a network are noise with the right histogram.",
        f"training.updates={max(ENOUGH_UPDATES, 2 * (run.length or 0))}",
        COSINE_LEARNED / max(cosine.end.value, 1e-3),
    )


def cosine_high_at_start(run: Evidence) -> Finding | None:
    """The direction is known before anything was learned."""
    cosine = run.series("cosine_sim_V_vc")
    if cosine is None or run.setting("training.init_from") or cosine.first.value < COSINE_TOO_HIGH:
        return None
    step = finite(run.summaries[0].get("global_step"))
    if (cosine.epochs[0] > 1) if step is None else (step > FIRST_UPDATES):
        return None
    return Finding(
        "cosine_high_at_start",
        "warning",
        f"the cosine with v_c is {cosine.first.value:.3g} in the very first epoch",
        (cosine.first, *(() if step is None else (Figure("updates by then", step),))),
        "An untrained network knows the time at most, which is worth 0.71 at t = 1. More means that the target leaks "
        "into the input, that the latents hardly differ (wrong statistics), or that the times drawn are all near 1.",
        "look at the latents' mean and standard deviation (`neuromf encode --report`); times.mean=-0.4",
        cosine.first.value / COSINE_TOO_HIGH,
    )


def correction_hurts(run: Evidence) -> Finding | None:
    """cos(v_tilde) > cos(V): the tangent alone is better than what the derivative makes of it."""
    V, tangent = run.series("cosine_sim_V_vc"), run.series("cosine_sim_vtilde_vc")
    if V is None or tangent is None:
        return None
    gap = tangent.end.value - V.end.value
    if gap < HURTS_NOTED:
        return None
    derivative = run.series("velocity_norms.jvp_norm")
    hurts = "hurts" if gap >= HURTS_WARNS else "may hurt"
    return Finding(
        "correction_hurts",
        "note" if gap < HURTS_WARNS else graded(gap, HURTS_IS_PROBLEM),
        f"the JVP correction {hurts}: cos(v_tilde) {tangent.end.value:.3g} is above cos(V) {V.end.value:.3g}",
        (V.end, tangent.end, *(() if derivative is None else (derivative.end,))),
        "V = u + (t - r) du/dt should point at v_c as well as the tangent v_tilde does; if it points worse, du/dt adds "
        "error. (V is averaged over all samples and v_tilde over r < t alone, which can make 0.1 of it.)",
        _calmer(run),
        gap / HURTS_NOTED,
    )


def derivative_grows(run: Evidence) -> Finding | None:
    """|du/dt| grows while |u| is stable."""
    derivative, u = run.series("velocity_norms.jvp_norm"), run.series("velocity_norms.u_norm")
    if derivative is None or u is None or run.phase.name == "early":
        return None
    growth, stable = times(derivative.end, derivative.settled), times(u.end, u.settled)
    if growth < DERIVATIVE_GROWTH or not 1 / VELOCITY_STABLE <= stable <= VELOCITY_STABLE:
        return None
    t_min = finite(run.setting("objective.t_min"))
    steep = run.setting("objective.prediction") == "x" and t_min is not None and t_min < 0.05
    return Finding(
        "derivative_grows",
        "warning",
        f"|du/dt| grew {fold(growth)} times while |u| is stable",
        (derivative.settled, derivative.end, u.settled, u.end),
        "The network becomes rough in t without u itself changing: the target is made of that derivative, so the "
        "roughness feeds itself. It usually comes before a divergence of the r < t part.",
        "objective.t_min=0.05" if steep else run.slower(),
        growth / DERIVATIVE_GROWTH,
    )


def mode_collapse(run: Evidence) -> Finding | None:
    """The standard deviation of x_hat goes to 0."""
    spread = run.series("x_hat_stats.std")
    if spread is None:
        return None
    now, shrinking = spread.end.value, spread.end.value < HALVED * spread.highest.value
    if now >= SHRUNK or not (shrinking or (now < COLLAPSED and run.phase.name != "early")):
        return None  # the estimate starts at zero
    return Finding(
        "mode_collapse",
        "problem" if now < COLLAPSED else "warning",
        f"mode collapse: the standard deviation of x_hat is {now:.3g}, the data's is 1",
        (spread.highest, spread.end),
        "Every estimate is nearly the mean of the data, so samples will all look alike: the network ignores z_t, or "
        "its output is scaled down by weight decay or by a dying last layer.",
        f"training.weight_decay=0 {run.slower(2)}",
        SHRUNK / max(now, 1e-3),
    )


def x_hat_extremes(run: Evidence) -> Finding | None:
    """The extremes of x_hat grow."""

    def largest(summary: Mapping[str, Any]) -> float | None:
        group = summary.get("x_hat_stats")
        found = [finite(group.get(name)) for name in ("min", "max")] if isinstance(group, Mapping) else []
        return max((abs(value) for value in found if value is not None), default=None)

    extreme = run.computed("largest |x_hat|", largest)
    if extreme is None or extreme.end.value <= EXTREME:
        return None
    growth = times(extreme.end, extreme.settled)
    if growth < EXTREME_GROWTH:
        return None
    low, high = run.series("x_hat_stats.min"), run.series("x_hat_stats.max")
    return Finding(
        "x_hat_extremes",
        graded(extreme.end.value, EXTREME_IS_PROBLEM),
        f"x_hat extremes grow: {fold(extreme.end.value)} standard deviations, {fold(growth)} times as before",
        (extreme.settled, extreme.end, *(series.end for series in (low, high) if series)),
        "Whitened latents hardly leave +-8. Single voxels far outside decode to bright specks, and divergence begins "
        "at them: at small t an x-prediction's error is divided by t.",
        f"objective.t_min=0.05 {run.slower(2)}",
        extreme.end.value / EXTREME,
    )


# --- gradients --------------------------------------------------------------------------------------------------


def _blocks(run: Evidence) -> dict[str, Series]:
    """RMS gradient of each block once `out` no longer learns alone; empty where none was kept."""

    def block(name: str, summary: Mapping[str, Any]) -> float | None:
        norms, step = summary.get("block_grad_norms"), finite(summary.get("global_step"))
        if not isinstance(norms, Mapping) or (step is not None and step <= SETTLED_UPDATES):
            return None
        return finite(norms.get(name))

    found = {name: run.computed(name, partial(block, name)) for name in run.keys("block_grad_norms")}
    return {name: series for name, series in found.items() if series is not None}


def dead_blocks(run: Evidence) -> Finding | None:
    """Deep blocks get no gradient."""
    blocks = _blocks(run)
    inner = {name: series.end for name, series in blocks.items() if "block" in name}  # no embedding, no layer at an end
    if len(inner) < 2:
        return None
    strongest = max(inner.values(), key=lambda figure: figure.value)
    dead = [figure for figure in inner.values() if figure.value < DEAD * strongest.value]
    if not dead:
        return None
    weakest = min(dead, key=lambda figure: figure.value)
    return Finding(
        "dead_blocks",
        "warning",
        f"dead deep blocks: {', '.join(figure.name for figure in dead)} get hardly any gradient",
        (strongest, *dead),
        "A block with a thousandth of the others' gradient does not learn: the skip connections carry everything, and "
        "the picture is made of local texture without anatomy.",
        "training.warmup_steps=1000 training.weight_decay=0; or fewer levels in network.channels",
        min(DEAD * strongest.value / max(weakest.value, 1e-12), 1e9),
    )


def out_dominates(run: Evidence) -> Finding | None:
    """The gradient of `out` dominates after the first hundreds of steps."""
    blocks = _blocks(run)
    if "out" not in blocks or len(blocks) < 2:
        return None
    out = blocks.pop("out").end
    strongest = max((series.end for series in blocks.values()), key=lambda figure: figure.value)
    ratio = times(out, strongest)
    if ratio <= OUT_DOMINATES:
        return None
    return Finding(
        "out_dominates",
        "warning",
        f"the gradient of `out` is {fold(ratio)} times that of any other block",
        (out, strongest),
        "The last layer starts at zero and learns alone for some hundreds of updates; if it still does, it fits the "
        "target's scale and the layers below hardly move. The global clip then cuts what little they get.",
        "training.clip=null objective.loss_reduction=mean",
        ratio / OUT_DOMINATES,
    )


def clipping(run: Evidence) -> Finding | None:
    """Nearly every step is clipped."""
    share, norm = run.series("grad_clip_fraction"), run.series("grad_norm_mean")
    if share is None or share.end.value <= CLIPPED:
        return None
    summed = run.setting("objective.loss_reduction") == "sum"
    clip = finite(run.setting("training.clip"))
    wanted = f"training.clip={2 * norm.end.value:.2g}" if norm else "training.clip=null"
    return Finding(
        "clipping",
        "warning",
        f"{share.end.value:.0%} of the steps are clipped",
        (share.start, share.end, *((norm.end,) if norm else ()), *((Figure("training.clip", clip),) if clip else ())),
        "With every gradient cut to one length the clip replaces the loss's own scale: large and small errors weigh "
        "the same, and the learning rate means something else than intended.",
        "objective.loss_reduction=mean" if summed else wanted,
        share.end.value / CLIPPED,
    )


def nfe_gap(run: Evidence) -> Finding | None:
    """Samples of one and of ten evaluations go apart."""
    gap = run.series("generated_samples.nfe_consistency.mse_1vs10")
    if gap is None or len(gap) < 2:
        return None
    growth = times(gap.end, gap.settled)
    if growth < NFE_GAP_GROWTH:
        return None
    share = finite(run.setting("times.one_step_share"))
    return Finding(
        "nfe_gap",
        "warning",
        f"the gap between 1 and 10 evaluations widens: {fold(growth)} times since a quarter of the run",
        (gap.settled, gap.end),
        "An average velocity gives the same sample in one step as in ten. If they go apart, the r = t part improves "
        "and the long jumps do not follow: too few samples train them, or their derivative is wrong.",
        "times.one_step_share=0.25" if not share else "times.data_proportion=0.5",
        growth / NFE_GAP_GROWTH,
    )
