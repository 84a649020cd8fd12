"""Autoencoders behind one interface: volumes (B, 1, I, J, K) to latents (B, C, I/f, J/f, K/f) and back.

`builtin` and `maisi` are KL autoencoders (learned, lossy), `haar` and `identity` are exact. All are frozen: no
gradients, evaluation mode. The volume's grey values are 0 at its minimum and 1 at its 99.5th percentile.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from neuromf.devices import free_memory
from neuromf.errors import UserError, did_you_mean
from neuromf.files import sha256_file, sha256_text
from neuromf.models.haar import haar_forward, haar_inverse
from neuromf.models.kl_network import MAISI, build_kl_network, posterior
from neuromf.models.kl_weights import read_weights
from neuromf.models.slabs import FEATURE_MAPS, Slabs, out_of_memory
from neuromf.models.state import refuse_differences
from neuromf.weights import find, locate, recognise

FOREIGN = ("maisi", "maisi-v2", "maisi-bundle")
"""Published autoencoders of one architecture, by their names in the weights catalogue; their latents do not mix."""
AUTOENCODERS = ("builtin", "identity", "haar", "haar2", *FOREIGN)
BUILTIN_WEIGHTS = Path(__file__).parent.parent / "assets" / "autoencoder_builtin.safetensors"
BUILTIN_LICENCE = "Apache-2.0"

_EXACT_LOG_SIGMA = -15.0  # where MAISI's own clamp ends: no noise at all
_CHUNK_VOXELS = 2**21  # volumes encoded at once, in voxels: eight of 64^3

T = TypeVar("T")


class Posterior(NamedTuple):
    """The latent distribution of a volume: mean and log standard deviation, (B, C, I/f, J/f, K/f) each."""

    mean: Tensor
    log_sigma: Tensor


class Autoencoder(ABC):
    """Encode volumes to latents and decode latents to volumes; nothing here is trained.

    Attributes:
        name: kind, as given to `load_autoencoder`.
        sha256: of the weights file, or of the definition if there is none; travels with every latent.
        latent_channels: C.
        factor: f, how many times coarser the latent grid is, per axis.
        device: where encode and decode run and leave their results.
        licence: of the weights, which travels with what they decode; None where there are none, or they are the user's.
    """

    def __init__(
        self,
        name: str,
        sha256: str,
        latent_channels: int,
        factor: int,
        device: torch.device | str = "cpu",
        licence: str | None = None,
    ) -> None:
        self.name = name
        self.sha256 = sha256
        self.latent_channels = latent_channels
        self.factor = factor
        self.device = torch.device(device)
        self.licence = licence

    def __repr__(self) -> str:
        return f"Autoencoder({self.name!r}, {self.latent_channels} channels, 1/{self.factor}, {self.sha256[:12]})"

    def check_size(self, size: Sequence[int]) -> None:
        """Refuse a volume size (I, J, K) that cannot be encoded without cropping.

        Raises:
            UserError: not three axes, or not multiples of `factor`; the hint names the nearest sizes.
        """
        if len(size) != 3:
            raise UserError(f"a volume has three axes, got {tuple(size)}", "give one 3-D volume per subject")
        f = self.factor
        if all(n > 0 and n % f == 0 for n in size):
            return
        smaller = tuple(max(n // f, 1) * f for n in size)
        larger = tuple(max(-(-n // f), 1) * f for n in size)
        nearest = _by(larger) if smaller == larger else f"{_by(smaller)} (crop) or {_by(larger)} (pad)"
        raise UserError(
            f"autoencoder '{self.name}' cannot take volumes of {_by(size)}: the axes must be multiples of {f}",
            f"nearest sizes: {nearest}",
        )

    def latent_shape(self, size: Sequence[int]) -> tuple[int, int, int, int]:
        """Latent shape (C, I/f, J/f, K/f) of a volume size (I, J, K); checks the size."""
        self.check_size(size)
        i, j, k = (n // self.factor for n in size)
        return self.latent_channels, i, j, k

    @torch.inference_mode()
    def encode(self, volume: Tensor) -> Posterior:
        """Encode volumes (B, 1, I, J, K) to float32 mean and log sigma, (B, C, I/f, J/f, K/f) each.

        Raises:
            UserError: a size that cannot be encoded (`check_size`).
        """
        assert volume.ndim == 5, f"volumes are (B, 1, I, J, K), got {tuple(volume.shape)}"
        assert volume.shape[1] == 1, f"volumes have one channel, got {volume.shape[1]}"
        expected = (len(volume), *self.latent_shape(volume.shape[2:]))
        step = _chunk(volume[0, 0].numel())
        parts = [self._encode(v.float()) for v in volume.split(step)]
        mean, log_sigma = (torch.cat(part).to(self.device, torch.float32) for part in zip(*parts, strict=True))
        assert mean.shape == log_sigma.shape == expected, f"latents {tuple(mean.shape)}, expected {expected}"
        return Posterior(mean, log_sigma)

    @torch.inference_mode()
    def decode(self, latent: Tensor) -> Tensor:
        """Decode latents (B, C, i, j, k), not whitened, to float32 volumes (B, 1, f i, f j, f k).

        Raises:
            UserError: another number of channels: the latents are of another autoencoder.
        """
        assert latent.ndim == 5, f"latents are (B, C, i, j, k), got {tuple(latent.shape)}"
        if latent.shape[1] != self.latent_channels:
            raise UserError(
                f"latents of {latent.shape[1]} channels; autoencoder '{self.name}' has {self.latent_channels}",
                "decode with the autoencoder that encoded them (its name is in dataset.json)",
            )
        size = tuple(n * self.factor for n in latent.shape[2:])
        self.check_size(size)
        step = _chunk(size[0] * size[1] * size[2])
        volume = torch.cat([self._decode(z.float()) for z in latent.split(step)]).to(self.device, torch.float32)
        assert volume.shape == (len(latent), 1, *size), f"decoded {tuple(volume.shape)}, expected {size}"
        return volume

    def reconstruct(self, volume: Tensor) -> Tensor:
        """Decode the mean of the encoded volumes: (B, 1, I, J, K) -> (B, 1, I, J, K)."""
        return self.decode(self.encode(volume).mean)

    @abstractmethod
    def _encode(self, volume: Tensor) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def _decode(self, latent: Tensor) -> Tensor: ...


class HaarAutoencoder(Autoencoder):
    """`levels` steps of the orthonormal Haar wavelet (`haar`, `haar2`); none is the `identity` in pixel space."""

    def __init__(self, name: str, levels: int, device: torch.device | str = "cpu") -> None:
        digest = sha256_text(f"orthonormal 3-D Haar wavelet packet, {levels} levels, order LLL..HHH per level")
        super().__init__(name, digest, 8**levels, 2**levels, device)
        self.levels = levels

    def _encode(self, volume: Tensor) -> tuple[Tensor, Tensor]:
        bands = haar_forward(volume.to(self.device), self.levels)
        return bands, torch.full_like(bands, _EXACT_LOG_SIGMA)

    def _decode(self, latent: Tensor) -> Tensor:
        return haar_inverse(latent.to(self.device), self.levels)


class KLAutoencoder(Autoencoder):
    """A KL autoencoder from a weights file (`builtin`, `maisi`, or a file of the user's).

    Args:
        name: what to call it in messages and records.
        path: `.safetensors` or `.pt` (see `kl_weights.read_weights`).
        dtype: of the convolutions; None chooses bfloat16 on CUDA devices that have it, else float32.
        memory: bytes it may take on the device; None looks at what is free. Volumes that need more are computed in
            slabs, with the same result.
        sha256: of the file; None computes it.
        licence: of the weights.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        *,
        sha256: str | None = None,
        licence: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        memory: int | None = None,
    ) -> None:
        device = torch.device(device)
        weights = read_weights(path)
        architecture = weights.architecture or MAISI
        network = build_kl_network(architecture)
        refuse_differences(
            f"{path} is no weights file of this autoencoder",
            weights.tensors,
            network.state_dict(),
            "give the file of the right autoencoder (for MAISI: `neuromf weights path maisi`)",
        )
        network.load_state_dict(weights.tensors)
        digest = sha256 or sha256_file(path)
        super().__init__(name, digest, architecture.latent_channels, architecture.factor, device, licence)
        self.architecture = architecture
        self.network = network.requires_grad_(False).eval().to(device)
        self.dtype = dtype or _best_dtype(device)
        self.memory = memory

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _encode(self, volume: Tensor) -> tuple[Tensor, Tensor]:
        return self._at_once(
            volume[:, 0].numel(),
            lambda: posterior(self.network, volume.to(self.device)),
            lambda slabs: slabs.encode(volume.cpu()),
        )

    def _decode(self, latent: Tensor) -> Tensor:
        return self._at_once(
            latent[:, 0].numel() * self.factor**3,
            lambda: self.network.decode(latent.to(self.device)),
            lambda slabs: slabs.decode(latent.cpu()),
        )

    def _at_once(self, voxels: int, whole: Callable[[], T], slab_by_slab: Callable[[Slabs], T]) -> T:
        """The whole network's result where it fits, else that of slabs; also where it was thought to fit."""
        if self._fits(voxels):
            try:
                with self._autocast():
                    return whole()
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return slab_by_slab(self._slabs())

    def _fits(self, voxels: int) -> bool:
        """Whether the whole network can look at so many voxels at once."""
        needed = 4 * voxels * self.architecture.channels[0] * FEATURE_MAPS
        return needed <= self._allowed()

    def _slabs(self) -> Slabs:
        return Slabs(self.network, self.device, self._allowed() // 2, self.dtype)

    def _allowed(self) -> int:
        return int(0.8 * free_memory(self.device)) if self.memory is None else self.memory

    def decode_with_gradient(self, latent: Tensor) -> Tensor:
        """As `decode` in float32, at once and with gradients to the latent: (B, C, i, j, k) -> (B, 1, I, J, K)."""
        return self.network.decode(latent)

    def encoder_features(self, volume: Tensor) -> list[Tensor]:
        """What each block of the encoder makes of volumes (B, 1, I, J, K), with gradients to them."""
        encoder: Any = self.network.encoder
        found = [volume]
        for block in encoder.blocks:
            found.append(block(found[-1]))
        return found[1:]


def load_autoencoder(
    name_or_path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    weights: str | Path | None = None,
    memory: int | None = None,
) -> Autoencoder:
    """Load an autoencoder by name or from a weights file.

    Args:
        name_or_path: "builtin", "identity", "haar" (factor 2, 8 channels), "haar2" (factor 4, 64 channels),
            one of `FOREIGN` (from the weights folder), or the path of a `.pt` or `.safetensors` file.
        device: where it runs.
        dtype: of the convolutions; None: bfloat16 on CUDA devices that have it, else float32.
        weights: file for "builtin" or one of `FOREIGN` instead of the default one.
        memory: bytes a learned one may take there; None looks at what is free.

    Raises:
        UserError: unknown name, absent file, or a file that does not fit.

    Example:
        >>> load_autoencoder("haar").latent_shape((64, 64, 64))
        (8, 32, 32, 32)
    """
    exact = {"identity": 0, "haar": 1, "haar2": 2}
    name = str(name_or_path)
    if name in exact:
        return HaarAutoencoder(name, exact[name], device)
    how: dict[str, Any] = {"device": device, "dtype": dtype, "memory": memory}
    if name in FOREIGN and weights is None:
        found = locate(name)
        return KLAutoencoder(name, found.path, sha256=found.sha256, licence=str(found.licence), **how)
    if name in ("builtin", *FOREIGN):
        path = Path(weights or BUILTIN_WEIGHTS)
    elif Path(name).suffix in (".pt", ".safetensors"):
        path, name = Path(name), Path(name).stem
    else:
        raise UserError(
            f"no autoencoder '{name}'", did_you_mean(name, AUTOENCODERS) + ", or the path of a .pt or .safetensors file"
        )
    autoencoder = KLAutoencoder(name, path, **how)
    autoencoder.licence = _licence(name, path, autoencoder.sha256)
    return autoencoder


def _licence(name: str, path: Path, sha256: str) -> str | None:
    """The licence of a file that was given by its path, as far as it is known whose it is."""
    if path == BUILTIN_WEIGHTS:
        return BUILTIN_LICENCE
    entry = recognise(path, sha256) or (find(name) if name in FOREIGN else None)
    return str(entry.licence) if entry else None


def _best_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def _chunk(voxels: int) -> int:
    return max(1, _CHUNK_VOXELS // voxels)


def _by(size: Sequence[int]) -> str:
    return " x ".join(str(n) for n in size)
