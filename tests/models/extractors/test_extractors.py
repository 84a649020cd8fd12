"""Extractors read files of the published layouts, refuse others, and compute what the published networks compute.

The weights are random here: what is tested is the reading and the forward pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from neuromf.errors import UserError
from neuromf.models.extractors import FOREIGN, load_extractor
from neuromf.models.extractors.slices import slice_numbers
from neuromf.vision_shim import prepare_torchvision
from neuromf.weights import catalogue as weights_catalogue
from neuromf.weights import entries, expected_path, find
from tests.models.extractors import layouts

Put = Callable[[str, object], Path]


@pytest.fixture
def put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Put:
    """`put("inception", content)` saves a file as the weights of that name, with whatever hash it has."""
    monkeypatch.setenv("NEUROMF_WEIGHTS", str(tmp_path / "weights"))

    def save(name: str, content: object) -> Path:
        changed = {**entries(), name: find(name)._replace(sha256=None)}
        monkeypatch.setattr(weights_catalogue, "entries", lambda: changed)
        path = expected_path(find(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, path)
        return path

    return save


def _volumes(n: int = 1, size: tuple[int, int, int] = (32, 36, 40)) -> Tensor:
    return torch.rand(n, 1, *size, generator=torch.Generator().manual_seed(1)) * 1.2


# --- the networks against upstream's definitions -----------------------------------------------------------------


def test_inception_reads_the_published_layout_and_equals_pytorch_fid(put: Put, monkeypatch) -> None:
    prepare_torchvision()
    theirs = pytest.importorskip("pytorch_fid.inception", reason="compared where pytorch-fid is installed")
    state = layouts.random_state(layouts.inception())
    path = put("inception", state)
    ours = load_extractor("inception")
    assert ours.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: state)
    reference = theirs.InceptionV3([3]).eval()
    volumes = _volumes()
    monkeypatch.setattr("neuromf.models.extractors.slices.slice_numbers", lambda n, _: [n // 4])  # one of each plane
    slices = {"axial": volumes[..., 10], "coronal": volumes[..., 9, :], "sagittal": volumes[:, :, 8]}
    features = ours(volumes)
    for plane, picture in slices.items():
        with torch.no_grad():
            expected = reference(picture.clamp(0, 1).expand(-1, 3, -1, -1))[0].flatten()
        torch.testing.assert_close(features[plane][0, 0], expected, rtol=1e-4, atol=1e-5)


def _medicalnet_by_tencent(state: dict[str, Tensor], x: Tensor, blocks: tuple[int, ...], bottleneck: bool) -> Tensor:
    """models/resnet.py of MedicalNet, written out: stages 3 and 4 dilate by 2 and 4 and do not stride."""

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            state[f"module.{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, weight, bias, eps=1e-5)

    def conv(x: Tensor, name: str, **how: int) -> Tensor:
        return F.conv3d(x, state[f"module.{name}.weight"], **how)

    x = F.max_pool3d(F.relu(norm(conv(x, "conv1", stride=2, padding=3), "bn1")), 3, 2, 1)
    for stage, (count, stride, dilation) in enumerate(zip(blocks, (1, 2, 1, 1), (1, 1, 2, 4), strict=True), 1):
        for block in range(count):
            name, s = f"layer{stage}.{block}", stride if block == 0 else 1
            wide = {"stride": s, "padding": dilation, "dilation": dilation}
            same = {"padding": dilation, "dilation": dilation}
            if bottleneck:
                y = F.relu(norm(conv(x, f"{name}.conv1"), f"{name}.bn1"))
                y = F.relu(norm(conv(y, f"{name}.conv2", **wide), f"{name}.bn2"))
                y = norm(conv(y, f"{name}.conv3"), f"{name}.bn3")
            else:
                y = F.relu(norm(conv(x, f"{name}.conv1", **wide), f"{name}.bn1"))
                y = norm(conv(y, f"{name}.conv2", **same), f"{name}.bn2")
            if f"module.{name}.downsample.0.weight" in state:
                x = norm(conv(x, f"{name}.downsample.0", stride=s), f"{name}.downsample.1")
            x = F.relu(x + y)
    return x.mean((2, 3, 4))


@pytest.mark.parametrize("depth", [10, 50])
def test_medicalnet_reads_the_published_layout_and_dilates_as_tencents(put: Put, depth: int) -> None:
    state = layouts.random_state(layouts.medicalnet(depth))
    put(f"medicalnet-{depth}", {"state_dict": state, "epoch": 1})
    extractor = load_extractor(f"medicalnet-{depth}")
    volumes = _volumes(2)
    features = extractor(volumes)["volume"]
    blocks = {10: (1, 1, 1, 1), 50: (3, 4, 6, 3)}[depth]
    expected = _medicalnet_by_tencent(state, volumes.clamp(0, 1), blocks, depth == 50)
    assert features.shape == (2, 1, {10: 512, 50: 2048}[depth])
    torch.testing.assert_close(features[:, 0], expected, rtol=1e-4, atol=1e-4)


def test_radimagenet_of_keras_strides_in_the_first_convolution_and_has_biases(put: Put) -> None:
    state = layouts.random_state(layouts.radimagenet_keras())
    put("radimagenet", state)
    network = load_extractor("radimagenet-mr").network
    x = torch.randn(1, 3, 20, 20, generator=torch.Generator().manual_seed(2))

    def norm(x: Tensor, name: str) -> Tensor:
        parts = (state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *parts, eps=1.001e-5)

    def conv(x: Tensor, name: str, **how: int) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **how)

    expected = F.max_pool2d(F.relu(norm(conv(x, "conv1", stride=2, padding=3), "bn1")), 3, 2, 1)
    for stage, count in enumerate((3, 4, 6, 3), 1):
        for block in range(count):
            name, s = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = F.relu(norm(conv(expected, f"{name}.conv1", stride=s), f"{name}.bn1"))
            y = F.relu(norm(conv(y, f"{name}.conv2", padding=1), f"{name}.bn2"))
            y = norm(conv(y, f"{name}.conv3"), f"{name}.bn3")
            if block == 0:
                expected = norm(conv(expected, f"{name}.downsample.0", stride=s), f"{name}.downsample.1")
            expected = F.relu(expected + y)
    torch.testing.assert_close(network(x), expected.mean((2, 3)), rtol=1e-4, atol=1e-4)


def test_radimagenets_own_layout_is_torchvisions_network(put: Put) -> None:
    prepare_torchvision()
    from torchvision.models import resnet50

    state = layouts.random_state(layouts.radimagenet_own())
    put("radimagenet", state)
    network = load_extractor("radimagenet").network
    reference = torch.nn.Sequential(*list(resnet50(weights=None).children())[:-1]).eval()
    reference.load_state_dict({name.removeprefix("backbone."): value for name, value in state.items()}, strict=True)
    x = torch.randn(1, 3, 40, 40, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(network(x), reference(x).flatten(1), rtol=1e-4, atol=1e-5)


# --- what the slices are -------------------------------------------------------------------------------------------


def test_slices_are_even_and_leave_the_ends_out() -> None:
    numbers = slice_numbers(64, 16)
    assert len(set(numbers)) == 16
    assert numbers[0] >= 6
    assert numbers[-1] <= 57
    assert set(torch.tensor(numbers).diff().tolist()) <= {3, 4}
    assert slice_numbers(10, 16) == slice_numbers(10, None) == list(range(10))


def test_the_two_rules_of_radimagenet_differ_in_scale_and_slices(put: Put, monkeypatch) -> None:
    put("radimagenet", layouts.random_state(layouts.radimagenet_own()))
    literal, mr = load_extractor("radimagenet"), load_extractor("radimagenet-mr")
    for extractor in (literal, mr):
        extractor.network = lambda pictures: pictures.amax((2, 3))  # what reaches the network
    volumes = _volumes(1, (20, 24, 28)) * 0.5
    mean = torch.tensor([0.406, 0.456, 0.485])
    by_rule, by_mr = literal(volumes), mr(volumes)
    assert {plane: x.shape[1] for plane, x in by_rule.items()} == {"axial": 28, "coronal": 24, "sagittal": 20}
    assert {plane: x.shape[1] for plane, x in by_mr.items()} == {"axial": 16, "coronal": 16, "sagittal": 16}
    torch.testing.assert_close(by_rule["axial"].amax((0, 1)), 1 - mean)  # scaled by its own largest value
    torch.testing.assert_close(by_mr["sagittal"][0, 0], volumes[0, 0, slice_numbers(20, 16)[0]].max() - mean)
    assert literal.name != mr.name
    assert literal.preprocessing != mr.preprocessing


# --- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOREIGN)
def test_absent_weights_are_named_with_what_brings_them(name: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("NEUROMF_WEIGHTS", str(tmp_path))
    with pytest.raises(UserError, match=r"not on this machine") as error:
        load_extractor(name)
    assert f"neuromf weights fetch {FOREIGN[name]}" in error.value.hint


def test_a_file_of_another_network_is_refused_with_its_differences(put: Put) -> None:
    state = layouts.random_state(layouts.medicalnet(10))
    state["module.conv1.weight"] = torch.zeros(64, 3, 7, 7, 7)
    del state["module.layer4.0.bn2.bias"]
    state["module.conv_seg.0.weight"] = torch.zeros(2)
    put("medicalnet-10", {"state_dict": state})
    with pytest.raises(UserError) as error:
        load_extractor("medicalnet-10")
    assert "missing (1): layer4.0.bn2.bias" in str(error.value)
    assert "not known (1): conv_seg.0.weight" in str(error.value)
    assert "conv1.weight (64, 3, 7, 7, 7) instead of (64, 1, 7, 7, 7)" in str(error.value)


def test_a_file_without_tensors_is_refused(put: Put) -> None:
    put("medicalnet-10", {"state_dict": {"a": 1}})
    with pytest.raises(UserError, match="no state dict"):
        load_extractor("medicalnet-10")


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'inception'"):
        load_extractor("incption")


# --- the user's own --------------------------------------------------------------------------------------------------


def test_a_function_of_the_users_own_is_an_extractor_named_after_its_file(tmp_path: Path) -> None:
    file = tmp_path / "octants.py"
    file.write_text("def features(v):\n    return v.mean((2, 3, 4))\n\ndef other(v):\n    return v.amax((2, 3, 4))\n")
    volumes = _volumes(3)
    extractor = load_extractor(f"module:{file}")
    assert extractor.name == "octants"
    assert extractor.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    torch.testing.assert_close(extractor(volumes)["volume"][:, 0], volumes.mean((2, 3, 4)))
    torch.testing.assert_close(load_extractor(f"module:{file}:other")(volumes)["volume"][:, 0], volumes.amax((2, 3, 4)))


@pytest.mark.parametrize(
    ("code", "spec", "said"),
    [
        ("def features(v): return v", "", r"returned \(3, 1, 32, 36, 40\) for 3 volumes"),
        ("def features(v): return 1 / 0", "", "ZeroDivisionError"),
        ("import nothing_of_that_name", "", "cannot be imported"),
        ("x = 1", "", "no function 'features'"),
        ("def features(v): return v", ":absent", "no function 'absent'"),
    ],
)
def test_a_function_that_does_not_do_is_the_users_error(tmp_path: Path, code: str, spec: str, said: str) -> None:
    (tmp_path / "own.py").write_text(code)
    with pytest.raises(UserError, match=said):
        load_extractor(f"module:{tmp_path / 'own.py'}{spec}")(_volumes(3))


def test_a_file_that_would_pass_as_a_published_network_is_refused(tmp_path: Path) -> None:
    (tmp_path / "inception.py").write_text("def features(v): return v.mean((2, 3, 4))")
    with pytest.raises(UserError, match="would pass as"):
        load_extractor(f"module:{tmp_path / 'inception.py'}")


# --- LPIPS ---------------------------------------------------------------------------------------------------------


def test_lpips_reads_torchvisions_alexnet_and_equals_the_package(put: Put, monkeypatch) -> None:
    prepare_torchvision()
    import lpips
    import torchvision

    from neuromf.models.extractors import load_lpips

    state = layouts.random_state(layouts.alexnet())
    put("lpips-alex", state)
    ours = load_lpips()
    trunk = torchvision.models.alexnet(weights=None)
    trunk.load_state_dict(state, strict=True)
    monkeypatch.setattr(torchvision.models, "alexnet", lambda **_: trunk)
    theirs = lpips.LPIPS(net="alex", verbose=False)
    monkeypatch.setattr("neuromf.models.extractors.lpips_alex.slice_numbers", lambda n, _: [n // 2])
    a, b = _volumes(2, (32, 34, 36)), _volumes(2, (32, 34, 36)).flip(2)
    planes = [(a[..., 18], b[..., 18]), (a[..., 17, :], b[..., 17, :]), (a[:, :, 16], b[:, :, 16])]
    with torch.no_grad():
        expected = sum(theirs(*(2 * x.clamp(0, 1).expand(-1, 3, -1, -1) - 1 for x in p)).flatten() for p in planes) / 3
    torch.testing.assert_close(ours(a, b).float(), expected, rtol=1e-4, atol=1e-6)
    assert ours(a, a).abs().max() == 0
    with pytest.raises(UserError, match="at least 32 voxels"):
        ours(a[:, :, :20], b[:, :, :20])


def test_lpips_refuses_another_network(put: Put) -> None:
    from neuromf.models.extractors import load_lpips

    put("lpips-alex", layouts.random_state(layouts.medicalnet(10)))
    with pytest.raises(UserError, match="missing"):
        load_lpips()
