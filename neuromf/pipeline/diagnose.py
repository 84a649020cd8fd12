"""`neuromf diagnose`: a run folder in, what is wrong with the run out, with a picture."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neuromf.config import parse_overrides
from neuromf.config.presets import read_yaml
from neuromf.errors import UserError
from neuromf.files import read_json
from neuromf.pipeline.run_folder import CONFIG_FILE, DATA_FILE, ENVIRONMENT_FILE, RESULT_FILE
from neuromf.reporting.diagnosis import Curve, Panel, diagnosis_figure
from neuromf.training import diagnosis
from neuromf.training.diagnosis import Diagnosis
from neuromf.training.diagnosis_evidence import COSINE_LEARNED, Evidence, Series, Sizes, finite
from neuromf.training.diagnosis_losses import channels
from neuromf.training.diagnosis_network import CLIPPED

PICTURE = "diagnosis.png"
HALTED = "diagnostics/halted.json"
# Where summaries lie: as telemetry writes them, and flat, as runs before this project did.
ARRAYS = ("diagnostics/aggregate_results/training_summary.json", "diagnostics/training_summary.json")
FOLDERS = ("diagnostics/per_epoch_metrics", "diagnostics")
# Groups of figures that old runs kept in files of their own.
GROUPS = (
    "velocity_norms",
    "adaptive_weight",
    "x_hat_stats",
    "block_grad_norms",
    "sampling",
    "per_channel_loss",
    "generated_samples",
)


@dataclass(frozen=True)
class Report:
    """The diagnosis of a run folder; `remarks` name files that could not be read or written."""

    run: Path
    diagnosis: Diagnosis
    sizes: dict[str, int | None]
    picture: Path | None
    remarks: list[str]

    @property
    def problems(self) -> list[str]:
        """What makes the exit code 4, one line each."""
        return [finding.title for finding in self.diagnosis.problems]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "run": str(self.run),
            **self.diagnosis.to_dict(),
            "sizes": self.sizes,
            "picture": str(self.picture) if self.picture else None,
            "remarks": self.remarks,
        }

    def lines(self) -> list[str]:
        """In words."""
        return [
            f"run:   {self.run}",
            *self.diagnosis.lines(),
            "",
            *(f"remark: {remark}" for remark in self.remarks),
            *([f"picture: {self.picture}"] if self.picture else []),
        ]


def diagnose(run: Path, *, overrides: Sequence[str] = (), out: Path | None = None) -> Report:
    """Read a run folder, judge the run, and draw its figures.

    Args:
        run: written by `neuromf train`, or an old one whose `diagnostics/` holds the same figures.
        overrides: `key=value` settings of a run whose folder does not tell them; they win over its config.yaml.
        out: of the picture; `diagnosis.png` in the run folder when None, and none if that cannot be written.

    Raises:
        UserError: no run there, no figures in it, or a picture that cannot be written where it was asked for.
    """
    if out is not None and out.suffix.lower() != ".png":
        raise UserError(f"--out {out} is not a PNG file", "give a name that ends in .png")
    evidence, remarks = gather(run, overrides)
    found = diagnosis.diagnose(evidence)
    picture: Path | None = None
    try:
        picture = _draw(evidence, found, run, out or run / PICTURE)
    except UserError as error:
        if out is not None:
            raise
        remarks.append(f"no picture: {error.message}; --out FILE.png puts it elsewhere")
    sizes = {**evidence.sizes._asdict(), "updates": evidence.updates, "planned": evidence.planned}
    return Report(run, found, sizes, picture, remarks)


# --- reading ----------------------------------------------------------------------------------------------------


def gather(run: Path, overrides: Sequence[str] = ()) -> tuple[Evidence, list[str]]:
    """What a run folder tells, and which of its files could not be read.

    Raises:
        UserError: no folder, or no summary of an epoch in it.
    """
    if not run.is_dir():
        raise UserError(
            f"there is no run at {run}", "give the folder that `neuromf train` wrote, such as runs/imf-xpred"
        )
    reader = _Reader(run)
    summaries = reader.summaries()
    halted = reader.mapping(HALTED)
    last = max((finite(summary.get("global_step")) or 0 for summary in summaries), default=0)
    if halted and (finite(halted.get("global_step")) or 0) > last:
        epochs = [int(epoch) for summary in summaries if (epoch := finite(summary.get("epoch"))) is not None]
        summaries.append({"epoch": max(epochs, default=len(summaries)) + 1, **halted})
    else:
        halted = {}  # of before the run was resumed
    if not summaries:
        found = "\n".join(f"  {remark}" for remark in reader.remarks)
        raise UserError(
            f"{run} holds no figures of any epoch" + (f":\n{found}" if found else ""),
            f"an epoch has to end first; looked for {', '.join(ARRAYS)} and epoch_NNN/*.json below "
            f"{' and '.join(FOLDERS)}",
        )
    settings = _merged(reader.settings(), parse_overrides(overrides))
    sizes = _sizes(settings, reader.mapping(DATA_FILE), reader.mapping(ENVIRONMENT_FILE), reader.mapping(RESULT_FILE))
    return Evidence(summaries, settings, sizes, halted or None), reader.remarks


@dataclass
class _Reader:
    """Reads what can be read of a run folder, and remembers what could not be."""

    run: Path
    remarks: list[str] = field(default_factory=list)

    def json(self, path: Path, kind: type) -> Any:
        """The content of a JSON file of this kind; None where it is absent or damaged."""
        try:
            value = read_json(path) if path.exists() else None
        except UserError as error:
            self.remarks.append(error.message)
            return None
        if value is not None and not isinstance(value, kind):
            self.remarks.append(f"{path} holds {type(value).__name__}, not {kind.__name__}")
            return None
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        """A JSON file of the run folder that holds one object; empty where there is none."""
        return self.json(self.run / name, dict) or {}

    def settings(self) -> dict[str, Any]:
        """config.yaml as it stands (an old one may have other keys), with the precision that `auto` meant."""
        path = self.run / CONFIG_FILE
        try:
            settings = read_yaml(path) if path.exists() else {}
        except UserError as error:
            self.remarks.append(error.message)
            return {}
        training = settings.get("training")
        if isinstance(training, dict) and training.get("precision") == "auto":
            environment = self.mapping(ENVIRONMENT_FILE)
            on_cuda = environment.get("cuda") is not None and environment.get("device") != "cpu"
            training["precision"] = "bf16" if on_cuda else "fp32"
        return settings

    def summaries(self) -> list[dict[str, Any]]:
        """All epochs, in order: the array, and below its last epoch what only the epochs' own files have."""
        listed: dict[int, dict[str, Any]] = {}
        for name in ARRAYS:
            entries = self.json(self.run / name, list) or []
            for place, entry in enumerate((e for e in entries if isinstance(e, dict)), start=1):
                epoch = finite(entry.get("epoch"))
                listed.setdefault(place if epoch is None else int(epoch), entry)
        newest = max(listed, default=None)
        for epoch, folder in self._folders():
            if newest is None or epoch < newest:  # later ones are of before the run was resumed
                listed[epoch] = {"epoch": epoch, **_merged(self._files(folder), listed.get(epoch, {}))}
        return [listed[epoch] for epoch in sorted(listed)]

    def _folders(self) -> Iterator[tuple[int, Path]]:
        for name in FOLDERS:
            for folder in sorted((self.run / name).glob("epoch_*")):
                number = re.fullmatch(r"epoch_(\d+)", folder.name)
                if number and folder.is_dir():
                    yield int(number[1]), folder

    def _files(self, folder: Path) -> dict[str, Any]:
        """The JSON files of an epoch as one summary; a file named as a group of figures is that group."""
        summary: dict[str, Any] = {}
        for path in sorted(folder.glob("*.json")):
            content = self.json(path, dict) or {}
            grouped = path.stem in GROUPS and path.stem not in content
            summary = _merged(summary, {path.stem: content} if grouped else content)
        return summary


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings laid over one another; a null above leaves what is below."""
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merged(merged[key], value)
        elif value is not None or key not in merged:
            merged[key] = value
    return merged


def _sizes(
    settings: Mapping[str, Any], data: Mapping[str, Any], environment: Mapping[str, Any], result: Mapping[str, Any]
) -> Sizes:
    training = settings.get("training")
    training = training if isinstance(training, Mapping) else {}
    batch, accumulation = finite(training.get("batch_size")), finite(training.get("accumulation")) or 1
    processes = finite(environment.get("processes")) or 1
    shape, subjects = data.get("latent_shape"), data.get("subjects")
    samples = finite(subjects.get("train")) if isinstance(subjects, Mapping) else None
    updates = finite(result.get("updates"))
    planned = updates if not (training.get("updates") or training.get("epochs")) else None
    return Sizes(
        planned=int(planned) if planned else None,
        samples=int(samples) if samples else None,
        batch=int(batch * accumulation * processes) if batch else None,
        dimension=math.prod(shape) if isinstance(shape, list) and all(isinstance(n, int) for n in shape) else None,
    )


# --- the picture ------------------------------------------------------------------------------------------------


def _draw(run: Evidence, found: Diagnosis, folder: Path, path: Path) -> Path:
    drawn = [panel for panel in panels(run) if panel.series]
    if not drawn:
        raise UserError("none of the figures is known")
    heading = f"{folder}: {found.phase.name}, {found.phase.judged_by}"
    titles = [(finding.severity, finding.title) for finding in found.findings]
    return diagnosis_figure(path, drawn, heading=heading, findings=titles)


def panels(run: Evidence) -> list[Panel]:
    """The figures of a run, those that share a scale in one panel; the raw loss first. Some may be empty."""
    norms, samples = "velocity_norms.", "generated_samples.nfe_consistency."
    ratio = run.quotient(norms + "compound_v_norm", norms + "target_v_norm", "")
    losses = {"r = t": "raw_loss_fm_mean", "r < t": "raw_loss_mf_mean", "both": "raw_loss_mean"}
    chance = {"chance": run.chance} if run.chance else {}
    names = {
        "raw loss": {**losses, "validation": "val_raw_loss", "weighted": "loss_mean"},
        "norms": {"|u|": norms + "u_norm", "|du/dt|": norms + "jvp_norm"},
        "cosine with v_c": {"V": "cosine_sim_V_vc", "tangent": "cosine_sim_vtilde_vc"},
        "gradient norm (mean)": {"": "grad_norm_mean"},
        "share of clipped steps": {"": "grad_clip_fraction"},
        "learning rate": {"": "learning_rate"},
        "x_hat (data: 0 +- 1)": {name: f"x_hat_stats.{name}" for name in ("min", "std", "max")},
        "gradient by block (RMS)": {name: f"block_grad_norms.{name}" for name in run.keys("block_grad_norms")},
        "samples of 1 against n evaluations": {f"n = {n}": f"{samples}mse_1vs{n}" for n in (2, 5, 10)},
    }
    drawn = {title: _curves((name, run.series(path)) for name, path in each.items()) for title, each in names.items()}
    log = {"raw loss", "norms", "gradient norm (mean)", "gradient by block (RMS)", "samples of 1 against n evaluations"}
    levels = {"cosine with v_c": {"0.5": COSINE_LEARNED, **chance}, "share of clipped steps": {"": CLIPPED}}
    first, *rest = (Panel(title, each, title in log, levels.get(title, {})) for title, each in drawn.items())
    return [
        first,
        Panel("|V| / |v_c|", _curves([("", ratio)]), levels={"1": 1.0, "2, the plateau of record": 2.0}),
        Panel("raw loss by channel", _channel_curves(run), log=True),
        *rest,
    ]


def _channel_curves(run: Evidence) -> dict[str, Curve]:
    names = dict.fromkeys(name for summary in run.summaries for name in channels(summary))

    def one(name: str) -> Callable[[Mapping[str, Any]], float | None]:
        return lambda summary: channels(summary).get(name)

    return _curves((f"channel {name}", run.computed(name, one(name))) for name in names)


def _curves(series: Any) -> dict[str, Curve]:
    """Those of the named series that any epoch has, as (epochs, values)."""
    known: Iterator[tuple[str, Series]] = ((name, each) for name, each in series if each is not None)
    return {name: (each.epochs, each.values) for name, each in known}
