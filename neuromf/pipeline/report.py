"""`neuromf report`: a run, a generated set, an ablation or a toy in, one HTML file out that needs nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from neuromf.errors import UserError
from neuromf.pipeline.ablation.folder import PLAN_FILE
from neuromf.pipeline.pages.ablation import ablation_page
from neuromf.pipeline.pages.collected import Progress, Wanted
from neuromf.pipeline.pages.figures import FigureReport, draw_figures, figure_section
from neuromf.pipeline.pages.generated import VOLUMES, set_page
from neuromf.pipeline.pages.run import run_page
from neuromf.pipeline.pages.toy import TOY, toy_page
from neuromf.pipeline.pages.volumes import nifti_files
from neuromf.pipeline.run_folder import CONFIG_FILE
from neuromf.pipeline.sample_folder import MANIFEST
from neuromf.reporting.page import Missing, Page, write_page

PAGE_FILE, FIGURES_FOLDER = "report.html", "figures"


class Kind(NamedTuple):
    """What a folder can be: how it is known, and how its page is collected."""

    name: str
    known_by: Callable[[Path], bool]
    collect: Callable[[Path, Wanted], Page]


KINDS = (
    Kind("ablation", lambda folder: (folder / PLAN_FILE).is_file(), ablation_page),
    Kind("toy", lambda folder: (folder / TOY).is_file(), toy_page),
    Kind("run", lambda f: (f / "diagnostics").is_dir() or (f / CONFIG_FILE).is_file(), run_page),
    Kind("generated set", lambda folder: (folder / MANIFEST).is_file() or bool(nifti_files(folder)), set_page),
)


@dataclass(frozen=True)
class Report:
    """The page that was written, what it says is missing, and the figures if they were asked for."""

    page: Path
    kind: str
    size_bytes: int
    missing: list[Missing]
    figures: FigureReport | None
    remarks: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "page": str(self.page),
            "kind": self.kind,
            "bytes": self.size_bytes,
            "missing": [{"what": block.what, "command": block.command} for block in self.missing],
            "figures": None if self.figures is None else self.figures.to_dict(),
            "remarks": self.remarks,
        }

    def lines(self) -> list[str]:
        """In words."""
        lines = [f"{self.kind}: {self.page} ({self.size_bytes / 1e6:.1f} MB; open it in a browser, send it as it is)"]
        for block in self.missing:
            lines += [f"missing: {block.what}", *([f"         {block.command}"] if block.command else [])]
        lines += [f"remark: {remark}" for remark in self.remarks]
        return [*lines, *(self.figures.lines() if self.figures else [])]


def report(
    path: Path,
    out: Path | None = None,
    *,
    figures: bool = False,
    real_scans: bool = False,
    weights: Path | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Report:
    """Write the page of a folder, and the figures of a paper if asked.

    Args:
        path: of a run, a generated set (its samples or its volumes), an ablation, or a toy.
        out: the HTML file; `report.html` in the folder when None.
        figures: also draw Figures 1 to 8 as PNG and PDF in `figures/` beside the page.
        real_scans: also show pictures of real scans, which those of evaluations are.
        weights: of the autoencoder, where it is not found by its name.
        device: auto, cpu, cuda or mps: where samples are decoded.
        progress: callback (description, done, total).

    Raises:
        UserError: nothing of neuromf there, or the page cannot be written.
    """
    kind = kind_of(path)
    page_file = out or path / PAGE_FILE
    if page_file.suffix.lower() not in {".html", ".htm"}:
        raise UserError(f"--out {page_file} is not an HTML file", "give a name that ends in .html")
    wanted = Wanted(real_scans, device, weights, progress or (lambda *_: None))
    drawn = draw_figures(kind.name, path, page_file.parent / FIGURES_FOLDER, wanted) if figures else None
    page = kind.collect(path, wanted)
    shown = figure_section(page_file.parent / FIGURES_FOLDER, wanted)
    if shown is not None:
        page = page._replace(sections=[*page.sections[:-1], shown, page.sections[-1]])
    size = write_page(page, page_file)
    return Report(page_file, kind.name, size, page.missing, drawn, list(dict.fromkeys(wanted.remarks)))


def kind_of(path: Path) -> Kind:
    """What a folder is.

    Raises:
        UserError: none of the kinds.
    """
    if not path.is_dir():
        raise UserError(f"there is no folder {path}", "give a run, a generated set, or an ablation")
    for kind in KINDS:
        if kind.known_by(path):
            return kind
    within = [child for child in sorted(path.iterdir()) if child.is_dir() and any(k.known_by(child) for k in KINDS)]
    hint = f"these have pages of their own: {', '.join(map(str, within[:8]))}" if within else _ALLOWED
    raise UserError(f"{path} is neither a run, nor a generated set, nor an ablation", hint)


_ALLOWED = (
    "a run has config.yaml and diagnostics/, a generated set manifest.json or NIfTI volumes "
    f"(also in {VOLUMES}/), an ablation plan.yaml"
)
