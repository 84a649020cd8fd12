"""Train, validation and test: by group, decided by a hash, the same for any order of the input."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from neuromf.errors import UserError

SPLITS = ("train", "val", "test")


def make_splits(
    subjects: Iterable[str],
    groups: Mapping[str, str] | None = None,
    fractions: Sequence[float] = (0.8, 0.1, 0.1),
    seed: int = 0,
) -> dict[str, list[str]]:
    """Divide subjects into train, val and test without ever dividing a group.

    Groups are put in the order of sha256(seed, group) and fill test, val, train by their share of subjects.
    Small sets: train is never empty; from three groups on, val and test are not either (unless their fraction
    is 0); of two groups the second goes to val.

    Args:
        subjects: unique ids.
        groups: subject -> group; None makes each subject its own group.
        fractions: of train, val, test; they sum to 1.
        seed: another seed, another division.

    Raises:
        UserError: no subject, a subject listed twice or without a group, or fractions that do not sum to 1.
    """
    subjects = sorted(subjects)
    _check(subjects, groups, fractions)
    members: dict[str, list[str]] = defaultdict(list)
    for subject in subjects:
        members[groups[subject] if groups is not None else subject].append(subject)

    ordered = sorted(members, key=lambda group: (_key(seed, group), group))
    parts = _fill(ordered, members, fractions)
    _repair(parts, fractions)
    return {name: sorted(s for group in parts[name] for s in members[group]) for name in SPLITS}


def split_hash(splits: Mapping[str, Sequence[str]]) -> str:
    """Hex SHA-256 of who is in which split, whatever the order."""
    canonical = {name: sorted(splits.get(name, ())) for name in SPLITS}
    return hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()


def _key(seed: int, group: str) -> str:
    return hashlib.sha256(f"{seed}\0{group}".encode()).hexdigest()


def _check(subjects: Sequence[str], groups: Mapping[str, str] | None, fractions: Sequence[float]) -> None:
    if not subjects:
        raise UserError("there is no subject to split")
    if len(set(subjects)) != len(subjects):
        twice = next(s for s, following in pairwise(subjects) if s == following)
        raise UserError(f"subject '{twice}' is listed twice", "each id may occur once")
    if len(fractions) != 3 or min(fractions) < 0 or fractions[0] == 0 or abs(sum(fractions) - 1) > 1e-6:
        raise UserError(
            f"split fractions {tuple(fractions)} cannot be used",
            "three numbers for train, val, test, not negative, train above 0, with the sum 1: 0.8 0.1 0.1",
        )
    missing = [s for s in subjects if groups is not None and s not in groups]
    if missing:
        raise UserError(f"{len(missing)} subjects have no group, the first is '{missing[0]}'")


def _fill(
    ordered: Sequence[str], members: Mapping[str, Sequence[str]], fractions: Sequence[float]
) -> dict[str, list[str]]:
    """Give each group to the split in which the middle of its stretch of subjects lies."""
    _, val, test = fractions
    total = sum(len(members[group]) for group in ordered)
    parts: dict[str, list[str]] = {name: [] for name in SPLITS}
    before = 0
    for group in ordered:
        middle = (before + len(members[group]) / 2) / total
        before += len(members[group])
        parts["test" if middle < test else "val" if middle < test + val else "train"].append(group)
    return parts


def _repair(parts: dict[str, list[str]], fractions: Sequence[float]) -> None:
    """Make sure that no split is empty that should not be, moving as few groups as possible."""
    count = sum(len(groups) for groups in parts.values())
    wanted = ["train"]
    if count >= 2 and fractions[1] > 0:
        wanted.append("val")
    if count >= len(wanted) + 1 and fractions[2] > 0:
        wanted.append("test")
    for name in SPLITS:
        if name not in wanted:
            parts["train"] += parts[name]
            parts[name] = []
    for name in wanted:
        if not parts[name]:
            giver = max(wanted, key=lambda other: len(parts[other]))
            parts[name].append(parts[giver].pop(0))
