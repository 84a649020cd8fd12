"""What shared options make of their words."""

from __future__ import annotations

import pytest

from neuromf.errors import UserError
from neuromf_cli import options


def test_one_number_stands_for_three() -> None:
    assert options.voxels("64") == (64, 64, 64)
    assert options.voxels("48,64,32") == (48, 64, 32)
    assert options.maybe_spacing("3") == 3.0
    assert options.maybe_spacing("1,1,2.5") == (1.0, 1.0, 2.5)
    assert options.maybe_spacing(None) is None
    assert options.shares("0.8,0.2,0") == (0.8, 0.2, 0.0)


@pytest.mark.parametrize("text", ["0.5", "0.5,0.5", "a,b,c", "1,-1,1"])
def test_fractions_are_three(text: str) -> None:
    with pytest.raises(UserError, match="--fractions"):
        options.shares(text)


def test_a_guidance_interval_is_two_times_in_order() -> None:
    assert options.interval("0,1") == (0.0, 1.0)
    assert options.interval("0.2,0.8") == (0.2, 0.8)
    assert options.interval("0.5,0.5") == (0.5, 0.5)


@pytest.mark.parametrize("text", ["0.5", "0.8,0.2", "-0.1,0.5", "0.5,1.1", "nan,1", "a,b", "0,0.5,1", "", ","])
def test_other_guidance_intervals_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(UserError, match="--guidance-interval") as caught:
        options.interval(text)
    assert "0.2 0.8" in caught.value.hint


def test_conditions_are_pairs() -> None:
    assert options.pairs(None) == {}
    assert options.pairs(["contrast=T1", "note=a=b"]) == {"contrast": "T1", "note": "a=b"}


@pytest.mark.parametrize("word", ["contrast", "=T1", "contrast=", "="])
def test_a_condition_that_is_no_pair_is_refused(word: str) -> None:
    with pytest.raises(UserError, match=f"--where {word}") as caught:
        options.pairs(["sex=F", word])
    assert "KEY=VALUE" in caught.value.hint


def test_presets_complete_by_their_beginning() -> None:
    assert "imf-xpred" in options.preset_names("imf")
    assert options.preset_names("no such beginning") == []
