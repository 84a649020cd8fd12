"""`neuromf evaluate --compare`: what several evaluations found, in one table, with tests of the differences.

Numbers compare only where they were measured alike. A number measured otherwise than the first row's carries a letter,
which the notes explain, and is left out of the tests; a cited one is marked as cited.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from neuromf.errors import UserError
from neuromf.files import write_json, write_text
from neuromf.metrics.comparisons import Difference, discrepancy_difference, holm, paired, unpaired
from neuromf.pipeline.comparison_rows import Row, read_rows
from neuromf.reporting.tables import format_number, markdown_table, write_csv

FORMAT, SCHEMA_VERSION = "neuromf-comparison", 1
OUT = Path("comparison")
# Headline metrics by how their names begin, in the order of the table; `_real` and `_equal_n` rows stand in metrics.md.
_HEADLINES = (
    "kid_", "mmd_", "frechet_", "fid_", "precision_", "recall_", "density_", "coverage_", "ms_ssim_pairs_generated",
    "ssim_nearest", "psnr_nearest_db", "lpips_nearest", "spectrum_distance", "high_frequency_energy_generated",
    "intensity_wasserstein", "morphology_effect", "morphology_structures_differing", "morphology_correlation_r",
    "dice_generated", "memorized_share_",
)  # fmt: skip
_NO_HEADLINES = ("_equal_n", "_real_real", "_real")
# Expected to be the same for any number of generated volumes; all others change with it by themselves.
_FOR_ANY_N = (
    "kid_", "mmd_", "precision_", "density_", "ssim_nearest", "psnr_", "lpips_", "high_frequency_", "ms_ssim_pairs_",
    "memorized_share_", "dice_",
)  # fmt: skip
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Comparison(NamedTuple):
    """The table (a row a model), the tests, and what its letters mean."""

    rows: list[dict[str, Any]]
    tests: list[dict[str, Any]]
    notes: list[str]
    content: dict[str, Any]
    files: list[Path]


def compare(sources: Sequence[Path], out: Path | None = None, metrics: Sequence[str] = ()) -> Comparison:
    """Compare evaluations; write comparison.json, .md and .csv.

    Args:
        sources: `metrics.json` files, folders that hold one (or `evaluation/metrics.json`), or `baseline.yaml` files
            with cited numbers.
        out: where to write; `./comparison` when None.
        metrics: names of those to show; the headline metrics when empty.

    Raises:
        UserError: fewer than two rows, a source that holds no evaluation, or a metric that no row has.
    """
    rows = read_rows(sources)
    if len(rows) < 2:
        raise UserError(f"{len(rows)} evaluation gives no comparison", "name two or more: --compare A B")
    shown = _chosen(rows, metrics)
    marks = _Marks(rows)
    table = [_line(row, shown, marks) for row in rows]
    tests = _tests(rows, shown, marks)
    notes = [*marks.notes(), *_remarks(rows, tests)]
    content = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "metrics": shown,
        "rows": [row.to_dict(shown) | {"marks": marks.of(row, shown)} for row in rows],
        "tests": tests,
        "notes": notes,
    }
    out = out or OUT
    files = [out / "comparison.json", out / "comparison.md", out / "comparison.csv"]
    write_csv(list(_long(rows, shown, marks)), files[2])
    write_text(files[1], _markdown(table, tests, notes))
    write_json(files[0], content)
    return Comparison(table, tests, notes, content, files)


def _chosen(rows: list[Row], wanted: Sequence[str]) -> list[str]:
    there = list(dict.fromkeys(name for row in rows for name in row.metrics))
    if missing := [name for name in wanted if name not in there]:
        raise UserError(f"no row has the metric '{missing[0]}'", f"there are: {', '.join(sorted(there))}")
    if wanted:
        return list(dict.fromkeys(wanted))
    kept = [name for name in there if not name.endswith(_NO_HEADLINES)]
    return [name for begin in _HEADLINES for name in kept if name.startswith(begin)]


# --- what compares with what -----------------------------------------------------------------------------------------


class _Marks:
    """Letters of numbers that were not measured as the reference's: the first measured row that has them."""

    def __init__(self, rows: list[Row]) -> None:
        self._rows = [row for row in rows if not row.cited]
        self._letters: dict[tuple[str, ...], str] = {}

    def differs(self, row: Row, metric: str) -> tuple[str, ...]:
        """In what a number was measured otherwise than the reference's."""
        if row.cited:
            return ()
        reference = next(other for other in self._rows if metric in other.metrics)
        return different(row, reference, metric)

    def letter(self, row: Row, metric: str) -> str:
        """Of a cell; empty where it compares."""
        found = self.differs(row, metric)
        if not found:
            return ""
        if found not in self._letters:
            n = len(self._letters)
            self._letters[found] = _LETTERS[n % 26] * (n // 26 + 1)
        return self._letters[found]

    def of(self, row: Row, metrics: Sequence[str]) -> dict[str, list[str]]:
        """All of a row, in words."""
        return {name: list(found) for name in metrics if name in row.metrics and (found := self.differs(row, name))}

    def notes(self) -> list[str]:
        """What the letters mean."""
        return [
            f"({letter}) does not compare with the first row that has this number: another {', another '.join(found)}"
            for found, letter in self._letters.items()
        ]


def different(row: Row, other: Row, metric: str) -> tuple[str, ...]:
    """In what a metric of two rows was measured otherwise, in words; empty where the numbers compare."""
    a, b = row.conditions(metric), other.conditions(metric)
    found = [name for name in a if a[name] != b.get(name)]
    if not metric.startswith(_FOR_ANY_N) and row.counts(metric) != other.counts(metric):
        found.append(f"N ({_n(row, metric)} against {_n(other, metric)})")
    return tuple(found)


def _n(row: Row, metric: str) -> str:
    n = row.counts(metric)
    return " / ".join(map(str, n.values())) if isinstance(n, dict) else str(n)


# --- tests -----------------------------------------------------------------------------------------------------------


def _tests(rows: list[Row], metrics: Sequence[str], marks: _Marks) -> list[dict[str, Any]]:
    """Every pair of rows in every metric with values of single volumes; p adjusted for all of them (Holm)."""
    found = []
    for metric in metrics:
        able = [row for row in rows if not row.cited and metric in row.metrics and not marks.differs(row, metric)]
        for a, b in combinations(able, 2):
            difference = _difference(a, b, metric)
            if difference is not None:
                better = _better(difference, a.metrics[metric].get("better"), a.name, b.name)
                found.append(
                    {"metric": metric, "first": a.name, "second": b.name, **difference._asdict(), "better": better}
                )
    for entry, p in zip(found, holm([entry["p"] for entry in found]), strict=True):
        entry["p_holm"] = p
    return found


def _difference(a: Row, b: Row, metric: str) -> Difference | None:
    """None where one of the rows has no values of single volumes, or they do not vary."""
    kind = a.metrics[metric].get("per_volume")
    if kind is None or kind != b.metrics[metric].get("per_volume"):
        return None
    of_a, of_b = a.values(metric), b.values(metric)
    try:
        if kind == "leave one out":
            pairs = [(of_a[name], of_b[name]) for name in ("generated", "real")]
            (generated_a, generated_b), (real_a, real_b) = pairs
            shared = [key for key in real_a if key in real_b]
            return discrepancy_difference(
                (a.metrics[metric]["value"], b.metrics[metric]["value"]),
                (list(generated_a.values()), list(generated_b.values())),
                ([real_a[key] for key in shared], [real_b[key] for key in shared]),
            )
        if "real" in of_a and "real" in of_b:
            shared = [key for key in of_a["real"] if key in of_b["real"]]
            return paired([of_a["real"][key] for key in shared], [of_b["real"][key] for key in shared])
        return unpaired(list(of_a["generated"].values()), list(of_b["generated"].values()))
    except (UserError, KeyError):
        return None


def _better(found: Difference, direction: str | None, first: str, second: str) -> str:
    if direction not in ("lower", "higher") or found.low <= 0 <= found.high:
        return ""
    return first if (found.difference > 0) == (direction == "higher") else second


def _remarks(rows: list[Row], tests: list[dict[str, Any]]) -> list[str]:
    notes = []
    if any(row.cited for row in rows):
        notes.append("(cited) numbers of a publication, measured by it on its own data: they compare with nothing here")
    if tests:
        notes.append(
            f"{len(tests)} tests; p is adjusted for all of them (Holm). Frechet distances have no interval, so that no"
            " test is made of them: read each beside its real-real distance"
        )
    return notes


# --- tables ----------------------------------------------------------------------------------------------------------


def _line(row: Row, metrics: Sequence[str], marks: _Marks) -> dict[str, Any]:
    cells = {name: _cell(row, name, marks) for name in metrics}
    return {
        "model": row.name,
        "NFE": row.model.nfe,
        "s/volume": row.model.seconds,
        "N": row.n,
        **cells,
        "citation": row.model.citation,
    }


def _cell(row: Row, metric: str, marks: _Marks) -> str | None:
    entry = row.metrics.get(metric)
    if entry is None:
        return None
    text = format_number(float(entry["value"]))
    if entry.get("low") is not None:
        text += f" ({format_number(entry['low'])} to {format_number(entry['high'])})"
    if row.cited:
        return f"{text} (cited)"
    letter = marks.letter(row, metric)
    return f"{text} ({letter})" if letter else text


def _long(rows: list[Row], metrics: Sequence[str], marks: _Marks) -> Iterator[dict[str, Any]]:
    """One record per number."""
    for row in rows:
        for name in metrics:
            if (entry := row.metrics.get(name)) is not None:
                yield {
                    "model": row.name,
                    "nfe": row.model.nfe,
                    "seconds": row.model.seconds,
                    "n": row.n,
                    "metric": name,
                    "value": entry["value"],
                    "low": entry.get("low"),
                    "high": entry.get("high"),
                    "better": entry.get("better"),
                    "cited": row.cited,
                    "differs_in": "; ".join(marks.differs(row, name)),
                    "citation": row.model.citation,
                }


def _markdown(table: list[dict[str, Any]], tests: list[dict[str, Any]], notes: list[str]) -> str:
    """The numbers with a column for each model, since there are more metrics than models; then the tests."""
    lines: list[dict[str, Any]] = [
        {"": head, **{row["model"]: _plain(row[head]) for row in table}}
        for head in table[0]
        if head != "model" and any(row[head] is not None for row in table)
    ]
    parts = ["# Comparison", "", markdown_table(lines), ""]
    if tests:
        heads = ("metric", "first", "second", "difference", "interval", "p (Holm)", "better", "test")
        shown = [
            test
            | {"interval": f"{format_number(test['low'])} to {format_number(test['high'])}"}
            | {"p (Holm)": "<0.001" if test["p_holm"] < 0.001 else f"{test['p_holm']:.3f}"}
            for test in tests
        ]
        parts += ["Differences, first less second, with 95 % intervals:", "", markdown_table(shown, heads), ""]
    return "\n".join([*parts, *(f"{note}.\n" for note in notes)])


def _plain(value: Any) -> str | None:
    return format_number(value) if isinstance(value, float) else None if value is None else str(value)
