"""What the losses of a run tell. One function per failure mode: evidence in, a finding or None out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neuromf.training.diagnosis_evidence import Evidence, Figure, Finding, Series, finite, fold, graded, times

GROWTH_WARNS, GROWTH_IS_DIVERGENCE = 5.0, 10.0
"""Growth of the raw loss since its lowest point; 10 is where the guard warns. Spikes that pass leave 3 to 5."""

FLAT = 1.5
"""A weighted loss that changes less than this while the raw one grows tenfold hides it; norm_p 0.5 shows a factor 3."""

MF_OVER_FM = 10.0
"""The r < t part of a healthy run is 0.5 to 3 times the r = t part."""

GROWING = 1.2
"""A ratio that has grown by less may only be noise."""

FALLEN = 1.5
"""A raw loss that fell less has not yet had to move the direction."""

COSINE_FLAT = 0.03
"""Change of the cosine that is none: epochs of a small run scatter by 0.02."""

COSINE_GOOD = 0.7
"""Above this the direction is there, and a flat cosine is convergence."""

IMBALANCE_WARNS, IMBALANCE_IS_PROBLEM = 10.0, 100.0
"""Largest over smallest channel loss; whitened channels start within a factor of 3 or so."""

OVERFIT_WARNS, OVERFIT_IS_PROBLEM, OVERFIT_GROWTH = 1.5, 3.0, 1.3
"""Validation over training raw loss, and its growth: fixed against fresh draws alone differ by 10 to 30 %."""

APART = 0.5
"""Share of the raw loss that adaptive_weight - raw loss may reach; it should be norm_eps all along."""


def _raw_losses(run: Evidence) -> list[Series]:
    """The figures that cannot hide a divergence, as far as they were kept."""
    names = ("raw_loss_mean", "raw_loss_fm_mean", "raw_loss_mf_mean", "adaptive_weight.mean")
    found = [run.series(name) for name in names]
    summed = run.computed("per_channel_loss, summed", lambda summary: sum(channels(summary).values()) or None)
    return [series for series in (*found, summed) if series is not None]


def channels(summary: Mapping[str, Any]) -> dict[str, float]:
    """The channel losses of a summary by name; a list is numbered."""
    given = summary.get("per_channel_loss")
    named = given.items() if isinstance(given, Mapping) else enumerate(given) if isinstance(given, list | tuple) else ()
    return {str(name): value for name, each in named if (value := finite(each)) is not None}


def _worst_growth(run: Evidence) -> tuple[Figure, Figure, float] | None:
    """Lowest point, end and growth of the raw figure that grew most since its lowest."""
    grown = [(raw.lowest, raw.end, times(raw.end, raw.lowest)) for raw in _raw_losses(run)]
    return max(grown, key=lambda each: each[2], default=None)


def masked_divergence(run: Evidence) -> Finding | None:
    """The weighted loss is flat while the raw one grows."""
    worst, loss = _worst_growth(run), run.series("loss_mean")
    if worst is None or loss is None or worst[2] < GROWTH_WARNS:
        return None
    lowest, end, growth = worst
    before, now = loss.near(lowest.epochs), loss.end
    if not 1 / FLAT <= times(now, before) <= FLAT:
        return None
    weight = run.series("adaptive_weight.mean")
    numbers = [before, now, lowest, end] + ([weight.start, weight.end] if weight and weight.name != end.name else [])
    return Finding(
        "masked_divergence",
        graded(growth, GROWTH_IS_DIVERGENCE),
        f"the adaptive weight masks a divergence: raw figures grew {fold(growth)} times, the weighted loss is flat",
        tuple(numbers),
        "loss / (loss + norm_eps)^norm_p stays near a constant (1, or 2 with two terms) whatever the error is, so the "
        "weighted loss says nothing; judge the run by its raw loss and go back to the checkpoint before it grew.",
        f"{run.slower()} guards.divergence=true objective.norm_p=0.5",
        growth / GROWTH_IS_DIVERGENCE,
    )


def divergence(run: Evidence) -> Finding | None:
    """Raw loss and adaptive weight grow, and the weighted loss shows it or was not kept."""
    worst = _worst_growth(run)
    if worst is None or worst[2] < GROWTH_WARNS or masked_divergence(run):
        return None
    lowest, end, growth = worst
    weight = run.series("adaptive_weight.mean")
    return Finding(
        "divergence",
        graded(growth, GROWTH_IS_DIVERGENCE),
        f"the run diverges: raw loss and adaptive weight grow, {fold(growth)} times since the lowest point",
        (lowest, end, *((weight.lowest, weight.end) if weight and weight.name != end.name else ())),
        "The error grows with training instead of falling: steps are too large for the noise of the r < t part. The "
        "weights since the lowest point are not worth keeping.",
        f"{run.slower()} times.data_proportion=0.75",
        growth / GROWTH_IS_DIVERGENCE,
    )


def weight_apart_from_loss(run: Evidence) -> Finding | None:
    """adaptive_weight leaves raw loss + norm_eps."""

    def gap(summary: Mapping[str, Any]) -> float | None:
        group, raw = summary.get("adaptive_weight"), finite(summary.get("raw_loss_mean"))
        weight = finite(group.get("mean")) if isinstance(group, Mapping) else None
        return None if weight is None or raw is None else abs(weight - raw)

    apart = run.computed("|adaptive_weight - raw loss|", gap)
    raw, weight = run.series("raw_loss_mean"), run.series("adaptive_weight.mean")
    if apart is None or raw is None or weight is None:
        return None
    limit = max(APART * raw.end.value, 2 * apart.lowest.value)
    if apart.end.value <= limit:
        return None
    return Finding(
        "weight_apart_from_loss",
        "warning",
        "adaptive_weight and raw loss go apart",
        (weight.start, raw.start, weight.end, raw.end),
        "adaptive_weight is the denominator, raw loss + norm_eps, so both differ by a constant. If the gap grows, what "
        "is weighted is not what is reported: channel weights, another reduction, or a few samples of enormous loss.",
        "objective.channel_weights=none",
        apart.end.value / limit,
    )


def mf_dominates(run: Evidence) -> Finding | None:
    """mf/fm > 10 and growing."""
    ratio = run.quotient("raw_loss_mf_mean", "raw_loss_fm_mean", "mf/fm")
    fm, mf = run.series("raw_loss_fm_mean"), run.series("raw_loss_mf_mean")
    if ratio is None or fm is None or mf is None or ratio.end.value <= MF_OVER_FM:
        return None
    if times(ratio.end, ratio.lowest) < GROWING:
        return None
    return Finding(
        "mf_dominates",
        "problem",
        f"the MF term dominates: the r < t part of the raw loss is {fold(ratio.end.value)} times the r = t part",
        (ratio.lowest, ratio.end, mf.end, fm.end),
        "The self-consistency term feeds on the network's own derivative; once it outweighs the flow-matching part by "
        "ten, it no longer corrects u but chases its own error.",
        f"times.data_proportion=0.75 {run.slower(2)}",
        ratio.end.value / MF_OVER_FM,
    )


def loss_falls_cosine_flat(run: Evidence) -> Finding | None:
    """The raw loss falls while the direction stays as it was."""
    raw, cosine = run.series("raw_loss_mean"), run.series("cosine_sim_V_vc")
    if raw is None or cosine is None or run.phase.name == "early" or cosine.end.value >= COSINE_GOOD:
        return None
    fall, change = times(raw.start, raw.end), cosine.end.value - cosine.start.value
    if fall < FALLEN or change > COSINE_FLAT:
        return None
    conditioning = run.setting("network.conditioning")
    return Finding(
        "loss_falls_cosine_flat",
        "warning",
        f"the raw loss fell {fall:.3g} times while the cosine with v_c is flat",
        (raw.start, raw.end, cosine.start, cosine.end),
        "The loss falls because |V| shrinks, while its direction is not learned. The network may not see its times, or "
        "its steps are too small to leave the mean velocity.",
        "network.conditioning=t+h" if conditioning in ("h", "t") else run.slower(0.5),
        fall / FALLEN,
    )


def overfitting(run: Evidence) -> Finding | None:
    """The validation raw loss leaves the training one."""
    ratio = run.quotient("val_raw_loss", "raw_loss_mean", "validation/training raw loss")
    validation, training = run.series("val_raw_loss"), run.series("raw_loss_mean")
    if ratio is None or validation is None or training is None or ratio.end.value < OVERFIT_WARNS:
        return None
    if times(ratio.end, ratio.lowest) < OVERFIT_GROWTH:
        return None
    best = validation.epochs[validation.values.index(min(validation.values))]
    return Finding(
        "overfitting",
        graded(ratio.end.value, OVERFIT_IS_PROBLEM),
        f"overfitting: the validation raw loss is {ratio.end.value:.3g} times the training one, and the gap grows",
        (ratio.lowest, ratio.end, validation.lowest, validation.end, training.near(validation.end.epochs)),
        "The network remembers its training latents: what it still gains there it loses on the others. The checkpoint "
        f"of the lowest validation loss (epoch {best}) is the better one.",
        "training.augmentation=true training.weight_decay=0.05",
        ratio.end.value / OVERFIT_WARNS,
    )


def channel_imbalance(run: Evidence) -> Finding | None:
    """One channel's loss dwarfs another's."""

    def spread(summary: Mapping[str, Any]) -> float | None:
        found = channels(summary).values()
        return max(found) / min(found) if len(found) > 1 and min(found) > 0 else None

    ratio = run.computed("largest/smallest channel loss", spread)
    if ratio is None or ratio.end.value <= IMBALANCE_WARNS:
        return None
    # Each channel where the ratio was last read: a median over epochs would mix them.
    last = next(n for n, summary in reversed(list(enumerate(run.summaries))) if len(channels(summary)) > 1)
    epoch = run.epochs[last]
    each = tuple(Figure(f"channel {c}", v, (epoch, epoch)) for c, v in channels(run.summaries[last]).items())
    norm_p = finite(run.setting("objective.norm_p"))
    return Finding(
        "channel_imbalance",
        graded(ratio.end.value, IMBALANCE_IS_PROBLEM),
        f"channel imbalance: the largest channel loss is {fold(ratio.end.value)} times the smallest",
        (ratio.start, ratio.end, *each),
        "Whitened channels start about equally hard, so a factor above ten means that one of them takes all of the "
        "gradient, or diverges alone; check its statistics, then weigh the channels.",
        "objective.channel_weights=learned" + ("" if norm_p is not None and norm_p < 1 else " objective.norm_p=0.5"),
        ratio.end.value / IMBALANCE_WARNS,
    )
