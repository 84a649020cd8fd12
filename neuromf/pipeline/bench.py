"""`neuromf bench`: what an update, the derivative, a sample and a decode cost here, with references in the same run.

Every way is called once a round, round after round, so that whatever else the machine does falls on all of them; the
medians are reported. Latents are random numbers: no data are needed.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from neuromf.config import TrainConfig
from neuromf.devices import torch_device
from neuromf.losses.derivative import Field, exact, finite_difference
from neuromf.losses.path import data_estimate
from neuromf.models.autoencoder import Autoencoder
from neuromf.models.networks import build_network, check_latent_size, parameter_count
from neuromf.reporting.tables import markdown_table
from neuromf.sampling.solvers import jump, time_grid
from neuromf.training.draws import draw_times
from neuromf.training.objective import Objective
from neuromf.training.optim import build_optimizer
from neuromf.training.processes import make_accelerator, prepare

WARM_UP, FEWEST, MOST = 2, 3, 30
GIB = 2**30
Way = Callable[[], Any]


class Cost(NamedTuple):
    """One way of doing something.

    Attributes:
        of: what is done: an update, the derivative, samples, a decode.
        way: how.
        ms: median of `calls`.
        low_ms, high_ms: their quartiles.
        relative: to the first way of the same thing.
        peak_gib: most memory held on a GPU meanwhile, everything included; None on a CPU.
    """

    of: str
    way: str
    ms: float
    low_ms: float
    high_ms: float
    calls: int
    relative: float
    peak_gib: float | None


@dataclass(frozen=True)
class BenchReport:
    """Costs, and the circumstances under which they hold."""

    facts: dict[str, Any]
    costs: list[Cost]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return {**self.facts, "costs": [cost._asdict() for cost in self.costs]}

    def lines(self) -> list[str]:
        """Facts, and a table."""
        rows = [
            {
                "what": cost.of,
                "how": cost.way,
                "ms": f"{cost.ms:.1f}",
                "quartiles": f"{cost.low_ms:.1f} to {cost.high_ms:.1f}",
                "times": f"{cost.relative:.2f}",
                **({} if cost.peak_gib is None else {"peak GiB": f"{cost.peak_gib:.2f}"}),
            }
            for cost in self.costs
        ]
        return [*(f"{name:<12}{value}" for name, value in self.facts.items()), "", markdown_table(rows)]


def bench(
    config: TrainConfig,
    *,
    shape: Sequence[int],
    batch: int | None = None,
    device: str = "auto",
    autoencoder: Autoencoder | None = None,
    seconds: float = 20.0,
    progress: Any = None,
) -> BenchReport:
    """Time a configuration's own network, objective and optimiser on random latents.

    * an update: plain flow matching (r = t throughout), then as configured;
    * the derivative at the samples with r < t: one evaluation of the network, ours, `torch.func.jvp`, and the
      finite difference that ours replaces;
    * `batch` samples with one and ten evaluations; one decode.

    Args:
        config: resolved settings; classes and guidance are left aside.
        shape: (C, I, J, K) of a latent.
        batch: samples; `training.batch_size` when None.
        device: auto, cpu, cuda or mps.
        autoencoder: decodes one random latent of its own channels and this grid, if given.
        seconds: how long each group is timed.
        progress: callback (description, done, total).

    Raises:
        UserError: a grid the network cannot take.
    """
    check_latent_size(config.network.model_dump(), shape[1:])
    config, place, batch = _without_conditions(config), torch_device(device), batch or config.training.batch_size
    work = _Work(config, tuple(shape), batch, device)
    groups: dict[str, dict[str, Way]] = {
        "update": {"flow matching, r = t": partial(work.update, 1.0), "as configured": work.update},
        "derivative": work.derivatives(),
        "samples": {f"{n} evaluations"[: None if n > 1 else -1]: partial(work.sample, n) for n in (1, 10)},
    }
    if config.objective.name == "rectflow":
        del groups["update"]["as configured"], groups["derivative"]
    if autoencoder is not None:
        latent = torch.randn(1, autoencoder.latent_channels, *shape[1:], device=place)
        groups["decode"] = {autoencoder.name: partial(autoencoder.decode, latent)}
    costs = [cost for of, ways in groups.items() for cost in _timed(of, ways, place, seconds, progress)]
    facts = {
        "preset": config.preset,
        "network": f"{config.network.name}, {parameter_count(work.bare.network) / 1e6:.2f} M parameters",
        "latents": f"{batch} x {' x '.join(map(str, shape))}, {work.moving} with r < t",
        "precision": work.accelerator.mixed_precision,
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else f"{place.type}, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    return BenchReport(facts, costs)


def _without_conditions(config: TrainConfig) -> TrainConfig:
    network = config.network.model_copy(update={"classes": False, "guidance": False})
    guidance = config.guidance.model_copy(update={"enabled": False})
    objective = config.objective.model_copy(update={"perceptual_weight": 0.0, "channel_weights": "none"})
    return config.model_copy(update={"network": network, "guidance": guidance, "objective": objective})


class _Work:
    """The parts of a run that are timed, on random latents.

    Args:
        config: of the run.
        shape: (C, I, J, K).
        batch: samples an update.
        device: auto, cpu, cuda or mps.
    """

    def __init__(self, config: TrainConfig, shape: tuple[int, ...], batch: int, device: str) -> None:
        self.config, self.shape, self.batch = config, shape, batch
        self.accelerator = make_accelerator(device, config.training.precision)
        torch.manual_seed(config.training.seed)
        network = build_network(config.network.model_dump(), shape)
        self.bare = Objective(network, config.objective, channels=shape[0]).to(self.accelerator.device)
        self.objective, self.optimizer = prepare(
            self.accelerator, self.bare, network, build_optimizer(self.bare, config.training)
        )
        self.x, self.eps = torch.randn(2, batch, *shape, device=self.accelerator.device)
        r, t = self._times(config.times.data_proportion)
        self.moving = int((r < t).sum())

    def _times(self, data_proportion: float) -> tuple[Tensor, Tensor]:
        times = self.config.times.model_copy(update={"data_proportion": data_proportion})
        seed, device = self.config.training.seed, self.accelerator.device
        r, t = draw_times(seed, "bench", 0, self.batch, times, self.config.objective)
        return r.to(device), t.to(device)

    def update(self, data_proportion: float | None = None) -> None:
        """Loss, gradient, clipping and the optimiser's step; averages and telemetry aside."""
        share = self.config.times.data_proportion if data_proportion is None else data_proportion
        self.objective.train()
        self.optimizer.zero_grad(set_to_none=True)
        with self.accelerator.autocast():
            loss = self.objective(self.x, self.eps, *self._times(share))
        self.accelerator.backward(loss.value)
        self.accelerator.clip_grad_norm_(self.objective.parameters(), self.config.training.clip or float("inf"))
        self.optimizer.step()

    def derivatives(self) -> dict[str, Way]:
        """Ways of taking du/dt at as many samples as have r < t; the first is one evaluation of the network."""
        z, tangent = self.x[: max(self.moving, 1)], self.eps[: max(self.moving, 1)]
        r, t = torch.zeros(len(z), device=z.device), torch.full((len(z),), 0.5, device=z.device)
        at = (self.bare.u, z, r, t, tangent)
        return {
            "one evaluation of u": partial(_evaluate, self.bare.u, z, r, t),
            "exact": partial(exact, *at),
            "torch.func.jvp": partial(_torch_jvp, *at),
            "finite difference": partial(finite_difference(self.config.objective.fd_step), *at),
        }

    @torch.inference_mode()
    def sample(self, nfe: int) -> Tensor:
        """Whitened latents of a whole batch."""
        prediction = self.config.objective.prediction
        estimate = partial(self._data_estimate, prediction) if prediction == "x" else None
        with self.accelerator.autocast():
            return jump(self.bare.u, self.eps, time_grid(nfe), estimate)

    def _data_estimate(self, prediction: Any, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return data_estimate(self.bare.network(z, r, t), z, t, prediction)


@torch.no_grad()
def _evaluate(u: Field, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
    return u(z, r, t)


@torch.no_grad()
def _torch_jvp(u: Field, z: Tensor, r: Tensor, t: Tensor, tangent: Tensor) -> Tensor:
    """The derivative by torch's own rules."""
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(lambda z_, t_: u(z_, r, t_), (z, t), (tangent, torch.ones_like(t)))[1]


def _timed(of: str, ways: dict[str, Way], place: torch.device, seconds: float, progress: Any) -> list[Cost]:
    """Rounds of one call each, until the time is over."""
    taken: dict[str, list[float]] = {way: [] for way in ways}
    peaks: dict[str, int] = dict.fromkeys(ways, 0)
    for way, call in ways.items():
        for _ in range(WARM_UP):
            call()
        peaks[way] = _peak(place, call)
    began = time.perf_counter()
    for done in range(1, MOST + 1):
        for way, call in ways.items():
            taken[way].append(_milliseconds(place, call))
        over = done >= FEWEST and time.perf_counter() - began > seconds
        if progress is not None:
            progress(f"timing {of}", MOST if over else done, MOST)
        if over:
            break
    first = statistics.median(next(iter(taken.values())))
    return [_cost(of, way, found, first, peaks[way] if place.type == "cuda" else None) for way, found in taken.items()]


def _cost(of: str, way: str, taken: Sequence[float], first: float, peak: int | None) -> Cost:
    low, middle, high = statistics.quantiles(taken, n=4, method="inclusive")
    return Cost(of, way, middle, low, high, len(taken), middle / first, None if peak is None else peak / GIB)


def _milliseconds(place: torch.device, call: Way) -> float:
    began = time.perf_counter()
    call()
    if place.type != "cpu":
        torch.accelerator.synchronize()  # kernels are only queued
    return (time.perf_counter() - began) * 1e3


def _peak(place: torch.device, call: Way) -> int:
    """Bytes held at most while it is called, on a GPU."""
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place)
    call()
    return torch.cuda.max_memory_allocated(place) if place.type == "cuda" else 0
