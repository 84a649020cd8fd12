"""The organs of the phantom as depth fields on head coordinates (mm, RAS+, origin in the middle of the brain).

Every function takes points (3, ...) and gives fields of the shape of one coordinate; see `shapes.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from neuromf.data.shapes import chain, ellipsoid, union


@dataclass(frozen=True)
class Anatomy:
    """What differs between heads: lengths in mm, ratios without unit. `draw` makes the joint distribution."""

    scale: tuple[float, float, float]  # of the whole head along x, y, z
    taper: float  # how much narrower the front is than the back
    ventricle: float  # size factor of the lateral ventricles
    third_ventricle_mm: float  # half width
    cortex_mm: float
    sulcus_mm: float  # half width
    sulcus_depth_mm: float
    fold_period_mm: float
    gap_mm: float  # fluid between brain and skull
    skull_mm: float
    scalp_mm: float
    deep_grey: float  # size factor
    cerebellum: float  # size factor
    callosum_mm: float  # half thickness
    face: float  # size factor

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Anatomy:
        """Draw one head; atrophy (0 young to 1 old) ties fluid spaces, cortex and deep grey together."""
        atrophy = float(rng.beta(1.3, 1.8))
        x, y, z = rng.normal(1.0, 0.03) * (1 + rng.normal(0, 0.025, 3))
        return cls(
            scale=(float(x), float(y), float(z)),
            taper=rng.uniform(0.03, 0.16),
            ventricle=float(np.exp(rng.normal(-0.3, 0.2) + 1.0 * atrophy)),
            third_ventricle_mm=1.2 + 3.0 * atrophy * rng.uniform(0.5, 1.2),
            cortex_mm=rng.uniform(2.6, 3.6) - 0.5 * atrophy,
            sulcus_mm=0.2 + 1.1 * atrophy * rng.uniform(0.6, 1.2),
            sulcus_depth_mm=rng.uniform(13, 19),
            fold_period_mm=rng.uniform(21, 27),
            gap_mm=1.5 + 3.0 * atrophy * rng.uniform(0.6, 1.3),
            skull_mm=rng.uniform(4.5, 8.5),
            scalp_mm=rng.uniform(3.5, 8.0),
            deep_grey=rng.uniform(0.92, 1.12) - 0.08 * atrophy,
            cerebellum=rng.uniform(0.92, 1.08),
            callosum_mm=rng.uniform(2.6, 4.0) - 0.8 * atrophy,
            face=rng.uniform(0.92, 1.08),
        )


def folded(points: torch.Tensor) -> torch.Tensor:
    """Both sides in one: (|x|, y, z)."""
    return torch.stack([points[0].abs(), points[1], points[2]])


class Surfaces(NamedTuple):
    """Depth below the surface of each large part."""

    cerebrum: torch.Tensor
    cerebellum: torch.Tensor
    stem: torch.Tensor
    cavity: torch.Tensor
    head: torch.Tensor


def surfaces(points: torch.Tensor, a: Anatomy) -> Surfaces:
    """Brain parts, the cavity of the skull around them, and the head with face and neck."""
    p = folded(points)
    y, z = p[1], p[2]
    tapered = torch.stack([p[0] * (1 + a.taper * y / 85), y, z])
    main = ellipsoid(tapered, (24, -2, 16), (44, 88, 57))
    # The frontal lobe rests on the orbits, the occipital lobe on the tentorium.
    floor = z + 15 - 0.10 * (y - 20).clamp(min=0) - 0.14 * (-y - 20).clamp(min=0)
    temporal = ellipsoid(torch.stack([tapered[0], y, z + 0.22 * y]), (43, -4, -21), (21, 43, 19))
    cerebrum = union(-union(-main, -floor, softness_mm=3), temporal, softness_mm=2)

    c = a.cerebellum
    half = ellipsoid(p, (24, -57, -39), (30 * c, 29 * c, 21 * c))
    vermis = ellipsoid(p, (0, -57, -36), (15 * c, 25 * c, 24 * c))
    cerebellum = union(half, vermis, softness_mm=2)
    stem = union(
        chain(
            p,
            [((0, -18, 0), 15), ((0, -22, -14), 13.5), ((0, -24, -34), 13), ((0, -32, -56), 8.5), ((0, -37, -72), 7.5)],
        ),
        ellipsoid(p, (0, -15, -31), (16, 11, 13)),
        softness_mm=3,
    )
    wide = ellipsoid(tapered, (0, -2, 8), (66, 86, 67))
    cavity = union(cerebrum + a.gap_mm, cerebellum + a.gap_mm, stem - 1, torch.minimum(wide, floor - 2), softness_mm=4)
    vault = cavity + a.skull_mm + a.scalp_mm
    f = a.face
    face = ellipsoid(p, (0, 38, -62), (62 * f, 58 * f, 72 * f))
    nose = chain(p, [((0, 88, -22), 7 * f), ((0, 100 * f, -52), 12 * f)])
    neck = chain(p, [((0, -36, -38), 56), ((0, -28, -90), 49), ((0, -32, -160), 50)])
    head = union(vault, face, nose, neck, softness_mm=7)
    return Surfaces(cerebrum, cerebellum, stem, cavity, head)


def fissure_limit(y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Distance below the outer edge of the corpus callosum, where the hemispheres are joined (positive inside)."""
    up = (z - 4).clamp(min=0)
    return (1 - ((y + 4) ** 2 / 43**2 + up**2 / 25**2).sqrt()) * 25


def core(points: torch.Tensor) -> torch.Tensor:
    """The middle of the base, where nuclei and brain stem take the place of cortex."""
    return ellipsoid(folded(points), (0, -9, -6), (31, 32, 30)) + 15


def callosum(points: torch.Tensor, a: Anatomy) -> torch.Tensor:
    """The arch of white matter that joins the hemispheres, from genu over body to splenium."""
    p = folded(points)
    t = a.callosum_mm
    nodes = [
        ((0, 24, -3), 0.8 * t),
        ((0, 33, 5), 1.3 * t),
        ((0, 27, 16), 1.2 * t),
        ((0, 8, 24), t),
        ((0, -14, 25), t),
        ((0, -32, 19), 1.2 * t),
        ((0, -40, 10), 1.5 * t),
        ((0, -36, 5), 1.0 * t),
    ]
    return chain(torch.stack([p[0] * 0.22, p[1], p[2]]), nodes)


def ventricles(points: torch.Tensor, a: Anatomy) -> dict[str, torch.Tensor]:
    """Lateral ventricles with frontal, occipital and temporal horns, third and fourth ventricle."""
    p = folded(points)
    v = a.ventricle
    out = 4 * (v - 1)  # large ventricles grow sideways
    body = chain(
        p,
        [
            ((6 + out, 29, 5), 3.2 * v),
            ((6 + out, 20, 11), 5.5 * v),
            ((7 + out, 2, 17), 5.2 * v),
            ((9 + out, -16, 18), 5.2 * v),
            ((17 + out, -34, 12), 7.5 * v),
            ((23 + out, -46, 7), 4.8 * v),
            ((23 + out, -58, 4), 2.0 * v),
        ],
    )
    body = torch.minimum(body, p[0] - 0.8)  # septum
    temporal = chain(
        p, [((19 + out, -34, 8), 4.0 * v), ((29, -33, -6), 3.0 * v), ((33, -20, -13), 2.4 * v), ((31, 0, -18), 2.2 * v)]
    )
    third = ellipsoid(p, (0, -9, -2), (a.third_ventricle_mm, 14, 12))
    fourth = ellipsoid(p, (0, -39, -32), (5, 5 * (0.7 + 0.3 * v), 9))
    return {
        "lateral ventricle": body,
        "inferior lateral ventricle": temporal,
        "third ventricle": third,
        "fourth ventricle": fourth,
    }


def deep_grey(points: torch.Tensor, a: Anatomy) -> dict[str, torch.Tensor]:
    """Nuclei and hippocampus, later entries in front of earlier ones."""
    p = folded(points)
    g = a.deep_grey
    out = 3 * (a.ventricle - 1)
    lens = torch.stack([p[0] + 0.22 * p[1], p[1], p[2]])  # the lentiform nucleus opens to the back
    return {
        "ventral diencephalon": ellipsoid(p, (9, -16, -8), (9, 11, 6)),
        "caudate": chain(
            p,
            [
                ((14 + out, 23, 3), 6.4 * g),
                ((15 + out, 12, 8), 6.4 * g),
                ((18 + out, -4, 17), 4.2 * g),
                ((20 + out, -20, 19), 2.4 * g),
            ],
        ),
        "accumbens": ellipsoid(p, (10 + out, 12, -5), (5, 5, 4)),
        "putamen": ellipsoid(lens, (28, 2, 2), (7.5 * g, 19 * g, 13 * g)),
        "pallidum": ellipsoid(lens, (20.5, -3, -1), (4.5 * g, 9 * g, 6.5 * g)),
        "thalamus": ellipsoid(
            torch.stack([p[0] + 0.3 * (p[1] + 18), p[1], p[2]]), (10.5 + out / 2, -18, 4), (10.5 * g, 16 * g, 10 * g)
        ),
        "hippocampus": chain(p, [((25, -6, -19), 5.2 * g), ((26, -18, -16), 4.4 * g), ((24, -34, -5), 3.4 * g)]),
        "amygdala": ellipsoid(p, (23, 3, -19), (7 * g, 7 * g, 7 * g)),
    }


def sylvian(points: torch.Tensor, wave: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The lateral fissure and the insula at its bottom: (signed distance, limits...) of two sheets."""
    x, y, z = folded(points)
    line = z - (-6 - 0.30 * y) - 3 * wave
    insula_x = 41 - 0.012 * (y - 2) ** 2 - 0.02 * line * line
    fissure = (line, 37 - x, (y + 8).abs() - 34)
    insula = (x - insula_x - wave, line.abs() - 11, (y - 2).abs() - 20)
    return (*fissure, *insula)


def fold_coordinates(points: torch.Tensor) -> torch.Tensor:
    """Points pushed out along rays from the middle of their hemisphere: sulci stand upright on the surface."""
    side = torch.sign(points[0])
    x, y, z = points[0] - 26 * side, points[1] + 2, points[2] - 10
    radius = ((x / 43) ** 2 + (y / 84) ** 2 + (z / 58) ** 2).sqrt()
    push = (radius + 0.05) ** -0.8
    return torch.stack([x * push + 50 * side, y * push, z * push])


def folia_coordinates(points: torch.Tensor) -> torch.Tensor:
    """Points for the folding of the cerebellum, whose sheets run mostly from side to side."""
    return torch.stack([points[0] * 0.45, points[1], points[2] * 1.1])


def face(points: torch.Tensor, wave: torch.Tensor, a: Anatomy) -> dict[str, torch.Tensor]:
    """Bones, airways, eyes and spinal cord below the brain, later entries in front; `wave` roughens them."""
    p = folded(points)
    f = a.face
    spine = chain(p, [((0, -34, -84), 19), ((0, -38, -160), 19)])
    jaw = chain(p, [((48 * f, 8, -55), 6), ((46 * f, 12, -85), 7), ((20 * f, 66 * f, -105), 8)])
    palate = ellipsoid(p, (10, 58, -74), (22 * f, 28 * f, 5))
    clivus = ellipsoid(p, (0, 18, -44), (16, 14, 20))
    petrous = chain(p, [((22, -8, -42), 7), ((40, -16, -46), 10), ((50, -22, -50), 14)])
    ear = chain(p, [((38, -14, -46), 3), ((85, -14, -46), 3.5)])
    nose = ellipsoid(p, (0, 68, -48), (15 * f, 27, 20 * f))
    throat = chain(p, [((0, 34, -54), 8 * f), ((0, 14, -78), 7 * f), ((0, 6, -150), 8 * f)])
    maxillary = ellipsoid(p, (28, 62, -50), (11 * f, 13 * f, 14 * f))
    sphenoid = ellipsoid(p, (8, 26, -34), (9, 11, 8 * f))
    passage = ellipsoid(p, (6, 66, -48), (4.0 * f, 22, 17 * f))
    rough = 2.5 * wave
    bone = torch.stack([spine, jaw, palate, clivus, petrous]).amax(dim=0) + rough
    return {
        "cortical bone": bone + 2,
        "cancellous bone": bone,
        "mucosa": torch.maximum(nose, throat + 2.5) + rough,
        "eyeball": ellipsoid(p, (32, 75, -20), (12.5, 12.5, 12.5)),
        "background": torch.stack([throat, maxillary, sphenoid, passage, petrous - 8, ear]).amax(dim=0) + rough,
        "csf": chain(p, [((0, -37, -70), 10), ((0, -44, -160), 9)]),
        "spinal cord": chain(p, [((0, -37, -70), 7), ((0, -44, -160), 6)]),
    }
