"""`lora` is `train` on another network: same folder, same resume; adapters know their base, and merge."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from neuromf import generator
from neuromf.config import from_yaml
from neuromf.data.latents import load_latent_folder_info
from neuromf.data.volumes import load_volume
from neuromf.errors import UserError
from neuromf.files import read_json, write_json
from neuromf.models.mask_codec import PairLayout
from neuromf.pipeline import lora
from neuromf.pipeline.decode import Decoding, decode
from neuromf.pipeline.sample import sample
from neuromf.pipeline.train import train
from neuromf.training import checkpoint
from neuromf.training.adapter_file import FILE

ADAPT = ["training.updates=12", "training.batch_size=4", "ema.decays=[0.5]", "ema.select=0.5"]


@pytest.fixture
def pairs(adapted: Path) -> Path:
    """Where the pairs of `adapted` lie."""
    return adapted.parent.parent / "pairs"


def settings(run: Path, pairs: Path, *overrides: str) -> lora.TrainConfig:
    config = lora.resolve(str(run), "lora-joint", [*ADAPT, *overrides])
    return lora.prepare(config, pairs, device="cpu")[0]


# --- settings --------------------------------------------------------------------------------------------------------


def test_network_objective_and_times_are_the_base_s(run: Path, adapted: Path) -> None:
    base, config = from_yaml(run / "config.yaml"), from_yaml(adapted / "config.yaml")
    assert config.network == base.network
    assert config.times == base.times
    assert config.objective.prediction == base.objective.prediction
    assert config.adapters.base == str(run)


def test_each_channel_has_its_exponent_and_mask_and_image_weigh_alike(run: Path, pairs: Path) -> None:
    layout = PairLayout(8, 1, "downsample")
    config = lora.resolve(str(run), "lora-joint", ["adapters.image_lp=1.5", "adapters.mask_lp=2"])
    objective = lora.fitted(config, layout, read_json(run / "data.json")).objective
    assert objective.lp == (1.5,) * 8 + (2.0,)
    assert objective.channel_weights == (1.0,) * 8 + (8.0,)
    plain = lora.resolve(str(run), "lora-joint", ["adapters.image_lp=2", "adapters.mask_weight=1"])
    objective = lora.fitted(plain, layout, read_json(run / "data.json")).objective
    assert (objective.lp, objective.channel_weights) == (2.0, "none")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("adapters.rank=0", "adapters.rank: .*greater than or equal to 1"),
        ("training.init_from=runs/x", "both say what to start from"),
        ("objective.perceptual_weight=1", "pairs hold masks too"),
        ("adapters.targets=everything", "adapters.targets"),
    ],
)
def test_settings_that_make_no_sense_are_refused(override: str, said: str, run: Path) -> None:
    with pytest.raises(UserError, match=said):
        lora.resolve(str(run), "lora-joint", [override])


def test_a_base_that_cannot_be_adapted_is_refused(run: Path, adapted: Path, latents: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="makes pairs already"):
        lora.resolve(str(adapted), "lora-joint")
    with pytest.raises(UserError, match="there is no run"):
        lora.resolve(str(tmp_path / "absent"), "lora-joint")
    with pytest.raises(UserError, match="there are no pairs"):
        settings(run, tmp_path / "absent")
    with pytest.raises(UserError, match="images without masks"):
        settings(run, latents)
    with pytest.raises(UserError, match="of images alone"):
        train(lora.resolve(str(run), "lora-joint"), latents, tmp_path / "out", device="cpu")


# --- the run ---------------------------------------------------------------------------------------------------------


def test_the_run_folder_is_that_of_train_and_holds_only_what_is_learned(run: Path, adapted: Path) -> None:
    assert {path.name for path in run.iterdir()} <= {path.name for path in adapted.iterdir()} | {"generated"}
    newest, _ = checkpoint.newest(adapted)
    assert newest is not None
    held = checkpoint.load(newest)
    assert all("lora_" in name or ".new." in name for name in [*held.model, *held.averages["0.5"]])


@pytest.mark.gate("P7-T3")
def test_the_image_s_whitening_stays_the_base_s(run: Path, adapted: Path, pairs: Path) -> None:
    base, own = (generator.load(path, device="cpu").statistics for path in (run, adapted))
    assert own.mean[:8] == base.mean
    assert own.std[:8] == base.std
    assert own.std[8:] == load_latent_folder_info(pairs).statistics.std[8:]


def test_a_run_that_was_stopped_continues_bit_for_bit(run: Path, adapted: Path, pairs: Path, tmp_path: Path) -> None:
    config = settings(run, pairs, "intervals.checkpoint_updates=5", "intervals.keep_checkpoints=9")
    lora.lora(config, pairs, tmp_path / "again", device="cpu")
    for later in ("step_00000010", "step_00000012"):
        shutil.rmtree(tmp_path / "again/checkpoints" / later)
    (tmp_path / "again/result.json").unlink()
    lora.lora(config, pairs, tmp_path / "again", device="cpu")
    once, twice = (checkpoint.load(checkpoint.folder_of(f, 12)) for f in (adapted, tmp_path / "again"))
    assert all(torch.equal(value, twice.model[name]) for name, value in once.model.items())
    assert once.model.keys() == twice.model.keys()


def test_another_base_is_refused_on_resuming(run: Path, adapted: Path, pairs: Path, tmp_path: Path) -> None:
    shutil.copytree(adapted, tmp_path / "moved")
    data = read_json(tmp_path / "moved/data.json")
    write_json(tmp_path / "moved/data.json", {**data, "base": {**data["base"], "sha256": "f" * 64}})
    with pytest.raises(UserError, match="adapts a base with other weights: ffffffffffff"):
        lora.lora(settings(run, pairs), pairs, tmp_path / "moved", device="cpu")


def test_the_plan_counts_what_is_learned_apart_from_what_is_frozen(run: Path, adapted: Path, pairs: Path) -> None:
    plan = lora.plan(settings(run, pairs), pairs, device="cpu")
    found = lora.info(adapted)
    assert plan.parameters["network"] == found["parameters"]
    assert plan.parameters["frozen"] == found["base_parameters"]
    assert plan.memory.weights == 4 * (found["parameters"] + found["base_parameters"])
    assert plan.memory.gradients == 4 * found["parameters"]
    assert any("frozen" in line for line in plan.lines())


# --- what is made ----------------------------------------------------------------------------------------------------


def test_samples_are_images_with_masks_by_their_bids_names(adapted: Path, tmp_path: Path) -> None:
    made = sample(str(adapted), 3, out=tmp_path / "gen", decoding=Decoding(), keep_latents=True, device="cpu")
    volumes = made.out / "volumes"
    images, masks = sorted(volumes.glob("*_T1w.nii.gz")), sorted(volumes.glob("*_label-lesion_mask.nii.gz"))
    assert [path.name for path in images] == [f"sub-gen{i:06d}_T1w.nii.gz" for i in range(3)]
    assert [path.name for path in masks] == [f"sub-gen{i:06d}_label-lesion_mask.nii.gz" for i in range(3)]
    assert read_json(volumes / "decode_report.json")["n"] == 3
    assert (volumes / "montage.png").is_file()
    for image, mask in zip(images, masks, strict=True):
        assert np.array_equal(nib.load(image).affine, nib.load(mask).affine)
        assert nib.load(image).shape == nib.load(mask).shape
        assert set(np.unique(np.asarray(nib.load(mask).dataobj))) <= {0, 1}


def test_decoding_later_gives_the_same_pairs_and_redoes_a_damaged_mask(adapted: Path, tmp_path: Path) -> None:
    sample(str(adapted), 2, out=tmp_path / "gen", device="cpu")
    decode(tmp_path / "gen", tmp_path / "a", device="cpu")
    mask = tmp_path / "a/sub-gen000001_label-lesion_mask.nii.gz"
    content = mask.read_bytes()
    mask.write_bytes(content[: len(content) // 2])
    again = decode(tmp_path / "gen", tmp_path / "a", device="cpu")
    assert (again.n, again.made) == (2, 1)
    assert mask.read_bytes() == content


def test_encoded_pairs_decode_to_their_own_masks(adapted: Path, pairs: Path, lesions: Path, tmp_path: Path) -> None:
    decode(pairs, tmp_path / "back", device="cpu")
    for path in sorted((lesions / "masks").glob("*.nii.gz")):
        back = tmp_path / "back" / path.name.replace(".nii.gz", "_label-lesion_mask.nii.gz")
        assert np.array_equal(load_volume(back).array, load_volume(path).array)


def test_in_python_a_generator_gives_images_and_masks(run: Path, adapted: Path) -> None:
    made = generator.load(adapted, device="cpu")
    latents = made.sample_latents([0, 1])
    assert made.decode(latents).shape == made.decode_masks(latents).shape == (2, 1, 16, 16, 16)
    assert made.decode_masks(latents).dtype == torch.bool
    plain = generator.load(run, device="cpu")
    with pytest.raises(UserError, match="images without masks"):
        plain.decode_masks(latents)


# --- the file of adapters --------------------------------------------------------------------------------------------


def test_info_tells_the_same_of_the_run_and_of_its_file(run: Path, adapted: Path) -> None:
    of_run, of_file = lora.info(adapted), lora.info(adapted / FILE)
    assert {**of_run, "size_bytes": 0} == {**of_file, "size_bytes": 0}
    assert of_file["base"] == str(run.resolve())
    assert of_file["mask"] == "autoencoder"
    assert (adapted / FILE).stat().st_size < 4 * of_file["parameters"] + 1_000_000


def test_merged_needs_neither_base_nor_adapters_and_gives_the_same(adapted: Path, tmp_path: Path) -> None:
    shutil.copy(adapted / FILE, tmp_path / FILE)
    merged = lora.merge(tmp_path / FILE, tmp_path / "merged")
    one, other = (generator.load(path, device="cpu") for path in (adapted, merged))
    assert other.config.adapters.base is None
    assert torch.equal(one.sample_latents([0, 5]), other.sample_latents([0, 5]))
    assert other.pair == one.pair
    with pytest.raises(UserError, match="there already"):
        lora.merge(adapted, tmp_path / "merged")


def test_a_base_that_moved_is_found_where_it_is_said_and_another_is_refused(
    run: Path, adapted: Path, tmp_path: Path
) -> None:
    shutil.copytree(adapted, tmp_path / "here/adapted")
    for file in ("data.json", "config.yaml"):
        path = tmp_path / "here/adapted" / file
        path.write_text(path.read_text().replace(str(run.parent), "/gone/runs"))
    with pytest.raises(UserError, match=r"belong to a base[\s\S]*/gone/runs/tiny[\s\S]*--merge"):
        generator.load(tmp_path / "here/adapted", device="cpu")
    assert generator.load(tmp_path / "here/adapted", base=run, device="cpu").pair is not None
    shutil.copytree(run, tmp_path / "here/tiny")  # beside the run, as it was
    assert generator.load(tmp_path / "here/adapted", device="cpu").pair is not None
    other = generator.load(run, device="cpu")
    with torch.no_grad():
        next(iter(other.network.state_dict().values())).add_(1)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"not at .*other"):
        lora.merge(adapted, tmp_path / "merged", base=str(tmp_path / "other"))


def test_what_are_no_adapters_is_refused(run: Path, adapted: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no adapters"):
        lora.info(run)
    with pytest.raises(UserError, match="there is no file"):
        lora.info(tmp_path / FILE)
    (tmp_path / FILE).write_bytes(b"nothing")
    with pytest.raises(UserError, match="is damaged"):
        lora.info(tmp_path / FILE)
    content = bytearray((adapted / FILE).read_bytes())
    content[-3] ^= 1
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(UserError, match="not those it was written with"):
        lora.merge(tmp_path / FILE, tmp_path / "merged")
    weights = next(iter((adapted / "checkpoints").glob("step_*/ema_0.5.safetensors")))
    shutil.copy(weights, tmp_path / FILE)
    with pytest.raises(UserError, match="holds no adapters"):
        lora.info(tmp_path / FILE)
