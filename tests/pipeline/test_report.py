"""Pages of real folders: what stands on them, what is said to be missing, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from neuromf.data.structure_tables import write_structure_table
from neuromf.data.volumes import save_volume
from neuromf.errors import UserError
from neuromf.pipeline.pages.collected import Wanted
from neuromf.pipeline.pages.figures import draw_figures
from neuromf.pipeline.pages.generated import set_page
from neuromf.pipeline.pages.run import run_page
from neuromf.pipeline.report import kind_of, report
from neuromf.reporting.page import Block, Charts, Facts, Folded, Missing, Page, Picture, Section, Table, Text, Volumes


def section(page: Page, id_: str) -> Section:
    return next(found for found in page.sections if found.id == id_)


def of_kind(found: Section, kind: type[Block]) -> list[Any]:
    return [block for block in found.blocks if isinstance(block, kind)]


def record(value: float, **more: Any) -> dict[str, Any]:
    return {
        "value": value,
        "low": value - 1,
        "high": value + 1,
        "n": {"generated": 4, "real": 3},
        "better": "lower",
    } | more


def evaluated(folder: Path, **changes: Any) -> Path:
    """An evaluation as `evaluate` leaves it, with pictures."""
    folder.mkdir(parents=True)
    content = {
        "metrics": {"frechet_builtin": record(12.5), "kid_builtin": record(0.25)},
        "verdict": {"metric": "kid_builtin", "differ": True, "text": "the sets differ: 0 lies below the interval"},
        "not_computed": {"fid_inception": "no weights <here>"},
        "notes": ["scaled by percentiles"],
        "sets": {"generated": {"n": 4}, "real": {"n": 3}},
    } | changes
    (folder / "metrics.json").write_text(json.dumps(content))
    for name in ("spectrum.png", "samples.png"):
        Image.fromarray(np.zeros((20, 30), dtype=np.uint8)).save(folder / name)
    return folder


@pytest.fixture
def own_run(run: Path, tmp_path: Path) -> Path:
    """A copy of the tiny run, to be changed."""
    return Path(shutil.copytree(run, tmp_path / "tiny"))


def test_the_page_of_a_run_has_its_curves_samples_and_origin(run: Path) -> None:
    page = run_page(run, Wanted(device="cpu"))
    assert page.kind == "Training run"
    assert page.title == "tiny"
    charts = of_kind(section(page, "curves"), Charts)[0].charts
    assert charts[0].title == "raw loss"
    assert charts[0].wide
    assert {line.name for line in charts[0].lines} >= {"r = t", "r < t", "both"}
    summaries = json.loads((run / "diagnostics/aggregate_results/training_summary.json").read_text())
    both = next(line for line in charts[0].lines if line.name == "both")
    assert list(both.y) == [summary["raw_loss_mean"] for summary in summaries]
    (viewer,) = of_kind(section(page, "samples"), Volumes)
    assert {item.is_["evaluations"] for item in viewer.items} == {"1", "10"}
    assert viewer.items[0].sprite.size == (16, 16, 16)
    assert viewer.items[0].sprite.mm == (192.0,) * 3
    facts = {
        name: value for block in of_kind(section(page, "provenance"), Facts) for name, value in block.facts.items()
    }
    assert facts["autoencoder"] == "haar"
    assert facts["autoencoder licence"] == "none needed: it has no weights"
    assert len(facts["split hash"]) == 64
    assert "prediction: x" in of_kind(section(page, "provenance"), Folded)[0].text


def test_what_is_not_there_is_said_with_its_command(run: Path) -> None:
    (missing,) = of_kind(section(run_page(run, Wanted(device="cpu")), "metrics"), Missing)
    assert missing.what == "Nothing was generated yet."
    assert missing.command == f"neuromf sample {run} --n 64 --decode"


def test_samples_that_are_not_decoded_or_not_evaluated_are_said(own_run: Path) -> None:
    for name in ("generated", "my generated-2"):
        (own_run / name).mkdir()
        (own_run / name / "manifest.json").write_text('{"nfe": 1}')
    (own_run / "my generated-2/volumes").mkdir()
    (own_run / "my generated-2/volumes/sample_000000.nii.gz").touch()
    found = of_kind(section(run_page(own_run, Wanted(device="cpu")), "metrics"), Missing)
    assert [block.what for block in found] == ["generated is not decoded yet.", "my generated-2 is not evaluated yet."]
    assert found[0].command == f"neuromf decode {own_run}/generated"
    assert found[1].command.startswith(f"neuromf evaluate '{own_run}/my generated-2/volumes' SCANS --latents ")


def test_metrics_stand_with_their_intervals_and_pictures_of_real_scans_only_if_asked(own_run: Path) -> None:
    (own_run / "generated").mkdir()
    (own_run / "generated/manifest.json").write_text('{"nfe": 1}')
    evaluated(own_run / "generated/evaluation")
    metrics = section(run_page(own_run, Wanted(device="cpu")), "metrics")
    rows = of_kind(metrics, Table)[0].rows
    assert rows[0]["metric"][0] == "frechet_builtin"
    assert "Fréchet" in rows[0]["metric"][1]
    assert (rows[0]["value"], rows[0]["interval"], rows[0]["N"]) == ("12.50", "11.50 to 13.50", "4 / 3")
    said = " ".join(block.text for block in of_kind(metrics, Text))
    assert "The sets differ" in said
    assert "samples.png" in said
    assert "--real-scans" in said
    assert [block.alt for block in of_kind(metrics, Picture)] == ["Radial power spectra of generated and real volumes"]
    with_real = section(run_page(own_run, Wanted(device="cpu", real_scans=True)), "metrics")
    assert len(of_kind(with_real, Picture)) == 2


def test_several_evaluations_get_a_table_of_all_and_the_one_step_comes_first(own_run: Path) -> None:
    for nfe in (10, 1):
        folder = own_run / f"generated-{nfe}"
        folder.mkdir()
        (folder / "manifest.json").write_text(json.dumps({"nfe": nfe}))
        evaluated(folder / "evaluation")
    tables = of_kind(section(run_page(own_run, Wanted(device="cpu")), "metrics"), Table)
    assert [row["set"] for row in tables[0].rows] == [
        "generated-1, 1 evaluation, 4 volumes",
        "generated-10, 10 evaluations, 4 volumes",
    ]
    assert tables[0].rows[0]["kid_builtin"] == 0.25


def test_a_run_without_an_epoch_still_has_a_page(own_run: Path) -> None:
    shutil.rmtree(own_run / "diagnostics")
    shutil.rmtree(own_run / "samples")
    (own_run / "environment.json").write_text("{ damaged")
    wanted = Wanted(device="cpu")
    page = run_page(own_run, wanted)
    assert "holds no figures of any epoch" in of_kind(section(page, "curves"), Missing)[0].what
    assert "No samples yet" in of_kind(section(page, "samples"), Missing)[0].what
    assert any("environment.json" in remark for remark in wanted.remarks)


def test_damaged_samples_are_said_and_lose_nothing_else(own_run: Path) -> None:
    newest = sorted((own_run / "samples/generated_samples").glob("*.pt"))[-1]
    newest.write_bytes(b"damaged")
    page = run_page(own_run, Wanted(device="cpu"))
    assert "not readable" in of_kind(section(page, "samples"), Missing)[0].what
    assert of_kind(section(page, "curves"), Charts)


def test_the_page_of_a_generated_set_shows_its_volumes(heads: Path) -> None:
    page = set_page(heads, Wanted())
    (viewer,) = of_kind(section(page, "volumes"), Volumes)
    assert len(viewer.items) == 8
    assert viewer.note.startswith("8 volumes of 12; 16 x 16 x 16 voxels of 12 x 12 x 12 mm")
    assert "no manifest.json" in of_kind(section(page, "provenance"), Missing)[0].what


def test_pairs_are_shown_with_their_masks_and_drawn_as_figure_7(tmp_path: Path) -> None:
    grid, affine = np.indices((16, 18, 14)).sum(0), np.diag([2.0, 2.0, 2.0, 1.0])
    for n in range(2):
        mask = np.zeros(grid.shape)
        mask[4 + n : 8, 5:9, 3:7] = 1
        save_volume(tmp_path / f"sub-gen00000{n}_T1w.nii.gz", grid / grid.max() + mask, affine)
        save_volume(tmp_path / f"sub-gen00000{n}_label-lesion_mask.nii.gz", mask, affine, dtype=np.uint8)
    (viewer,) = of_kind(section(set_page(tmp_path, Wanted()), "volumes"), Volumes)
    assert [item.is_ for item in viewer.items] == [{"volume": f"sub-gen00000{n}_T1w"} for n in range(2)]
    assert [item.mask.size for item in viewer.items if item.mask] == [(16, 18, 14)] * 2
    drawn = {f.number: f for f in draw_figures("generated set", tmp_path, tmp_path / "figures", Wanted()).figures}
    assert [number for number, figure in drawn.items() if figure.files] == [1, 7]


def test_real_and_generated_and_the_structures_are_drawn_where_an_evaluation_has_them(
    heads: Path, own_run: Path, tmp_path: Path
) -> None:
    """Figures 3, 4 and 8 of a run with two evaluations, whose real set is the held-back part of its scans."""
    grid = {"size": [16, 16, 16], "spacing_mm": [12.0, 12.0, 12.0]}
    sets = {"generated": {"n": 12, "source": str(heads)}, "real": {"n": 3, "source": str(heads)}}
    for nfe in (1, 2):
        folder = own_run / f"generated-{nfe}"
        folder.mkdir()
        (folder / "manifest.json").write_text(json.dumps({"nfe": nfe, "objective": "imf"}))
        evaluated(folder / "evaluation", grid=grid, sets=sets)
    ml = np.random.default_rng(0).uniform(2, 9, (5, 2))
    for name in ("generated", "real"):
        path = own_run / f"generated-2/evaluation/morphology_{name}.csv"
        write_structure_table(path, map(str, range(5)), ["thalamus", "putamen"], ml)
    drawn = {f.number: f for f in draw_figures("run", own_run, tmp_path / "figures", Wanted()).figures}
    assert [number for number, figure in drawn.items() if figure.files] == [1, 3, 4, 8], drawn
    shutil.rmtree(own_run / "generated-2/evaluation")
    sets["real"]["source"] = str(tmp_path / "moved")
    shutil.rmtree(own_run / "generated-1/evaluation")
    evaluated(own_run / "generated-1/evaluation", grid=grid, sets=sets)
    drawn = {f.number: f for f in draw_figures("run", own_run, tmp_path / "again", Wanted()).figures}
    assert "moved does not exist" in drawn[3].missing
    assert drawn[4].command.startswith(f"neuromf sample {own_run} --nfe 10")
    assert "--morphology" in drawn[8].command


def test_the_command_writes_one_file_and_says_what_is_missing(neuromf: Callable[..., Any], run: Path) -> None:
    done = neuromf("report", run, "--out", "page.html", "--json", "--device", "cpu")
    assert done.exit_code == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["kind"] == "run"
    assert said["bytes"] == Path("page.html").stat().st_size < 1_000_000
    assert said["missing"][0]["command"].startswith("neuromf sample")
    assert said["figures"] is None
    assert "<!doctype html>" in Path("page.html").read_text()


def test_figures_are_drawn_or_named_with_their_command(neuromf: Callable[..., Any], run: Path, in_tmp: Path) -> None:
    done = neuromf("report", run, "--figures", "--out", "page.html", "--json", "--device", "cpu")
    assert done.exit_code == 0, done.stderr
    figures = json.loads(done.stdout)["figures"]
    assert list(figures) == [str(n) for n in range(1, 9)]
    assert figures["1"]["files"] == ["figures/figure-1.png", "figures/figure-1.pdf"]
    assert all(Path(file).stat().st_size > 1000 for file in figures["1"]["files"])
    assert figures["2"]["command"] == "neuromf toy"
    assert figures["5"]["command"] == "neuromf ablate ablate-lp"
    assert figures["6"]["command"] == "neuromf ablate ablate-prediction"
    for number in "2345678":
        assert figures[number]["files"] == []
        assert figures[number]["missing"]
    assert "Figure 1: method overview" in Path("page.html").read_text()


def test_wrong_places_are_refused_with_what_would_do(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder") as caught:
        report(tmp_path / "absent")
    assert "a run" in caught.value.hint
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="neither a run") as caught:
        report(tmp_path)
    assert "config.yaml" in caught.value.hint
    with pytest.raises(UserError) as caught:
        kind_of(run.parent)
    assert str(run) in caught.value.hint
    with pytest.raises(UserError, match="not an HTML file"):
        report(run, tmp_path / "page.txt")
