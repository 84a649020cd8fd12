"""What a plan file may say, and how its mistakes are answered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from neuromf.errors import UserError
from neuromf.pipeline.ablation.cells import cells_of, runs_of
from neuromf.pipeline.ablation.plan import plan_files, read_plan

Write = Callable[..., Path]
REST = "phantoms: {}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: {objective.lpp: [1.0]}", "no setting 'objective.lpp': did you mean 'objective.lp'"),
        ("sample: {nn: 3}\nseeds: [0]", "no key 'sample.nn' in a plan: did you mean 'n'?"),
        ("gird: {objective.lp: [1.0]}\nseeds: [0]", "no key 'gird' in a plan: did you mean 'grid'?"),
        ("experiments: {a: {sede: [0]}}", "no key 'experiments.a.sede' in a plan: did you mean 'seeds'?"),
        ("grid: {objective.lp: []}", "objective.lp has no values, so there is no cell to run"),
        ("seeds: []", "seeds has no values"),
        ("preset: demo", "varies nothing"),
        ("grid: {objective.lp: [2, 2.0]}", "objective.lp has a value twice"),
        ("grid: {training.seed: [0, 1]}", "training.seed is given by `seeds`"),
        ("seeds: [0]\nexperiments: {a: {}}", "put seeds into an experiment"),
        ("experiments: {a: {}}\ncomparisons: [{experiment: b, factor: seed}]", "no experiment 'b'"),
        ("experiments: {a: {}}\ncomparisons: [{experiment: a, factor: seed}]", "does not vary 'seed'"),
        ("experiments: {a: {nfe: [1, 2]}}\ncomparisons: [{experiment: a, factor: nfe, baseline: 3}]", "no level '3'"),
        ("experiments: {a: {}}\ncomparisons: [{experiment: a}]", "give a factor, or groups of cells"),
        ("extends: small.yaml\nseeds: [0]", "extends itself"),
        ("seeds: [0", "not valid YAML"),
    ],
)
def test_a_mistake_in_a_plan_is_named_with_the_way_out(text: str, message: str, plan_file: Write) -> None:
    path = plan_file(REST + text)
    text = path.read_text().replace("small.yaml", str(path))
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_plan(str(path))
    assert message in str(caught.value)


def test_a_plan_without_reference_scans_is_refused(plan_file: Write) -> None:
    with pytest.raises(UserError, match=r"evaluate\.real: name the scans"):
        read_plan(str(plan_file("seeds: [0]")))


def test_an_unknown_plan_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'paper-small'"):
        read_plan("paper-smal")


def test_a_plan_may_extend_another_and_say_less(plan_file: Write) -> None:
    plan_file(name="base.yaml")
    path = plan_file(f"extends: {plan_file(name='base.yaml')}\ngrid: {{objective.lp: [1.0, 2.0]}}\nseeds: [4, 5]")
    plan = read_plan(str(path))
    assert (plan.name, plan.preset, plan.sample.n) == ("small", "demo", 4)
    assert list(plan.experiments) == ["small"]
    assert plan.experiments["small"].seeds == (4, 5)
    assert [(c.experiment, c.factor) for c in plan.comparisons] == [("small", "objective.lp")]


def test_settings_may_be_written_in_sections(plan_file: Write) -> None:
    plan = read_plan(str(plan_file(REST + "seeds: [0]\nsettings: {training: {updates: 7, lr: 1e-3}, ema.every: 2}")))
    assert plan.settings == {"training.updates": 7, "training.lr": "1e-3", "ema.every": 2}


def test_the_plan_as_written_reads_as_the_same_plan(plan_file: Write, tmp_path: Path) -> None:
    plan = read_plan(str(plan_file()))
    (tmp_path / "again.yaml").write_text(plan.to_yaml())
    assert read_plan(str(tmp_path / "again.yaml")) == plan


@pytest.mark.parametrize("name", ["ablate-prediction", "ablate-lp", "ablate-nfe", "ablate-rectflow", "paper"])
def test_each_plan_is_shipped_in_full_and_in_small_with_the_same_cells(name: str) -> None:
    found = [cells_of(read_plan(f"{name}{kind}"), "latents", {}) for kind in ("", "-small")]
    shape = [[(c.experiment, c.factors, c.seed, c.nfe) for c in cells] for cells in found]
    assert shape[0] == shape[1]
    counts = {"ablate-prediction": (6, 6), "ablate-lp": (14, 14), "ablate-nfe": (6, 1), "ablate-rectflow": (24, 4)}
    assert (len(found[0]), len(runs_of(found[0]))) == counts.get(name, (28, 20))
    assert plan_files().keys() >= {name, f"{name}-small"}
