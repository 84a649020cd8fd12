"""What measures the anatomy of heads: the small networks of brainchop, or SynthSeg where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch

from neuromf.data.structure_tables import StructureTable, read_structure_table
from neuromf.data.volumes import Volume, save_volume
from neuromf.errors import UserError, did_you_mean
from neuromf.files import sha256_file
from neuromf.models.meshnet import load_meshnet
from neuromf.pipeline.segmentation import segment

SYNTHSEG = "synthseg"
NETWORKS = ("meshnet-18", "meshnet-18-small", "meshnet-tissue")
METHODS = (SYNTHSEG, *NETWORKS)
_PROGRAM = "mri_synthseg"
_BATCH = 16  # heads a call of SynthSeg measures, which loads its network each time
_SAID = 300


class Anatomy(NamedTuple):
    """Volumes in ml by structure, of one head; its labels (I, J, K) uint8 where the method gives them on its grid."""

    volumes_ml: dict[str, float]
    labels: np.ndarray | None = None


class Segmenter(Protocol):
    """Something that measures heads.

    Attributes:
        name: of the method.
        sha256: of its weights or its program.
        how: what it does, in words.
        batch: heads that are measured at once.
        classes: the structures' names in order of their labels, 1 first; empty where there are no labels.
    """

    name: str
    sha256: str
    how: str
    batch: int
    classes: tuple[str, ...]

    def __call__(self, heads: list[Volume], /) -> list[Anatomy]:
        """Measure some heads."""
        ...


def load_segmenter(name: str, device: torch.device | str = "cpu") -> Segmenter:
    """A method of `METHODS`, ready to measure.

    Raises:
        UserError: no such method; its program is not on the path, or its weights are not here.
    """
    if name == SYNTHSEG:
        return _SynthSeg(device)
    if name in NETWORKS:
        return _Network(name, device)
    raise UserError(
        f"no segmentation '{name}'",
        f"{did_you_mean(name, METHODS)}, or two tables of volumes: GENERATED.csv,REAL.csv",
    )


class _Network:
    """A MeshNet, on the grid of FreeSurfer."""

    batch = 1

    def __init__(self, name: str, device: torch.device | str) -> None:
        self._loaded = load_meshnet(name, device=device)
        self.name, self.sha256 = name, self._loaded.weights.sha256
        self.classes = self._loaded.network.layout.labels[1:]
        self.how = "trilinear to 256^3 of 1 mm, 256 grey values to p99.9; largest connected part; volumes at 1 mm"

    def __call__(self, heads: list[Volume], /) -> list[Anatomy]:
        found = [segment(head, self._loaded) for head in heads]
        return [Anatomy(head.volumes_ml, head.labels) for head in found]


class _SynthSeg:
    """FreeSurfer's `mri_synthseg` on the path, as it is by default (version 2.0, not robust, no parcellation)."""

    name, batch = SYNTHSEG, _BATCH
    classes: tuple[str, ...] = ()

    def __init__(self, device: torch.device | str) -> None:
        program = shutil.which(_PROGRAM)
        if program is None:
            raise UserError(
                f"{_PROGRAM} is not on the path",
                "install FreeSurfer 7.4 or later and source its set-up; or --morphology meshnet-18; or give the volumes"
                " it measured elsewhere: --morphology GENERATED.csv,REAL.csv",
            )
        self.sha256 = sha256_file(program)
        self.how = f"{_PROGRAM}{_version()}, volumes from its soft segmentation at 1 mm"
        self._program, self._cpu = program, str(device).startswith("cpu")

    def __call__(self, heads: list[Volume], /) -> list[Anatomy]:
        names = [f"head{i:04d}" for i in range(len(heads))]
        with tempfile.TemporaryDirectory(prefix="neuromf-synthseg-") as folder:
            scans, table = Path(folder) / "scans", Path(folder) / "volumes.csv"
            for name, head in zip(names, heads, strict=True):
                save_volume(scans / f"{name}.nii.gz", head.array, head.affine)
            self._run("--i", str(scans), "--o", str(Path(folder) / "labels"), "--vol", str(table))
            return _in_order(read_structure_table(table, check_unit=False), names)

    def _run(self, *words: str) -> None:
        threads = ["--threads", str(torch.get_num_threads())]
        cpu = ["--cpu"] if self._cpu else []
        done = subprocess.run(
            [self._program, *words, *threads, *cpu], capture_output=True, text=True, errors="replace", check=False
        )
        if done.returncode != 0:
            said = (done.stderr.strip() or done.stdout.strip())[-_SAID:]
            raise UserError(f"{_PROGRAM} failed with code {done.returncode}: {said}", "run it on one volume by hand")


def _in_order(table: StructureTable, names: list[str]) -> list[Anatomy]:
    rows = {Path(subject).name.split(".")[0]: row for subject, row in zip(table.subjects, table.ml, strict=True)}
    if missing := [name for name in names if name not in rows]:
        raise UserError(
            f"{_PROGRAM} measured {len(names) - len(missing)} of {len(names)} heads", "run it on one volume by hand"
        )
    return [Anatomy(dict(zip(table.names, rows[name].tolist(), strict=True))) for name in names]


def _version() -> str:
    """FreeSurfer's own word for its version, where its set-up was sourced."""
    stamp = Path(os.environ.get("FREESURFER_HOME", "")) / "build-stamp.txt"
    try:
        return f" of {stamp.read_text(encoding='utf-8').strip()}"
    except OSError:
        return ""
