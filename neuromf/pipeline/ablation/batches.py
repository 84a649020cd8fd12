"""Which stages go to the queue together: arrays whose tasks wait for single tasks of others, not for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest

from neuromf.pipeline.ablation.stages import Stage

LARGEST = 1000
"""Of an array; SLURM's own limit (MaxArraySize) is 1001 unless an administrator says otherwise."""


def batches(stages: Sequence[Stage], queued: Mapping[str, str]) -> Iterator[list[Stage]]:
    """Stages in arrays, each array after those that it needs.

    SLURM has two ways of waiting that fit: all tasks of an array for one job (afterok), or each task for the one of the
    same number (aftercorr). So the stages of an array need one and the same stage, or each the one in the same place of
    an earlier array.

    Args:
        stages: to submit, each after those it needs; what they need beside these is finished or queued.
        queued: jobs by the names of stages.
    """
    wanted = {stage.name for stage in stages}
    below: dict[str, list[Stage]] = {}
    roots: dict[tuple[str, str], list[Stage]] = {}
    for stage in stages:
        need = next((name for name in stage.needs if name in wanted), None)
        if need is not None:
            below.setdefault(need, []).append(stage)
        else:
            after = next((queued[name] for name in stage.needs if name in queued), "")
            roots.setdefault((stage.words[0], after), []).append(stage)
    for group in roots.values():
        yield from _families(group, below)


def _families(group: list[Stage], below: Mapping[str, list[Stage]]) -> Iterator[list[Stage]]:
    """Stages that may wait for the same, and all that follows on them."""
    # Those with most to follow come first: then what follows stands in the same places, without gaps.
    ordered = sorted(group, key=lambda stage: -len(below.get(stage.name, ())))
    for start in range(0, len(ordered), LARGEST):
        yield from _family(ordered[start : start + LARGEST], below)


def _family(batch: list[Stage], below: Mapping[str, list[Stage]]) -> Iterator[list[Stage]]:
    yield batch
    if len(batch) == 1:
        yield from _families(below.get(batch[0].name, []), below)
        return
    for places in zip_longest(*(below.get(stage.name, []) for stage in batch)):
        following = [stage for stage in places if stage is not None]
        if len(following) > 1 and None not in places[: len(following)]:
            yield from _family(following, below)
        else:
            for stage in following:
                yield from _family([stage], below)


def dependency(jobs: Sequence[str]) -> str:
    """What sbatch's --dependency says for an array whose tasks wait for `jobs`, "" where there is nothing to wait for.

    Example:
        >>> dependency(["", ""]), dependency(["7", "7"]), dependency(["7_3"]), dependency(["8_0", "8_1"])
        ('', 'afterok:7', 'afterok:7_3', 'aftercorr:8')
    """
    if len(set(jobs)) == 1:
        return f"afterok:{jobs[0]}" if jobs[0] else ""
    array = jobs[0].partition("_")[0]
    if list(jobs) != [f"{array}_{place}" for place in range(len(jobs))]:
        raise ValueError(f"no single dependency says {jobs}")
    return f"aftercorr:{array}"
