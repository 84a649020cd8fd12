"""Every `neuromf ...` line in the code blocks of the documents parses, so that no reader meets a wrong option."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from neuromf_cli.app import COMMANDS, load_command

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
PRESETS = sorted((REPOSITORY / "presets").glob("*.yaml"))


def commands_of(text: str) -> Iterator[str]:
    """Command lines that call `neuromf`, with continuation lines joined."""
    for block in re.findall(r"^```[a-z]*\n(.*?)^```", text, flags=re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|\|(?!\|)", line.removeprefix("$ ")):
                if re.match(r"\s*(?:\S*/)?neuromf\s", part + " "):
                    yield part.strip()


def parse(line: str) -> None:
    """Parse the words of one command line without running it."""
    words = shlex.split(re.sub(r"^accelerate launch .*-m neuromf_cli ", "neuromf ", line), comments=True)[1:]
    if not words or words[0].startswith("-"):
        return
    assert words[0] in COMMANDS, f"no command '{words[0]}'"
    command: Any = load_command(words[0])
    rest = words[1:]
    if hasattr(command, "commands") and rest:
        assert rest[0] in command.commands, f"no command '{words[0]} {rest[0]}'"
        command, rest = command.commands[rest[0]], rest[1:]
    if "--help" not in rest:
        command.make_context(words[0], rest)


LINES = [(path.name, line) for path in DOCUMENTS for line in commands_of(path.read_text(encoding="utf-8"))]
LINES += [
    (path.name, command)
    for path in PRESETS
    for line in path.read_text(encoding="utf-8").splitlines()
    if line.startswith("# Command: ")
    for command in line.removeprefix("# Command: ").split(" && ")
]


@pytest.mark.parametrize(("document", "line"), LINES)
def test_commands_in_the_documents_parse(document: str, line: str) -> None:
    parse(line)


@pytest.mark.parametrize(
    "line",
    [
        "neuromf train --preset imf-xpred",
        "neuromf sample --nfe 1 --n 2000",
        "neuromf encode a.nii.gz 'b/*.nii' --size 48 64 48 --spacing 1 --groups s.csv --group-column scan_group",
        "neuromf render --n 300 --size 64 --spacing 3 --out volumes labels/",
        "neuromf encode scans/ --groups scans.csv --class-column contrast",
        "neuromf sample --where contrast=T1 sex=F --guidance 2 --guidance-interval 0.2 0.8 runs/imf-guided",
        "accelerate launch --num_processes 2 -m neuromf_cli train --preset imf-xpred",
    ],
)
def test_the_promised_commands_parse(line: str) -> None:
    parse(line)


def test_a_wrong_option_does_not_parse() -> None:
    with pytest.raises(Exception, match="no-such-option"):
        parse("neuromf train --no-such-option")
    assert list(commands_of("```bash\n.venv/bin/neuromf demo && ls\nls\n```\nneuromf text\n")) == [
        ".venv/bin/neuromf demo"
    ]
