"""What is found in folders of scans: each of these is refused by its own words, or read rightly, and stops no other."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from neuromf.data.latents import load_latent
from neuromf.data.preprocessing import Preprocessing, preprocess
from neuromf.data.volumes import load_volume
from neuromf.errors import UserError
from neuromf.models.autoencoder import HaarAutoencoder
from neuromf.pipeline.encode import encode

SPEC = Preprocessing((8, 8, 8), None)
SHAPE = (8, 9, 10)


def voxels(dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(0).gamma(2, 50, SHAPE).astype(dtype)


def nifti(array: np.ndarray | None = None, affine: np.ndarray | None = None, version: Any = nib.Nifti1Image) -> bytes:
    return version(voxels() if array is None else array, np.eye(4) if affine is None else affine).to_bytes()


def patched(field: str, value: Any, content: bytes | None = None) -> bytes:
    """A header field set behind nibabel's back, which would repair it."""
    content = content or nifti()
    header = nib.Nifti1Header(content[:348], check=False)
    header[field] = value
    return header.binaryblock + content[348:]


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.nii", nifti())
    return buffer.getvalue()


def damaged(content: bytes) -> bytes:
    changed = bytearray(content)
    changed[len(changed) // 2] ^= 1
    return bytes(changed)


class Trap:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def spoilt(value: float) -> np.ndarray:
    array = voxels()
    array.flat[:72] = value
    return array


GZ = gzip.compress(nifti())
BOMB = gzip.compress(patched("dim", [3, 10_000, 10_000, 10_000, 1, 1, 1, 1]))
ENDLESS = gzip.compress(nifti() + bytes(2**24 + 2), 1)
CONSTANT_BUT_ONE = np.zeros((20, 20, 20), np.float32)
CONSTANT_BUT_ONE[10, 10, 10] = 1
SINGULAR = np.array([[1, 2, 3, 0]] * 3 + [[0, 0, 0, 1]], float)
COLOURS = np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
COLOURS_AND_ALPHA = np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1"), ("A", "u1")])

# What a file holds -> words of the reason it is refused for.
REFUSED: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.nii", b"", "an empty file"),
    "zeros": ("a.nii", bytes(1000), "but zeros"),
    "text": ("a.nii.gz", b"hello " * 100, "not a NIfTI file;"),
    "compressed text": ("a.nii.gz", gzip.compress(b"hello " * 100), "not a NIfTI file;"),
    "a zip": ("a.nii.gz", zipped(), "a zip archive"),
    "bzip2": ("a.nii", b"BZh91AY" + bytes(500), "bzip2"),
    "xz": ("a.nii", b"\xfd7zXZ\0" + bytes(500), "compressed by xz"),
    "a picture": ("a.nii", b"\x89PNG\r\n" + bytes(500), "a PNG picture"),
    "DICOM": ("a.nii", bytes(128) + b"DICM" + bytes(500), "but DICOM"),
    "a web page": ("a.nii.gz", b"<!DOCTYPE html><html>404</html>", "a web page"),
    "a sidecar": ("a.nii", b'{"EchoTime": 0.01}', "JSON"),
    "a git-lfs pointer": ("a.nii.gz", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "a git-annex pointer": ("a.nii.gz", b"/annex/objects/MD5E-s1--0.nii.gz\n", "datalad get"),
    "MINC": ("a.nii", b"\x89HDF\r\n" + bytes(500), "MINC"),
    "a header half": ("a.nii", patched("magic", b"ni1"), "the header half of a NIfTI pair"),
    "ANALYZE": ("a.nii", patched("magic", b""), "ANALYZE 7.5"),
    "a pickle": ("a.nii", pickle.dumps({"z": 1}, protocol=4), "a Python pickle, which is not opened"),
    "truncated": ("a.nii", nifti()[:-8], "truncated: the header promises 3232 bytes, the file has 3224"),
    "a header alone": ("a.nii", nifti()[:352], "truncated"),
    "half a header": ("a.nii", nifti()[:200], "not a NIfTI file"),
    "truncated gz": ("a.nii.gz", GZ[:-20], "the compressed file is truncated"),
    "gz without its end": ("a.nii.gz", GZ[:-4], "the compressed file is truncated"),
    "damaged gz": ("a.nii.gz", damaged(GZ), "truncated or damaged (Error -3"),
    "gz with rubbish after it": ("a.nii.gz", GZ + b"rubbish", "truncated or damaged (Error -3"),
    "a gz that claims 10^12 voxels": ("a.nii.gz", BOMB, "the header promises 4000000000352 bytes, the file has"),
    "a gz without an end": ("a.nii.gz", ENDLESS, "goes on for more than 16777216 bytes after the 3232"),
    "a file that claims 10^12 voxels": ("a.nii", gzip.decompress(BOMB), "truncated: the header promises 4000000000352"),
    "4-D": ("a.nii", nifti(np.stack([voxels()] * 3, -1)), "4-D, 3 volumes (8 x 9 x 10 x 3)"),
    "5-D": ("a.nii", nifti(voxels()[..., None, None].repeat(2, -1)), "5-D, 2 volumes (8 x 9 x 10 x 1 x 2)"),
    "a slice": ("a.nii", nifti(voxels()[:, :, :1]), "shape 8 x 9 x 1 is no volume"),
    "2-D": ("a.nii", nifti(voxels()[:, :, 0]), "shape 8 x 9 is no volume"),
    "no voxels": ("a.nii", patched("dim", [3, 8, 0, 10, 1, 1, 1, 1]), "shape 8 x 0 x 10 is no volume"),
    "a negative size": ("a.nii", patched("dim", [3, 8, -9, 10, 1, 1, 1, 1]), "shape 8 x -9 x 10 is no volume"),
    "nine axes": ("a.nii", patched("dim", [9, 8, 9, 10, 1, 1, 1, 1]), "header"),
    "RGB": ("a.nii", nifti(COLOURS), "holds RGB colours"),
    "RGBA": ("a.nii", nifti(COLOURS_AND_ALPHA), "holds RGB colours"),
    "complex": ("a.nii", nifti(voxels(np.complex64)), "holds complex numbers"),
    "an unknown type": ("a.nii", patched("datatype", 77), "damaged (no data type has the code 77)"),
    "voxels within the header": ("a.nii", patched("vox_offset", 100), "the voxels begin at byte 100"),
    "voxels that begin nowhere": ("a.nii", patched("vox_offset", np.nan), "the NIfTI header is damaged"),
    "NaN": ("a.nii", nifti(spoilt(np.nan)), "10.00% of the voxels are NaN or Inf"),
    "Inf": ("a.nii", nifti(spoilt(np.inf)), "10.00% of the voxels are NaN or Inf"),
    "values too large": ("a.nii", nifti(1e300 * voxels(np.float64)), "are too large for single precision (3.4e38)"),
    "a slope too large": ("a.nii", patched("scl_slope", 1e38), "are too large for single precision"),
    "one value": ("a.nii", nifti(np.full(SHAPE, 3, np.float32)), "every voxel has the value 3"),
    "one voxel": ("a.nii", nifti(CONSTANT_BUT_ONE), "nothing to scale"),
    "no voxel size": (
        "a.nii",
        patched("pixdim", [1, 1, 0, 1, 0, 0, 0, 0]),
        "the voxel size in the header is 1 x 0 x 1",
    ),
    "NaN voxel size": ("a.nii", patched("pixdim", [1, 1, np.nan, 1, 0, 0, 0, 0]), "is 1 x nan x 1 mm"),
    "NaN affine": ("a.nii", patched("srow_x", [np.nan, 0, 0, 0]), "the affine holds NaN or Inf"),
    "a singular affine": ("a.nii", nifti(affine=SINGULAR), "the affine is singular"),
    "an axis without length": ("a.nii", patched("srow_y", [0, 0, 0, 0]), "the affine's voxel size is 1 x 0 x 1"),
}


# What lies in the folder under a NIfTI file's name and is no file that could be read.
NO_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a link in a circle": (
        lambda path: path.symlink_to(path.name),
        "cannot be read (Too many levels of symbolic links)",
    ),
    "a link to nothing": (lambda path: path.symlink_to(".git/annex/objects/x"), "a link to a file that is not here"),
    "a pipe": (os.mkfifo, "no file but a pipe or a device"),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The sound scan's folder, encoded alone."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "scans").mkdir()
    sound(folder / "scans")
    run(folder / "scans", folder / "out")
    return folder


def sound(folder: Path) -> None:
    """Two scans among which the others lie: one is taken before them, one after."""
    (folder / "0.nii.gz").write_bytes(GZ)
    (folder / "z.nii").write_bytes(nifti(voxels()[::-1]))


def run(scans: Path, out: Path):
    autoencoder = HaarAutoencoder("haar", 1)
    return encode([scans], out, autoencoder=autoencoder, preprocessing=SPEC, fractions=(1, 0, 0))


def refused(folder: Path) -> list[tuple[str, str]]:
    """Encode a folder; what was refused, and why. The two sound scans are as if they were alone."""
    report = run(folder, folder.parent / "out")
    assert report.encoded == 2
    found = [scan for scan in report.scans if scan.status == "refused"]
    assert all(scan.hint for scan in found)
    return [(scan.subject, scan.reason) for scan in found]


def test_there_are_at_least_forty_faults_and_each_has_its_own_words():
    assert len(REFUSED) + len(NO_FILES) >= 40


@pytest.mark.parametrize("fault", REFUSED)
def test_a_malformed_file_is_refused_by_its_own_words_and_the_rest_is_encoded(tmp_path, alone, fault):
    name, content, words = REFUSED[fault]
    (tmp_path / "scans").mkdir()
    sound(tmp_path / "scans")
    (tmp_path / "scans" / name).write_bytes(content)
    ((subject, reason),) = refused(tmp_path / "scans")
    assert subject == "a"
    assert words in reason
    for file in ("0.pt", "z.pt"):
        assert (tmp_path / "out" / file).read_bytes() == (alone / "out" / file).read_bytes()


@pytest.mark.parametrize("fault", NO_FILES)
def test_what_is_no_file_is_refused_by_its_own_words_and_the_rest_is_encoded(tmp_path, fault):
    make, words = NO_FILES[fault]
    (tmp_path / "scans").mkdir()
    sound(tmp_path / "scans")
    make(tmp_path / "scans" / "a.nii.gz")
    ((subject, reason),) = refused(tmp_path / "scans")
    assert subject == "a"
    assert words in reason


def test_a_file_without_rights_is_refused_and_the_rest_is_encoded(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may read every file")
    (tmp_path / "scans").mkdir()
    sound(tmp_path / "scans")
    (tmp_path / "scans" / "a.nii.gz").write_bytes(GZ)
    (tmp_path / "scans" / "a.nii.gz").chmod(0)
    assert refused(tmp_path / "scans") == [("a", "cannot be read (Permission denied)")]


def test_files_of_one_name_and_names_that_no_file_may_have_are_refused_and_the_rest_is_encoded(tmp_path):
    scans = tmp_path / "scans"
    scans.mkdir()
    sound(scans)
    for name in ("a.nii", "A.nii.gz", "b\nc.nii.gz", "-b.nii"):
        (scans / name).write_bytes(GZ)
    found = refused(scans)
    assert [subject for subject, _ in found] == ["A", "a", "b", "b_c"]
    assert [reason.split(":")[0] for _, reason in found] == [
        "two files have the subject id 'A'",
        "two files have the subject id 'a'",
        "the subject id '-b' cannot be a file name",
        r"the subject id 'b\nc' cannot be a file name",
    ]


def test_all_faults_together_are_all_told(tmp_path):
    (tmp_path / "scans").mkdir()
    sound(tmp_path / "scans")
    for n, (_, content, _) in enumerate(REFUSED.values()):
        (tmp_path / "scans" / f"a{n:02}.nii").write_bytes(content)
    found = refused(tmp_path / "scans")
    assert [subject for subject, _ in found] == [f"a{n:02}" for n in range(len(REFUSED))]
    for (_, reason), (_, _, words) in zip(found, REFUSED.values(), strict=True):
        assert words in reason


def test_a_bomb_takes_no_memory(tmp_path):
    import tracemalloc

    (tmp_path / "a.nii.gz").write_bytes(BOMB)
    tracemalloc.start()
    with pytest.raises(UserError, match="truncated"):
        load_volume(tmp_path / "a.nii.gz")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_a_latent_with_code_in_it_is_never_run_and_is_made_anew(tmp_path):
    (tmp_path / "scans").mkdir()
    sound(tmp_path / "scans")
    run(tmp_path / "scans", tmp_path / "out")
    before = (tmp_path / "out" / "z.pt").read_bytes()
    trap = Trap(tmp_path / "trapped")
    torch.save({"z": trap, "log_sigma": trap, "metadata": trap}, tmp_path / "out" / "z.pt")
    (tmp_path / "out" / "0.pt").write_bytes(pickle.dumps(trap))
    for mmap in (False, True):
        with pytest.raises(UserError, match="it is not opened"):
            load_latent(tmp_path / "out" / "z.pt", mmap=mmap)
    assert run(tmp_path / "scans", tmp_path / "out").encoded == 2
    assert (tmp_path / "out" / "z.pt").read_bytes() == before
    assert not (tmp_path / "trapped").exists()


# --- what only looks malformed ------------------------------------------------------------------------------


def big_endian() -> bytes:
    image = nib.Nifti1Image(voxels(np.int16), np.eye(4), nib.Nifti1Header(endianness=">"))
    return image.to_bytes()


def sloped() -> bytes:
    stored = np.arange(720, dtype=np.int16).reshape(SHAPE)
    return patched("scl_inter", -5, patched("scl_slope", 0.5, nifti(stored)))


def without_forms() -> bytes:
    return patched("sform_code", 0, patched("qform_code", 0))


# What a file holds -> the voxels that must be read from it.
READ: dict[str, tuple[str, bytes, np.ndarray]] = {
    "big-endian": ("a.nii", big_endian(), voxels(np.int16)),
    "integers with a slope": ("a.nii", sloped(), np.arange(720, dtype=np.float32).reshape(SHAPE) * 0.5 - 5),
    "a slope of zero, which means none": ("a.nii", patched("scl_slope", 0, nifti(voxels(np.int16))), voxels(np.int16)),
    "no orientation, so by the rule from right to left": ("a.nii", without_forms(), voxels()[::-1]),
    "NIfTI-2": ("a.nii.gz", gzip.compress(nifti(version=nib.Nifti2Image)), voxels()),
    "unsigned bytes": ("a.nii", nifti(voxels(np.uint8)), voxels(np.uint8)),
    "double precision": ("a.nii", nifti(voxels(np.float64)), voxels()),
    "axes of length 1": ("a.nii", nifti(voxels()[..., None, None]), voxels()),
    "bytes after the voxels": ("a.nii", nifti() + bytes(100), voxels()),
    "two gz members": ("a.nii.gz", gzip.compress(nifti()[:1000]) + gzip.compress(nifti()[1000:]), voxels()),
    "gz padded with zeros": ("a.nii.gz", GZ + bytes(512), voxels()),
    "gz called .nii": ("a.nii", GZ, voxels()),
    "not compressed, called .nii.gz": ("a.nii.gz", nifti(), voxels()),
    "a name with blanks, brackets and letters of the world": ("Zoë (T1) 頭 ü.nii.gz", GZ, voxels()),
}


@pytest.mark.parametrize("kind", READ)
def test_what_only_looks_malformed_is_read_rightly(tmp_path, kind):
    name, content, expected = READ[kind]
    (tmp_path / "scans").mkdir()
    path = tmp_path / "scans" / name
    path.write_bytes(content)
    volume = load_volume(path)
    assert np.array_equal(volume.array, expected.astype(np.float32))
    assert run(tmp_path / "scans", tmp_path / "out").encoded == 1
    (latent,) = (tmp_path / "out").glob("*.pt")
    prepared = torch.from_numpy(preprocess(volume, SPEC).array)[None]
    assert torch.equal(load_latent(latent)["z"], HaarAutoencoder("haar", 1).encode(prepared).mean[0])


def test_the_magic_of_a_big_endian_file_is_that_of_one():
    assert struct.unpack(">i", big_endian()[:4]) == (348,)
