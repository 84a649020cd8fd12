"""Who is in a dataset: the scans, what is known of them, who belongs together, and the splits that follow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from neuromf.data.bids import Selection
from neuromf.data.sources import Scan, Sources, find_sources, join_table, read_column, read_groups
from neuromf.data.splits import SPLITS, make_splits
from neuromf.data.tables import describe_columns, typed
from neuromf.errors import UserError


class Cohort(NamedTuple):
    """The scans behind the inputs of a command, and how they are told apart.

    Attributes:
        sources: the scans, and the tables that describe them.
        columns: what each covariate holds (`describe_columns`).
        groups: subject -> who must stay in one split with it.
        classes: subject -> class, None where no column was named.
        recorded: what dataset.json says of all this, beside the values.
    """

    sources: Sources
    columns: dict[str, dict[str, Any]]
    groups: dict[str, str]
    classes: dict[str, str] | None
    recorded: dict[str, Any]

    @property
    def scans(self) -> list[Scan]:
        """Sorted by subject."""
        return self.sources.scans

    @property
    def covariates(self) -> dict[str, dict[str, float | str | None]]:
        """Subject -> column -> a number, a class name, or None where it is missing."""
        return {scan.subject: typed(scan.covariates, self.columns) for scan in self.scans}

    def splits(self, subjects: Iterable[str]) -> dict[str, list[str]]:
        """Who of `subjects` is in train, val and test: as the inputs say, else drawn (see `make_splits`).

        Raises:
            UserError: nobody in train, or fractions that cannot be used.
        """
        wanted = set(subjects)
        scans = [scan for scan in self.scans if scan.subject in wanted]
        settings = self.recorded["splits"]
        if not settings["given"]:
            return make_splits([scan.subject for scan in scans], self.groups, settings["fractions"], settings["seed"])
        splits = {name: [scan.subject for scan in scans if scan.split == name] for name in SPLITS}
        if not splits["train"]:
            raise UserError("no usable scan is in the split 'train'", "give it to most rows in the column 'split'")
        return splits

    def to_dict(self, subjects: Iterable[str]) -> dict[str, Any]:
        """What dataset.json says of `subjects`: selection, how they were split, classes and covariates."""
        wanted = set(subjects)
        scans = [scan for scan in self.scans if scan.subject in wanted]
        classes = None
        if self.classes is not None:
            of = {scan.subject: self.classes[scan.subject] for scan in scans}
            classes = {"column": self.recorded["class_column"], "names": sorted(set(of.values())), "of": of}
        texts = {scan.subject: scan.covariates for scan in scans}
        # A column is what it was for all scans, also where those with words in it were refused.
        coded = [name for name, column in self.columns.items() if column["type"] == "class"]
        covariates = {name: values for name, values in self.covariates.items() if name in wanted}
        return {
            "selection": self.recorded["selection"],
            "splits": self.recorded["splits"],
            "classes": classes,
            "covariates": {"columns": describe_columns(texts, coded), "of": covariates},
            "participants": len({scan.participant for scan in scans}),
        }


def read_cohort(
    inputs: Sequence[str | Path],
    *,
    selection: Selection | None = None,
    table: str | Path | None = None,
    group_column: str | None = None,
    class_column: str | None = None,
    fractions: Sequence[float] = (0.8, 0.1, 0.1),
    seed: int = 0,
) -> Cohort:
    """Find the scans behind `inputs`, join what a table says of them, and check that they can be split.

    Raises:
        UserError: what `find_sources`, `join_table`, `read_groups`, `read_column` and `make_splits` refuse.
    """
    selection = selection or Selection()
    sources = find_sources(inputs, selection)
    if (selection.suffixes or selection.entities) and not sources.trees:
        raise UserError(
            "--suffix and --entity select from BIDS datasets, and none is among the inputs",
            "leave them out, or give the folder that holds dataset_description.json",
        )
    if table is not None:
        sources = join_table(sources, table)
    texts: Mapping[str, Mapping[str, str]] = {scan.subject: scan.covariates for scan in sources.scans}
    recorded = {
        "selection": selection.to_dict(),
        "class_column": class_column,
        "splits": {
            "seed": seed,
            "fractions": list(fractions),
            "group_column": group_column,
            "given": sources.scans[0].split is not None,
        },
    }
    cohort = Cohort(
        sources,
        describe_columns(texts, sources.coded),
        read_groups(sources, group_column),
        read_column(sources, class_column) if class_column is not None else None,
        recorded,
    )
    # A fault in the fractions or splits should show before hours of encoding.
    cohort.splits(scan.subject for scan in cohort.scans)
    return cohort
