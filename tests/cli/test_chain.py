"""The commands hand over to one another with their defaults, as a newcomer types them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]
TINY = [
    "network.channels=[8,16]",
    "network.attention_levels=[false,true]",
    "network.norm_groups=4",
    "network.head_channels=8",
    "training.updates=4",
    "training.batch_size=2",
    "training.accumulation=1",
]


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory, small_label_maps: Path) -> Path:
    """Eight small synthetic scans of two people, with their table."""
    from neuromf.pipeline.render import Recipe, render

    out = tmp_path_factory.mktemp("scans") / "volumes"
    render([small_label_maps], out, n=8, recipe=Recipe(size=(16, 16, 16), spacing_mm=12.0))
    return out


def answer(result: Any) -> dict[str, Any]:
    """The JSON object of a command that went well."""
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_encode_train_sample_decode_evaluate_with_default_folders(neuromf: Run, scans: Path, in_tmp: Path) -> None:
    encode = ["encode", scans, "--size", "16", "16", "16", "--autoencoder", "haar", "--json"]
    assert answer(neuromf(*encode))["counts"]["encoded"] == 8
    assert answer(neuromf(*encode))["counts"]["kept"] == 8

    assert answer(neuromf("train", "--preset", "imf-xpred", "--dry-run", "--json", *TINY))["updates"] == 4
    assert not (in_tmp / "runs").exists()
    assert answer(neuromf("train", "--preset", "imf-xpred", "--json", *TINY))["updates"] == 4
    again = neuromf("train", "--preset", "imf-xpred", *TINY)
    assert "nothing to do" in again.stderr

    made = answer(neuromf("sample", "--nfe", "1", "--n", "3", "--json"))
    assert (made["out"], made["made"]) == ("runs/imf-xpred/generated", 3)
    assert answer(neuromf("sample", "--nfe", "1", "--n", "3", "--json"))["made"] == 0
    decoded = neuromf("decode", "runs/imf-xpred/generated", "--out", "volumes", "--json")
    assert decoded.exit_code in (0, 4)  # the check may dislike what four updates have learned
    assert len(list((in_tmp / "volumes").glob("*.nii.gz"))) == 3
    table = neuromf("evaluate", "volumes", scans, "--autoencoder", "haar", "--out", "evaluation")
    assert table.exit_code == 0, table.stderr
    assert table.stdout.startswith("metric")
    assert "frechet" in table.stdout
    assert (in_tmp / "evaluation" / "metrics.json").is_file()


def test_a_model_of_classes_is_asked_for_one_in_words(neuromf: Run, scans: Path, in_tmp: Path) -> None:
    table = ["--groups", scans / "renderings.csv", "--class-column", "source"]
    words = ["--size", "16", "--autoencoder", "haar", "--fractions", "0.5", "0.5", "0"]
    assert neuromf("encode", scans, *words, *table, "--quiet").exit_code == 0
    classes = json.loads((in_tmp / "latents" / "dataset.json").read_text())["classes"]
    assert (classes["column"], len(classes["names"]), len(classes["of"])) == ("source", 2, 8)

    guided = ["network.name=mlp", "network.width=8", "network.classes=true", "network.guidance=true"]
    training = ["guidance.enabled=true", "training.updates=4", "training.batch_size=4", "training.accumulation=1"]
    assert neuromf("train", *guided, *training, "--quiet").exit_code == 0

    one, other = classes["names"]
    sample = ["sample", "--n", "2", "--guidance", "2", "--guidance-interval", "0.2", "0.8", "--where"]
    planned = answer(neuromf(*sample, f"source={one}", "--dry-run", "--json"))
    assert (planned["planned"], planned["made"]) == (2, 0)
    assert not (in_tmp / "runs/imf-xpred/generated").exists()
    assert answer(neuromf(*sample, f"source={one}", "runs/imf-xpred", "--json"))["made"] == 2
    manifest = json.loads((in_tmp / "runs/imf-xpred/generated/manifest.json").read_text())
    assert manifest["condition"] == {"where": {"source": one}, "guidance": 2.0, "interval": [0.2, 0.8]}

    for asked, complaint in (
        ([f"source={other}"], "holds other samples: condition"),
        (["source=carl"], "no source 'carl'"),
        ([f"source={one}", "age=70"], "cannot be asked for age=70"),
        (["source"], "--where source is not usable"),
    ):
        refused = neuromf(*sample, *asked)
        assert refused.exit_code == 2
        assert complaint in refused.stderr
        assert one in refused.stderr or "KEY=VALUE" in refused.stderr


def test_a_scan_that_cannot_be_used_is_named_and_exits_4(neuromf: Run, scans: Path, in_tmp: Path) -> None:
    shutil.copytree(scans, in_tmp / "scans")
    (in_tmp / "scans" / "broken.nii.gz").write_bytes(b"not a scan")
    result = neuromf("encode", "scans", "--size", "16", "--autoencoder", "identity", "--json")
    assert result.exit_code == 4
    assert "broken.nii.gz" in result.stderr
    counts = json.loads(result.stdout)["counts"]
    assert (counts["encoded"], counts["refused"]) == (8, 1)
    strict = neuromf("encode", "scans", "--size", "16", "--autoencoder", "identity", "--out", "other", "--strict")
    assert strict.exit_code == 2


def test_groups_from_render_keep_one_person_in_one_split(neuromf: Run, scans: Path, in_tmp: Path) -> None:
    groups = ["--groups", scans / "renderings.csv", "--group-column", "source"]
    words = ["--size", "16", "--autoencoder", "identity", "--fractions", "0.5", "0.5", "0"]
    assert neuromf("encode", scans, *words, *groups, "--quiet").exit_code == 0
    splits = json.loads((in_tmp / "latents" / "splits.json").read_text())
    odd = {int(name[-4:]) % 2 for name in splits["train"]}
    assert len(odd) == 1
    assert len(splits["train"]) == len(splits["val"]) == 4


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["sample"], "neuromf train"),
        (["encode", "absent/", "--autoencoder", "identity"], "absent"),
        (["decode", "absent/"], "absent"),
        (["evaluate", "absent/", "other/", "--autoencoder", "identity"], "absent"),
        (["encode", ".", "--autoencoder", "builtinn"], "builtin"),
        (["render", "absent.nii.gz"], "absent"),
    ],
)
def test_what_is_absent_exits_2_and_says_so(words: list[str], hint: str, neuromf: Run) -> None:
    result = neuromf(*words)
    assert result.exit_code == 2
    assert hint in result.stderr
    assert result.stdout == ""


def test_quiet_says_nothing_on_stderr(neuromf: Run, scans: Path) -> None:
    assert neuromf("encode", scans, "--size", "16", "--autoencoder", "identity", "--quiet").stderr == ""
