"""MeshNet: slabs equal the definition, and files are read strictly."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from neuromf.errors import UserError
from neuromf.models.meshnet import LAYOUTS, MeshNet, MeshNetLayout, load_meshnet, read_tensors

NAMES = ("background", "one", "two")
PLAIN = MeshNetLayout(NAMES, 3, (1, 4, 2))
STANDARDISED = MeshNetLayout(NAMES, 3, (4, 2, 1), "gelu", standardised=True)


@pytest.fixture
def weights_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NEUROMF_WEIGHTS", str(tmp_path))
    monkeypatch.setitem(LAYOUTS, "meshnet-tissue", PLAIN)
    # The catalogue knows the hash of the real file; here another network stands for it.
    monkeypatch.setattr("neuromf.models.meshnet.locate", lambda name: _Found(tmp_path / "model.pth"))
    return tmp_path


class _Found:
    def __init__(self, path: Path) -> None:
        self.path = path


@pytest.mark.parametrize("layout", [PLAIN, STANDARDISED, PLAIN._replace(activation="relu")])
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_slabs_of_any_size_give_the_classes_of_the_whole_network(layout: MeshNetLayout, rows: int) -> None:
    torch.manual_seed(3)
    network = MeshNet(layout).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    volume = torch.rand(13, 9, 11)
    with torch.no_grad():
        logits = network(volume[None, None])[0]
    found = network.segment(volume, rows=rows)
    assert found.unique().numel() > 1
    # Where two classes are equal to rounding either is right.
    chosen = logits.gather(0, found[None].long())[0]
    assert (logits.amax(0) - chosen).max() < 1e-4
    assert (found == logits.argmax(0)).float().mean() > 0.999


def test_segment_leaves_its_input_alone() -> None:
    volume = torch.rand(6, 5, 4)
    before = volume.clone()
    MeshNet(PLAIN).segment(volume)
    assert torch.equal(volume, before)


def test_parameters_have_the_names_and_numbers_of_brainchops_files() -> None:
    counts = {name: sum(p.numel() for p in MeshNet(layout).parameters()) for name, layout in LAYOUTS.items()}
    assert counts == {
        "mindgrab": 146_237,
        "meshnet-tissue": 5_598,
        "meshnet-18": 196_038,
        "meshnet-18-small": 96_408,
    }
    plain = [name for i in range(0, 20, 2) for name in (f"model.{i}.weight", f"model.{i}.bias")]
    assert sorted(MeshNet(LAYOUTS["meshnet-18"]).state_dict()) == sorted(plain)
    stacked = [*(f"model.{i}.0.weight" for i in range(25)), "model.25.weight", "model.25.bias"]
    assert sorted(MeshNet(LAYOUTS["mindgrab"]).state_dict()) == sorted(stacked)


@pytest.mark.parametrize("form", ["safetensors", "torch"])
def test_either_kind_of_file_is_read_whatever_its_suffix(weights_folder: Path, form: str) -> None:
    state = MeshNet(PLAIN).state_dict()
    path = weights_folder / "model.pth"
    save_file(state, path) if form == "safetensors" else torch.save(state, path)
    network = load_meshnet("meshnet-tissue").network
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert not any(p.requires_grad for p in network.parameters())


def test_weights_of_another_network_are_refused_with_what_differs(weights_folder: Path) -> None:
    save_file(MeshNet(PLAIN._replace(channels=4)).state_dict(), weights_folder / "model.pth")
    with pytest.raises(UserError, match=r"other shape \(7\).*model.0.bias \(4,\) instead of \(3,\)"):
        load_meshnet("meshnet-tissue")
    save_file(MeshNet(STANDARDISED).state_dict(), weights_folder / "model.pth")
    with pytest.raises(UserError, match=r"missing \(8\).*\n.*not known \(5\): model.0.0.weight"):
        load_meshnet("meshnet-tissue")


@pytest.mark.parametrize("content", [b"", b"PK damaged", b"\x80\x04pickle", b"\xff" * 64])
def test_a_damaged_file_is_said_to_be_one(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"model.pth cannot be read as weights"):
        read_tensors(tmp_path / "model.pth")


def test_a_file_without_names_is_refused(tmp_path: Path) -> None:
    torch.save([torch.ones(2)], tmp_path / "model.pth")
    with pytest.raises(UserError, match="no tensors by name"):
        read_tensors(tmp_path / "model.pth")


def test_an_unknown_network_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="did you mean 'mindgrab'"):
        load_meshnet("mindgrap")


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_the_published_files_load(shared_data: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("NEUROMF_WEIGHTS", str(shared_data / "weights"))
    loaded = load_meshnet(name)
    assert loaded.weights.name == name
    assert len(loaded.weights.sha256) == 64


@pytest.mark.slow
def test_mindgrab_draws_the_mask_that_others_got_from_it(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEUROMF_WEIGHTS", str(shared_data / "weights"))
    image = nib.load(shared_data / "wholebrain/t1_crop.nii.gz")
    assert nib.aff2axcodes(image.affine) == ("L", "I", "A")
    volume = torch.from_numpy(image.get_fdata(dtype=np.float32) / 255)
    expected = nib.load(shared_data / "weights/reference/t1_crop_mindgrab_mask.nii.gz").get_fdata() > 0
    found = load_meshnet("mindgrab").network.segment(volume).numpy() > 0
    assert 2 * (found & expected).sum() / (found.sum() + expected.sum()) > 0.99
