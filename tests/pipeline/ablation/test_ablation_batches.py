"""Arrays of stages: each stage once, after what it needs, and with a dependency that SLURM can express."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuromf.pipeline.ablation import batches as module
from neuromf.pipeline.ablation.batches import batches, dependency
from neuromf.pipeline.ablation.stages import Stage


def stage(name: str, *needs: str) -> Stage:
    return Stage(name, (name.split(".")[-1].split("-")[0],), needs, lambda: False)


def submitted(stages: list[Stage], queued: dict[str, str]) -> list[tuple[list[str], str]]:
    """(stages, dependency) of each array, with ids as SLURM gives them."""
    jobs, found = dict(queued), []
    for number, batch in enumerate(batches(stages, queued), 100):
        found.append(
            ([s.name for s in batch], dependency([next((jobs[n] for n in s.needs if n in jobs), "") for s in batch]))
        )
        jobs |= {s.name: f"{number}_{place}" if len(batch) > 1 else str(number) for place, s in enumerate(batch)}
    return found


def chain(run: str, *nfes: int, first: str = "") -> list[Stage]:
    train = stage(f"{run}.train", *([first] if first else []))
    samples = [stage(f"{run}.sample-{n}", train.name) for n in nfes]
    return [train, *samples, *(stage(f"{run}.evaluate-{n}", f"{run}.sample-{n}") for n in nfes)]


def test_each_kind_of_stage_is_an_array_that_waits_task_by_task() -> None:
    data = [stage("data.render"), stage("data.encode", "data.render")]
    stages = [*data, *chain("a", 1, first="data.encode"), *chain("b", 1, 10, first="data.encode")]
    assert submitted(stages, {}) == [
        (["data.render"], ""),
        (["data.encode"], "afterok:100"),
        (["b.train", "a.train"], "afterok:101"),
        (["b.sample-1", "a.sample-1"], "aftercorr:102"),
        (["b.evaluate-1", "a.evaluate-1"], "aftercorr:103"),
        (["b.sample-10"], "afterok:102_0"),
        (["b.evaluate-10"], "afterok:105"),
    ]


def test_what_follows_on_finished_and_on_queued_stages_is_told_apart() -> None:
    a, b, c = chain("a", 1), chain("b", 1), chain("c", 1)
    assert submitted([*a[1:], *b[1:], *c[1:]], {"b.train": "7_3", "c.train": "7_4"}) == [
        (["a.sample-1"], ""),
        (["a.evaluate-1"], "afterok:100"),
        (["b.sample-1"], "afterok:7_3"),
        (["b.evaluate-1"], "afterok:102"),
        (["c.sample-1"], "afterok:7_4"),
        (["c.evaluate-1"], "afterok:104"),
    ]


@given(st.lists(st.lists(st.integers(0, 2), max_size=4), max_size=9), st.data())
def test_whatever_is_left_to_do_goes_once_each_and_after_its_need(runs: list[list[int]], data: st.DataObject) -> None:
    """Runs with any number of samples, of which some have no evaluation left; some trainings are queued."""
    stages, queued = [], {}
    for number, evaluations in enumerate(runs):
        train = stage(f"{number}.train")
        if data.draw(st.booleans()):
            queued[train.name] = f"9_{number}"
        else:
            stages.append(train)
        for k, count in enumerate(evaluations):
            stages.append(stage(f"{number}.sample-{k}", train.name))
            stages += [stage(f"{number}.evaluate-{k}-{i}", f"{number}.sample-{k}") for i in range(count)]
    found = submitted(stages, queued)  # raises where an array has no single dependency
    names = [name for batch, _ in found for name in batch]
    assert sorted(names) == sorted(s.name for s in stages)
    order = {name: number for number, name in enumerate(names)}
    assert all(order[need] < order[s.name] for s in stages for need in s.needs if need in order)


def test_arrays_stay_below_the_limit_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST", 3)
    sizes = [len(batch) for batch in batches([s for run in "abcdefg" for s in chain(run, 1)], {})]
    assert sorted(sizes, reverse=True) == [3] * 6 + [1] * 3


def test_jobs_in_another_order_have_no_single_dependency() -> None:
    with pytest.raises(ValueError, match="no single dependency"):
        dependency(["8_1", "8_0"])
