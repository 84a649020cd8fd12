"""How the command line starts, helps and completes."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neuromf import __version__
from neuromf_cli import completions
from neuromf_cli.app import COMMANDS, load_command

Run = Callable[..., Any]
HEAVY = ("torch", "monai", "numpy", "nibabel", "scipy", "matplotlib")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_line_in_the_list_is_the_first_of_the_command_s_own_help(name: str) -> None:
    assert (load_command(name).help or "").strip().splitlines()[0] == COMMANDS[name]


def test_every_command_file_is_listed(repository: Path) -> None:
    files = {path.stem.replace("_", "-") for path in (repository / "neuromf_cli/commands").glob("[!_]*.py")}
    assert files == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command_shows_an_example_that_parses(name: str, neuromf: Run) -> None:
    verbs = getattr(load_command(name), "commands", None)
    for command in [[name, verb] for verb in verbs] if verbs else [[name]]:
        page = neuromf(*command, "--help")
        assert page.exit_code == 0
        text = " ".join(page.stdout.split())
        assert f"Example: neuromf {' '.join(command)}" in text


def test_version_is_the_package_s(neuromf: Run) -> None:
    assert neuromf("--version").stdout == f"neuromf {__version__}\n"


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["train", "--help"],
        ["presets", "list"],
        ["train", "--preset", "no-such-preset"],
        ["train", "training.no_such_key=1"],
        ["train", "training.lr=-1"],
        ["no-such-command"],
    ],
)
def test_what_needs_no_mathematics_imports_none(words: list[str], in_tmp: Path) -> None:
    script = (
        "import sys; from neuromf_cli.app import main\n"
        f"sys.argv = ['neuromf', *{words!r}]\n"
        "try: main()\n"
        f"finally: print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "HEAVY []" in done.stdout, done.stdout + done.stderr


def test_help_takes_under_0_4_seconds(neuromf_process: Run) -> None:
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert neuromf_process("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # Processor time, the best of several: a busy machine is slow for other reasons.
    assert min(seconds() for _ in range(4)) <= 0.4


def test_an_unknown_command_suggests_the_nearest(neuromf: Run) -> None:
    result = neuromf("trainn")
    assert result.exit_code == 2
    assert "'train'" in result.stderr


def test_an_unknown_option_suggests_the_nearest(neuromf: Run) -> None:
    result = neuromf("train", "--preste", "imf-xpred")
    assert result.exit_code == 2
    assert "--preset" in result.stderr


def test_completion_finds_commands_options_and_presets(neuromf_process: Run) -> None:
    def complete(words: str, index: int) -> list[str]:
        environment = {"_NEUROMF_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(index)}
        return neuromf_process(**environment).stdout.split()

    assert complete("neuromf tra", 1) == ["train", "train-autoencoder"]
    assert "--deterministic" in complete("neuromf train --de", 2)
    assert "imf-xpred" in complete("neuromf train --preset imf", 3)


def test_completion_files_are_those_of_the_present_version(repository: Path) -> None:
    for file, content in completions.scripts().items():
        assert (repository / "completions" / file).read_text(encoding="utf-8") == content, (
            "run: python -m neuromf_cli.completions"
        )
