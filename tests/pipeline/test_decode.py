from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

import neuromf
from neuromf.data.preprocessing import Preprocessing
from neuromf.data.volumes import load_volume, save_volume
from neuromf.errors import UserError
from neuromf.files import write_json
from neuromf.generator import matching_autoencoder
from neuromf.models.autoencoder import Autoencoder, load_autoencoder
from neuromf.pipeline import volume_folder
from neuromf.pipeline.decode import Decoding, decode
from neuromf.pipeline.encode import encode
from neuromf.pipeline.sample import sample
from neuromf.pipeline.sample_folder import MANIFEST, sample_path, save_sample
from neuromf.pipeline.volume_folder import Dtype, read_stored


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, those of killed writers too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """Five invented latents of the built-in autoencoder."""
    model = load_autoencoder("builtin")
    folder = tmp_path / "samples"
    manifest = {
        "model": {"path": "runs/x", "weights_sha256": "0" * 64, "update": 1, "ema": "0.5"},
        "objective": "imf", "nfe": 1, "solver": "meanflow", "seed": 0, "condition": None, "n": 5,
        "latent_shape": [8, 4, 4, 4], "affine": np.diag([12.0, 12.0, 12.0, 1.0]).tolist(),
        "autoencoder": {"name": model.name, "sha256": model.sha256},
    }  # fmt: skip
    write_json(folder / MANIFEST, manifest)
    for i in range(5):
        save_sample(sample_path(folder, i), torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(i)), i)
    return folder


def test_volumes_have_the_training_grid_and_say_they_are_synthetic(run: Path, tmp_path: Path) -> None:
    sample(str(run), 3, out=tmp_path / "g", decoding=Decoding(), seed=4)
    image = nib.load(tmp_path / "g/volumes/sample_000001.nii.gz")
    assert image.shape == (16, 16, 16)
    assert image.get_data_dtype() == np.int16
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    assert np.allclose(image.header.get_zooms(), 12.0)
    sidecar = json.loads((tmp_path / "g/volumes/sample_000001.json").read_text())
    assert sidecar["SyntheticImage"] is True
    assert (sidecar["Seed"], sidecar["Index"], sidecar["NFE"]) == (4, 1, 1)
    assert len(sidecar["Model"]["weights_sha256"]) == 64
    assert sidecar["Modality"] == "MR"
    assert sidecar["GeneratedBy"][0]["Name"] == "neuromf"
    direct = neuromf.load(str(run), device="cpu").sample(3, seed=4)[1, 0].numpy()
    assert np.abs(image.get_fdata() / 1000 - direct).max() <= 0.5 / 1000 + 1e-5 * np.ptp(direct)
    assert (tmp_path / "g/volumes/montage.png").exists()


def test_decoding_encoded_latents_gives_the_scans_back(latents: Path, heads: Path, tmp_path: Path) -> None:
    report = decode(latents, tmp_path / "back")
    assert report.n == report.made == 12
    name = sorted(path.name for path in heads.glob("*.nii.gz"))[0]
    real, back = (nib.load(folder / name).get_fdata() / 1000 for folder in (heads, tmp_path / "back"))
    scaled = (real - real.min()) / (np.percentile(real, 99.5) - real.min())
    assert np.abs(scaled - back).max() < 2e-3  # Haar is invertible; int16 rounds twice


def test_latents_of_another_autoencoder_are_refused(latents: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="these latents were made by"):
        decode(latents, tmp_path / "out", Decoding(autoencoder="identity"))
    assert not (tmp_path / "out").exists()


def test_the_licence_of_the_autoencoder_is_copied_beside_every_volume(
    latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def licensed(*args: object, **how: object) -> Autoencoder:
        found = matching_autoencoder(*args, **how)  # type: ignore[arg-type]
        found.licence = "X, non-commercial use only (https://x.org)"
        return found

    monkeypatch.setattr("neuromf.pipeline.decode.matching_autoencoder", licensed)
    decode(latents, tmp_path / "out", Decoding(montage=False))
    volumes = sorted((tmp_path / "out").glob("*.nii.gz"))
    sidecars = [json.loads(path.with_suffix("").with_suffix(".json").read_text()) for path in volumes]
    assert len(sidecars) == 12
    assert {s["Autoencoder"]["licence"] for s in sidecars} == {"X, non-commercial use only (https://x.org)"}


def test_a_reconstruction_overlays_its_scan(heads: Path, tmp_path: Path) -> None:
    """Each scan has its own place in the world, and its volume comes back there."""
    real = load_volume(sorted(heads.glob("*.nii.gz"))[0])
    turned = np.array([[0, -6, 1, 30], [6, 0, 0.5, -20], [-0.5, -1, 6, 5], [0, 0, 0, 1]], dtype=float)
    turned[:3, :3] = 12 * np.linalg.qr(turned[:3, :3])[0] * [-1, -1, 1]
    for name, affine in (("a", real.affine), ("b", turned), ("c", np.diag([-12.0, 12, 12, 1]))):
        save_volume(tmp_path / f"scans/{name}.nii.gz", real.array, affine)
    spec = Preprocessing(size=(16, 16, 16), spacing_mm=12.0)
    encode([tmp_path / "scans"], tmp_path / "l", autoencoder=load_autoencoder("haar"), preprocessing=spec,
           fractions=(1, 0, 0))  # fmt: skip
    decode(tmp_path / "l", tmp_path / "back", Decoding(dtype="float32"))
    for path in sorted((tmp_path / "scans").glob("*.nii.gz")):
        scan, back = load_volume(path), load_volume(tmp_path / "back" / path.name)
        np.testing.assert_allclose(back.affine, scan.affine, atol=1e-3)
        assert np.corrcoef(back.array.ravel(), scan.array.ravel())[0, 1] > 0.9999
        assert json.loads((tmp_path / f"back/{path.name[0]}.json").read_text())["Source"]["name"] == path.name


# --- back to the scans' own voxels --------------------------------------------------------------------------------

GRID = Preprocessing(size=(16, 16, 20), spacing_mm=14.0)


def scanned(folder: Path, name: str, seed: int, affine: np.ndarray) -> Path:
    """A smooth blob on a dark floor, on the scale of a scanner, with an affine of its own."""
    centre = np.random.default_rng(seed).uniform(6, 9, (3, 1, 1, 1))
    distance = ((np.indices((14, 16, 15)) - centre) ** 2).sum(0)
    folder.mkdir(exist_ok=True)
    save_volume(folder / f"{name}.nii.gz", (40 + 900 * np.exp(-distance / 18)).astype(np.float32), affine)
    return folder / f"{name}.nii.gz"


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Three, in other orientations and at other places."""
    turned = np.diag([0, 0, 0, 1.0])
    turned[:3, :3] = 14 * np.linalg.qr(np.array([[0, -6, 1], [6, 0, 0.5], [-0.5, -1, 6]]))[0] * [-1, -1, 1]
    for seed, (name, affine) in enumerate(
        {"a": np.diag([14.0, 14, 14, 1]), "b": turned, "c": np.diag([-12.0, 13, 15, 1])}.items()
    ):
        scanned(tmp_path / "scans", name, seed, affine)
    return tmp_path / "scans"


def encoded(scans: Path, out: Path) -> Path:
    encode([scans], out, autoencoder=load_autoencoder("haar"), preprocessing=GRID, fractions=(1, 0, 0))
    return out


@pytest.mark.parametrize("dtype", ["int16", "float32", "uint8"])
def test_all_preprocessing_is_undone_on_request(scans: Path, tmp_path: Path, dtype: Dtype) -> None:
    out = tmp_path / "back"
    decode(encoded(scans, tmp_path / "l"), out, Decoding(dtype=dtype, as_scanned=True))
    for name in "abc":
        scan, back = (nib.load(folder / f"{name}.nii.gz") for folder in (scans, out))
        assert back.shape == scan.shape
        np.testing.assert_allclose(back.affine, scan.affine, atol=1e-5)
        off = np.abs(back.get_fdata() - scan.get_fdata()).max() / np.ptp(scan.get_fdata())
        step = {"int16": 1e-3, "float32": 0, "uint8": 1 / 255}[dtype]
        assert off < step + (0.1 if name == "c" else 1e-5), name  # c alone is resampled
        low, high = json.loads((out / f"{name}.json").read_text())["IntensityRange"]
        assert low == pytest.approx(scan.get_fdata().min(), abs=20)
        assert high == pytest.approx(np.percentile(scan.get_fdata(), 99.5), rel=0.1)
    assert (out / "montage.png").stat().st_size > 1000
    assert decode(tmp_path / "l", out, Decoding(dtype=dtype, as_scanned=True)).made == 0
    with pytest.raises(UserError, match="as_scanned True there, None now"):
        decode(tmp_path / "l", out, Decoding(dtype=dtype))


def test_samples_were_never_scanned(samples: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="never scanned") as caught:
        decode(samples, tmp_path / "v", Decoding(as_scanned=True))
    assert "--as-scanned" in caught.value.hint
    assert not (tmp_path / "v").exists()


def test_a_scan_that_was_replaced_is_decoded_anew_and_no_other(scans: Path, tmp_path: Path) -> None:
    encoded(scans, tmp_path / "l")
    decode(tmp_path / "l", tmp_path / "back")
    before = files(tmp_path / "back")
    scanned(scans, "b", 99, np.diag([14.0, 14, 14, 1]))
    encoded(scans, tmp_path / "l")
    assert decode(tmp_path / "l", tmp_path / "back").made == 1
    after = files(tmp_path / "back")
    assert {name for name in before if before[name] != after[name]} == {
        "b.nii.gz", "b.json", "decode_report.json", "montage.png"
    }  # fmt: skip


def test_scans_that_were_cleaned_otherwise_do_not_share_a_folder(scans: Path, tmp_path: Path) -> None:
    encoded(scans, tmp_path / "l")
    decode(tmp_path / "l", tmp_path / "back")
    dataset = json.loads((tmp_path / "l/dataset.json").read_text())
    write_json(tmp_path / "l/dataset.json", dataset | {"cleaning": {"skull_strip": {"method": "hd-bet"}}})
    with pytest.raises(UserError, match=r"encoded\.cleaning None there"):
        decode(tmp_path / "l", tmp_path / "back")


# --- many ---------------------------------------------------------------------------------------------------------


def test_bits_depend_neither_on_what_is_there_already_nor_on_the_number_of_processes(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a learned decoder, whose rounding depends on the batch: a sample keeps its place in a full one."""
    decoding = Decoding(batch_size=2, dtype="float32")
    decode(samples, tmp_path / "one", decoding)
    whole = files(tmp_path / "one")
    for name in ("sample_000000", "sample_000003"):
        (tmp_path / f"one/{name}.nii.gz").unlink()
    assert decode(samples, tmp_path / "one", decoding).made == 2
    assert files(tmp_path / "one") == whole
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, made in (("1", 2), ("0", 3)):
        monkeypatch.setenv("RANK", rank)
        assert decode(samples, tmp_path / "two", decoding).made == made
    assert files(tmp_path / "two") == whole


def test_volumes_are_stored_as_asked(samples: Path, tmp_path: Path) -> None:
    exact = {}
    for dtype, compression in (("float32", 0), ("int16", 9), ("uint8", 1)):
        folder = tmp_path / dtype
        decode(samples, folder, Decoding(dtype=dtype, compression=compression, montage=False))
        suffix = ".nii.gz" if compression else ".nii"
        assert len(list(folder.glob(f"*{suffix}"))) == 5
        for path in folder.glob(f"*{suffix}"):
            assert nib.load(path).get_data_dtype() == np.dtype(dtype)
            volume = read_stored(path)
            name = path.name.partition(".")[0]
            exact.setdefault(name, volume)
            step = {"float32": 0, "int16": 1e-3, "uint8": np.ptp(volume) / 255}[dtype]
            assert np.abs(volume - exact[name]).max() <= 0.501 * step + 1e-6


def test_more_compression_is_smaller_and_holds_the_same(samples: Path, tmp_path: Path) -> None:
    for level in (1, 9):
        decode(samples, tmp_path / str(level), Decoding(compression=level, montage=False))
    fast, small = (tmp_path / f"{level}/sample_000000.nii.gz" for level in (1, 9))
    assert small.stat().st_size < fast.stat().st_size
    assert np.array_equal(read_stored(fast), read_stored(small))


def test_volumes_of_other_settings_do_not_share_a_folder(samples: Path, tmp_path: Path) -> None:
    out = tmp_path / "v"
    decode(samples, out)
    before = files(out)
    for other in (Decoding(dtype="uint8"), Decoding(compression=0)):
        with pytest.raises(UserError, match=r"holds other volumes: (dtype int16|suffix \.nii\.gz) there"):
            decode(samples, out, other)
    manifest = json.loads((samples / MANIFEST).read_text())
    write_json(samples / MANIFEST, {**manifest, "seed": 1})
    with pytest.raises(UserError, match=r"samples\.seed 0 there, 1 now"):
        decode(samples, out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/scan.nii").write_bytes(b"x")
    with pytest.raises(UserError, match="not empty and holds no volumes"):
        decode(samples, tmp_path / "mine")
    assert files(out) == before
    assert files(tmp_path / "mine") == {"scan.nii": b"x"}


def test_what_a_writer_meets_reaches_the_user_and_nothing_finished_is_lost(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode(samples, tmp_path / "whole")

    def full(path: Path, *arguments: Any, **how: Any) -> None:
        if "000002" in path.name:
            raise UserError("the disk is full")
        save_volume(path, *arguments, **how)

    with monkeypatch.context() as patch:
        patch.setattr(volume_folder, "save_volume", full)
        with pytest.raises(UserError, match="the disk is full"):
            decode(samples, tmp_path / "v")
    there = files(tmp_path / "v")
    assert {"sample_000000.nii.gz", "sample_000001.nii.gz"} <= there.keys()
    assert "sample_000002.nii.gz" not in there
    decode(samples, tmp_path / "v")
    assert files(tmp_path / "v") == files(tmp_path / "whole")


def test_the_report_holds_the_quality_of_every_volume_whenever_it_was_made(samples: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_sample(sample_path(samples, 1), torch.full((8, 4, 4, 4), float("nan")), 1)
    first = decode(samples, tmp_path / "v")
    assert "not finite" in first.failed["sample_000001"]
    again = decode(samples, tmp_path / "v")
    assert (again.made, again.failed) == (0, first.failed)
    report = json.loads((tmp_path / "v/decode_report.json").read_text())
    assert (report["n"], report["complete"], report["failed"]) == (5, True, first.failed)
    assert set(report["volumes"]) == {f"sample_{i:06d}" for i in range(5)}
    quality = report["volumes"]["sample_000000"]
    stored = read_stored(tmp_path / "v/sample_000000.nii.gz")
    assert quality["maximum"] == pytest.approx(float(stored.max()), abs=1e-3)
    assert quality["head_ml"] == pytest.approx(quality["head_share"] * 16**3 * 1.728, rel=1e-3)
    assert np.isfinite(read_stored(tmp_path / "v/sample_000001.nii.gz")).all()


def test_a_limit_of_memory_gives_the_same_volumes(samples: Path, tmp_path: Path) -> None:
    for name, memory in (("free", None), ("limited", 100_000)):
        decode(samples, tmp_path / name, Decoding(memory=memory, dtype="float32", montage=False))
    free, limited = (read_stored(tmp_path / f"{name}/sample_000000.nii.gz") for name in ("free", "limited"))
    assert not np.array_equal(free, limited), "the limit was not heard of"
    assert np.abs(free - limited).max() < 1e-4


def test_options_of_the_commands_reach_the_volumes(neuromf: Callable[..., Any], run: Path, tmp_path: Path) -> None:
    words = ["sample", run, "--n", "2", "--out", "g", "--decode", "--dtype", "uint8", "--compression", "0"]
    words += ["--checkpoint", "best", "--no-montage", "--device", "cpu", "--quiet"]
    made = neuromf(*words, "--memory", "1", "--json")
    assert made.exit_code in (0, 4), made.stderr
    assert json.loads(made.stdout)["made"] == 2
    out = tmp_path / "g"
    assert {path.name for path in out.iterdir()} == {"manifest.json", "volumes"}
    assert nib.load(out / "volumes/sample_000001.nii").get_data_dtype() == np.uint8
    assert json.loads((out / "manifest.json").read_text())["model"]["ema"] == "0.5"
    assert neuromf(*words, "--keep-latents").exit_code in (0, 4)
    decoded = neuromf("decode", "g", "--out", "v", "--dtype", "uint8", "--compression", "0", "--no-montage", "-q")
    assert decoded.exit_code in (0, 4)
    assert files(out / "volumes") == files(tmp_path / "v")


def test_the_command_puts_scans_back_where_they_were(neuromf: Callable[..., Any], scans: Path, tmp_path: Path) -> None:
    encoded(scans, tmp_path / "l")
    assert neuromf("decode", "l", "--out", "v", "--as-scanned", "--no-montage", "-q").exit_code == 0
    assert nib.load(tmp_path / "v/b.nii.gz").shape == nib.load(scans / "b.nii.gz").shape == (14, 16, 15)


def test_other_processes_than_the_main_one_say_nothing(
    neuromf: Callable[..., Any], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    ended = neuromf("sample", run, "--n", "16", "--out", "g", "--decode", "--device", "cpu")
    assert (ended.exit_code, ended.stdout, ended.stderr) == (0, "", "")
