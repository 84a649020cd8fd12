"""The tissue labels that are understood (FreeSurfer/SynthSeg numbers) and how bright each tissue is.

Numbers and T1 priors follow the training label maps and priors of SynthSeg (Billot et al., Medical Image
Analysis 2023; github.com/BBillot/SynthSeg, Apache-2.0); labels above 500 follow the SimNIBS charm atlas.
Grey values are on the 0..255 scale of those priors.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

Contrast = Literal["T1", "FLAIR"]
CONTRASTS: tuple[Contrast, ...] = ("T1", "FLAIR")
Region = Literal["outside", "brain", "fluid", "head"]


class Tissue(NamedTuple):
    """One intensity class: labels of one class share their mean.

    `t1`, `t1_sd`: mean grey value over scanners and its spread. `t1_flat`: fraction of white matter in a scan of
    low contrast (0: not known, `t1` is used). `flair`: fraction of white matter in a FLAIR scan (own choice:
    fluid suppressed, grey a little brighter than white, lesions bright). `grain`: standard deviation inside.
    """

    name: str
    t1: float
    t1_sd: float
    grain: float
    t1_flat: float
    flair: float


TISSUES: tuple[Tissue, ...] = (
    Tissue("air", 7.0, 1.8, 5.0, 0.0, 0.04),
    Tissue("csf", 44.4, 11.2, 25.6, 0.28, 0.18),
    Tissue("white", 160.3, 21.7, 15.6, 1.0, 1.0),
    Tissue("grey", 96.3, 12.2, 18.9, 0.79, 1.18),
    Tissue("cerebellar white", 136.0, 13.4, 15.3, 0.98, 1.02),
    Tissue("cerebellar grey", 88.2, 10.6, 17.1, 0.80, 1.16),
    Tissue("thalamus", 129.5, 17.7, 19.6, 0.94, 1.08),
    Tissue("putamen", 124.1, 15.7, 13.8, 0.89, 1.12),
    Tissue("pallidum", 151.8, 19.5, 8.6, 0.98, 0.96),
    Tissue("ventral diencephalon", 142.5, 16.1, 21.1, 0.97, 1.04),
    Tissue("lesion", 116.1, 14.8, 19.5, 0.85, 1.65),
    Tissue("vessel", 86.8, 17.5, 17.2, 0.5, 0.40),
    Tissue("choroid plexus", 59.6, 10.4, 23.7, 0.45, 0.75),
    Tissue("brain stem", 129.8, 12.2, 17.5, 0.97, 1.05),
    Tissue("artery", 126.4, 24.8, 84.0, 0.0, 0.25),
    Tissue("eyeball", 18.1, 3.8, 13.9, 0.0, 0.20),
    Tissue("soft tissue", 93.9, 9.1, 48.6, 0.0, 0.72),
    Tissue("eye muscle", 117.1, 11.7, 64.8, 0.0, 0.80),
    Tissue("mucosa", 69.9, 9.2, 25.5, 0.0, 1.10),
    Tissue("skin", 113.7, 12.4, 74.9, 0.0, 0.95),
    Tissue("spinal cord", 68.2, 11.1, 35.9, 0.0, 0.95),
    Tissue("vein", 48.4, 8.6, 19.9, 0.0, 0.35),
    Tissue("cortical bone", 30.2, 6.9, 22.0, 0.0, 0.13),
    Tissue("cancellous bone", 94.2, 18.3, 43.3, 0.0, 0.58),
    Tissue("optic nerve", 144.5, 16.3, 44.7, 0.0, 1.0),
)


class Label(NamedTuple):
    """One label number, its structure, tissue and region, and its twin on the other side (or itself)."""

    number: int
    name: str
    tissue: str
    region: Region
    mirror: int


# (structure, tissue, region, left or only number, right number)
_STRUCTURES: tuple[tuple[str, str, Region, int, int], ...] = (
    ("background", "air", "outside", 0, 0),
    ("cerebral white matter", "white", "brain", 2, 41),
    ("cerebral cortex", "grey", "brain", 3, 42),
    ("lateral ventricle", "csf", "brain", 4, 43),
    ("inferior lateral ventricle", "csf", "brain", 5, 44),
    ("cerebellar white matter", "cerebellar white", "brain", 7, 46),
    ("cerebellar cortex", "cerebellar grey", "brain", 8, 47),
    ("thalamus", "thalamus", "brain", 10, 49),
    ("caudate", "grey", "brain", 11, 50),
    ("putamen", "putamen", "brain", 12, 51),
    ("pallidum", "pallidum", "brain", 13, 52),
    ("third ventricle", "csf", "brain", 14, 14),
    ("fourth ventricle", "csf", "brain", 15, 15),
    ("brain stem", "brain stem", "brain", 16, 16),
    ("hippocampus", "grey", "brain", 17, 53),
    ("amygdala", "grey", "brain", 18, 54),
    ("csf", "csf", "fluid", 24, 24),
    ("white matter lesion", "lesion", "brain", 25, 57),
    ("accumbens", "grey", "brain", 26, 58),
    ("ventral diencephalon", "ventral diencephalon", "brain", 28, 60),
    ("vessel", "vessel", "brain", 30, 62),
    ("fifth ventricle", "csf", "brain", 72, 72),
    ("optic chiasm", "white", "brain", 85, 85),
    ("choroid plexus, lateral ventricle", "choroid plexus", "brain", 136, 163),
    ("choroid plexus, inferior ventricle", "choroid plexus", "brain", 137, 164),
    ("artery", "artery", "head", 502, 502),
    ("eyeball", "eyeball", "head", 506, 506),
    ("soft tissue", "soft tissue", "head", 507, 507),
    ("eye muscle", "eye muscle", "head", 508, 508),
    ("mucosa", "mucosa", "head", 509, 509),
    ("skin", "skin", "head", 511, 511),
    ("spinal cord", "spinal cord", "head", 512, 512),
    ("vein", "vein", "head", 514, 514),
    ("cortical bone", "cortical bone", "head", 515, 515),
    ("cancellous bone", "cancellous bone", "head", 516, 516),
    ("optic nerve", "optic nerve", "head", 530, 530),
)


def _labels() -> tuple[Label, ...]:
    rows: list[Label] = []
    for name, tissue, region, left, right in _STRUCTURES:
        rows.append(Label(left, name, tissue, region, right))
        if right != left:
            rows.append(Label(right, name, tissue, region, left))
    return tuple(sorted(rows))


# Everything below is indexed by *row*: the position of a label in LABELS, which fits a byte.
LABELS: tuple[Label, ...] = _labels()
NUMBERS: np.ndarray = np.array([label.number for label in LABELS], dtype=np.int16)
MIRROR_ROWS: np.ndarray = np.searchsorted(NUMBERS, [label.mirror for label in LABELS]).astype(np.uint8)
TISSUE_OF_ROW: np.ndarray = np.array([[t.name for t in TISSUES].index(label.tissue) for label in LABELS])
IS_BRAIN: np.ndarray = np.array([label.region == "brain" for label in LABELS])
IS_HEAD: np.ndarray = np.array([label.region == "head" for label in LABELS])


def numbers_of(*structures: str) -> tuple[int, ...]:
    """All label numbers, left and right, of the named structures; `numbers_of("thalamus")` is (10, 49)."""
    known = {label.name for label in LABELS}
    missing = set(structures) - known
    assert not missing, f"no structure named {sorted(missing)}; there are {sorted(known)}"
    return tuple(label.number for label in LABELS if label.name in structures)
