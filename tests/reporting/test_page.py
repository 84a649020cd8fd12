from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuromf.errors import UserError
from neuromf.reporting import page as pages
from neuromf.reporting.page import (
    Block,
    Chart,
    Charts,
    Facts,
    Folded,
    Item,
    Line,
    Missing,
    Page,
    Picture,
    Problem,
    Section,
    Table,
    Text,
    Tile,
    Volumes,
    render,
    write_page,
)
from neuromf.reporting.sprites import sprites

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&\"'"


def page_of(*blocks: Block, **changes: Any) -> Page:
    settings = {"kind": "Test", "title": "a page", "lead": "", "tiles": [], "foot": "foot"}
    return Page(**{**settings, "sections": [Section("one", "One", blocks)], **changes})


def data_of(html: str) -> dict[str, Any]:
    """What the page's script reads."""
    found = re.search(r'<script type="application/json" id="page-data">(.*?)</script>', html, re.S)
    assert found is not None
    return json.loads(found[1])


class Elements(HTMLParser):
    """Every element of a page with its attributes, and the text outside of script and style."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._within: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._within.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._within and self._within[-1] == tag:
            self._within.pop()

    def handle_data(self, data: str) -> None:
        self.text += "" if self._within else data


def every_block(text: str) -> list[Block]:
    """One block of each kind, with this text wherever a text can stand."""
    volume = sprites([np.zeros((8, 8, 8))], 10**5).items[0]
    return [
        Charts([Chart(text, [Line(text, [1, 2], [3.0, None])], levels={text: 3.0}, x_label=text, note=text)]),
        Volumes(text, [Item({text: text}, volume)], text),
        Problem("problem", text, [text], text, text),
        Table([{text: text, "pair": (text, text)}], text),
        Facts({text: text}),
        Picture("data:image/png;base64,", text, text),
        Text(text),
        Text(text, heading=True),
        Missing(text, text),
        Folded(text, text),
    ]


def test_what_users_wrote_is_text_and_never_markup() -> None:
    tiles = [Tile(HOSTILE, HOSTILE, HOSTILE)]
    html = render(page_of(*every_block(HOSTILE), title=HOSTILE, lead=HOSTILE, tiles=tiles, foot=HOSTILE, kind=HOSTILE))
    elements = Elements(html)
    scripts = [attributes for tag, attributes in elements.found if tag == "script"]
    assert len(scripts) == 2
    assert not [a for tag, a in elements.found if tag == "img" and a.get("src") == "x"]
    assert not [a for _, a in elements.found if any(name.startswith("on") for name in a)]
    assert elements.text.count(HOSTILE) >= 15
    assert data_of(html)["charts"][0]["title"] == HOSTILE


def test_the_page_loads_nothing() -> None:
    html = render(page_of(*every_block("x")))
    for tag, attributes in Elements(html).found:
        assert tag not in ("link", "iframe", "object", "base")
        for name in ("src", "href", "srcset", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    assert "@import" not in html
    assert "url(" not in html
    addresses = set(re.findall(r"https?://[\w./]+", html))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a namespace, which is a name


def test_the_policy_allows_this_script_and_style_by_their_hashes() -> None:
    html = render(page_of(Text("x")))
    policy = next(a["content"] for tag, a in Elements(html).found if "http-equiv" in a)
    script, style = (re.search(rf"<{tag}>(.*?)</{tag}>", html, re.S) for tag in ("script", "style"))
    assert script is not None
    assert style is not None
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert pages._digest(script[1]) in policy
    assert pages._digest(style[1]) in policy


def test_all_points_are_carried_and_what_is_not_finite_is_a_gap() -> None:
    y = [float(n) for n in range(3000)]
    y[7], y[8] = float("nan"), float("inf")
    html = render(page_of(Charts([Chart("a", [Line("one", range(3000), y), Line("two", range(3000), [1.0] * 3000)])])))
    data = data_of(html)
    assert len(data["axes"]) == 1  # shared
    assert data["charts"][0]["series"][0]["y"][6:10] == [6, None, None, 9]
    assert len(data["charts"][0]["series"][0]["y"]) == 3000
    assert data["charts"][0]["note"] == ""


def test_a_very_long_series_is_thinned_and_that_is_said() -> None:
    n = 12_000
    data = data_of(render(page_of(Charts([Chart("a", [Line("", range(n), np.arange(n) * 1.0)])]))))
    assert data["charts"][0]["series"][0]["y"][:3] == [0, 3, 6]
    assert "One point of 3" in data["charts"][0]["note"]


def test_columns_of_numbers_are_aligned_and_absent_values_empty() -> None:
    html = render(page_of(Table([{"name": "a", "value": 0.123456}, {"name": "b", "value": None}])))
    assert '<td class="number">0.1235</td>' in html
    assert '<td class="number"></td>' in html
    assert "<td>a</td>" in html


def test_a_page_says_what_is_missing() -> None:
    page = page_of(Text("x"), Missing("not evaluated yet", "neuromf evaluate"))
    assert page.missing == [Missing("not evaluated yet", "neuromf evaluate")]
    assert "neuromf evaluate" in Elements(render(page)).text


def test_a_page_beyond_the_limit_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="more than 10 MB"):
        write_page(page_of(Folded("x", "y" * 10_000_001)), tmp_path / "a.html")
    assert list(tmp_path.iterdir()) == []
    size = write_page(page_of(Text("é")), tmp_path / "a.html")
    assert (tmp_path / "a.html").stat().st_size == size


def test_words_in_backticks_are_code_and_a_lone_backtick_is_itself() -> None:
    html = render(page_of(Text("run `neuromf <x>` now"), Text("a ` b")))
    assert "<p>run <code>neuromf &lt;x&gt;</code> now</p>" in html
    assert "<p>a ` b</p>" in html


def test_every_kind_of_block_has_its_template() -> None:
    kinds = {block.kind for block in every_block("x")}
    blocks = (Path(pages.__file__).parent / "html" / "blocks.html").read_text()
    assert kinds == set(re.findall(r"macro (\w+)\(", blocks))
