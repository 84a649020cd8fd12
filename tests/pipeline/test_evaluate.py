from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch

from neuromf.data.latents import LatentStatistics
from neuromf.errors import UserError
from neuromf.pipeline.evaluate import GeneratedLatents, evaluate
from neuromf.pipeline.sharing import Share

SIZE = (16, 20, 16)


class _Pooling:
    """An autoencoder with two channels: the mean and the left-right gradient of 4^3 blocks."""

    name = "pooling"
    sha256 = "ab" * 32

    def check_size(self, size) -> None:
        if any(n % 4 for n in size):
            raise UserError(f"size {size} is not a multiple of 4")

    def encode(self, volume):
        mean = torch.nn.functional.avg_pool3d(volume, 4)
        gradient = torch.nn.functional.avg_pool3d(volume.diff(dim=2, append=volume[:, :, -1:]), 4)
        return SimpleNamespace(mean=torch.cat([mean, gradient], dim=1))


def _volumes(n: int, seed: int, size: tuple[int, int, int] = SIZE) -> np.ndarray:
    """Blobs of varied size and place, p99.5 near 1."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1, 1, m) for m in size), indexing="ij")
    volumes = []
    for _ in range(n):
        centre, width = rng.uniform(-0.3, 0.3, 3), rng.uniform(0.4, 0.8, 3)
        r = sum(((x - c) / w) ** 2 for x, c, w in zip(axes, centre, width, strict=True))
        volume = np.exp(-r) + 0.05 * rng.random(size)
        volumes.append(volume / np.percentile(volume, 99.5))
    return np.stack(volumes).astype(np.float32)


def _write(folder: Path, volumes: np.ndarray, *, spacing: float = 2.0, scale: float = 1.0) -> Path:
    folder.mkdir(parents=True)
    for i, volume in enumerate(volumes):
        nib.save(nib.Nifti1Image(volume * scale, np.diag([spacing] * 3 + [1])), folder / f"v{i:03d}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sets")
    return {
        "generated": _write(root / "generated", _volumes(8, 0)),
        "real": _write(root / "real", _volumes(12, 1)),
        "train": _write(root / "train", _volumes(10, 2)),
    }


@pytest.fixture(scope="module")
def report(folders, tmp_path_factory):
    return evaluate(
        folders["generated"],
        folders["real"],
        train=folders["train"],
        autoencoder=_Pooling(),
        out=tmp_path_factory.mktemp("out") / "evaluation",
    )


def test_every_number_is_finite_and_has_its_n(report) -> None:
    content = json.loads(report.json.read_text())
    assert content == report.content
    assert content["schema_version"] == 3
    assert content["extractors"]["builtin"]["weights_sha256"] == "ab" * 32
    assert content["extractors"]["builtin"]["dimension"] == 2 * 2 * 8
    assert {s: content["sets"][s]["n"] for s in content["sets"]} == {"generated": 8, "real": 12, "train": 10}
    for name, entry in content["metrics"].items():
        assert np.isfinite(entry["value"]), name
        assert entry["n"], name
        assert (entry["low"] is None) == (entry["high"] is None), name
        if entry["low"] is not None:
            assert entry["low"] <= entry["high"], name


def test_the_expected_metrics_are_there_and_none_is_called_fid(report) -> None:
    assert {
        "frechet_builtin",
        "frechet_builtin_equal_n",
        "frechet_builtin_real_real",
        "frechet_builtin_ratio",
        "kid_builtin",
        "mmd_builtin",
        "precision_builtin",
        "coverage_builtin",
        "ssim_nearest",
        "psnr_nearest_db",
        "ms_ssim_pairs_generated",
        "high_frequency_energy_generated",
        "spectrum_distance",
        "intensity_wasserstein",
        "memorized_share_pixels",
        "memorized_share_builtin",
    } <= set(report.metrics)
    assert not any("fid" in name for name in report.metrics)
    assert report.metrics["frechet_builtin"]["covariance"] == "shrunk"  # 8 volumes, 32 features


def test_what_was_not_asked_for_is_listed_with_what_to_type(report) -> None:
    missing = report.content["not_computed"]
    published = {"inception", "radimagenet", "radimagenet_mr", "medicalnet_10", "medicalnet_50"}
    assert {"lpips_nearest", "morphology", "latents"} | {f"fid_{name}" for name in published} <= set(missing)
    expected = "not asked for: --features radimagenet-mr, after: neuromf weights fetch radimagenet"
    assert missing["fid_radimagenet_mr"] == expected


def test_features_without_their_weights_are_not_computed_and_nothing_else_fails(folders, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("NEUROMF_WEIGHTS", str(tmp_path / "weights"))
    asked = ("builtin", "inception", "medicalnet-10", "lpips")
    report = evaluate(folders["generated"], folders["real"], features=asked, autoencoder=_Pooling(), out=tmp_path)
    missing = report.content["not_computed"]
    for metric, weights in (("fid_inception", "inception"), ("fid_medicalnet_10", "medicalnet-10")):
        assert "not on this machine" in missing[metric]
        assert f"neuromf weights fetch {weights}" in missing[metric]
    assert "neuromf weights fetch lpips-alex" in missing["lpips_nearest"]
    assert "frechet_builtin" in report.metrics


def test_a_file_of_another_hash_gives_no_number(folders, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("NEUROMF_WEIGHTS", str(tmp_path))
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights-inception-2015-12-05-6726825d.pth")
    report = evaluate(
        folders["generated"], folders["real"], features=["inception"], autoencoder=_Pooling(), out=tmp_path
    )
    assert "should begin with 6726825d" in report.content["not_computed"]["fid_inception"]
    assert not any("inception" in name or "builtin" in name for name in report.metrics)


def test_features_of_the_users_own_carry_their_name_hash_preprocessing_and_n(folders, tmp_path) -> None:
    (tmp_path / "blocks.py").write_text(
        "import torch\n\ndef features(volumes):\n    return torch.nn.functional.avg_pool3d(volumes, 8).flatten(1)\n"
    )
    asked = [f"module:{tmp_path / 'blocks.py'}"]
    report = evaluate(folders["generated"], folders["real"], features=asked, autoencoder=_Pooling(), out=tmp_path)
    made = {name: entry for name, entry in report.metrics.items() if name.endswith("_blocks")}
    expected = {"frechet", "kid", "mmd", "precision", "recall", "density", "coverage"}
    assert set(made) == {f"{metric}_blocks" for metric in expected}
    for entry in made.values():
        assert entry["extractor"] == "blocks"
        assert len(entry["weights_sha256"]) == 64
        assert entry["features_preprocessing"] == "blocks.py:features"
        assert entry["n"] == {"generated": 8, "real": 12}
    assert report.content["verdict"]["metric"] == "kid_blocks"


def test_features_that_fail_half_way_cost_nothing_else(folders, tmp_path) -> None:
    (tmp_path / "half.py").write_text("def features(volumes):\n    raise RuntimeError('no memory of that')\n")
    asked = ["builtin", f"module:{tmp_path / 'half.py'}"]
    report = evaluate(folders["generated"], folders["real"], features=asked, autoencoder=_Pooling(), out=tmp_path)
    assert "no memory of that" in report.content["not_computed"]["frechet_half"]
    assert "frechet_builtin" in report.metrics


def test_two_functions_of_one_name_are_refused(folders, tmp_path) -> None:
    asked = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "own.py").write_text("def features(volumes):\n    return volumes.mean((2, 3, 4))\n")
        asked.append(f"module:{tmp_path / folder / 'own.py'}")
    with pytest.raises(UserError, match="files called 'own'"):
        evaluate(folders["generated"], folders["real"], features=asked, autoencoder=_Pooling())


def test_unknown_features_are_refused_before_anything_is_read(folders, tmp_path) -> None:
    with pytest.raises(UserError, match="did you mean 'medicalnet-50'"):
        evaluate(tmp_path / "absent", folders["real"], features=["medicalnet50"], autoencoder=_Pooling())


def test_computed_features_are_shared_and_used_again(folders, tmp_path) -> None:
    class _Counting(_Pooling):
        encoded = 0

        def encode(self, volume):
            self.encoded += len(volume)
            return super().encode(volume)

    autoencoder = _Counting()
    kwargs = {"autoencoder": autoencoder, "cache": tmp_path / "cache"}
    first = evaluate(folders["generated"], folders["real"], out=tmp_path / "a", **kwargs)
    assert autoencoder.encoded == 8 + 12
    second = evaluate(folders["train"], folders["real"], out=tmp_path / "b", **kwargs)
    assert autoencoder.encoded == 8 + 12 + 10
    assert first.metrics["frechet_builtin"] != second.metrics["frechet_builtin"]
    again = evaluate(folders["generated"], folders["real"], out=tmp_path / "c", **kwargs)
    assert again.metrics == first.metrics


def test_table_and_pictures_are_written_and_no_scratch_is_left(report) -> None:
    text = report.markdown.read_text()
    assert "| frechet_builtin (shrunk) |" in text
    assert "no FID" in text
    assert len(report.rows) == len(report.metrics)
    names = {"samples.png", "spectrum.png", "intensity.png", "closest_pixels.png", "closest_builtin.png"}
    assert {path.name for path in report.figures} == names
    found = {path.name for path in report.json.parent.iterdir()}
    assert found == names | {"metrics.json", "metrics.md", "volumes.csv", ".features"}


def test_the_same_seed_gives_the_same_numbers_at_another_batch_size(report, folders, tmp_path) -> None:
    again = evaluate(
        folders["generated"],
        folders["real"],
        train=folders["train"],
        autoencoder=_Pooling(),
        batch_size=3,
        out=tmp_path,
    )
    for name, entry in report.metrics.items():
        assert again.metrics[name]["value"] == pytest.approx(entry["value"], rel=1e-6, abs=1e-9), name


def test_metrics_json_has_the_documented_schema(report) -> None:
    content = report.content
    assert list(content) == [
        "format", "schema_version", "neuromf_version", "model", "settings", "grid", "preprocessing", "cleaning", "sets",
        "autoencoder", "extractors", "metrics", "verdict", "not_computed", "details", "notes",
    ]  # fmt: skip
    assert content["format"] == "neuromf-metrics"
    assert content["model"] == {"name": "generated", "nfe": None, "seconds": None, "citation": None}
    for described in content["sets"].values():
        assert set(described) == {"source", "n", "sha256", "intensity_scale", "brought_to_grid", "refused"}
        assert len(described["sha256"]) == 64
    for name, entry in content["metrics"].items():
        assert {"value", "low", "high", "n", "better"} <= set(entry), name
        assert entry["better"] in ("lower", "higher", "equal"), name
        assert isinstance(entry["n"], int) or all(isinstance(n, int) for n in entry["n"].values()), name
        assert ("extractor" in entry) == ("features_preprocessing" in entry), name
        assert entry.get("per_volume") in (None, "mean", "leave one out"), name
        assert "values" not in entry, name
    assert all(isinstance(reason, str) and reason for reason in content["not_computed"].values())


def test_values_of_single_volumes_have_the_means_that_are_reported(report) -> None:
    with (report.json.parent / "volumes.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert [row["set"] for row in rows] == ["generated"] * 8 + ["real"] * 12
    assert rows[0]["volume"] == "v000.nii.gz"
    means = {name: entry for name, entry in report.metrics.items() if entry.get("per_volume") == "mean"}
    assert {"ssim_nearest", "precision_builtin", "recall_builtin", "high_frequency_energy_real"} <= set(means)
    for name, entry in means.items():
        values = [float(row[name]) for row in rows if row[name]]
        assert len(values) in (8, 12)
        assert np.mean(values) == pytest.approx(entry["value"], rel=1e-6), name
    without = [float(row["kid_builtin"]) for row in rows]
    assert len(without) == 20
    assert min(without) < report.metrics["kid_builtin"]["value"] < max(without)


def test_the_spectrum_is_compared_along_each_axis(report, folders, tmp_path) -> None:
    assert set(report.metrics["spectrum_distance"]["axes"]) == {"left-right", "back-front", "bottom-top"}
    volumes = _volumes(8, 0)
    smooth = (volumes + np.roll(volumes, 1, axis=3)) / 2  # along the body's axis alone
    worse = evaluate(_write(tmp_path / "smooth", smooth), folders["real"], autoencoder=_Pooling(), out=tmp_path / "out")
    change = {
        axis: value - report.metrics["spectrum_distance"]["axes"][axis]
        for axis, value in worse.metrics["spectrum_distance"]["axes"].items()
    }
    assert max(change, key=change.get) == "bottom-top"


def test_two_processes_share_the_features_and_one_measures(folders, tmp_path, monkeypatch) -> None:
    alone = evaluate(folders["generated"], folders["real"], autoencoder=_Pooling(), out=tmp_path / "alone")

    class _Counting(_Pooling):
        def __init__(self) -> None:
            self.encoded = 0

        def encode(self, volume):
            self.encoded += len(volume)
            return super().encode(volume)

    autoencoders = [_Counting(), _Counting()]
    for rank in (1, 0):
        share = Share(rank, 2)
        monkeypatch.setattr("neuromf.pipeline.evaluate.Share.own", lambda share=share: share)
        report = evaluate(
            folders["generated"], folders["real"], train=folders["train"], autoencoder=autoencoders[rank],
            out=tmp_path / "shared",
        )  # fmt: skip
        assert bool(report.content) == (rank == 0)
    assert report.metrics["frechet_builtin"] == alone.metrics["frechet_builtin"]
    # 8 and 12 volumes as they are and mirrored, 10 of training, in blocks of 4.
    assert [a.encoded for a in autoencoders] == [2 * 4 + 2 * 8 + 6, 2 * 4 + 2 * 4 + 4]


def test_the_real_scans_of_our_own_run_without_its_latents_are_noted(folders, tmp_path) -> None:
    raw = _write(tmp_path / "raw", _volumes(5, 3, (32, 40, 36)), spacing=1.0, scale=1000)
    latents = tmp_path / "latents"
    latents.mkdir()
    report = evaluate(
        folders["generated"], raw, autoencoder=_Pooling(), latents=GeneratedLatents(latents, None), out=tmp_path / "out"
    )
    assert any("--latents" in note for note in report.content["notes"])


def test_worse_volumes_measure_worse(report, folders, tmp_path) -> None:
    volumes = _volumes(8, 0)
    blurred = torch.nn.functional.avg_pool3d(torch.tensor(volumes)[:, None], 5, 1, 2)[:, 0].numpy()
    worse = evaluate(
        _write(tmp_path / "blurred", blurred), folders["real"], autoencoder=_Pooling(), out=tmp_path / "out"
    )
    for name in ("frechet_builtin", "frechet_builtin_ratio", "kid_builtin", "spectrum_distance"):
        assert worse.metrics[name]["value"] > report.metrics[name]["value"], name
    sharp = report.metrics["high_frequency_energy_generated"]["value"]
    assert worse.metrics["high_frequency_energy_generated"]["value"] < 0.5 * sharp


def test_copies_of_training_volumes_are_audited(folders, tmp_path) -> None:
    mirrored = _volumes(10, 2)[:, ::-1].copy()
    report = evaluate(
        _write(tmp_path / "copies", mirrored),
        folders["real"],
        train=folders["train"],
        autoencoder=_Pooling(),
        out=tmp_path / "out",
    )
    assert report.metrics["memorized_share_pixels"]["value"] == 1
    pair = report.content["details"]["closest_pixels"][0]
    assert pair["mirrored"]
    assert Path(pair["generated"]).name == Path(pair["train"]).name


def test_held_back_volumes_that_are_training_volumes_give_no_audit(folders, tmp_path) -> None:
    report = evaluate(
        folders["generated"], folders["train"], train=folders["train"], autoencoder=_Pooling(), out=tmp_path
    )
    assert "also in the training" in report.content["not_computed"]["memorized_share_pixels"]


def test_real_scans_of_another_grid_and_scale_are_preprocessed_and_it_is_said(folders, tmp_path) -> None:
    large = _write(tmp_path / "raw", _volumes(5, 3, (32, 40, 36)), spacing=1.0, scale=1000)
    report = evaluate(folders["generated"], large, autoencoder=_Pooling(), out=tmp_path / "out")
    described = report.content["sets"]["real"]
    assert described["brought_to_grid"] == 5
    assert described["intensity_scale"] == {"percentiles": 5}
    assert report.content["preprocessing"]["size"] == list(SIZE)
    assert any("scaled by their own percentiles" in note for note in report.content["notes"])
    assert report.metrics["intensity_p99_real"]["value"] == pytest.approx(0.97, abs=0.1)


def test_a_sidecar_intensity_range_is_divided_out(folders, tmp_path) -> None:
    folder = _write(tmp_path / "scaled", _volumes(8, 0) * 900 + 100)
    for path in folder.glob("*.nii.gz"):
        sidecar = path.with_name(path.name.replace(".nii.gz", ".json"))
        sidecar.write_text(json.dumps({"IntensityRange": [100, 1000]}))
    scaled = evaluate(folder, folders["real"], autoencoder=_Pooling(), out=tmp_path / "a")
    plain = evaluate(folders["generated"], folders["real"], autoencoder=_Pooling(), out=tmp_path / "b")
    assert scaled.content["sets"]["generated"]["intensity_scale"] == {"sidecar": 8}
    for name in ("frechet_builtin", "intensity_mean_generated", "ssim_nearest"):
        expected = plain.metrics[name]["value"]
        assert scaled.metrics[name]["value"] == pytest.approx(expected, rel=1e-4), name


def test_a_set_of_mixed_scales_is_said(folders, tmp_path) -> None:
    folder = _write(tmp_path / "mixed", _volumes(6, 0))
    nib.save(nib.Nifti1Image(_volumes(1, 4)[0] * 1000, np.diag([2.0, 2, 2, 1])), folder / "raw.nii.gz")
    report = evaluate(folder, folders["real"], autoencoder=_Pooling(), out=tmp_path / "out")
    assert any("different ways (1 percentiles, 6 as stored)" in note for note in report.content["notes"])


def test_latents_are_compared_with_the_training_statistics(folders, tmp_path) -> None:
    generator = torch.Generator().manual_seed(0)
    latents = tmp_path / "latents"
    latents.mkdir()
    for i in range(4):
        z = torch.randn(2, 4, 5, 4, generator=generator) * torch.tensor([3.0, 0.5])[:, None, None, None] + 2
        torch.save({"z": z}, latents / f"{i}.pt")
    training = LatentStatistics(
        mean=(2.0, 1.0),
        std=(3.0, 1.0),
        skewness=(0.0, 0.0),
        kurtosis=(3.0, 3.0),
        correlation=((1.0, 0.0), (0.0, 1.0)),
        sigma2_share=0.0,
        sigma2_share_per_channel=(0.0, 0.0),
        pca_explained_variance=(1.0,),
        files=4,
        voxels=320,
    )
    report = evaluate(
        folders["generated"],
        folders["real"],
        autoencoder=_Pooling(),
        latents=GeneratedLatents(latents, training),
        out=tmp_path / "out",
    )
    assert report.metrics["latent_abs_mean_max"]["value"] == pytest.approx(1, abs=0.1)  # channel 1 is off by 1
    assert report.metrics["latent_std_min"]["value"] == pytest.approx(0.5, abs=0.1)
    assert report.content["details"]["latents_whitened"]["n"] == 4


def test_one_generated_volume_gives_what_can_be_measured(folders, tmp_path) -> None:
    report = evaluate(folders["generated"], folders["real"], limit=1, autoencoder=_Pooling(), out=tmp_path)
    assert "at least 2" in report.content["not_computed"]["frechet_builtin"]
    assert "at least 3" in report.content["not_computed"]["kid_builtin"]
    assert "ssim_nearest" in report.metrics


def test_unusable_volumes_are_refused_by_name_and_never_counted(folders, tmp_path) -> None:
    folder = _write(tmp_path / "generated", _volumes(4, 0))
    bad = _volumes(1, 5)
    bad[0, 3, 3, 3] = np.nan
    nib.save(nib.Nifti1Image(bad[0], np.diag([2.0, 2, 2, 1])), folder / "a-nan.nii.gz")
    (folder / "broken.nii.gz").write_bytes(b"not a scan")
    report = evaluate(folder, folders["real"], autoencoder=_Pooling(), out=tmp_path / "out")
    assert report.content["sets"]["generated"]["n"] == 4
    assert {Path(entry["path"]).name for entry in report.refused} == {"a-nan.nii.gz", "broken.nii.gz"}
    assert "a-nan" in report.markdown.read_text()


def test_generated_volumes_of_two_grids_are_refused(folders, tmp_path) -> None:
    folder = _write(tmp_path / "generated", _volumes(2, 0))
    nib.save(nib.Nifti1Image(_volumes(1, 1, (8, 8, 8))[0], np.diag([2.0, 2, 2, 1])), folder / "z.nii.gz")
    with pytest.raises(UserError, match="different grids"):
        evaluate(folder, folders["real"], autoencoder=_Pooling(), out=tmp_path / "out")


@pytest.mark.parametrize("case", ["absent", "empty", "all bad", "size"])
def test_input_without_usable_volumes_is_the_users_error(case, folders, tmp_path) -> None:
    folder = tmp_path / "generated"
    if case == "size":
        _write(folder, _volumes(2, 0, (14, 16, 16)))
    elif case != "absent":
        folder.mkdir()
        if case == "all bad":
            (folder / "x.nii.gz").write_bytes(b"?")
    with pytest.raises(UserError):
        evaluate(folder, folders["real"], autoencoder=_Pooling())
    assert case != "absent" or not folder.exists()


def test_nothing_is_lost_when_the_sets_live_on_disk(folders, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("neuromf.data.volume_sets._RAM_LIMIT_BYTES", 0)
    mapped = evaluate(folders["generated"], folders["real"], autoencoder=_Pooling(), out=tmp_path / "a")
    monkeypatch.undo()
    plain = evaluate(folders["generated"], folders["real"], autoencoder=_Pooling(), out=tmp_path / "b")
    assert mapped.metrics == plain.metrics
