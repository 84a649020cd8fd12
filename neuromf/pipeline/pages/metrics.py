"""What `neuromf evaluate` found, for a page: metrics with intervals, what was not computed, and the pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from neuromf.errors import UserError
from neuromf.pipeline.evaluation_report import table_rows
from neuromf.pipeline.pages.collected import PICTURE_BYTES, Wanted, part
from neuromf.pipeline.sample_folder import MANIFEST
from neuromf.reporting.page import Block, Folded, Missing, Picture, Table, Text
from neuromf.reporting.sprites import embedded
from neuromf.training.diagnosis_evidence import finite

METRICS = "metrics.json"
_DEEPEST, _MOST = 4, 12
# What an overview tells of, and what it leaves out.
_MAIN, _FLOORS = ("frechet_", "fid_", "kid_", "precision_", "recall_", "memorized_"), ("_equal_n", "_real_real")
# What a metric is, by the first pattern that its name fits.
_MEANINGS = (
    (r"_equal_n$", "at a number that real against real can be done at, too"),
    (r"_real_real$", "between halves of the real set: what perfect samples would have"),
    (r"_ratio$", "of the two above; 1 is as close as real to real"),
    (r"^(frechet|fid)_", "Fréchet distance of features; biased upwards for few volumes"),
    (r"^kid_", "kernel distance of features, unbiased; 0 within its interval: no difference seen"),
    (r"^mmd_", "kernel distance of features (Gaussian kernel), unbiased"),
    (r"^precision_", "share of generated volumes among real ones"),
    (r"^recall_", "share of real volumes among generated ones"),
    (r"^density_", "how densely real volumes surround generated ones"),
    (r"^coverage_", "share of real volumes with a generated one near"),
    (r"^memorized_share_", "closer to a training volume than nearly all held-back real ones are"),
    (r"^ssim_nearest$", "structural similarity to the nearest real volume"),
    (r"^psnr_nearest_db$", "signal to noise against the nearest real volume, dB"),
    (r"^lpips_nearest$", "perceptual distance to the nearest real volume"),
    (r"^ms_ssim_pairs_", "likeness within the set: high means little variety"),
    (r"^spectrum_distance$", "of mean radial spectra, log10 power"),
    (r"^high_frequency_energy_", "share of the energy above half the Nyquist frequency"),
    (r"^intensity_", "of voxel intensities"),
    (r"^latent_", "of whitened latents, by channel"),
)
# Pictures of `evaluate`, whether they show real people, and what they show.
_PICTURES = {
    "spectrum.png": (False, "Radial power spectra of generated and real volumes"),
    "intensity.png": (False, "Voxel intensities of generated and real volumes"),
    "morphology.png": (False, "Volumes of structures, and their correlations, generated and real"),
    "samples.png": (True, "Real volumes above generated ones, in three planes"),
    "closest_pixels.png": (True, "Generated volumes above their nearest training volumes, by voxels"),
    "closest_builtin.png": (True, "Generated volumes above their nearest training volumes, by features"),
}


class Evaluation(NamedTuple):
    """One folder of `evaluate`, and how its samples were made (empty where they do not say)."""

    folder: Path
    content: Mapping[str, Any]
    manifest: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The set, as in `generated, 1 evaluation, 64 volumes`."""
        nfe, n = self.manifest.get("nfe"), (self.content.get("sets") or {}).get("generated", {}).get("n")
        samples = _samples_above(self.folder)
        words = [samples.name if samples else self.folder.name]
        words += [f"{nfe} evaluation{'s' * (nfe != 1)}"] if nfe else []
        return ", ".join([*words, *([f"{n} volumes"] if n else [])])


def evaluations(folder: Path, wanted: Wanted) -> list[Evaluation]:
    """Every evaluation in a folder and some levels below it, those of the fewest evaluations of the network first."""
    found = []
    for depth in range(_DEEPEST):
        for path in sorted(folder.glob("*/" * depth + METRICS)):
            content = wanted.mapping(path)
            samples = _samples_above(path.parent)
            if isinstance(content.get("metrics"), dict):
                found.append(Evaluation(path.parent, content, wanted.mapping(samples / MANIFEST) if samples else {}))
    found.sort(key=lambda evaluation: (evaluation.manifest.get("nfe") or 0, str(evaluation.folder)))
    if len(found) > _MOST:
        wanted.remarks.append(f"{len(found)} evaluations below {folder}: the first {_MOST} are shown")
    return found[:_MOST]


def overview(found: Sequence[Evaluation]) -> Table:
    """One line for each evaluation, with the distances that the first one has."""
    names = [name for name in found[0].content["metrics"] if name.startswith(_MAIN) and not name.endswith(_FLOORS)]
    rows = []
    for evaluation in found:
        metrics = evaluation.content["metrics"]
        rows.append({"set": evaluation.name, **{name: finite(part(metrics, name).get("value")) for name in names}})
    return Table(rows, "All evaluations; each with its intervals below.")


def _samples_above(folder: Path) -> Path | None:
    """The folder of samples that an evaluation lies in."""
    return next((above for above in (folder, *list(folder.parents)[:2]) if (above / MANIFEST).is_file()), None)


def metric_blocks(evaluation: Evaluation, wanted: Wanted, *, heading: bool = True) -> list[Block]:
    """The table, the verdict, the notes and the pictures of an evaluation."""
    content, blocks = evaluation.content, list[Block]()
    if heading:
        blocks.append(Text(evaluation.name, heading=True))
    verdict = content.get("verdict")
    if verdict:
        text = str(verdict["text"])
        blocks.append(Text(f"{text[:1].upper()}{text[1:]} ({verdict['metric']})."))
    try:
        rows = [{**row, "metric": (row["metric"], _meaning(row["metric"]))} for row in table_rows(content["metrics"])]
    except (KeyError, TypeError, AttributeError) as error:
        return [*blocks, Missing(f"{evaluation.folder / METRICS} is not what this version writes ({error!r}).")]
    caption = "Interval: 95 %; of _equal_n and _real_real the spread over random halves. N: generated / real."
    blocks.append(Table(rows, caption))
    notes = [f"{note}." for note in content.get("notes", [])]
    absent = [f"{name}: {reason}" for name, reason in (content.get("not_computed") or {}).items()]
    blocks += [Text(f"Note: {note}") for note in notes]
    blocks += [Folded(f"Not computed ({len(absent)})", "\n".join(absent))] if absent else []
    return [*blocks, *_pictures(evaluation, wanted)]


def _meaning(name: str) -> str:
    return next((meaning for pattern, meaning in _MEANINGS if re.search(pattern, name.removesuffix(" (shrunk)"))), "")


def _pictures(evaluation: Evaluation, wanted: Wanted) -> list[Block]:
    blocks: list[Block] = []
    withheld, too_large = [], []
    for name, (real, alt) in _PICTURES.items():
        path = evaluation.folder / name
        if not path.is_file():
            continue
        if real and not wanted.real_scans:
            withheld.append(name)
            continue
        limit = min(PICTURE_BYTES, wanted.pictures_left)
        try:
            data = embedded(path, limit)
        except UserError as error:
            wanted.remarks.append(error.message)
            continue
        if len(data) > limit:
            too_large.append(name)
            continue
        wanted.pictures_left -= len(data)
        blocks.append(Picture(data, alt, f"{alt}."))
    for names, why in ((withheld, "real scans are shown with --real-scans only"), (too_large, "the page is full")):
        if names:
            blocks.append(Text(f"Left out, since {why}: {', '.join(names)} in {evaluation.folder}."))
    return blocks
