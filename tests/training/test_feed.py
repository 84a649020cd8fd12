from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import pytest
import torch
from torch.utils.data import Dataset

from neuromf.conditions import Condition
from neuromf.config import TrainConfig
from neuromf.training.feed import Batch, Clock, Feed, deal, labels_of

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


def by_noise(batches: list[Batch]) -> list[tuple]:
    """Every sample's image, draws and progress; noise tells samples apart."""
    rows = []
    for batch in batches:
        values = [v for v in flat(batch) if isinstance(v, torch.Tensor)]
        rows += [tuple(v[i].flatten().tolist() for v in values) + (batch.progress,) for i in range(len(batch.x))]
    return sorted(rows, key=lambda row: row[1])


@pytest.mark.parametrize("shape", [SHAPE, (4, 1, 1, 1)])
@pytest.mark.parametrize("update", [0, 5])
@pytest.mark.parametrize(("world", "batch", "accumulation"), [(2, 6, 1), (1, 3, 4), (2, 2, 3), (4, 3, 1)])
def test_an_update_is_the_same_however_it_is_shared(shape, update, world, batch, accumulation):
    """Processes and micro-batches get the samples of one process's batch of 12 between them, draws and all."""
    alone = list(feed(batch=12, accumulation=1, dataset=Numbers(shape)).batches(update))
    parts = [
        list(feed(rank, world, batch=batch, accumulation=accumulation, dataset=Numbers(shape)).batches(update))
        for rank in range(world)
    ]
    for u, whole in enumerate(alone):
        shared = [b for part in parts for b in part[u * accumulation : (u + 1) * accumulation]]
        assert all(len(b.x) == batch for b in shared)
        assert by_noise(shared) == by_noise([whole])


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_every_part_of_an_update_gets_its_share_of_the_costly_samples(parts):
    moving = torch.rand(12, generator=torch.Generator().manual_seed(3)) < 0.4
    shares = deal(moving, parts)
    assert sorted(torch.cat(shares).tolist()) == list(range(12))
    counts = [int(moving[at].sum()) for at in shares]
    assert max(counts) - min(counts) <= 1
    assert all(at.tolist() == sorted(at.tolist()) for at in shares)


def test_a_run_that_goes_on_sees_the_batches_of_the_one_that_never_stopped():
    whole = list(feed().batches(0))
    assert len(whole) == UPDATES * 2
    for update in (1, 4, 8):
        rest = list(feed().batches(update))
        assert len(rest) == (UPDATES - update) * 2
        assert all(same(a, b) for a, b in zip(whole[2 * update :], rest, strict=True))
    assert not same(whole[0], whole[1])
    assert list(feed().batches(UPDATES)) == []


def test_the_progress_is_the_share_of_finished_updates():
    assert [batch.progress for batch in feed().batches(7)] == pytest.approx([7 / 9, 7 / 9, 8 / 9, 8 / 9])


def test_classes_stay_with_their_images():
    for batch in feed().batches(0):
        assert torch.equal(batch.draws.condition.label, batch.x[:, 0, 0, 0, 0].long() % 3)


def test_every_image_is_seen_equally_often():
    seen = torch.cat([batch.x[:, 0, 0, 0, 0] for batch in feed(accumulation=1).batches(0)])
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
