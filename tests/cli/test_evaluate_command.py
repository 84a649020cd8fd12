from __future__ import annotations

import pytest

LISTED = ["--features", "builtin,incepton"]
REPEATED = ["--features", "builtin", "--features", "incepton"]


@pytest.mark.parametrize("words", [LISTED, REPEATED])
def test_features_are_a_list_or_repeated_and_unknown_ones_are_refused(neuromf, in_tmp, words: list[str]) -> None:
    result = neuromf("evaluate", "generated", "real", *words)
    assert result.exit_code == 2
    assert "no features 'incepton'" in result.stderr
    assert "did you mean 'inception'" in result.stderr


def test_a_file_that_is_not_there_is_said_before_volumes_are_read(neuromf, in_tmp) -> None:
    result = neuromf("evaluate", "generated", "real", "--features", "module:own.py")
    assert result.exit_code == 2
    assert "own.py is not a Python file" in result.stderr
