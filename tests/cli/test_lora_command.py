"""`neuromf lora`: what is refused before anything is read or trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neuromf.config import load
from neuromf.files import write_json

Run = Callable[..., Any]


@pytest.fixture
def base(in_tmp: Path) -> str:
    """What a run folder says of itself, without weights."""
    (in_tmp / "base").mkdir()
    (in_tmp / "base/config.yaml").write_text(load("cpu-small").to_yaml())
    write_json(in_tmp / "base/data.json", {"latent_shape": [8, 16, 16, 16]})
    return "base"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--base runs/imf-xpred"),
        (["--base", "./absent"], "there is no run at absent"),
        (["--info", "absent.safetensors"], "there is no file absent.safetensors"),
        (["--merge", "absent.safetensors"], "there is no file absent.safetensors"),
    ],
)
def test_without_a_base_or_adapters_it_says_what_to_give(words: list[str], said: str, neuromf: Run, in_tmp) -> None:
    result = neuromf("lora", *words)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["adapters.rank=0"], "adapters.rank"),
        (["adapters.rnk=4"], "did you mean 'adapters.rank'"),
        (["network.patch=2"], "there are no pairs"),
        (["--masks", "masks"], "--masks, --label and --suffix belong to --images"),
        (["--images", "scans", "--label", "lesion"], "--label lesion is not usable"),
        (["--images", "scans", "--label", "0"], "--label 0 is not usable"),
        (["--images", "scans", "--fractions", "1", "2"], "--fractions"),
        ([], "there are no pairs at pairs"),
        (["--dry-run"], "there are no pairs at pairs"),
    ],
)
def test_a_wrong_word_is_refused_with_the_way_out(words: list[str], said: str, neuromf: Run, base: str) -> None:
    result = neuromf("lora", "--base", base, *words)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert not Path("runs").exists()
