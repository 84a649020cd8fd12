"""The changelog is alive: its newest version is the package's, under a heading for what comes next."""

from __future__ import annotations

import re
from pathlib import Path

import neuromf


def test_the_newest_version_below_unreleased_is_the_package_s(repository: Path) -> None:
    headings = re.findall(r"^## (\S+)", (repository / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.M)
    assert headings[:2] == ["Unreleased", neuromf.__version__]
