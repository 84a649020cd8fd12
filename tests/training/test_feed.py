from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import pytest
import torch
from torch.utils.data import Dataset

from neuromf.conditions import Condition
from neuromf.config import TrainConfig
from neuromf.training.feed import Batch, Clock, Feed, labels_of

CPU = torch.device("cpu")
SHAPE = (2, 3, 3, 3)
COUNT, UPDATES = 11, 9


class Numbers(Dataset):
    """Item i is filled with i; its class is i modulo 3."""

    def __init__(self, shape: tuple[int, ...] = SHAPE, classes: bool = True) -> None:
        self.shape = shape
        self.labels = torch.arange(COUNT) % 3 if classes else None

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full(self.shape, float(index))


def settings(batch: int, accumulation: int = 2, workers: int = 0, **sections) -> TrainConfig:
    """Everything that can be drawn is drawn."""
    sections = {
        "network": {"classes": True, "guidance": True},
        "guidance": {"enabled": True, "label_drop": 0.5},
        "objective": {"perceptual_weight": 1.0},
        "times": {"data_proportion": 0.5, "gap_start": 0.3, "gap_curriculum": 0.6},
        **sections,
    }
    training = {"updates": UPDATES, "batch_size": batch, "accumulation": accumulation, "workers": workers}
    return TrainConfig(_environment=False, training=training, **sections)


def feed(rank: int = 0, world: int = 1, batch: int = 3, dataset: Numbers | None = None, **options) -> Feed:
    config = settings(batch, **options)
    clock = Clock(COUNT, batch * config.training.accumulation * world, config)
    return Feed(dataset or Numbers(), clock, CPU, rank, world)


def flat(batch: Batch) -> Iterator[torch.Tensor | float | None]:
    """Every tensor of a batch."""
    for value in (batch.x, *batch.draws, batch.progress):
        yield from value if isinstance(value, Condition) else (value,)


def same(a: Batch, b: Batch) -> bool:
    pairs = list(zip(flat(a), flat(b), strict=True))
    return len(pairs) == 10 and all(torch.equal(torch.as_tensor(x), torch.as_tensor(y)) for x, y in pairs)


@pytest.mark.parametrize("shape", [SHAPE, (4, 1, 1, 1)])
@pytest.mark.parametrize("update", [0, 5])
def test_two_processes_see_together_what_one_with_twice_the_batch_sees(update, shape):
    alone = feed(batch=6, dataset=Numbers(shape)).batches(update)
    first, second = (feed(rank, 2, batch=3, dataset=Numbers(shape)).batches(update) for rank in (0, 1))
    for one, a, b in zip(alone, first, second, strict=True):
        for whole, *parts in zip(flat(one), flat(a), flat(b), strict=True):
            if isinstance(whole, float):
                assert parts == [whole, whole]
            else:
                assert torch.equal(whole, torch.cat(parts))


def test_a_run_that_goes_on_sees_the_batches_of_the_one_that_never_stopped():
    whole = list(feed().batches(0))
    assert len(whole) == UPDATES * 2
    for update in (1, 4, 8):
        rest = list(feed().batches(update))
        assert len(rest) == (UPDATES - update) * 2
        assert all(same(a, b) for a, b in zip(whole[2 * update :], rest, strict=True))
    assert not same(whole[0], whole[1])
    assert list(feed().batches(UPDATES)) == []


def test_accumulation_splits_the_images_of_an_update_and_nothing_else():
    """Two micro-batches of 3 have the images and the noise of one of 6; the progress is the update's."""
    together, apart = list(feed(batch=6, accumulation=1).batches(0)), list(feed(batch=3, accumulation=2).batches(0))
    for i, whole in enumerate(together):
        parts = apart[2 * i : 2 * i + 2]
        assert torch.equal(whole.x, torch.cat([p.x for p in parts]))
        assert torch.equal(whole.draws.eps, torch.cat([p.draws.eps for p in parts]))
        assert torch.equal(whole.draws.condition.label, torch.cat([p.draws.condition.label for p in parts]))
        assert [p.progress for p in parts] == [whole.progress] * 2


def test_the_progress_is_the_share_of_finished_updates():
    assert [batch.progress for batch in feed().batches(7)] == pytest.approx([7 / 9, 7 / 9, 8 / 9, 8 / 9])


def test_classes_stay_with_their_images():
    for batch in feed().batches(0):
        assert torch.equal(batch.draws.condition.label, batch.x[:, 0, 0, 0, 0].long() % 3)


def test_every_image_is_seen_equally_often():
    seen = torch.cat([batch.x[:, 0, 0, 0, 0] for batch in feed().batches(0)])
    assert sorted(seen[:COUNT].tolist()) == list(range(COUNT))
    counts = torch.bincount(seen.long())
    assert counts.max() - counts.min() <= 1


def test_loader_processes_change_nothing():
    alone, helped = feed().batches(6), feed(workers=2).batches(6)
    assert all(same(a, b) for a, b in zip(alone, helped, strict=True))


def test_the_gap_grows_with_the_updates():
    gaps = [(batch.draws.t - batch.draws.r).max() for batch in feed(batch=200, accumulation=1).batches(0)]
    assert gaps[0] <= 0.3 + 1e-6
    assert gaps[-1] > 0.8


def test_a_network_without_classes_is_told_none_even_of_images_that_have_some():
    plain = {"network": {}, "guidance": {}, "objective": {}}
    for dataset in (Numbers(), Numbers(classes=False)):
        draws = next(feed(dataset=dataset, **plain).batches(0)).draws
        assert draws[3:] == (None, None, None)
    assert labels_of(Numbers(classes=False)) is None


def test_an_image_that_costs_a_read_is_read_when_it_is_trained_on_alone():
    reads: list[int] = []

    class Counted(Numbers):
        def __getitem__(self, index: int) -> torch.Tensor:
            reads.append(index)
            return super().__getitem__(index)

    list(islice(feed(dataset=Counted()).batches(0), 8))
    assert len(reads) <= 8 * 3 + 1  # one look at the shape


@pytest.mark.parametrize(("samples", "batch", "expected"), [(990, 128, 10), (6471, 128, 50), (5, 16, 10)])
def test_an_epoch_is_one_pass_but_at_least_ten_updates(samples, batch, expected):
    config = TrainConfig(_environment=False, training={"updates": None, "epochs": 3})
    clock = Clock(samples, batch, config)
    assert clock.epoch_updates == expected
    assert clock.updates == 3 * expected
