"""NIfTI files to and from arrays: every scan arrives as RAS+ float32 with a sound affine, or is refused.

Geometry (shape, spacing, affine) is always that of the reoriented array, never of the stored header: a
target size taken from the header is wrong for every scan that is not stored as RAS.
"""

from __future__ import annotations

import gzip
import io
import stat
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
from nibabel.spatialimages import HeaderDataError

from neuromf.errors import ScanError, UserError

NIFTI_SUFFIXES = (".nii.gz", ".nii")
_GZIP_MAGIC = b"\x1f\x8b"
_HEADER_BYTES = 540
# No scan has more voxels, and what goes on for longer after them than this is no padding.
_MAX_VOXELS, _MOST_AFTER = 2**31, 2**24
# deflate makes at most this many bytes of one.
_MOST_EXPANSION = 1032
# What other files begin with, whatever they are called.
_OTHER_KINDS = {
    b"PK\x03\x04": "a zip archive: unpack it",
    b"\x80\x02": "a Python pickle, which is not opened",
    b"\x80\x04": "a Python pickle, which is not opened",
    b"\x89PNG": "a PNG picture",
    b"\x89HDF": "an HDF5 file (MINC)",
    b"BZh": "compressed by bzip2: unpack it",
    b"\xfd7zXZ": "compressed by xz: unpack it",
    b"version https://git-lfs": "a pointer of Git LFS: fetch the file by `git lfs pull`",
    b"<": "a web page or XML, as a failed download leaves",
    b"{": "JSON: a sidecar or a list, not the image",
}


class Volume(NamedTuple):
    """One scan in RAS+ order.

    Attributes:
        array: (I, J, K) float32; I runs to the right, J to the front, K to the top.
        affine: (4, 4) float64, voxel index -> world millimetres.
        source: how the file stored it: orientation, shape, spacing_mm, dtype, affine, orientation_from.
    """

    array: np.ndarray
    affine: np.ndarray
    source: dict[str, Any]


def load_volume(path: str | Path, *, constant: bool = False) -> Volume:
    """Read a NIfTI file, bring it to RAS+ and check it.

    The same scan stored in any of the 48 axis orders and directions gives the same array, bit for bit.

    Args:
        path: of the file.
        constant: take a volume of one value, too, such as an empty mask.

    Raises:
        ScanError: not a 3-D real NIfTI volume, damaged, with NaN or Inf, constant, or without a usable grid.
    """
    path = Path(path)
    image = _open(path)
    affine = np.asarray(image.affine, dtype=np.float64)
    _check_affine(path, affine)
    array = _voxels(path, image)
    if not constant and array.min() == array.max():
        raise ScanError(
            f"{path}: every voxel has the value {float(array.flat[0]):g}; there is no image in it",
            "check that the right file was exported",
        )

    orientation = io_orientation(affine)
    ras = np.ascontiguousarray(apply_orientation(array, orientation))
    return Volume(ras, affine @ inv_ornt_aff(orientation, array.shape), _describe(image, array.shape, affine))


def spacing_of(affine: np.ndarray) -> tuple[float, float, float]:
    """Voxel size along the array axes in mm: the lengths of the affine's first three columns."""
    lengths = np.linalg.norm(np.asarray(affine, dtype=np.float64)[:3, :3], axis=0)
    return float(lengths[0]), float(lengths[1]), float(lengths[2])


def absent(path: Path) -> ScanError:
    """What is said of a file that is not there; BIDS datasets often come as links to files not yet fetched."""
    if path.is_symlink():
        return ScanError(
            f"{path}: a link to a file that is not here ({path.readlink()})",
            "fetch it first: `datalad get FILE`, or `git annex get FILE`",
        )
    return ScanError(f"{path}: the file does not exist", "check the path")


def nifti_stem(path: str | Path) -> str:
    """The file name without `.nii` or `.nii.gz` (any letter case); other suffixes stay."""
    name = Path(path).name
    for suffix in NIFTI_SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def save_volume(
    path: str | Path,
    array: np.ndarray,
    affine: np.ndarray,
    *,
    dtype: Any = np.float32,
    slope: float = 1.0,
    intercept: float = 0.0,
    compression: int = 1,
    header_description: str = "",
) -> None:
    """Write a NIfTI-1 file atomically; the same input gives the same bytes.

    Args:
        path: ends in `.nii.gz` or `.nii`.
        array: (I, J, K) or (1, I, J, K).
        affine: (4, 4), voxel index -> world mm; stored as sform and qform.
        dtype: of the file; integers are rounded and limited to their range.
        slope, intercept: an integer y in the file stands for slope * y + intercept; readers give these values back.
        compression: of a `.nii.gz`, 1 (fast) to 9 (small).
        header_description: at most 79 bytes of ASCII for the header's `descrip`.

    Raises:
        UserError: another suffix, or the file cannot be written.
    """
    from neuromf.files import atomic_path

    path = Path(path)
    suffix = next((s for s in NIFTI_SUFFIXES if path.name.endswith(s)), None)
    if suffix is None:
        raise UserError(f"cannot write {path.name}: a volume is a .nii.gz or .nii file", "rename the output")
    array = np.asarray(array)
    array = array[0] if array.ndim == 4 and array.shape[0] == 1 else array
    assert array.ndim == 3, f"a volume is (I, J, K) or (1, I, J, K), got {array.shape}"

    stored = array if (slope, intercept) == (1, 0) else (array - intercept) / slope
    image = nib.Nifti1Image(_as_dtype(stored, np.dtype(dtype)), np.asarray(affine, dtype=np.float64))
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units(xyz="mm")
    image.header.set_slope_inter(slope, intercept)  # said, not left open: some readers take an unset slope for 0
    image.header["descrip"] = header_description.encode("ascii", "replace")[:79]
    content = image.to_bytes()
    if suffix == ".nii.gz":
        # In one piece: zlib then lets other threads run. Without a time, so that the bytes are the same each time.
        content = gzip.compress(content, compression, mtime=0)
    with atomic_path(path, suffix=suffix) as temporary:
        temporary.write_bytes(content)


def _as_dtype(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if np.issubdtype(dtype, np.integer) and not np.issubdtype(array.dtype, np.integer):
        limits = np.iinfo(dtype)
        return np.clip(np.rint(array), limits.min, limits.max).astype(dtype)
    return array.astype(dtype)


def check_regular(path: Path) -> None:
    """Refuse what is no file: reading from a pipe would wait for ever.

    Raises:
        ScanError: a folder, a pipe or a device; absent; or a link in a circle.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise absent(path) from error
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "links in a circle"
        raise ScanError(f"{path}: cannot be read ({reason})", "check the path, its links and its rights") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "no file but a pipe or a device"
        raise ScanError(f"{path}: {kind}; a NIfTI file is needed", "check the path")


def _bytes(path: Path) -> bytes:
    check_regular(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise ScanError(f"{path}: cannot be read ({error.strerror})", "check the path and its rights") from error


def _unpacked(path: Path, stored: bytes, limit: int) -> bytes:
    """At most `limit` bytes of the content, decompressed; zlib compares checksums where it gets to the end."""
    if not stored.startswith(_GZIP_MAGIC):
        return stored
    parts, left = [], limit
    try:
        while stored and left > 0:
            stream = zlib.decompressobj(wbits=31)
            parts.append(stream.decompress(stored, left))
            left -= len(parts[-1])
            if left > 0 and not stream.eof:
                raise EOFError("it ends before its data do")
            stored = stream.unused_data.lstrip(b"\0")
    except (EOFError, zlib.error) as error:
        raise ScanError(
            f"{path}: the compressed file is truncated or damaged ({error})",
            "copy or download it again; `gzip -t FILE` tests it",
        ) from error
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _open(path: Path) -> nib.Nifti1Image:
    stored = _bytes(path)
    head = _unpacked(path, stored, _HEADER_BYTES)
    image_class = _nifti_class(path, head)
    # nibabel repairs a zero or negative pixdim in silence, so the header is looked at before it does.
    header = image_class.header_class.from_fileobj(io.BytesIO(head), check=False)
    spacing = np.asarray(header["pixdim"][1:4], dtype=np.float64)
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise ScanError(
            f"{path}: the voxel size in the header is {_numbers(spacing)} mm; it must be positive and finite",
            "correct the header (pixdim) from the original DICOM, for instance with dcm2niix",
        )
    try:
        content = _unpacked(path, stored, _promised(path, header, stored) + _MOST_AFTER)
        image = image_class.from_bytes(content)
    except (HeaderDataError, ImageFileError, ValueError, OverflowError, KeyError) as error:
        found = f"no data type has the code {error}" if isinstance(error, KeyError) else error
        raise ScanError(f"{path}: the NIfTI header is damaged ({found})", "convert the scan again") from error
    promised = _promised(path, header, content)
    if len(content) == promised + _MOST_AFTER and len(stored) < len(content):
        raise ScanError(
            f"{path}: goes on for more than {_MOST_AFTER} bytes after the {promised} its header promises",
            "convert the scan again",
        )
    return image


def _promised(path: Path, header: nib.Nifti1Header, there: bytes) -> int:
    """How long the content is by its header, which must be a volume's, and what is `there` must be able to hold it."""
    shape, dtype, offset = header.get_data_shape(), header.get_data_dtype(), int(header["vox_offset"])
    _check_kind(path, shape, dtype)
    if offset < header.single_vox_offset:
        raise ValueError(f"the voxels begin at byte {offset}, within the header")
    voxels = int(np.prod(shape, dtype=object))
    promised, packed = offset + voxels * dtype.itemsize, there.startswith(_GZIP_MAGIC)
    if promised > len(there) * (_MOST_EXPANSION if packed else 1):
        size = f"{len(there)}, compressed" if packed else f"{len(there)}"
        raise ScanError(
            f"{path}: truncated: the header promises {promised} bytes, the file has {size}",
            "copy or download it again",
        )
    if voxels > _MAX_VOXELS:
        raise ScanError(
            f"{path}: {_by(shape)} are more voxels than can be read ({_MAX_VOXELS})", "crop it, or resample it first"
        )
    return promised


def _nifti_class(path: Path, content: bytes) -> type[nib.Nifti1Image]:
    if len(content) >= 348 and content[344:348] == b"n+1\0":
        return nib.Nifti1Image
    if len(content) >= 540 and content[4:8] == b"n+2\0":
        return nib.Nifti2Image
    raise ScanError(
        f"{path}: {_kind(content)}; a single-file NIfTI (.nii or .nii.gz) is needed",
        "convert it: dcm2niix for DICOM, mri_convert for .mgz, fslchfiletype for .hdr/.img",
    )


def _kind(content: bytes) -> str:
    """What a file that is no NIfTI file is, in words."""
    if not content.strip(b"\0"):
        return "an empty file" if not content else "not a NIfTI file but zeros"
    if content[344:348] == b"ni1\0":
        return "the header half of a NIfTI pair (.hdr/.img)"
    if content[128:132] == b"DICM":
        return "not a NIfTI file but DICOM"
    if content[:4] in (b"\x5c\x01\0\0", b"\0\0\x01\x5c"):
        return "not a NIfTI file but ANALYZE 7.5, or one without its mark (magic)"
    if b"annex/objects" in content[:200]:
        return "not a NIfTI file but a pointer of git-annex: fetch the file by `datalad get`"
    other = next((kind for magic, kind in _OTHER_KINDS.items() if content.startswith(magic)), None)
    return f"not a NIfTI file but {other}" if other else "not a NIfTI file"


def _check_kind(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Only 3-D real numbers; axes of length 1 after the third are dropped later."""
    if dtype.kind not in "iuf":
        kind = "RGB colours" if dtype.fields else "complex numbers" if dtype.kind == "c" else "no numbers"
        raise ScanError(
            f"{path}: holds {kind} ({dtype}); one real number per voxel is needed",
            "export the magnitude image as a scalar volume",
        )
    extra = [n for n in shape[3:] if n != 1]
    if extra:
        raise ScanError(
            f"{path}: {len(shape)}-D, {int(np.prod(extra))} volumes ({_by(shape)}); one 3-D volume is needed",
            f"extract the one you want, for instance the first: fslroi {path.name} first.nii.gz 0 1",
        )
    if len(shape) < 3 or min(shape[:3]) < 2:
        raise ScanError(
            f"{path}: shape {_by(shape)} is no volume; at least 2 voxels along 3 axes are needed",
            "give the 3-D series, not a single slice",
        )


def _check_affine(path: Path, affine: np.ndarray) -> None:
    hint = "correct the header's sform/qform, or convert the scan again from DICOM (dcm2niix)"
    if not np.isfinite(affine).all():
        raise ScanError(f"{path}: the affine holds NaN or Inf", hint)
    spacing = spacing_of(affine)
    if min(spacing) <= 0:
        raise ScanError(f"{path}: the affine's voxel size is {_numbers(spacing)} mm; it must be positive", hint)
    # Volume of the cell spanned by unit axes: 1 when they are orthogonal, 0 when they lie in one plane.
    skew = abs(np.linalg.det(affine[:3, :3] / np.asarray(spacing)))
    if skew < 1e-3:
        raise ScanError(f"{path}: the affine is singular: its axes do not span three dimensions", hint)


def _voxels(path: Path, image: nib.Nifti1Image) -> np.ndarray:
    """(I, J, K) float32 with the header's slope applied, checked for NaN and Inf."""
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            array = np.asarray(image.get_fdata(dtype=np.float32, caching="unchanged"))
    except (EOFError, OSError, ValueError) as error:
        raise ScanError(f"{path}: the voxels cannot be read ({error})", "copy or download it again") from error
    array = array.reshape(array.shape[:3])
    finite = np.isfinite(array)
    if not finite.all():
        _check_overflow(path, image)
        raise ScanError(
            f"{path}: {1 - finite.mean():.2%} of the voxels are NaN or Inf; every voxel must be a number",
            "replace them, for instance by 0: fslmaths IN -nan OUT",
        )
    return array


def _check_overflow(path: Path, image: nib.Nifti1Image) -> None:
    """Tell values that are only too large for single precision from those that are no numbers."""
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.asanyarray(image.dataobj)
    if np.isfinite(values).all():
        raise ScanError(
            f"{path}: values up to {np.abs(values).max():.3g} are too large for single precision (3.4e38)",
            "check the header's slope (scl_slope), or scale the scan down",
        )


def _describe(image: nib.Nifti1Image, shape: tuple[int, ...], affine: np.ndarray) -> dict[str, Any]:
    header = image.header
    coded = [name for name in ("sform", "qform") if int(header[f"{name}_code"]) > 0]
    return {
        "orientation": "".join(nib.aff2axcodes(affine)),
        "orientation_from": coded[0] if coded else "none",
        "shape": [int(n) for n in shape],
        "spacing_mm": list(spacing_of(affine)),
        "dtype": str(header.get_data_dtype()),
        "affine": affine.tolist(),
    }


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(str(n) for n in shape)


def _numbers(values: Any) -> str:
    return " x ".join(f"{float(v):g}" for v in values)
