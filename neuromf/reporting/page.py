"""A page about one thing: records in, one HTML file out that needs nothing but itself.

What comes from users is escaped by the templates; a content security policy allows the page's own script and style (by
their hashes) and pictures that lie in the page, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from numpy.typing import ArrayLike

from neuromf.errors import UserError
from neuromf.files import write_text
from neuromf.reporting.sprites import Sprite
from neuromf.reporting.tables import format_number

LIMIT_BYTES = 10_000_000
"""What a mail system lets through, and a telephone opens."""

# Of one series; beyond it every n-th point is carried, and the chart says so.
_MOST_POINTS = 5_000
_DIGITS = 5
_SCRIPTS, _STYLE = ("charts.js", "viewer.js"), "page.css"


class Line(NamedTuple):
    """One series: y over x (numbers, rising), None where there is none; with ends of intervals where it has them.

    Points of a series that is not `joined` stand alone, and several may have the same x.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None] | ArrayLike
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    joined: bool = True


@dataclass(frozen=True)
class Chart:
    """Curves that share a scale, to be hovered.

    Attributes:
        title: also what a series without a name is called.
        lines: at least one.
        log: begin with a logarithmic scale; it can be switched.
        levels: named values to compare with.
        x_label: charts of one label share the cursor.
        x_log: places go by their logarithm.
        x_names: the places 0, 1, ... are these, and no numbers.
        note: a sentence below the title.
        wide: over the whole width of the page.
    """

    title: str
    lines: Sequence[Line]
    log: bool = False
    levels: Mapping[str, float] = field(default_factory=dict)
    x_label: str = "epoch"
    x_log: bool = False
    x_names: Sequence[str] | None = None
    note: str = ""
    wide: bool = False


class Item(NamedTuple):
    """A volume of a viewer, told from the others by what it `is`: {"sample": "3", "evaluations": "1"}.

    `mask` has its size; what is bright in it is tinted.
    """

    is_: Mapping[str, str]
    sprite: Sprite
    mask: Sprite | None = None

    def to_dict(self) -> dict[str, Any]:
        """As the page's script reads it."""
        mask = self.mask.to_dict() if self.mask is not None else None
        return {"is": dict(self.is_), "sprite": self.sprite.to_dict(), "mask": mask}


@dataclass(frozen=True)
class Charts:
    """Charts side by side."""

    kind: ClassVar[str] = "charts"
    charts: Sequence[Chart]


@dataclass(frozen=True)
class Volumes:
    """Volumes in three planes, one at a time."""

    kind: ClassVar[str] = "volumes"
    label: str
    items: Sequence[Item]
    note: str = ""


@dataclass(frozen=True)
class Problem:
    """What a diagnosis found: severity is problem, warning or note."""

    kind: ClassVar[str] = "problem"
    severity: str
    title: str
    numbers: Sequence[str]
    why: str
    setting: str


@dataclass(frozen=True)
class Table:
    """Records; the keys of the first are the heads. A value that is a pair is a text with a remark below it."""

    kind: ClassVar[str] = "table"
    rows: Sequence[Mapping[str, Any]]
    caption: str = ""

    @property
    def heads(self) -> list[str]:
        """The heads, in order of appearance."""
        return list(dict.fromkeys(key for row in self.rows for key in row))

    def numeric(self, head: str) -> bool:
        """Whether a column is of numbers alone, be they written out."""
        values = [row.get(head) for row in self.rows if row.get(head) not in (None, "")]
        return bool(values) and all(map(_is_number, values))


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    kind: ClassVar[str] = "facts"
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Picture:
    """A picture as a data URI, with what it shows in words."""

    kind: ClassVar[str] = "picture"
    data: str
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Text:
    """A paragraph; a heading if it is one."""

    kind: ClassVar[str] = "text"
    text: str
    heading: bool = False


@dataclass(frozen=True)
class Missing:
    """What is not there, and the command that makes it."""

    kind: ClassVar[str] = "missing"
    what: str
    command: str = ""


@dataclass(frozen=True)
class Folded:
    """A long text that is shown when it is asked for."""

    kind: ClassVar[str] = "folded"
    summary: str
    text: str


Block = Charts | Volumes | Problem | Table | Facts | Picture | Text | Missing | Folded


class Section(NamedTuple):
    """A part of the page; its id is what the navigation goes to."""

    id: str
    title: str
    blocks: Sequence[Block]
    lead: str = ""


class Tile(NamedTuple):
    """A figure of the page's head."""

    name: str
    value: str
    remark: str = ""


class Page(NamedTuple):
    """What a page says, in order."""

    kind: str
    title: str
    lead: str
    tiles: Sequence[Tile]
    sections: Sequence[Section]
    foot: str

    @property
    def missing(self) -> list[Missing]:
        """What it says is not there."""
        return [block for section in self.sections for block in section.blocks if isinstance(block, Missing)]


def write_page(page: Page, path: str | Path) -> int:
    """Write the page as one HTML file; returns its bytes.

    Raises:
        UserError: it would exceed `LIMIT_BYTES`, or cannot be written.
    """
    text = render(page)
    size = len(text.encode())
    if size > LIMIT_BYTES:
        raise UserError(
            f"the page would have {size / 1e6:.1f} MB, more than {LIMIT_BYTES / 1e6:.0f} MB", "show fewer volumes"
        )
    write_text(path, text)
    return size


def render(page: Page) -> str:
    """The page as HTML."""
    script, style = "\n".join(map(_part, _SCRIPTS)), _part(_STYLE)
    payload = _Payload()
    # The body comes first: rendering it collects what the script needs to know.
    body = Markup(_ENVIRONMENT.get_template("body.html").render(page=page, payload=payload))
    return _ENVIRONMENT.get_template("page.html").render(
        page=page,
        body=body,
        data=payload.json(),
        script=Markup(script),
        style=Markup(style),
        policy=f"default-src 'none'; img-src data:; script-src '{_digest(script)}'; style-src '{_digest(style)}'",
    )


class _Payload:
    """What the page's script draws: charts and viewers by number, with each axis carried once."""

    def __init__(self) -> None:
        self.axes: list[list[float]] = []
        self._known: dict[tuple[float, ...], int] = {}
        self.charts: list[dict[str, Any]] = []
        self.viewers: list[dict[str, Any]] = []

    def chart(self, chart: Chart) -> int:
        """Add a chart; returns its number."""
        longest = max(len(line.x) for line in chart.lines)
        stride = max(1, -(-longest // _MOST_POINTS))
        thinned = f"One point of {stride} is drawn." if stride > 1 else ""
        self.charts.append(
            {
                "title": chart.title,
                "log": chart.log,
                "levels": {name: _rounded(level) for name, level in chart.levels.items()},
                "x_label": chart.x_label,
                "x_log": chart.x_log,
                "x_names": list(chart.x_names) if chart.x_names is not None else None,
                "note": " ".join(filter(None, (chart.note, thinned))),
                "series": [self._series(line, stride) for line in chart.lines],
            }
        )
        return len(self.charts) - 1

    def _series(self, line: Line, stride: int) -> dict[str, Any]:
        ends = {"low": line.low, "high": line.high}
        intervals = {name: _thin(values, stride) for name, values in ends.items() if values is not None}
        return {
            "name": line.name,
            "x": self._axis(tuple(map(float, line.x[::stride]))),
            "y": _thin(line.y, stride),
            **intervals,
            "joined": line.joined,
        }

    def _axis(self, x: tuple[float, ...]) -> int:
        if x not in self._known:
            self._known[x] = len(self.axes)
            self.axes.append([int(v) if v == int(v) else v for v in x])
        return self._known[x]

    def viewer(self, volumes: Volumes) -> int:
        """Add volumes to look at; returns their number."""
        self.viewers.append({"note": volumes.note, "items": [item.to_dict() for item in volumes.items]})
        return len(self.viewers) - 1

    def json(self) -> Markup:
        """Everything, as JSON that cannot end the element it stands in."""
        text = json.dumps(
            {"axes": self.axes, "charts": self.charts, "viewers": self.viewers},
            allow_nan=False,
            separators=(",", ":"),
        )
        return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _thin(values: Any, stride: int) -> list[float | None]:
    return [_rounded(value) for value in list(values)[::stride]]


def _rounded(value: Any) -> float | None:
    """A number with few digits; None where it is none."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{float(value):.{_DIGITS}g}")


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        return re.fullmatch(r"-?[\d.,]+(e[+-]?\d+)?", value) is not None
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return format_number(value) if isinstance(value, float) else str(value)


def _inline(text: str) -> Markup:
    """A text whose `words in backticks` are commands or names."""
    parts = [escape(part) for part in text.split("`")]
    closed = len(parts) % 2 == 1
    marked = (Markup("<code>{}</code>").format(part) if n % 2 and closed else part for n, part in enumerate(parts))
    return Markup("" if closed else "`").join(marked)


def _part(name: str) -> str:
    return (files("neuromf.reporting") / "html" / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


_ENVIRONMENT = Environment(
    loader=PackageLoader("neuromf.reporting", "html"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters.update(cell=_cell, inline=_inline)
