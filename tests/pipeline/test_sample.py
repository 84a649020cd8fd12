from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import neuromf
from neuromf import config
from neuromf.errors import UserError
from neuromf.generator import Generator
from neuromf.pipeline.decode import Decoding, decode
from neuromf.pipeline.sample import newest_run, sample
from neuromf.pipeline.sample_folder import load_sample, sample_path
from neuromf.pipeline.train import train
from neuromf.training import checkpoint


def contents(folder: Path, n: int) -> list[bytes]:
    return [sample_path(folder, i).read_bytes() for i in range(n)]


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, those of killed writers too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def latents_of(folder: Path, n: int) -> torch.Tensor:
    return torch.stack([load_sample(sample_path(folder, i))[1] for i in range(n)])


def test_sample_depends_on_seed_and_index_only(run: Path, tmp_path: Path) -> None:
    sample(str(run), 6, out=tmp_path / "a", batch_size=4)
    sample(str(run), 3, out=tmp_path / "b", batch_size=4)
    sample(str(run), 6, out=tmp_path / "c", batch_size=3)
    assert contents(tmp_path / "a", 3) == contents(tmp_path / "b", 3)
    a, c = latents_of(tmp_path / "a", 6), latents_of(tmp_path / "c", 6)
    assert (a - c).abs().max() <= 1e-5 * (a.max() - a.min())
    sample(str(run), 1, out=tmp_path / "d", seed=1)
    assert (latents_of(tmp_path / "d", 1) - a[:1]).abs().max() > 1e-3


def test_sampling_again_makes_only_what_is_missing(run: Path, tmp_path: Path) -> None:
    sample(str(run), 5, out=tmp_path / "g", batch_size=4)
    whole = contents(tmp_path / "g", 5)
    sample_path(tmp_path / "g", 2).unlink()
    report = sample(str(run), 5, out=tmp_path / "g", batch_size=4)
    assert report.made == 1
    assert contents(tmp_path / "g", 5) == whole
    assert sample(str(run), 7, out=tmp_path / "g", batch_size=4).made == 2
    assert json.loads((tmp_path / "g/manifest.json").read_text())["n"] == 7


def test_what_is_damaged_is_redone_and_nothing_else(run: Path, tmp_path: Path) -> None:
    out, how = tmp_path / "g", {"batch_size": 2, "decoding": Decoding(), "keep_latents": True}
    sample(str(run), 5, out=out, **how)
    whole = files(out)
    times = {name: (out / name).stat().st_mtime_ns for name in whole}
    damaged = ["latents/sample_000001.pt", "volumes/sample_000002.nii.gz", "volumes/sample_000004.json"]
    for name, content in zip(damaged, (whole[damaged[0]][:300], whole[damaged[1]][:-9], b"{"), strict=True):
        (out / name).write_bytes(content)
    (out / "volumes/.partial-abc").write_bytes(b"of a process that was killed")
    assert sample(str(run), 5, out=out, dry_run=True, **how).planned == 3
    assert sample(str(run), 5, out=out, **how).made == 3
    assert files(out) == whole
    rewritten = {name for name in whole if (out / name).stat().st_mtime_ns != times[name]}
    redone = {*damaged, "volumes/sample_000002.json", "volumes/sample_000004.nii.gz"}
    assert rewritten - redone == {"manifest.json", "volumes/decode_report.json", "volumes/montage.png"}


def test_decoding_at_once_gives_the_files_of_two_steps(run: Path, tmp_path: Path) -> None:
    decoding = Decoding(batch_size=2, dtype="float32")
    once = sample(str(run), 7, out=tmp_path / "once", batch_size=3, decoding=decoding)
    assert (once.made, sorted(files(tmp_path / "once"))[0]) == (7, "manifest.json")
    assert not (tmp_path / "once/latents").exists()
    sample(str(run), 7, out=tmp_path / "twice", batch_size=3)
    decode(tmp_path / "twice", decoding=decoding)
    assert files(tmp_path / "once/volumes") == files(tmp_path / "twice/volumes")
    sample(str(run), 7, out=tmp_path / "kept", batch_size=3, decoding=decoding, keep_latents=True)
    assert files(tmp_path / "kept") == files(tmp_path / "twice")
    with pytest.raises(UserError, match="holds no latents") as caught:
        decode(tmp_path / "once")
    assert "volumes" in caught.value.hint


def test_latents_of_an_earlier_call_are_not_computed_again(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample(str(run), 3, out=tmp_path / "g")
    monkeypatch.setattr(Generator, "sample_latents", None)
    assert sample(str(run), 3, out=tmp_path / "g", decoding=Decoding()).made == 3


def test_processes_share_the_blocks_and_leave_what_one_leaves(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second process first: it must not wait for the main one."""
    how = {"batch_size": 2, "decoding": Decoding(batch_size=2), "keep_latents": True}
    sample(str(run), 7, out=tmp_path / "one", **how)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, share in (("1", [2, 3, 6]), ("0", range(7))):
        monkeypatch.setenv("RANK", rank)
        made = sample(str(run), 7, out=tmp_path / "two", **how).made
        assert made == {"0": 4, "1": 3}[rank]
        assert {path.stem for path in (tmp_path / "two/latents").iterdir()} == {f"sample_{i:06d}" for i in share}
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_folder_of_other_samples_is_refused(run: Path, tmp_path: Path) -> None:
    sample(str(run), 2, out=tmp_path / "g")
    with pytest.raises(UserError, match="seed 0 there, 5 now"):
        sample(str(run), 2, out=tmp_path / "g", seed=5)
    with pytest.raises(UserError, match="nfe 1 there, 2 now"):
        sample(str(run), 2, out=tmp_path / "g", nfe=2)


def test_any_number_of_evaluations(run: Path, tmp_path: Path) -> None:
    for nfe in (1, 2, 5):
        sample(str(run), 1, out=tmp_path / str(nfe), nfe=nfe)
    one, two, five = (latents_of(tmp_path / str(nfe), 1) for nfe in (1, 2, 5))
    assert torch.isfinite(five).all()
    assert not torch.equal(one, two)
    with pytest.raises(UserError, match="at least one"):
        sample(str(run), 1, out=tmp_path / "0", nfe=0)


def test_dry_run_checks_everything_and_writes_nothing(run: Path, tmp_path: Path) -> None:
    planned = sample(str(run), 5, out=tmp_path / "g", dry_run=True)
    assert (planned.planned, planned.made) == (5, 0)
    assert list(tmp_path.iterdir()) == []
    sample(str(run), 2, out=tmp_path / "g")
    before = {path: path.read_bytes() for path in (tmp_path / "g").rglob("*") if path.is_file()}
    assert sample(str(run), 5, out=tmp_path / "g", dry_run=True).planned == 3
    assert before == {path: path.read_bytes() for path in (tmp_path / "g").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="seed 0 there, 5 now"):
        sample(str(run), 2, out=tmp_path / "g", seed=5, dry_run=True)


def test_newest_finished_run_is_the_default(run: Path, tmp_path: Path) -> None:
    assert newest_run(run.parent) == run
    with pytest.raises(UserError, match="no run in"):
        newest_run(tmp_path)
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "config.yaml").write_text("")
    with pytest.raises(UserError, match="is finished"):
        newest_run(tmp_path)


def test_unknown_average_lists_the_kept_ones(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no average 0\.9") as caught:
        sample(str(run), 1, out=tmp_path / "g", ema=0.9)
    assert "0.5" in caught.value.hint


def test_the_best_weights_are_taken_on_request(run: Path, tmp_path: Path) -> None:
    best = checkpoint.best(run)
    assert best is not None
    model = neuromf.load(run, checkpoint="best", device="cpu")
    assert (model.source.update, model.source.ema) == (best.update, "0.5")
    kept = checkpoint.load_best(run)[0]
    assert all(torch.equal(value, kept[name]) for name, value in model.network.named_parameters())
    with pytest.raises(UserError, match=r"the average 0\.5, not 0\.9"):
        neuromf.load(run, checkpoint="best", ema=0.9, device="cpu")
    model.save_pretrained(tmp_path / "export")
    with pytest.raises(UserError, match="no best weights"):
        neuromf.load(tmp_path / "export", checkpoint="best", device="cpu")


def test_export_holds_the_generator_alone(run: Path, tmp_path: Path) -> None:
    whole = neuromf.load(str(run), device="cpu")
    small = neuromf.load(str(whole.save_pretrained(tmp_path / "export")), device="cpu")
    assert torch.equal(whole.sample_latents([0, 1]), small.sample_latents([0, 1]))
    assert str(run.parent) not in (tmp_path / "export" / "data.json").read_text()


def test_load_says_what_it_did_not_find(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run at"):
        neuromf.load(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="neither a run nor an exported generator"):
        neuromf.load(str(tmp_path))


# --- conditions --------------------------------------------------------------------------------------------------

TINY = [
    "network.name=mlp", "network.width=16", "network.depth=2", "training.updates=10", "training.batch_size=4",
    "training.accumulation=1", "training.warmup_steps=0", "training.lr=1e-2",
]  # fmt: skip


@pytest.fixture(scope="module")
def contrasts(latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The latents of the heads, every other one called FLAIR."""
    folder = tmp_path_factory.mktemp("contrasts") / "latents"
    folder.mkdir()
    for path in latents.glob("*.*"):
        (folder / path.name).write_bytes(path.read_bytes())
    dataset = json.loads((folder / "dataset.json").read_text())
    of = {path.stem: ("T1", "FLAIR")[i % 2] for i, path in enumerate(sorted(folder.glob("*.pt")))}
    (folder / "dataset.json").write_text(
        json.dumps({**dataset, "classes": {"column": "contrast", "names": ["FLAIR", "T1"], "of": of}})
    )
    return folder


@pytest.fixture(scope="module")
def classed(contrasts: Path) -> Path:
    """A run that knows the contrasts and takes no guidance; with a second head and an average by half-life."""
    run = contrasts.parent / "classed"
    words = ["network.classes=true", "network.v_head_blocks=1", "objective.tangent=v-head"]
    averages = ["ema.decays=[0.5]", "ema.half_lives_kimg=[0.01,500]", "ema.select=0.01kimg"]
    train(config.load("imf-xpred", [*TINY, *words, *averages]), contrasts, run, device="cpu")
    return run


@pytest.fixture(scope="module")
def guided(contrasts: Path) -> Path:
    """A run that takes scale and interval."""
    run = contrasts.parent / "guided"
    words = ["network.classes=true", "network.guidance=true", "guidance.enabled=true", "guidance.label_drop=0.3"]
    train(config.load("imf-xpred", [*TINY, *words, "ema.decays=[0.5]", "ema.select=0.5"]), contrasts, run, device="cpu")
    return run


def test_the_class_asked_for_is_the_one_that_comes(classed: Path, tmp_path: Path) -> None:
    found = {}
    for name in ("T1", "FLAIR"):
        sample(str(classed), 2, out=tmp_path / name, where={"contrast": name})
        found[name] = latents_of(tmp_path / name, 2)
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        assert manifest["condition"] == {"where": {"contrast": name}, "guidance": 1.0, "interval": [0.0, 1.0]}
    sample(str(classed), 2, out=tmp_path / "any")
    found["any"] = latents_of(tmp_path / "any", 2)
    assert all(not torch.equal(found[a], found[b]) for a, b in (("T1", "FLAIR"), ("T1", "any"), ("FLAIR", "any")))
    model = neuromf.load(classed, device="cpu")
    assert model.classes == ["FLAIR", "T1"]
    whitened = [model.condition(2, {"contrast": name}).label.tolist() for name in model.classes]
    assert whitened == [[0, 0], [1, 1]]
    assert model.condition(1, {}).label.tolist() == [2]


@pytest.mark.parametrize(
    ("where", "message", "hint"),
    [
        ({"contrast": "T2"}, "no contrast 'T2'", "FLAIR, T1"),
        ({"age": "70"}, "cannot be asked for age=70", "it knows contrast: FLAIR, T1"),
        ({"contrast": "T1", "sex": "F"}, "cannot be asked for sex=F", "FLAIR, T1"),
    ],
)
def test_an_unknown_condition_lists_the_trained_ones(
    classed: Path, tmp_path: Path, where: dict[str, str], message: str, hint: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        sample(str(classed), 1, out=tmp_path / "g", where=where)
    assert hint in caught.value.hint
    assert not (tmp_path / "g").exists()


def test_a_model_without_classes_is_asked_for_one_in_vain(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be asked for contrast=T1") as caught:
        sample(str(run), 1, out=tmp_path / "g", where={"contrast": "T1"})
    assert "trained without classes" in caught.value.hint


@pytest.mark.parametrize("how", [{"guidance": 2.0}, {"interval": (0.2, 0.8)}])
def test_guidance_is_refused_by_a_model_that_takes_none(classed: Path, run: Path, tmp_path: Path, how: dict) -> None:
    for folder in (classed, run):
        with pytest.raises(UserError, match=r"takes no guidance scale \(--guidance") as caught:
            sample(str(folder), 1, out=tmp_path / "g", **how)
        assert "imf-guided" in caught.value.hint
    assert not (tmp_path / "g").exists()


def test_scale_and_interval_reach_the_network(guided: Path, tmp_path: Path) -> None:
    asked = {
        "plain": {},
        "strong": {"guidance": 3.0},
        "short": {"guidance": 3.0, "interval": (0.2, 0.7)},
    }
    found = []
    for name, how in asked.items():
        sample(str(guided), 2, out=tmp_path / name, where={"contrast": "T1"}, **how)
        found.append(latents_of(tmp_path / name, 2))
    assert not any(torch.equal(a, b) for a, b in zip(found, found[1:] + found[:1], strict=True))
    condition = neuromf.load(guided, device="cpu").condition(2, {"contrast": "T1"}, 3.0, (0.2, 0.7))
    assert condition.omega.tolist() == [3.0, 3.0]
    assert condition.interval.flatten().tolist() == pytest.approx([0.2, 0.7] * 2)
    with pytest.raises(UserError, match=r"a guidance scale of 0\.5 is none"):
        sample(str(guided), 1, out=tmp_path / "g", guidance=0.5)


def test_samples_of_another_condition_do_not_share_a_folder(guided: Path, tmp_path: Path) -> None:
    asked = {"where": {"contrast": "T1"}, "guidance": 2.0}
    sample(str(guided), 1, out=tmp_path / "g", **asked)
    for other in ({"where": {"contrast": "FLAIR"}}, {"where": {}}, {"guidance": 3.0}, {"interval": (0.1, 0.9)}):
        with pytest.raises(UserError, match="holds other samples: condition"):
            sample(str(guided), 1, out=tmp_path / "g", **(asked | other))
    assert sample(str(guided), 2, out=tmp_path / "g", **asked).made == 1


def test_a_model_that_always_saw_a_class_must_be_asked_for_one(contrasts: Path, tmp_path: Path) -> None:
    words = [*TINY, "network.classes=true", "guidance.label_drop=0", "training.updates=1"]
    train(config.load("imf-xpred", words), contrasts, tmp_path / "run", device="cpu")
    with pytest.raises(UserError, match="never trained without a class") as caught:
        sample(str(tmp_path / "run"), 1, out=tmp_path / "g")
    assert "--where contrast=FLAIR" in caught.value.hint
    assert sample(str(tmp_path / "run"), 1, out=tmp_path / "g", where={"contrast": "FLAIR"}).made == 1


def test_an_average_is_asked_for_by_decay_or_half_life(classed: Path, tmp_path: Path) -> None:
    model: dict[str, Generator] = {
        str(name): neuromf.load(classed, ema=name, device="cpu") for name in (None, "0.01kimg", "500kimg", 0.5, "0.50")
    }
    assert [m.source.ema for m in model.values()] == ["0.01kimg", "0.01kimg", "500kimg", "0.5", "0.5"]
    latents = {name: m.sample_latents([0]) for name, m in model.items()}
    assert torch.equal(latents["None"], latents["0.01kimg"])
    assert not torch.equal(latents["0.5"], latents["500kimg"])
    sample(str(classed), 1, out=tmp_path / "g", ema="500kimg", batch_size=1)
    assert torch.equal(latents_of(tmp_path / "g", 1), latents["500kimg"])
    with pytest.raises(UserError, match="no average 100kimg") as caught:
        neuromf.load(classed, ema="100kimg", device="cpu")
    assert "0.5, 0.01kimg, 500kimg" in caught.value.hint


def test_the_second_head_stays_behind(classed: Path, tmp_path: Path) -> None:
    whole = neuromf.load(classed, device="cpu")
    assert not [name for name in whole.network.state_dict() if "v_head" in name]
    export = whole.save_pretrained(tmp_path / "export")
    again = neuromf.load(export, device="cpu")
    ask = {"where": {"contrast": "T1"}, "nfe": 2}
    assert torch.equal(again.sample_latents([0, 1], **ask), whole.sample_latents([0, 1], **ask))
    with pytest.raises(UserError, match=r"holds the average 0\.01kimg alone, not 500kimg"):
        neuromf.load(export, ema="500kimg", device="cpu")
