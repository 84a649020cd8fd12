"""What the settings and sizes of a run tell. One function per failure mode: evidence in, a finding or None out."""

from __future__ import annotations

import math

from neuromf.training.diagnosis_evidence import (
    COSINE_LEARNED,
    ENOUGH_UPDATES,
    Evidence,
    Figure,
    Finding,
    finite,
    graded,
)
from neuromf.training.ema import Constant, Decay, HalfLife

WARMUP_WARNS, WARMUP_STARVES = 0.2, 0.5
"""Share of the updates at a reduced rate; usual are 0.1 to 2 %."""

WINDOW_WARNS, WINDOW_IS_PROBLEM = 0.1, 1.0
"""Averaging window over the updates (10 % is the plan's own limit); above 1 the starting weights are averaged in."""

FEW_UPDATES = 10_000
"""Below it, and with the direction unlearned, the length of the run is what is wrong with it."""

SAMPLER_DRIFT = 0.05
"""Largest difference of a mean time or share from the configured one; n samples scatter by 0.3 / sqrt(n), so
1 / sqrt(n) where that is more, with n = 100 where it is not known."""


def warmup_starvation(run: Evidence) -> Finding | None:
    """Most of the run passes before the learning rate is reached."""
    steps, length = finite(run.setting("training.warmup_steps")), run.length
    numbers: tuple[Figure, ...] = ()
    if steps is None:
        steps, numbers = _warmup_seen(run)
    if steps is None or not length or steps / length < WARMUP_WARNS:
        return None
    steps = min(steps, length)
    share = steps / length
    return Finding(
        "warmup_starvation",
        graded(share, WARMUP_STARVES),
        f"warm-up starvation: {steps:,.0f} of {length:,} updates ({share:.0%}) are warm-up",
        (Figure("warm-up updates", steps), Figure("updates", length), *numbers),
        "The learning rate rises for most of the run and is highest near its end: the first part learns little, and "
        "what the full rate breaks is never repaired.",
        f"training.warmup_steps={max(100, round(length / 100))}",
        share / WARMUP_WARNS,
    )


def _warmup_seen(run: Evidence) -> tuple[float | None, tuple[Figure, ...]]:
    """The warm-up as the learning rates of the epochs show it, in updates."""
    rates = run.series("learning_rate")
    if rates is None or len(rates) < 3 or not run.length or rates.values[0] > 0.5 * max(rates.values):
        return None, ()
    top = rates.values.index(max(rates.values))
    figures = rates.first, Figure(rates.name, rates.values[top], (rates.epochs[top], rates.epochs[top]))
    return (run.updates or run.length) * rates.epochs[top] / max(run.epochs), figures


def ema_window(run: Evidence) -> Finding | None:
    """The selected average reaches further back than the run is long."""
    decay, length = _selected(run), run.length
    if decay is None or not length or (isinstance(decay, HalfLife) and not run.sizes.batch):
        return None
    batch = run.sizes.batch or 1
    share = decay.window(batch) / length
    if share <= WINDOW_WARNS * (1 + 1e-9):
        return None
    ramped = isinstance(decay, HalfLife)  # its ramp bounds what it averages over, so it is merely without effect
    window = decay.window(batch)
    lag = run.series("ema_divergence")
    return Finding(
        "ema_window",
        "note" if ramped else graded(share, WINDOW_IS_PROBLEM),
        f"the EMA window is {window:,.0f} updates, {share:.2g} times the run's {length:,}",
        (Figure("EMA window", round(window)), Figure("updates", length), *((lag.end,) if lag else ())),
        "The averaged weights, which validation and samples use, still carry those the run began with: they look worse "
        f"than the network is. {decay.advice(length, batch).capitalize()}.",
        _shorter_average(decay, length, batch),
        share / WINDOW_WARNS,
    )


def _selected(run: Evidence) -> Decay | None:
    """The average that is validated and sampled from."""
    decays = run.setting("ema.decays")
    name = run.setting("ema.select") or (decays[0] if isinstance(decays, list | tuple) and decays else decays)
    text = str(name)
    try:
        if text.endswith("kimg"):
            return HalfLife(float(text.removesuffix("kimg")))
        return Constant(float(text)) if 0 < float(text) < 1 else None
    except ValueError:
        return None


def _shorter_average(decay: Decay, updates: int, batch: int) -> str:
    if isinstance(decay, HalfLife):
        kimg = f"{decay.ramp * updates * batch / 1000:.2g}"
        return f"ema.half_lives_kimg=[{kimg}] ema.select={kimg}kimg"
    fitting = f"{max(math.floor((1 - 10 / updates) * 1e4) / 1e4, 0.5):g}"
    return f"ema.decays=[{fitting}] ema.select={fitting}"


def too_few_updates(run: Evidence) -> Finding | None:
    """Far fewer updates than the 1e5 a network of real size needs."""
    length, cosine = run.length, run.series("cosine_sim_V_vc")
    if not length or length >= ENOUGH_UPDATES:
        return None
    unlearned = cosine is not None and cosine.end.value < COSINE_LEARNED
    about = round(length, 1 - len(str(length)) + 1)
    sizes = (("samples", run.sizes.samples), ("batch", run.sizes.batch))
    epochs = round(ENOUGH_UPDATES * max(run.epochs) / run.updates) if run.updates and run.epochs else 0
    return Finding(
        "too_few_updates",
        "problem" if unlearned and length < FEW_UPDATES else "warning",
        f"too few updates: about {about:,} against {ENOUGH_UPDATES:,}",
        (
            Figure("updates", length),
            *(Figure(name, size) for name, size in sizes if size),
            *((cosine.end,) if cosine else ()),
        ),
        "Epochs of a small set are short: what counts is the number of updates, and the direction of V comes late. "
        + (
            f"With this set and batch size, 100,000 updates are {epochs:,} epochs."
            if epochs
            else "Toys and small latents need less."
        ),
        f"training.updates={ENOUGH_UPDATES}",
        ENOUGH_UPDATES / length,
    )


def sampler_drift(run: Evidence) -> Finding | None:
    """The times drawn are not the times configured, or change while the run goes."""
    count = run.series("sampling.count")
    limit = max(SAMPLER_DRIFT, 1 / math.sqrt(max(count.end.value if count else 100.0, 1.0)))
    off: list[tuple[float, Figure, Figure]] = []
    for name in ("t_mean", "t_std", "h_mean", "h_zero_frac"):
        drawn, expected = run.series(f"sampling.{name}"), _expected(run, name)
        if drawn is not None and expected is not None:
            off.append((abs(drawn.end.value - expected.value), drawn.end, expected))
    worst = max(off, key=lambda each: each[0], default=None)
    if worst is None or worst[0] <= limit:
        return None
    return Finding(
        "sampler_drift",
        "warning",
        f"sampler drift: {worst[1].name} is {worst[1].value:.3g} instead of {worst[2].value:.3g}",
        tuple(figure for gap, drawn, expected in off if gap > limit for figure in (drawn, expected)),
        "The pairs (r, t) no longer follow the configured distribution, so losses of different epochs mean different "
        "things: a resumed run with other settings, or a broken random stream.",
        "compare the times section of config.yaml with the command that resumed the run",
        worst[0] / limit,
    )


def _expected(run: Evidence, name: str) -> Figure | None:
    """What the configured sampler gives: as the run recorded it, as it was set, or else what it gave at first."""
    recorded, drawn = run.series(f"sampling.expected.{name}"), run.series(f"sampling.{name}")
    if recorded is not None:
        return recorded.end
    share = finite(run.setting("times.data_proportion"))
    if name == "h_zero_frac" and share is not None:
        return Figure("times.data_proportion", 1.0 if run.setting("objective.name") == "rectflow" else share)
    if drawn is None or finite(run.setting("times.gap_curriculum")):
        return None
    return drawn.start


def finite_difference_in_bf16(run: Evidence) -> Finding | None:
    """du/dt by finite differences of a network that computes in bf16."""
    if run.setting("objective.derivative") != "finite-difference" or run.setting("training.precision") != "bf16":
        return None
    if run.setting("objective.name") == "rectflow":
        return None
    step = finite(run.setting("objective.fd_step")) or 1e-3
    rounding = 2.0**-9 / step
    return Finding(
        "finite_difference_in_bf16",
        "problem",
        f"du/dt by finite differences under bf16 is noise: rounding alone makes {rounding:.2g} |u| of it",
        (Figure("objective.fd_step", step), Figure("relative rounding of bf16", 2.0**-9)),
        "bf16 keeps 8 bits of u, and the difference is divided by fd_step: on the MAISI U-Net the error was 1380 %, "
        "against 4e-5 for the exact derivative in float32. `neuromf doctor --jvp` measures it.",
        "objective.derivative=exact",
        rounding,
    )


def halted(run: Evidence) -> Finding | None:
    """A guard ended the run."""
    if run.halted is None:
        return None
    step, raw = finite(run.halted.get("global_step")), run.series("raw_loss_mean")
    last = finite(run.halted.get("raw_loss_mean"))
    numbers = [Figure("updates", step)] if step is not None else []
    numbers += [raw.lowest] if raw else []
    numbers += [Figure("raw_loss_mean of the last, unfinished epoch", last)] if last is not None else []
    return Finding(
        "halted",
        "problem",
        "a guard ended the run" + ("" if step is None else f" after update {step:,.0f}"),
        tuple(numbers),
        "The raw loss passed a hundred times its first value, or too many updates were not finite. The last checkpoint "
        "before it is kept.",
        run.slower(),
        1.0 if last is None or raw is None else max(last / max(raw.lowest.value, 1e-12), 1.0),
    )
