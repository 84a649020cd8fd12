from __future__ import annotations

from pathlib import Path

import pytest
import torch
from monai.apps.generation.maisi.networks import diffusion_model_unet_maisi
from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
from monai.networks.schedulers.rectified_flow import RFlowScheduler

from neuromf.conditions import Condition
from neuromf.errors import UserError
from neuromf.models import pretrained
from neuromf.models.networks import build_network
from neuromf.models.pretrained import CODES, load_rectified_flow, rectified_flow_settings
from neuromf.models.unet import sinusoid
from neuromf.models.warm_start import convert
from neuromf.sampling.solvers import euler, time_grid

SHAPE = (2, 4, 4, 4)
SMALL = {"channels": [4, 8], "attention_levels": [False, True], "head_channels": 4, "res_blocks": 1, "norm_groups": 4}
SPACING = [0.9375, 1.0, 1.2]


def target(**settings) -> dict:
    """Our settings for a network like NVIDIA's."""
    published = {**pretrained.ARCHITECTURE, **SMALL}
    return {**published, "classes": True, "spacing_mm": SPACING, **settings}


@pytest.fixture
def small_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "ARCHITECTURE", {**pretrained.ARCHITECTURE, **SMALL})


@pytest.fixture
def theirs(small_architecture) -> DiffusionModelUNetMaisi:
    """MONAI's network as NVIDIA configures it, small, with random weights in float32 as the file has them."""
    torch.manual_seed(0)
    network = DiffusionModelUNetMaisi(
        spatial_dims=3,
        in_channels=2,
        out_channels=2,
        num_channels=(4, 8),
        attention_levels=(False, True),
        num_head_channels=(0, 4),
        num_res_blocks=1,
        norm_num_groups=4,
        resblock_updown=True,
        include_fc=True,
        include_spacing_input=True,
        num_class_embeds=128,
    )
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(0.3 * torch.randn_like(p))
    return network


@pytest.fixture
def file(theirs: DiffusionModelUNetMaisi, tmp_path: Path) -> Path:
    path = tmp_path / "diff_unet_3d_rflow-small.pt"
    content = {"epoch": 3, "loss": 0.2, "num_train_timesteps": 1000, "scale_factor": torch.tensor(0.96968)}
    torch.save({**content, "unet_state_dict": theirs.state_dict()}, path)
    return path


def ours(file: Path, settings: dict, contrasts=range(1, 128)) -> torch.nn.Module:
    flow = load_rectified_flow(file, contrasts)
    network = build_network(settings, SHAPE, 0 if isinstance(contrasts, int) else len(contrasts))
    network.load_state_dict(convert(flow.state, rectified_flow_settings(settings), network, settings))
    return network.double()


def velocity(theirs: DiffusionModelUNetMaisi, z: torch.Tensor, tau: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """v = eps - x by MONAI's own forward."""
    spacing = 100 * torch.tensor([SPACING], dtype=z.dtype).expand(len(z), -1)
    return -theirs.double()(z, 1000 * tau, class_labels=codes, spacing_tensor=spacing)


@pytest.fixture
def exact_sinusoid(monkeypatch: pytest.MonkeyPatch) -> None:
    """MONAI embeds the time in float32 whatever the network's precision; this lets it be compared to rounding."""
    monkeypatch.setattr(diffusion_model_unet_maisi, "get_timestep_embedding", sinusoid)


@torch.no_grad()
@pytest.mark.parametrize("tau", [0.0, 0.013, 0.37, 1.0])
def test_u_at_equal_times_is_minus_nvidias_network(tau, theirs, file, exact_sinusoid):
    z = torch.randn(2, *SHAPE, dtype=torch.float64)
    t = torch.full((2,), tau, dtype=torch.float64)
    network = ours(file, target())
    label = Condition(torch.tensor([CODES["T1"] - 1, 127]))  # the second has none
    expected = velocity(theirs, z, t, torch.tensor([CODES["T1"], 0]))
    torch.testing.assert_close(network(z, t, t, label), expected, rtol=1e-12, atol=1e-12)
    assert (expected[0] - expected[1]).abs().max() > 1e-3


@torch.no_grad()
def test_with_monais_own_embedding_it_agrees_to_its_precision(theirs, file):
    z, t = torch.randn(2, *SHAPE, dtype=torch.float64), torch.tensor([0.2, 0.8], dtype=torch.float64)
    expected = velocity(theirs, z, t, torch.tensor([0, 0]))
    error = ours(file, target())(z, t, t) - expected
    assert error.norm() / expected.norm() < 1e-4


def sampled_by_monai(theirs: DiffusionModelUNetMaisi, z: torch.Tensor, codes: torch.Tensor, steps: int) -> torch.Tensor:
    """NVIDIA's sampling loop, at exact times: the scheduler rounds its own to half precision (966.5 for 966.67)."""
    scheduler = RFlowScheduler(num_train_timesteps=1000, use_discrete_timesteps=False)
    scheduler.set_timesteps(steps)
    exact = 1000 * torch.linspace(1, 0, steps + 1)[:-1]
    assert (scheduler.timesteps - exact).abs().max() < 1
    for t in exact:
        spacing = 100 * torch.tensor([SPACING]).expand(len(z), -1)
        z, _ = scheduler.step(theirs(z, t.expand(len(z)), class_labels=codes, spacing_tensor=spacing), t, z)
    return z


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 5, 30])
@pytest.mark.parametrize("conditioning", ["t", "t+h"])
def test_monais_scheduler_and_our_euler_sample_the_same(steps, conditioning, theirs, file):
    eps, codes = torch.randn(3, *SHAPE), torch.tensor([CODES["T1"], CODES["FLAIR"], 0])
    network = ours(file, target(conditioning=conditioning)).float()
    label = Condition(torch.tensor([CODES["T1"] - 1, CODES["FLAIR"] - 1, 127]))
    found = euler(lambda z, r, t: network(z, r, t, label), eps, time_grid(steps))
    expected = sampled_by_monai(theirs, eps, codes, steps)
    assert (found - expected).norm() < 1e-4 * expected.norm()
    assert (expected - eps).norm() > 0.1 * eps.norm()


@torch.no_grad()
@pytest.mark.parametrize("conditioning", ["t+h", "r+t"])
def test_a_second_time_leaves_it_as_it_is_for_every_r(conditioning, theirs, file, exact_sinusoid):
    z, t = torch.randn(2, *SHAPE, dtype=torch.float64), torch.tensor([0.2, 0.8], dtype=torch.float64)
    network = ours(file, target(conditioning=conditioning, v_head_blocks=1, guidance=True))
    expected = velocity(theirs, z, t, torch.tensor([0, 0]))
    torch.testing.assert_close(network(z, t / 3, t), expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_our_classes_are_the_contrasts_they_name(theirs, file, exact_sinusoid):
    z, t = torch.randn(3, *SHAPE, dtype=torch.float64), torch.full((3,), 0.5, dtype=torch.float64)
    network = ours(file, target(), [CODES["FLAIR"], CODES["T1"]])
    found = network(z, t, t, Condition(torch.tensor([0, 1, 2])))
    expected = velocity(theirs, z, t, torch.tensor([CODES["FLAIR"], CODES["T1"], 0]))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_one_contrast_needs_no_classes(theirs, file, exact_sinusoid):
    z, t = torch.randn(2, *SHAPE, dtype=torch.float64), torch.tensor([0.2, 0.8], dtype=torch.float64)
    network = ours(file, target(classes=False), CODES["T2"])
    expected = velocity(theirs, z, t, torch.full((2,), CODES["T2"]))
    torch.testing.assert_close(network(z, t, t), expected, rtol=1e-6, atol=1e-6)  # added in float32


def test_the_published_file_has_the_published_tensors():
    settings = {**pretrained.ARCHITECTURE, "classes": True, "spacing_mm": SPACING}
    with torch.device("meta"):
        network = build_network(settings, (4, 8, 8, 8), 127)
    assert len(network.state_dict()) == 435


def test_the_scale_factor_is_read(file):
    assert load_rectified_flow(file).scale_factor == pytest.approx(0.96968)


# --- files and settings that do not fit -------------------------------------------------------------------------


def test_another_time_scale_and_size_are_refused_together(file):
    wrong = target(t_scale=1.0, res_blocks=2)
    network = build_network(wrong, SHAPE, 127)
    with pytest.raises(UserError, match=r"res_blocks: 1 there, 2 here\n  t_scale: 1000\.0 there, 1\.0 here"):
        convert(load_rectified_flow(file).state, rectified_flow_settings(wrong), network, wrong)


def test_every_difference_of_the_tensors_is_listed(file, theirs):
    content = torch.load(file, weights_only=True)
    state = content["unet_state_dict"]
    del state["conv_in.conv.bias"]
    state["top_region_index_layer.0.weight"] = torch.zeros(1)
    torch.save(content, file)
    with pytest.raises(UserError) as caught:
        ours(file, target())
    assert "missing (1): net.conv_in.conv.bias" in caught.value.message
    assert "not known (1): net.top_region_index_layer.0.weight" in caught.value.message


def test_a_network_without_spacing_is_told_what_to_set():
    with pytest.raises(UserError, match=r"network\.spacing_mm"):
        rectified_flow_settings(target(spacing_mm=None))


def test_a_contrast_the_file_does_not_have_is_refused_with_some_it_has(file):
    with pytest.raises(UserError, match=r"0 to 127, not \[128\]\namong them: mri 8, T1 9"):
        load_rectified_flow(file, [9, 128])


def test_files_that_are_no_rectified_flow_are_refused(file, tmp_path):
    (tmp_path / "broken.pt").write_bytes(b"not weights")
    with pytest.raises(UserError, match="cannot be read as weights"):
        load_rectified_flow(tmp_path / "broken.pt")
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="lacks 'unet_state_dict' or 'scale_factor'"):
        load_rectified_flow(tmp_path / "other.pt")
    content = torch.load(file, weights_only=True)
    del content["unet_state_dict"]["class_embedding.weight"]
    torch.save(content, tmp_path / "ddpm.pt")
    with pytest.raises(UserError, match="without contrasts"):
        load_rectified_flow(tmp_path / "ddpm.pt")
    with pytest.raises(UserError, match="does not exist"):
        load_rectified_flow(tmp_path / "absent.pt")


def test_no_code_is_unpickled(tmp_path):
    class Payload:
        def __reduce__(self):
            return print, ("ran",)

    torch.save({"unet_state_dict": {}, "scale_factor": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="cannot be read as weights"):
        load_rectified_flow(tmp_path / "evil.pt")
