from __future__ import annotations

import torch

from neuromf.conditions import Condition

WHOLE = Condition(
    torch.tensor([0, 1, 2]), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[0.0, 1.0], [0.1, 0.9], [0, 0.5]])
)


def test_a_selection_keeps_what_belongs_to_a_sample_together():
    some = WHOLE.select(torch.tensor([2, 0]))
    assert some.label.tolist() == [2, 0]
    assert some.omega.tolist() == [3.0, 1.0]
    assert some.interval.tolist() == [[0.0, 0.5], [0.0, 1.0]]


def test_what_is_not_there_stays_absent():
    assert Condition() == (None, None, None)
    assert Condition(torch.tensor([1, 0])).select(torch.tensor([1])) == (torch.tensor([0]), None, None)
    moved = Condition(omega=torch.ones(2)).to(torch.device("meta"))
    assert (moved.label, moved.interval) == (None, None)
    assert moved.omega.is_meta
