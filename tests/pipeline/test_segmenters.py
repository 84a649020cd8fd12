"""SynthSeg by a stand-in on the path: what it is called with, and what becomes of what it writes."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import numpy as np
import pytest

from neuromf.data.volumes import Volume
from neuromf.errors import UserError
from neuromf.pipeline.segmenters import load_segmenter

# Writes, as SynthSeg does, a row for each scan of a folder: the voxels above 0.5, in mm3, in reversed order of names.
STAND_IN = """\
import csv, sys
from pathlib import Path
import nibabel as nib
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert words["--threads"].isdigit() and "--cpu" in sys.argv
rows = [["subject", "total intracranial", "left hippocampus"]]
for path in sorted(Path(words["--i"]).glob("*.nii.gz"), reverse=True):
    image = nib.load(path)
    ml = float((image.get_fdata() > 0.5).sum() * abs(image.header.get_zooms()[0]) ** 3)
    rows.append([path.name.replace(".nii.gz", ""), 1.4e6, ml])
with open(words["--vol"], "w", newline="") as handle:
    csv.writer(handle).writerows(rows)
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "bin/mri_synthseg"
    path.parent.mkdir()
    path.write_text(f"#!{sys.executable}\n{STAND_IN}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(path.parent))
    monkeypatch.setenv("FREESURFER_HOME", str(tmp_path))
    (tmp_path / "build-stamp.txt").write_text("freesurfer-linux-7.4.1\n")
    return path


def _head(voxels: int) -> Volume:
    array = np.zeros((8, 8, 8), dtype=np.float32)
    array.flat[:voxels] = 1
    return Volume(array, np.diag([2.0, 2.0, 2.0, 1.0]), {})


def test_synthseg_measures_a_folder_of_heads_and_rows_find_their_heads(program: Path) -> None:
    segmenter = load_segmenter("synthseg", "cpu")
    found = segmenter([_head(10), _head(20), _head(30)])
    assert [head.volumes_ml["left hippocampus"] for head in found] == pytest.approx([0.08, 0.16, 0.24])
    assert found[0].volumes_ml["total intracranial"] == 1400
    assert found[0].labels is None
    assert "freesurfer-linux-7.4.1" in segmenter.how
    assert len(segmenter.sha256) == 64


def test_an_absent_synthseg_is_said_with_what_else_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="not on the path") as error:
        load_segmenter("synthseg")
    assert "GENERATED.csv,REAL.csv" in error.value.hint


def test_a_synthseg_that_fails_or_leaves_heads_out_is_said(program: Path) -> None:
    program.write_text(f"#!{sys.executable}\nimport sys\nprint('no licence file', file=sys.stderr)\nsys.exit(3)\n")
    with pytest.raises(UserError, match="failed with code 3: no licence file"):
        load_segmenter("synthseg", "cpu")([_head(10)])
    fewer = STAND_IN.replace("rows.append(", "path.name.startswith('head0000') or rows.append(")
    program.write_text(f"#!{sys.executable}\n{fewer}")
    with pytest.raises(UserError, match="measured 1 of 2 heads"):
        load_segmenter("synthseg", "cpu")([_head(10), _head(20)])


def test_an_unknown_method_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="no segmentation 'meshnet'") as error:
        load_segmenter("meshnet")
    assert "meshnet-18" in error.value.hint
