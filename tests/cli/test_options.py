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


def test_presets_complete_by_their_beginning() -> None:
    assert "imf-xpred" in options.preset_names("imf")
    assert options.preset_names("no such beginning") == []
