"""`neuromf doctor --jvp`: how far each way of taking du/dt is from the truth, on a preset's own network.

The truth is the exact derivative in float64, itself compared with central differences. The weights are random; those
that start at zero are drawn too, or u would hardly depend on time. What is differentiated is the u of the objective,
with an x-prediction's division by t, as in training.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from neuromf.conditions import Condition
from neuromf.config import TrainConfig
from neuromf.devices import torch_device
from neuromf.errors import UserError
from neuromf.losses.derivative import Field, exact, finite_difference
from neuromf.losses.path import interpolate, velocity
from neuromf.models.networks import build_network, check_latent_size, parameter_count
from neuromf.pipeline.doctor_report import DerivativeReport, Reference, Row
from neuromf.pipeline.recorder import Silent
from neuromf.training.memory import GIB, available
from neuromf.training.objective import Objective

CHANNELS, CLASSES = 4, 3
R, T = 0.25, 0.625  # without rounding in bf16, too
LEFT_IN_AUTOCAST = "exact, inside autocast"
_CENTRAL_STEP = 1e-4  # over the factor on the times
_LONG_MS = 5e3  # a call longer than this is not repeated to be timed warm

Scale = tuple[float, float]
"""The factors on the times: of all of them (`time_scale`), and one more on t (`t_scale`)."""


class Point(NamedTuple):
    """Where the derivative is taken, and along which tangent: (1, C, I, J, K) or (1,) each, of float32 values."""

    z: Tensor
    r: Tensor
    t: Tensor
    tangent: Tensor

    def cast(self, dtype: torch.dtype, device: torch.device) -> Point:
        """The same numbers in another precision."""
        return Point(*(value.to(device, dtype) for value in self))


def check_derivative(
    config: TrainConfig,
    *,
    size: Sequence[int] | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: Any = None,
) -> DerivativeReport:
    """Compare the derivative strategies on the network of `config`, at one sample of 4 channels.

    Args:
        config: resolved settings.
        size: latent I, J, K; None is `smallest_size`.
        device: auto, cpu, cuda or mps.
        seed: of the weights, the sample and its conditions.
        progress: an object with `message(text)`.

    Raises:
        UserError: a size the network cannot take, or more memory needed than there is.
    """
    listener, started, place = progress or Silent(), time.perf_counter(), torch_device(device)
    shape = _latent_shape(config, size, device)
    listener.message(f"building the network for latents of {shape}")
    objective, condition = _random_objective(config, shape, seed), _random_condition(config, seed)
    field = _field(objective, condition)
    point = _random_point(objective, condition, shape, seed)
    in_use, fd_step = _in_use(config, place), config.objective.fd_step
    references, rows, held = [], [], 0
    for i, scale in enumerate(_scales(objective)):
        times = _set_scale(objective, scale)
        listener.message(f"times x{times:g}: the float64 reference, then each strategy")
        references.append(_reference(objective, field, point, place, times))
        held = max(held, _held(place))
        objective.to(place).float()
        rows += _compare(field, point.cast(torch.float32, place), references[-1], fd_step, None if i else in_use)
    facts = {
        "network": config.network.name,
        "parameters": parameter_count(objective.network),
        "prediction": config.objective.prediction,
        "latent_shape": shape,
        "size": "as asked" if size else "smallest that fits (--size gives others)",
        "r": R,
        "t": T,
        "memory_gib": round(held / GIB, 2),
        "seconds": round(time.perf_counter() - started, 1),
    }
    return DerivativeReport(config.preset, config.objective.name, place.type, fd_step, facts, references, rows)


def smallest_size(settings: Mapping[str, Any]) -> tuple[int, int, int]:
    """The smallest cube of latent cells that a network takes without padding; for a transformer, two blocks an axis.

    One block alone would have no other to attend to.

    Args:
        settings: the `network` section.
    """
    unpadded = {**settings, "pad": False}
    n = next(n for n in count(1) if _fits(unpadded, n)) * (2 if settings["name"] == "mit" else 1)
    return n, n, n


def _fits(settings: Mapping[str, Any], n: int) -> bool:
    try:
        check_latent_size(settings, (n, n, n))
    except UserError:
        return False
    return True


def _latent_shape(config: TrainConfig, size: Sequence[int] | None, device: str) -> tuple[int, ...]:
    """(C, I, J, K) of the sample, refused where the network cannot take it or does not fit the memory."""
    settings = config.network.model_dump()
    shape = (CHANNELS, *(size or smallest_size(settings)))
    check_latent_size(settings, shape[1:])
    with torch.device("meta"):
        needed = 8 * parameter_count(build_network(settings, shape, classes=CLASSES))
    there, name = available(device)
    if needed > there:
        raise UserError(
            f"the network takes {needed / GIB:.1f} GiB in float64 and {name} has {there / GIB:.1f} GiB",
            "check a narrower one of the same kind, as in network.channels='[32,64,128,256]' or network.size=B",
        )
    return shape


# --- what is compared -----------------------------------------------------------------------------------------


def _random_objective(config: TrainConfig, shape: Sequence[int], seed: int) -> Objective:
    """The preset's objective on its network, with no weight left at zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = build_network(config.network.model_dump(), shape, classes=CLASSES)
        with torch.no_grad():
            for weight in network.parameters():
                if not weight.any():
                    weight.normal_(0, weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.3)
    classes = CLASSES if config.network.classes else 0
    return Objective(network, config.objective, guidance=config.guidance, classes=classes, channels=shape[0])


def _random_condition(config: TrainConfig, seed: int) -> Condition | None:
    """A class, a scale and an interval, as far as the network takes them."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(CLASSES, (1,), generator=generator) if config.network.classes else None
    omega, interval = 1 + 7 * torch.rand(1, generator=generator), torch.rand(1, 2, generator=generator).sort().values
    if config.network.guidance:
        return Condition(label, omega, interval)
    return None if label is None else Condition(label)


def _field(objective: Objective, condition: Condition | None) -> Field:
    """u(z, r, t) under a condition, on the device of z."""
    return lambda z, r, t: objective.u(z, r, t, None if condition is None else condition.to(z.device))


@torch.no_grad()
def _random_point(objective: Objective, condition: Condition | None, shape: Sequence[int], seed: int) -> Point:
    """z_t of Gaussian data and noise, and the tangent that the objective takes there."""
    x, eps = torch.randn(2, 1, *shape, generator=torch.Generator().manual_seed(seed + 1))
    r, t = torch.tensor([R]), torch.tensor([T])
    z = interpolate(x, eps, t)
    own = objective.config.name in ("imf", "pmf")
    return Point(z, r, t, objective.v(z, t, condition) if own else velocity(x, eps))


def _in_use(config: TrainConfig, place: torch.device) -> tuple[str, str] | None:
    """Strategy and precision that training would use on this device, None without a derivative."""
    if config.objective.name == "rectflow":
        return None
    precision = config.training.precision
    if precision == "auto":
        precision = "bf16" if place.type == "cuda" else "fp32"
    return config.objective.derivative, precision


def _scaled(objective: nn.Module) -> Any:
    """The module that multiplies times, None in a network without one."""
    return next((module for module in objective.modules() if hasattr(module, "time_scale")), None)


def _scales(objective: nn.Module) -> list[Scale]:
    """The network's own factors on the times first; then times x1000, or x1 for a network that has a factor."""
    module = _scaled(objective)
    if module is None:
        return [(1.0, 1.0)]
    own = (float(module.time_scale), float(module.t_scale))
    return [own, (1000.0, 1.0) if own == (1.0, 1.0) else (1.0, 1.0)]


def _set_scale(objective: nn.Module, scale: Scale) -> float:
    """Put these factors into the network; what t is multiplied by in all."""
    module = _scaled(objective)
    if module is not None:
        module.time_scale, module.t_scale = scale
    return math.prod(scale)


# --- comparing ------------------------------------------------------------------------------------------------


def _reference(objective: nn.Module, field: Field, point: Point, place: torch.device, times: float) -> Reference:
    """The exact derivative in float64, and how far Richardson's central differences are from it."""
    at = point.cast(torch.float64, torch.device("cpu") if place.type == "mps" else place)  # MPS has no float64
    objective.to(at.z.device).double()
    du_dt, milliseconds = _timed(lambda: exact(field, *at), at.z.device)
    step = _CENTRAL_STEP / times
    coarse, fine = _central(field, at, step), _central(field, at, step / 2)
    disagreement = _relative_error((4 * fine - coarse) / 3, du_dt)
    return Reference(times, du_dt.cpu(), disagreement, milliseconds)


@torch.no_grad()
def _central(field: Field, at: Point, step: float) -> Tensor:
    """(u(z + d tangent, r, t + d) - u(z - d tangent, r, t - d)) / 2 d."""
    ahead = field(at.z + step * at.tangent, at.r, at.t + step)
    behind = field(at.z - step * at.tangent, at.r, at.t - step)
    return (ahead - behind) / (2 * step)


def _compare(
    field: Field, at: Point, reference: Reference, fd_step: float, in_use: tuple[str, str] | None
) -> list[Row]:
    """Every strategy in float32, and as it does when training runs under bf16 autocast."""
    ways: dict[tuple[str, str], Callable[[], Tensor]] = {
        ("exact", "fp32"): partial(exact, field, *at),
        ("exact", "bf16"): partial(exact, field, *at),
        (LEFT_IN_AUTOCAST, "bf16"): partial(_left_in_autocast, field, at),
        ("finite-difference", "fp32"): partial(finite_difference(fd_step), field, *at),
        ("finite-difference", "bf16"): partial(finite_difference(fd_step), field, *at),
    }
    rows = []
    for (strategy, precision), way in ways.items():
        error, milliseconds, failure = _attempt(way, precision, reference.du_dt, at.z.device)
        used = (strategy, precision) == in_use
        rows.append(Row(strategy, precision, reference.times, used, error, milliseconds, failure))
    return rows


@torch.no_grad()
def _left_in_autocast(field: Field, at: Point) -> Tensor:
    """What `exact` avoids: forward mode through layers that autocast rounds."""
    with sdpa_kernel(SDPBackend.MATH):
        ones = torch.ones_like(at.t)
        return torch.func.jvp(lambda z, t: field(z, at.r, t), (at.z, at.t), (at.tangent, ones))[1]


def _attempt(
    way: Callable[[], Tensor], precision: str, truth: Tensor, place: torch.device
) -> tuple[float | None, float | None, str]:
    """Relative error and milliseconds, or why it does not run."""
    try:
        with torch.autocast(place.type, torch.bfloat16, enabled=precision == "bf16"):
            found, milliseconds = _timed(way, place)
    except (RuntimeError, NotImplementedError) as error:
        if "memory" in str(error):
            raise
        return None, None, (str(error).splitlines() or [type(error).__name__])[0]
    return _relative_error(found.cpu(), truth), milliseconds, ""


def _timed(way: Callable[[], Tensor], place: torch.device) -> tuple[Tensor, float]:
    """The result and its milliseconds, of the second call unless the first was long."""
    found, milliseconds = _timed_once(way, place)
    return (found, milliseconds) if milliseconds > _LONG_MS else _timed_once(way, place)


def _timed_once(way: Callable[[], Tensor], place: torch.device) -> tuple[Tensor, float]:
    started = time.perf_counter()
    found = way()
    if place.type != "cpu":
        torch.accelerator.synchronize()  # kernels are only queued
    return found, (time.perf_counter() - started) * 1e3


def _held(place: torch.device) -> int:
    """Bytes, with the weights in float64."""
    return torch.cuda.max_memory_allocated() if place.type == "cuda" else psutil.Process().memory_info().rss


def _relative_error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())
