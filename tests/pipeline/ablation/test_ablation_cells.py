"""Which cells a plan has, and which of them are the same run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from neuromf.errors import UserError
from neuromf.pipeline.ablation.cells import cells_of, folder_of, runs_of
from neuromf.pipeline.ablation.plan import read_plan

Write = Callable[..., Path]


def test_identical_cells_share_one_run(plan_file: Write) -> None:
    cells = cells_of(read_plan(str(plan_file())), "latents", {})
    assert len(cells) == 4 + 6 + 2
    # x with seeds 0 and 1 is lp = 2 with the same seeds, and the run that is sampled twice.
    assert len(runs_of(cells)) == 4 + 4
    same = {cell.name for cell in cells if cell.run == cells[0].run}
    assert same == {
        "prediction: objective.prediction=x, seed 0, 1 evaluation",
        "lp: objective.lp=2, seed 0, 1 evaluation",
        "nfe: seed 0, 1 evaluation",
        "nfe: seed 0, 10 evaluations",
    }


def test_what_does_not_touch_learning_does_not_make_another_run_and_data_does(plan_file: Write) -> None:
    plan = read_plan(str(plan_file()))
    watched = plan.model_copy(update={"settings": {"intervals.validation": 3}})
    longer = plan.model_copy(update={"settings": {"training.updates": 3}})

    def identities(changed: object, digest: str = "a") -> list[str]:
        return [run.identity for run in runs_of(cells_of(changed, "latents", {"latents": digest}))]  # type: ignore[arg-type]

    assert identities(watched) == identities(plan)
    assert not set(identities(longer)) & set(identities(plan))
    assert not set(identities(plan, "b")) & set(identities(plan))


def test_variants_go_together_and_may_choose_preset_and_data(plan_file: Write) -> None:
    text = (
        "phantoms: {}\nvariants:\n  one: {preset: demo-rectflow, data: others}\n"
        "  two: {training: {lr: 1.0e-3, batch_size: 2}}\ngrid: {objective.norm_p: [0.5, 1.0]}\npreset: demo"
    )
    plan = read_plan(str(plan_file(text)))
    cells = cells_of(plan, "latents", {})
    assert [dict(cell.factors) for cell in cells] == [
        {"variant": variant, "objective.norm_p": level} for variant in ("one", "two") for level in ("0.5", "1")
    ]
    assert [cell.run.data for cell in cells] == ["others"] * 2 + ["latents"] * 2
    assert cells[0].run.config.objective.name == "rectflow"
    assert cells[3].run.config.training.batch_size == 2
    assert cells[3].run.config.objective.norm_p == 1


def test_values_the_schema_refuses_are_named_with_their_cells(plan_file: Write) -> None:
    path = plan_file("phantoms: {}\npreset: demo\ngrid: {objective.lp: [2.0, -1.0]}\nseeds: [0, 7]")
    with pytest.raises(UserError) as caught:
        cells_of(read_plan(str(path)), "latents", {})
    text = str(caught.value)
    assert "cell small: objective.lp=-1, seed 7" in text
    assert "greater than 0" in text
    assert "objective.lp=2" not in text


def test_a_run_is_found_under_any_label(plan_file: Write, tmp_path: Path) -> None:
    run = cells_of(read_plan(str(plan_file())), "latents", {})[0].run
    assert folder_of(run, tmp_path).name == run.name
    (tmp_path / f"called-otherwise-{run.identity}").mkdir()
    assert folder_of(run, tmp_path).name == f"called-otherwise-{run.identity}"


def test_levels_never_become_paths(plan_file: Write) -> None:
    path = plan_file("phantoms: {}\npreset: demo\ngrid: {data: [../../a b, /c]}")
    names = [run.name for run in runs_of(cells_of(read_plan(str(path)), "latents", {}))]
    assert [name.rsplit("-", 1)[0] for name in names] == ["data_a_b-seed0", "data_c-seed0"]
