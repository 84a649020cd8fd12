from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from neuromf.errors import UserError
from neuromf.files import sha256_file
from neuromf.models import autoencoder as module
from neuromf.models.autoencoder import BUILTIN_WEIGHTS, KLAutoencoder, load_autoencoder
from neuromf.models.kl_network import (
    MAISI,
    KLArchitecture,
    build_kl_network,
    parameter_count,
    posterior,
)
from neuromf.models.kl_weights import read_weights, write_weights

TINY = KLArchitecture(latent_channels=3, channels=(4, 8, 8), res_blocks=(1, 1, 1), norm_groups=2)


def volumes(n: int = 2, size: tuple[int, int, int] = (8, 16, 12)) -> torch.Tensor:
    return torch.rand(n, 1, *size, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def tiny(tmp_path: Path) -> KLAutoencoder:
    torch.manual_seed(0)
    path = tmp_path / "tiny.safetensors"
    write_weights(path, build_kl_network(TINY).state_dict(), TINY)
    loaded = load_autoencoder(path)
    assert isinstance(loaded, KLAutoencoder)
    return loaded


@pytest.fixture(scope="module")
def maisi_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return build_kl_network(MAISI).state_dict()


@pytest.mark.parametrize(
    ("name", "channels", "factor"), [("identity", 1, 1), ("haar", 8, 2), ("haar2", 64, 4), ("builtin", 8, 4)]
)
def test_shapes_follow_channels_and_factor(name: str, channels: int, factor: int) -> None:
    autoencoder = load_autoencoder(name)
    assert (autoencoder.latent_channels, autoencoder.factor, autoencoder.name) == (channels, factor, name)
    x = volumes()
    mean, log_sigma = autoencoder.encode(x)
    assert mean.shape == log_sigma.shape == (2, channels, 8 // factor, 16 // factor, 12 // factor)
    assert autoencoder.latent_shape((8, 16, 12)) == mean.shape[1:]
    assert autoencoder.decode(mean).shape == x.shape
    assert mean.dtype == log_sigma.dtype == torch.float32


@pytest.mark.parametrize("name", ["identity", "haar", "haar2"])
def test_wavelets_reconstruct_exactly(name: str) -> None:
    x = volumes()
    torch.testing.assert_close(load_autoencoder(name).reconstruct(x), x, atol=1e-5, rtol=1e-5)


def test_every_autoencoder_has_its_own_hash() -> None:
    names = ("identity", "haar", "haar2", "builtin")
    hashes = {load_autoencoder(name).sha256 for name in names}
    assert len(hashes) == len(names)
    assert all(len(digest) == 64 for digest in hashes)
    assert load_autoencoder("builtin").sha256 == sha256_file(BUILTIN_WEIGHTS)


def test_builtin_weights_fit_the_wheel() -> None:
    assert BUILTIN_WEIGHTS.stat().st_size <= 6_000_000


def test_size_rule_names_the_nearest_sizes() -> None:
    autoencoder = load_autoencoder("haar2")
    autoencoder.check_size((48, 64, 48))
    with pytest.raises(UserError, match=r"50 x 64 x 46.*multiples of 4") as error:
        autoencoder.encode(volumes(1, (50, 64, 46)))
    assert error.value.hint == "nearest sizes: 48 x 64 x 44 (crop) or 52 x 64 x 48 (pad)"
    with pytest.raises(UserError, match="three axes"):
        autoencoder.check_size((48, 48))


def test_a_volume_too_large_for_the_memory_is_computed_in_slabs(tiny: KLAutoencoder, tmp_path: Path) -> None:
    small = load_autoencoder(tmp_path / "tiny.safetensors", memory=100_000)
    assert isinstance(small, KLAutoencoder)
    x = volumes(1, (8, 32, 8))
    assert tiny._fits(x.numel())
    assert not small._fits(x.numel())
    torch.testing.assert_close(small.encode(x).log_sigma, tiny.encode(x).log_sigma, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(small.reconstruct(x), tiny.reconstruct(x), atol=1e-5, rtol=1e-4)


def test_a_volume_that_does_not_fit_although_it_should_is_computed_in_slabs(
    tiny: KLAutoencoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Free memory is a guess: others may take it in the meantime."""
    x = volumes(1, (8, 32, 8))
    expected = tiny.encode(x).mean
    restored = tiny.decode(expected)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(module, "posterior", full)
    monkeypatch.setattr(tiny.network, "decode", full)
    torch.testing.assert_close(tiny.encode(x).mean, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(tiny.decode(expected), restored, atol=1e-5, rtol=1e-4)

    def broken(*_: object) -> None:
        raise RuntimeError("size mismatch")

    monkeypatch.setattr(module, "posterior", broken)
    with pytest.raises(RuntimeError, match="size mismatch"):
        tiny.encode(x)


def test_a_batch_in_chunks_equals_one_by_one(tiny: KLAutoencoder, monkeypatch: pytest.MonkeyPatch) -> None:
    x = volumes(3)
    whole = tiny.encode(x)
    monkeypatch.setattr(module, "_CHUNK_VOXELS", 1)
    chunked = tiny.encode(x)
    torch.testing.assert_close(chunked.mean, whole.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tiny.decode(whole.mean), tiny.reconstruct(x), atol=1e-5, rtol=1e-5)


def test_nothing_is_trained(tiny: KLAutoencoder) -> None:
    x = volumes(1).requires_grad_()
    assert not tiny.reconstruct(x).requires_grad
    assert not tiny.network.training
    assert not any(p.requires_grad for p in tiny.network.parameters())


def test_latents_of_another_autoencoder_are_refused(tiny: KLAutoencoder) -> None:
    with pytest.raises(UserError, match="latents of 8 channels; autoencoder 'tiny' has 3"):
        tiny.decode(torch.zeros(1, 8, 2, 2, 2))


def test_weights_survive_the_file_to_half_precision(tmp_path: Path) -> None:
    torch.manual_seed(2)
    state = build_kl_network(TINY).state_dict()
    write_weights(tmp_path / "w.safetensors", state, TINY)
    tensors, architecture = read_weights(tmp_path / "w.safetensors")
    assert architecture == TINY
    for name, value in state.items():
        assert tensors[name].dtype == torch.float32
        torch.testing.assert_close(tensors[name], value, atol=1e-6, rtol=1e-3)


def test_fast_norm_equals_monai_norm() -> None:
    from monai.apps.generation.maisi.networks.autoencoderkl_maisi import MaisiGroupNorm3D

    torch.manual_seed(3)
    slow = MaisiGroupNorm3D(4, 8, eps=1e-6)
    fast = nn.GroupNorm(4, 8, eps=1e-6)
    for norm in (slow, fast):
        nn.init.constant_(norm.weight, 1.7)
        nn.init.constant_(norm.bias, -0.3)
    x = torch.randn(2, 8, 4, 5, 6) * 3 + 1
    torch.testing.assert_close(fast(x), slow(x), atol=1e-5, rtol=1e-5)


def test_log_sigma_is_the_logarithm_of_monai_sigma() -> None:
    torch.manual_seed(4)
    network = build_kl_network(TINY).eval()
    with torch.no_grad():
        mean, log_sigma = posterior(network, volumes())
        monai_mean, monai_sigma = network.encode(volumes())
    torch.testing.assert_close(mean, monai_mean)
    torch.testing.assert_close(log_sigma.exp(), monai_sigma)


def test_published_network_has_its_published_size(maisi_state: dict[str, torch.Tensor]) -> None:
    network = build_kl_network(MAISI)
    assert round(parameter_count(network) / 1e6, 2) == 20.94
    assert len(maisi_state) == 130
    assert "encoder.blocks.1.conv1.conv.conv.weight" in maisi_state
    assert "quant_conv_log_sigma.conv.weight" in maisi_state


@pytest.mark.parametrize("layout", ["plain.pt", "wrapped.pt", "plain.safetensors"])
def test_maisi_loads_every_published_layout(layout: str, maisi_state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / layout
    if path.suffix == ".safetensors":
        save_file(maisi_state, path)
    else:
        wrapped = {"epoch": 1, "unet_state_dict": maisi_state}
        torch.save(wrapped if layout == "wrapped.pt" else maisi_state, path)
    autoencoder = load_autoencoder("maisi", weights=path)
    assert (autoencoder.latent_channels, autoencoder.factor) == (4, 4)
    assert autoencoder.sha256 == sha256_file(path)
    assert autoencoder.reconstruct(volumes(1, (16, 12, 16))).shape == (1, 1, 16, 12, 16)


def test_maisi_is_found_in_the_weights_folder(
    maisi_state: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(maisi_state, tmp_path / "autoencoder_v1.pt")
    torch.save({"unet_state_dict": maisi_state, "epoch": 1}, tmp_path / "autoencoder_v2.pt")
    monkeypatch.setenv("NEUROMF_WEIGHTS", str(tmp_path))
    first, second = load_autoencoder("maisi"), load_autoencoder("maisi-v2")
    assert (first.name, second.name) == ("maisi", "maisi-v2")
    assert first.sha256 == sha256_file(tmp_path / "autoencoder_v1.pt") != second.sha256
    assert str(first.licence).startswith("NVIDIA Open Model License")
    assert "non-commercial use only" in str(second.licence)


def test_another_file_under_the_name_of_known_weights_is_refused(
    maisi_state: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEUROMF_WEIGHTS", str(tmp_path))
    torch.save(maisi_state, tmp_path / "autoencoder_v1.pt")
    load_autoencoder("maisi")
    torch.save({"unet_state_dict": maisi_state}, tmp_path / "autoencoder_v1.pt")
    with pytest.raises(UserError, match="not what the weights 'maisi' were at their first use"):
        load_autoencoder("maisi")


def test_the_licence_of_a_file_given_by_path_is_that_of_the_file(
    maisi_state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    for name in ("autoencoder_v2.pt", "mine.pt"):
        torch.save(maisi_state, tmp_path / name)
    assert "non-commercial" in str(load_autoencoder("maisi", weights=tmp_path / "autoencoder_v2.pt").licence)
    assert "non-commercial" in str(load_autoencoder(tmp_path / "autoencoder_v2.pt").licence)
    assert "NVIDIA Open Model License" in str(load_autoencoder("maisi", weights=tmp_path / "mine.pt").licence)
    assert load_autoencoder(tmp_path / "mine.pt").licence is None
    assert load_autoencoder("builtin").licence == "Apache-2.0"


@pytest.mark.parametrize("layout", ["plain", "wrapped"])
def test_weights_of_monai_s_own_class_give_monai_s_own_results(layout: str, tmp_path: Path) -> None:
    from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi

    torch.manual_seed(6)
    # NVIDIA's config_network_rflow.json, but for norm_float16, which fails on CPUs and has the same weights.
    theirs = AutoencoderKlMaisi(
        spatial_dims=3, in_channels=1, out_channels=1, latent_channels=4, num_channels=[64, 128, 256],
        num_res_blocks=[2, 2, 2], norm_num_groups=32, norm_eps=1e-6, attention_levels=[False] * 3,
        with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False, use_checkpointing=False,
        use_convtranspose=False, norm_float16=False, num_splits=1, dim_split=1,
    ).eval()  # fmt: skip
    state = theirs.state_dict()
    torch.save(state if layout == "plain" else {"epoch": 3, "unet_state_dict": state}, tmp_path / "autoencoder_v1.pt")
    ours = load_autoencoder("maisi", weights=tmp_path / "autoencoder_v1.pt")
    x = volumes(1, (16, 16, 16))
    with torch.no_grad():
        mean, sigma = theirs.encode(x)
        decoded = theirs.decode(mean)
    found = ours.encode(x)
    torch.testing.assert_close(found.mean, mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.log_sigma.exp(), sigma, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.decode(mean), decoded, atol=1e-5, rtol=1e-4)


def test_a_u_net_s_file_is_called_one(maisi_state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    content = {"unet_state_dict": maisi_state, "scale_factor": torch.tensor(0.97), "num_train_timesteps": 1000}
    torch.save(content, tmp_path / "diff_unet_3d_rflow-mr.pt")
    with pytest.raises(UserError, match="is a rectified-flow U-Net, not an autoencoder") as error:
        load_autoencoder("maisi", weights=tmp_path / "diff_unet_3d_rflow-mr.pt")
    assert "training.init_from" in error.value.hint


def test_every_difference_of_a_weights_file_is_listed(maisi_state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    wrong = dict(maisi_state)
    del wrong["encoder.blocks.0.conv.conv.bias"]
    wrong["extra.weight"] = torch.zeros(1)
    wrong["post_quant_conv.conv.bias"] = torch.zeros(5)
    path = tmp_path / "wrong.pt"
    torch.save(wrong, path)
    with pytest.raises(UserError) as error:
        load_autoencoder("maisi", weights=path)
    message = error.value.message
    assert "missing (1): encoder.blocks.0.conv.conv.bias" in message
    assert "not known (1): extra.weight" in message
    assert "other shape (1): post_quant_conv.conv.bias (5,) instead of (4,)" in message


def test_maisi_without_weights_says_what_to_get_and_where_to_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEUROMF_WEIGHTS", str(tmp_path))
    with pytest.raises(UserError, match=r"autoencoder_v1\.pt does not exist") as error:
        load_autoencoder("maisi")
    assert error.value.hint.startswith("neuromf weights fetch maisi (NVIDIA Open Model License)")
    assert f"put it at {tmp_path / 'autoencoder_v1.pt'}" in error.value.hint


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    for name in ("broken.pt", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"not weights")
        with pytest.raises(UserError, match="cannot be read as weights"):
            load_autoencoder(tmp_path / name)
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="no state dict"):
        load_autoencoder(tmp_path / "other.pt")
    with pytest.raises(UserError, match="do not exist"):
        load_autoencoder(tmp_path / "absent.pt")


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UserError) as error:
        load_autoencoder("buildin")
    assert "did you mean 'builtin'?" in error.value.hint
