from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuromf.data.splits import SPLITS, make_splits, split_hash
from neuromf.errors import UserError

SUBJECTS = [f"sub-{i:03d}" for i in range(100)]


def test_shares_are_met_and_nobody_is_lost_or_twice():
    splits = make_splits(SUBJECTS)
    assert {name: len(splits[name]) for name in SPLITS} == {"train": 80, "val": 10, "test": 10}
    assert sorted(s for name in SPLITS for s in splits[name]) == SUBJECTS


def test_the_order_of_the_input_does_not_matter_and_the_seed_does():
    shuffled = random.Random(0).sample(SUBJECTS, len(SUBJECTS))
    assert make_splits(shuffled) == make_splits(SUBJECTS)
    assert make_splits(SUBJECTS, seed=1) != make_splits(SUBJECTS)


def test_the_division_is_the_same_on_every_machine():
    assert make_splits("abcdefghij") == {"train": list("abceghij"), "val": ["d"], "test": ["f"]}


@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=30),
    val=st.floats(0, 0.4),
    test=st.floats(0, 0.4),
    seed=st.integers(0, 100),
)
def test_groups_stay_whole_and_no_wanted_split_is_empty(sizes, val, test, seed):
    groups = {f"s{g}-{i}": f"g{g}" for g, size in enumerate(sizes) for i in range(size)}
    splits = make_splits(groups, groups, (1 - val - test, val, test), seed)
    homes = {}
    for name in SPLITS:
        for subject in splits[name]:
            assert homes.setdefault(groups[subject], name) == name
    assert sorted(s for name in SPLITS for s in splits[name]) == sorted(groups)
    assert splits["train"]
    if len(sizes) >= 3:
        assert bool(splits["val"]) == (val > 0) or splits["val"]
        assert val == 0 or splits["val"]
        assert test == 0 or splits["test"]


@pytest.mark.parametrize(("n", "expected"), [(1, (1, 0, 0)), (2, (1, 1, 0)), (3, (1, 1, 1)), (4, (2, 1, 1))])
def test_very_small_sets(n, expected):
    splits = make_splits(SUBJECTS[:n])
    assert tuple(len(splits[name]) for name in SPLITS) == expected


def test_a_fraction_of_zero_leaves_its_split_empty():
    splits = make_splits(SUBJECTS, fractions=(0.9, 0.1, 0))
    assert (len(splits["train"]), len(splits["val"]), len(splits["test"])) == (90, 10, 0)


@pytest.mark.parametrize("fractions", [(0.8, 0.1), (0.8, 0.1, 0.2), (1.1, -0.1, 0), (0, 0.5, 0.5)])
def test_wrong_fractions_are_refused(fractions):
    with pytest.raises(UserError, match="fractions"):
        make_splits(SUBJECTS, fractions=fractions)


def test_nobody_twice_or_without_group():
    with pytest.raises(UserError, match="'a' is listed twice"):
        make_splits(["b", "a", "a"])
    with pytest.raises(UserError, match="no group"):
        make_splits(["b", "a"], {"a": "g"})
    with pytest.raises(UserError, match="no subject"):
        make_splits([])


def test_hash_sees_membership_and_not_order():
    one = {"train": ["a", "b"], "val": ["c"], "test": []}
    assert split_hash(one) == split_hash({"test": [], "val": ["c"], "train": ["b", "a"]})
    assert split_hash(one) != split_hash({"train": ["a", "c"], "val": ["b"], "test": []})
