"""Figures 1 to 8 of a paper from what a folder holds; each is drawn, or named with the command that makes its data."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from neuromf.config.presets import read_yaml
from neuromf.data.preprocessing import Preprocessing
from neuromf.data.structure_tables import TOTAL, read_structure_table
from neuromf.data.volume_sets import Grid, evenly, find_volumes, read_volume_set
from neuromf.data.volumes import load_volume, spacing_of
from neuromf.errors import UserError
from neuromf.files import read_json
from neuromf.pipeline.ablation.stages import Place
from neuromf.pipeline.evaluation_sets import held_back
from neuromf.pipeline.pages.ablation_data import Collected, by_evaluations, collected, levels, training_curves
from neuromf.pipeline.pages.collected import PICTURE_BYTES, Wanted, command, part
from neuromf.pipeline.pages.generated import VOLUMES, volumes_of
from neuromf.pipeline.pages.metrics import Evaluation, evaluations
from neuromf.pipeline.run_folder import CONFIG_FILE, DATA_FILE
from neuromf.pipeline.volume_folder import MASK_ENDING, mask_beside
from neuromf.reporting import paper_figures
from neuromf.reporting.anatomy import anatomy_figure
from neuromf.reporting.figures import comparison_sheet, montage
from neuromf.reporting.overview import overview
from neuromf.reporting.page import Block, Missing, Picture, Section
from neuromf.reporting.paper_figures import Group
from neuromf.reporting.sprites import embedded
from neuromf.training.diagnosis_evidence import finite

SHOWN = 4
_PREDICTION = "objective.prediction"
_SHOW_REAL = (3,)  # these are embedded with --real-scans only


class Source(NamedTuple):
    """Where figures are drawn from: what the folder is, where it lies, and how the page was asked for."""

    kind: str
    path: Path
    wanted: Wanted

    def ablation(self, plan: str) -> Collected:
        """The folder as an ablation.

        Raises:
            UserError: it is none, or nothing of it is evaluated; the plan that would do is named.
        """
        if self.kind != "ablation":
            raise UserError(f"a {self.kind} does not compare runs", command("ablate", plan))
        found = collected(self.path)
        if not found.results:
            raise UserError("nothing is collected yet", command("ablate", self.path / "plan.yaml", "--out", self.path))
        return found

    def evaluations(self) -> list[Evaluation]:
        """Every evaluation in the folder.

        Raises:
            UserError: there is none.
        """
        found = evaluations(Place(self.path).runs if self.kind == "ablation" else self.path, self.wanted)
        if not found:
            volumes = volumes_of(self.path) if self.kind == "generated set" else self.path / "generated" / VOLUMES
            raise UserError("nothing is evaluated", command("evaluate", volumes, "SCANS", "--latents", "LATENTS"))
        return found


class Drawn(NamedTuple):
    """One figure: its files; or why there is none, and the command that makes its data."""

    number: int
    title: str
    files: list[Path]
    missing: str = ""
    command: str = ""


class FigureReport(NamedTuple):
    """What became of the eight figures."""

    figures: list[Drawn]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            str(f.number): {
                "title": f.title,
                "files": list(map(str, f.files)),
                "missing": f.missing,
                "command": f.command,
            }
            for f in self.figures
        }

    def lines(self) -> list[str]:
        """One line each, and the command below it where there is nothing to draw."""
        lines = []
        for figure in self.figures:
            where = ", ".join(map(str, figure.files)) or f"not drawn: {figure.missing}"
            lines += [f"figure {figure.number}, {figure.title}: {where}"]
            lines += [f"          {figure.command}"] if figure.command else []
        return lines


def draw_figures(kind: str, path: Path, folder: Path, wanted: Wanted) -> FigureReport:
    """Draw what can be drawn of a folder into another one; the rest is named."""
    source, drawn = Source(kind, path, wanted), []
    for done, (number, (title, draw)) in enumerate(FIGURES.items(), 1):
        try:
            drawn.append(Drawn(number, title, draw(source, folder / f"figure-{number}")))
        except UserError as error:
            drawn.append(Drawn(number, title, [], error.message, error.hint))
        wanted.progress("drawing figures", done, len(FIGURES))
    return FigureReport(drawn)


def figure_section(folder: Path, wanted: Wanted) -> Section | None:
    """The figures that were drawn into a folder, those of real scans only if asked; None where there are none."""
    blocks: list[Block] = []
    for number, (title, _) in FIGURES.items():
        file = folder / f"figure-{number}.png"
        if not file.is_file():
            continue
        if number in _SHOW_REAL and not wanted.real_scans:
            blocks.append(Missing(f"Figure {number}, {title}, shows real scans: {file}. --real-scans embeds it."))
            continue
        data = embedded(file, min(PICTURE_BYTES, wanted.pictures_left))
        wanted.pictures_left -= len(data)
        blocks.append(Picture(data, title, f"Figure {number}: {title}. As PDF: {file.with_suffix('.pdf')}"))
    return Section("figures", "Figures", blocks, "As `neuromf report --figures` drew them.") if blocks else None


# --- the figures ------------------------------------------------------------------------------------------------


def _overview(source: Source, stem: Path) -> list[Path]:
    """1: always possible; with the shapes of the run where there is one."""
    data = source.wanted.mapping(source.path / DATA_FILE)
    config = source.path / CONFIG_FILE
    settings = read_yaml(config) if config.is_file() else {}
    latent, size = data.get("latent_shape"), part(data, "preprocessing").get("size")
    return overview(
        stem,
        prediction=str(part(settings, "objective").get("prediction", "x")),
        latent=_shape(latent),
        volume=_shape(size),
    )


def _shape(values: Any) -> str:
    return " x ".join(map(str, values)) if isinstance(values, list) else ""


def _toy(source: Source, stem: Path) -> list[Path]:
    """2: as `neuromf toy` drew it."""
    again = command("toy", *(("--out", source.path) if source.kind == "toy" else ()))
    files = [source.path / f"figure2{suffix}" for suffix in (".png", ".pdf")]
    if source.kind != "toy":
        raise UserError(f"a {source.kind} has no toy; give the folder of `neuromf toy`", again)
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise UserError(f"{', '.join(absent)} not there; the same call judges again and draws", again)
    stem.parent.mkdir(parents=True, exist_ok=True)
    return [Path(shutil.copyfile(file, f"{stem}{file.suffix}")) for file in files]


def _real_and_generated(source: Source, stem: Path) -> list[Path]:
    """3: volumes of the first evaluation beside the real ones it was compared with."""
    evaluation = source.evaluations()[0]
    generated, real = _compared(evaluation)
    content = evaluation.content
    grid = Grid(tuple(content["grid"]["size"]), tuple(content["grid"]["spacing_mm"]))
    spec = content.get("preprocessing")
    preprocessing = Preprocessing.from_dict(spec) if spec else None
    with tempfile.TemporaryDirectory() as scratch:
        rows = {
            name: list(
                read_volume_set(evenly(paths, SHOWN), grid, scratch=Path(scratch), preprocessing=preprocessing).array
            )
            for name, paths in (("real", real), ("generated", generated))
        }
        files = [Path(f"{stem}{suffix}") for suffix in (".png", ".pdf")]
        return [comparison_sheet(rows, file, spacing_mm=grid.spacing_mm) for file in files]


def _compared(evaluation: Evaluation) -> tuple[list[Path], list[Path]]:
    """The files of both sets, as far as an evaluation says which they were.

    Raises:
        UserError: they have moved, or it is not known which of the scans were held back.
    """
    sets, folder = part(evaluation.content, "sets"), evaluation.folder
    beside = next((above / VOLUMES for above in folder.parents if (above / VOLUMES).is_dir()), None)
    generated = find_volumes(beside or str(part(sets, "generated").get("source")))
    described = part(sets, "real")
    real = find_volumes(str(described.get("source")))
    if len(real) == int(described.get("n", 0)) + len(described.get("refused", [])):
        return generated, real
    run = next((above for above in folder.parents if (above / DATA_FILE).is_file()), None)
    latents = read_json(run / DATA_FILE).get("latents") if run is not None else None
    if latents is None:
        raise UserError(f"{folder} does not say which of the scans in {described.get('source')} were compared")
    return generated, held_back(Path(str(described["source"])), Path(latents)).real


def _evaluations(source: Source, stem: Path) -> list[Path]:
    """4: of an ablation, or of a run that was sampled with several numbers of evaluations."""
    if source.kind == "ablation":
        ablation = source.ablation("ablate-rectflow")
        metric = _frechet([ablation.plan.metric, *ablation.plan.also]) or ablation.plan.metric
        models = by_evaluations(ablation, metric)
        again = command("ablate", "ablate-rectflow")
    else:
        found = source.evaluations()
        metric = _frechet(list(found[0].content["metrics"])) or "frechet_builtin"
        models = _by_nfe(found, metric)
        again = command("sample", source.path, "--nfe", 10, "--out", source.path / "generated-nfe10", "--decode")
    if not any(len(values) > 1 for values in models.values()):
        raise UserError("nothing was evaluated with several numbers of evaluations", again)
    return paper_figures.by_evaluations(models, metric, stem)


def _frechet(names: list[str]) -> str | None:
    return next((name for name in names if name.startswith(("fid_", "frechet_"))), None)


def _by_nfe(found: list[Evaluation], metric: str) -> dict[str, dict[int, list[float]]]:
    models: dict[str, dict[int, list[float]]] = {}
    for evaluation in found:
        value, nfe = finite(part(evaluation.content["metrics"], metric).get("value")), evaluation.manifest.get("nfe")
        if value is not None and nfe:
            model = models.setdefault(str(evaluation.manifest.get("objective")), {})
            model.setdefault(int(nfe), []).append(value)
    return models


def _sweep(source: Source, stem: Path) -> list[Path]:
    """5: the exponent of the loss."""
    ablation = source.ablation("ablate-lp")
    groups = _groups(ablation, "objective.lp", "ablate-lp")
    return paper_figures.sweep(groups, ablation.plan.metric, "exponent p of the loss", stem)


def _two_ways(source: Source, stem: Path) -> list[Path]:
    """6: predicting the data or the velocity."""
    ablation = source.ablation("ablate-prediction")
    groups = _groups(ablation, _PREDICTION, "ablate-prediction")
    curves: dict[str, list[Any]] = {group.name: [] for group in groups}
    predicted = {str(cell["run"]): cell[_PREDICTION] for cell in ablation.cells if cell.get(_PREDICTION)}
    for run, xy in training_curves(ablation, "val_raw_loss").items():
        if predicted.get(run) in curves:
            curves[predicted[run]].append(xy)
    drawn = {name: runs for name, runs in curves.items() if runs}
    return paper_figures.two_ways(groups, drawn, ablation.plan.metric, "what the network predicts", stem)


def _groups(ablation: Collected, factor: str, plan: str) -> list[Group]:
    """The levels of the comparison over a setting.

    Raises:
        UserError: the plan does not vary it, or fewer than two levels were measured.
    """
    numbers = [n for n, comparison in enumerate(ablation.plan.comparisons) if comparison.factor == factor]
    if not numbers:
        raise UserError(f"{ablation.plan.name} does not vary {factor}", command("ablate", plan))
    groups = [
        Group(level.name, level.values, level.mean, level.low, level.high) for level in levels(ablation, numbers[0])
    ]
    measured = [group for group in groups if group.mean is not None]
    if len(measured) < 2:
        again = command("ablate", ablation.folder / "plan.yaml", "--out", ablation.folder)
        raise UserError(f"fewer than two levels of {factor} are measured", again)
    return measured


def _overlays(source: Source, stem: Path) -> list[Path]:
    """7: volumes that were made together with their lesion masks."""
    images: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    spacing = (1.0, 1.0, 1.0)
    for path in sorted(source.path.rglob("*.nii*")):
        mask = mask_beside(path)
        if MASK_ENDING in path.name or not mask.is_file() or len(images) == SHOWN:
            continue
        volume = load_volume(path)
        images.append(_unit(volume.array))
        masks.append(load_volume(mask).array)
        spacing = spacing_of(volume.affine)
    if not images:
        again = command("lora", "--base", source.path if source.kind == "run" else "RUN", "--images", "IMAGES")
        raise UserError(f"no volumes with *{MASK_ENDING}.nii.gz beside them", again)
    names = [f"sample {n}" for n in range(1, len(images) + 1)]
    files = [Path(f"{stem}{suffix}") for suffix in (".png", ".pdf")]
    return [montage(images, names, file, columns=2, spacing_mm=spacing, masks=masks) for file in files]


def _unit(array: np.ndarray) -> np.ndarray:
    """The 99.5th percentile at 1."""
    return np.clip(array / max(float(np.percentile(array, 99.5)), 1e-6), 0, 1)


def _structures(source: Source, stem: Path) -> list[Path]:
    """8: volumes of structures of the brain, where an evaluation measured them."""
    found = source.evaluations()
    for evaluation in found:
        files = [evaluation.folder / f"morphology_{name}.csv" for name in ("generated", "real")]
        if all(file.is_file() for file in files):
            generated, real = (read_structure_table(file, check_unit=False) for file in files)
            names = [name for name in real.names if name != TOTAL and name in generated.names]
            values = (names, generated.columns(names), real.columns(names))
            return [anatomy_figure(Path(f"{stem}{suffix}"), *values) for suffix in (".png", ".pdf")]
    volumes = volumes_of(found[0].folder.parent)
    again = command("evaluate", volumes, "SCANS", "--morphology", "meshnet-18")
    raise UserError("no evaluation measured volumes of structures", again)


FIGURES: dict[int, tuple[str, Callable[[Source, Path], list[Path]]]] = {
    1: ("method overview", _overview),
    2: ("toy", _toy),
    3: ("real against generated", _real_and_generated),
    4: ("quality by number of evaluations", _evaluations),
    5: ("exponent of the loss", _sweep),
    6: ("x- against u-prediction", _two_ways),
    7: ("joint synthesis", _overlays),
    8: ("volumes of structures", _structures),
}
