from __future__ import annotations

import math

import pytest
import torch
from torch.utils.data import Dataset

from neuromf.config import TrainConfig
from neuromf.models.mlp import MeanFlowMLP
from neuromf.sampling.noise import noise_batch
from neuromf.training.ema import Constant, WeightAverage
from neuromf.training.objective import Objective
from neuromf.training.validation import (
    COLLECTED_NFE,
    VALIDATION_SAMPLES,
    channel_raw_losses,
    fixed_samples,
    validate,
)

CPU = torch.device("cpu")
SHAPE = (2, 2, 2, 2)


class Latents(Dataset):
    def __init__(self, count: int, classes: int = 0) -> None:
        self.items = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1))
        self.labels = torch.arange(count) % classes if classes else None

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.items[index]


def config_of(batch: int = 4, **sections) -> TrainConfig:
    return TrainConfig(
        _environment=False, training={"updates": 9, "batch_size": batch}, intervals={"sample_count": 5}, **sections
    )


def objective_of(config: TrainConfig, classes: int = 0) -> tuple[Objective, WeightAverage]:
    torch.manual_seed(0)
    network = MeanFlowMLP(SHAPE, width=8, depth=2, classes=classes)
    objective = Objective(network, config.objective, guidance=config.guidance, classes=classes)
    return objective, WeightAverage(network, Constant(0.9))


def validated(config: TrainConfig, data: Dataset, classes: int = 0) -> dict[str, float | None]:
    return validate(*objective_of(config, classes), data, config, CPU)


def test_the_figures_never_change_and_do_not_depend_on_the_batch():
    data = Latents(10)
    once = validated(config_of(4), data)
    assert validated(config_of(4), data) == once
    for name, value in validated(config_of(3), data).items():
        assert value == pytest.approx(once[name], rel=1e-6)
    assert validated(config_of(4, objective={"norm_p": 0.0}), data)["val_loss"] == pytest.approx(once["val_raw_loss"])


def test_no_data_gives_no_figure():
    assert validated(config_of(), Latents(0)) == {"val_loss": None, "val_raw_loss": None}


def test_at_most_64_latents_are_looked_at():
    assert VALIDATION_SAMPLES == 64
    few, many = Latents(64), Latents(64)
    many.items = torch.cat([few.items, torch.full((5, *SHAPE), math.nan)])
    assert validated(config_of(), many) == validated(config_of(), few)


def test_the_average_is_judged_and_the_trained_weights_come_back():
    config, data = config_of(), Latents(4)
    objective, average = objective_of(config)
    before = validate(objective, average, data, config, CPU)
    with torch.no_grad():
        for p in objective.parameters():
            p.mul_(3)
    trained = {name: p.clone() for name, p in objective.named_parameters()}
    assert validate(objective, average, data, config, CPU) == before
    assert all(torch.equal(p, trained[name]) for name, p in objective.named_parameters())
    objective, other = objective_of(config)
    with torch.no_grad():
        for weights in other.weights.values():
            weights.mul_(3)
    assert validate(objective, other, data, config, CPU) != before


def test_schedules_stand_where_the_training_ends():
    ends = {"name": "alphaflow", "alpha_schedule": (0.0, 1.0)}
    meanflow = validated(config_of(objective={"name": "meanflow"}), Latents(6))
    assert validated(config_of(objective=ends), Latents(6)) == meanflow
    whole = validated(config_of(), Latents(6))
    assert validated(config_of(times={"gap_start": 0.1, "gap_curriculum": 0.5}), Latents(6)) == whole


def test_classes_are_told():
    config = config_of(network={"classes": True})
    data = Latents(6, classes=2)
    found = validated(config, data, classes=2)
    data.labels = 1 - data.labels
    assert validated(config, data, classes=2) != found


def test_samples_are_one_step_from_noise_that_never_changes():
    config = config_of()
    objective, average = objective_of(config)
    found = fixed_samples(objective, average, config, SHAPE, CPU)[1]
    noise = noise_batch(0, range(5), SHAPE)
    with torch.no_grad():
        assert torch.equal(found, objective.network(noise, torch.zeros(5), torch.ones(5)))  # an x-prediction's own
    u = config_of(objective={"prediction": "u"})
    objective, average = objective_of(u)
    with torch.no_grad():
        expected = noise - objective.network(noise, torch.zeros(5), torch.ones(5))
    torch.testing.assert_close(fixed_samples(objective, average, u, SHAPE, CPU)[1], expected)


@pytest.mark.parametrize("prediction", ["u", "x"])
def test_a_flow_model_steps_along_the_only_velocity_it_knows(prediction):
    config = config_of(objective={"name": "rectflow", "prediction": prediction})
    objective, average = objective_of(config)
    noise, one = noise_batch(0, range(5), SHAPE), torch.ones(5)
    with torch.no_grad():
        output = objective.network(noise, one, one)
    expected = noise - output if prediction == "u" else output
    torch.testing.assert_close(fixed_samples(objective, average, config, SHAPE, CPU)[1], expected)


def test_the_classes_take_turns_in_the_samples():
    config = config_of(network={"classes": True})
    objective, average = objective_of(config, classes=2)
    seen: list[list[int]] = []
    objective.network.class_embedding.register_forward_hook(lambda _, label, __: seen.append(label[0].tolist()))
    fixed_samples(objective, average, config, SHAPE, CPU)
    assert seen == [[0, 1, 0, 1, 0]] * sum(COLLECTED_NFE)


@pytest.mark.parametrize("name", ["imf", "rectflow"])
def test_samples_with_more_evaluations_come_from_the_same_noise(name):
    """The exact field of data that are all zero: z / t, whose every path ends at zero; a half of it stops half way."""
    config = config_of(objective={"name": name, "prediction": "u"})
    objective, average = objective_of(config)
    objective.u = lambda z, r, t, condition=None: 0.5 * z / t.reshape(-1, 1, 1, 1, 1)
    found = fixed_samples(objective, average, config, SHAPE, CPU)
    assert tuple(found) == COLLECTED_NFE
    noise = noise_batch(0, range(5), SHAPE)
    torch.testing.assert_close(found[1], 0.5 * noise)
    torch.testing.assert_close(found[2], 0.75 * 0.5 * noise)


def test_a_validation_that_is_not_finite_is_null():
    """JSON has no NaN: the run would end at its own summary."""
    broken = Latents(4)
    broken.items[0] = math.nan
    assert validated(config_of(), broken) == {"val_loss": None, "val_raw_loss": None}
    objective, _ = objective_of(config_of())
    assert channel_raw_losses(objective, broken, config_of(), CPU) == [None, None]


# --- by channel ------------------------------------------------------------------------------------------------------


def by_channel(config: TrainConfig, data: Dataset, classes: int = 0) -> list[float | None] | None:
    return channel_raw_losses(objective_of(config, classes)[0], data, config, CPU)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_channels_add_up_to_the_raw_loss_of_the_same_draws(reduction):
    config = config_of(objective={"loss_reduction": reduction})
    whole = validated(config, Latents(6))["val_raw_loss"]  # a fresh network's average is the network
    assert sum(by_channel(config, Latents(6))) == pytest.approx(whole, rel=1e-5)


def test_a_channel_that_is_off_is_the_one_that_is_named():
    data = Latents(6)
    data.items[:, 1] *= 30
    first, second = by_channel(config_of(), data)
    assert second > 50 * first


def test_the_trained_weights_are_looked_at_by_channel_not_their_average():
    config = config_of()
    objective, _ = objective_of(config)
    before = channel_raw_losses(objective, Latents(4), config, CPU)
    with torch.no_grad():
        for p in objective.parameters():
            p.mul_(3)
    assert channel_raw_losses(objective, Latents(4), config, CPU) != before


def test_every_objective_has_its_losses_by_channel():
    alphaflow = config_of(objective={"name": "alphaflow", "alpha_schedule": (0.0, 1.0)})
    assert by_channel(alphaflow, Latents(6)) == by_channel(config_of(objective={"name": "meanflow"}), Latents(6))
    assert len(by_channel(config_of(network={"classes": True}), Latents(6, classes=2), classes=2)) == 2
    assert by_channel(config_of(), Latents(0)) is None
