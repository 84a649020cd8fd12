"""The transformer of improved MeanFlow (Geng 2025b, arXiv 2512.02012) on three axes.

Blocks of p^3 cells are the tokens of a volume; times and conditions are tokens before them, and nothing modulates
the norms. Positions enter by rotation alone: scores between two blocks of cells see their offset, scores against
the tokens of the conditions, which are not rotated, see the place itself.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neuromf.conditions import Condition
from neuromf.errors import UserError
from neuromf.models.unet import sinusoid

SIZES = {
    "B": {"depth": 12, "width": 768, "heads": 12},
    "M": {"depth": 24, "width": 768, "heads": 12},
    "L": {"depth": 32, "width": 1024, "heads": 16},
    "XL": {"depth": 48, "width": 1024, "heads": 16},
}
"""The published sizes."""

TOKENS = {"h": 4, "t": 4, "omega": 4, "low": 2, "high": 2, "label": 8}
"""How many tokens carry each condition, in the order they stand in."""

FREQUENCIES = 256
"""Length of the sinusoidal embedding of one number."""

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines, (N, head width / 2), of the angles each token's queries and keys are turned by."""


def swiglu_width(width: int) -> int:
    """8/3 of the width, so that three matrices weigh as much as the usual two, up to a multiple of 64 (narrow: 8)."""
    multiple = 64 if width >= 192 else 8
    return -(-8 * width // (3 * multiple)) * multiple


def check_token_grid(grid: Sequence[int], patch: int, factor: int = 4) -> None:
    """Refuse latents that do not divide into blocks of patch^3 cells.

    Args:
        grid: latent I, J, K.
        patch: cells per axis of a block.
        factor: voxels per latent cell along an axis.

    Raises:
        UserError: naming the nearest sizes, in latent cells and in voxels, and a patch that fits.
    """
    if all(n % patch == 0 and n > 0 for n in grid):
        return
    below = tuple(max(n // patch * patch, patch) for n in grid)
    above = tuple(-(-n // patch) * patch for n in grid)
    fits = max(p for p in range(1, patch + 1) if all(n % p == 0 for n in grid))
    raise UserError(
        f"latents of {tuple(grid)} do not divide into blocks of {patch} cells: each axis must be a multiple of {patch}",
        f"nearest latent sizes: {below} or {above}, volumes of {tuple(n * factor for n in below)} or "
        f"{tuple(n * factor for n in above)}; encode again with --size, or set network.patch={fits}",
    )


def to_tokens(z: Tensor, patch: int) -> Tensor:
    """(B, C, I, J, K) -> (B, N, C p^3), blocks in the order of I, J, K."""
    b, c, *grid = z.shape
    i, j, k = (n // patch for n in grid)
    blocks = z.reshape(b, c, i, patch, j, patch, k, patch).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return blocks.reshape(b, i * j * k, c * patch**3)


def from_tokens(tokens: Tensor, patch: int, grid: Sequence[int]) -> Tensor:
    """(B, N, C p^3) -> (B, C, I, J, K): the inverse of `to_tokens`."""
    b, _, features = tokens.shape
    i, j, k = (n // patch for n in grid)
    blocks = tokens.reshape(b, i, j, k, features // patch**3, patch, patch, patch)
    return blocks.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(b, -1, *grid)


def rotation_angles(
    blocks: Sequence[int], head_width: int, *, dtype: torch.dtype, device: torch.device | None = None
) -> Tensor:
    """Angles of rotary position embedding over three axes (Su 2021, axial): position x 10,000^(-2k / d) per axis.

    A third of the head, d = 2 floor(head_width / 6) channels, belongs to each axis; what is left is not rotated.

    Args:
        blocks: tokens along I, J, K.
        head_width: channels of a head.
        dtype: of the answer.
        device: likewise.

    Returns:
        (N, head_width / 2).
    """
    pairs = head_width // 6
    frequencies = torch.exp(-math.log(10_000.0) * torch.arange(pairs, dtype=dtype, device=device) / pairs)
    places = torch.meshgrid(*(torch.arange(n, dtype=dtype, device=device) for n in blocks), indexing="ij")
    angles = torch.cat([place.flatten()[:, None] * frequencies for place in places], dim=-1)
    return F.pad(angles, (0, head_width // 2 - 3 * pairs))


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn the pairs (x_c, x_{c + d/2}), d the head's width, by each token's angles: (..., N, d) -> the same shape."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class _RMSNorm(nn.RMSNorm):
    """x / rms(x) x weight, in the precision of the weight whatever autocast hands over."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class _Attention(nn.Module):
    """Self-attention whose queries and keys are normed, then rotated."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.norm_q, self.norm_k = _RMSNorm(width // heads), _RMSNorm(width // heads)
        self.to_out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        b, n, width = x.shape
        q, k, v = self.to_qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each (B, heads, N, d)
        q, k = rotate(self.norm_q(q), rotation).to(v.dtype), rotate(self.norm_k(k), rotation).to(v.dtype)
        answer = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(answer.transpose(1, 2).reshape(b, n, width))


class _SwiGLU(nn.Module):
    """(SiLU(x W_1) * x W_2) W_3 (Shazeer 2020)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = swiglu_width(width)
        self.inner = nn.Linear(width, 2 * hidden, bias=False)
        self.outer = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.inner(x).chunk(2, dim=-1)
        return self.outer(F.silu(gate) * value)


class _Block(nn.Module):
    """Attention, then SwiGLU, each x + gate * branch(norm(x)) with a gate per channel that starts at zero."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_attention, self.attention = _RMSNorm(width), _Attention(width, heads)
        self.gate_attention = nn.Parameter(torch.zeros(width))
        self.norm_mlp, self.mlp = _RMSNorm(width), _SwiGLU(width)
        self.gate_mlp = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        x = x + self.gate_attention * self.attention(self.norm_attention(x), rotation)
        return x + self.gate_mlp * self.mlp(self.norm_mlp(x))


class _LastLayer(nn.Module):
    """Norm and linear layer from tokens to cells; starts at zero."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.norm, self.linear = _RMSNorm(width), nn.Linear(width, features)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


class _NumberEmbedding(nn.Module):
    """A real number (B,) as a vector (B, width): sinusoids, then two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(FREQUENCIES, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(F.silu(self.inner(sinusoid(x, FREQUENCIES).to(self.inner.weight.dtype))))


class _TokenGroup(nn.Module):
    """The tokens of one condition: its embedding, plus a learned vector that tells the tokens apart."""

    def __init__(self, embed: nn.Module, count: int, width: int) -> None:
        super().__init__()
        self.embed = embed
        self.places = nn.Parameter(0.02 * torch.randn(count, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x)[:, None] + self.places


class _Conditioning(nn.Module):
    """Times and conditions as tokens, `TOKENS` of them for each."""

    def __init__(self, width: int, *, time_token: bool, classes: int, guidance: bool) -> None:
        super().__init__()
        self.classes = classes
        names = ["h"] + (["t"] if time_token else []) + (["omega", "low", "high"] if guidance else [])
        embeddings: dict[str, nn.Module] = {name: _NumberEmbedding(width) for name in names}
        if classes:
            embeddings["label"] = nn.Embedding(classes + 1, width)  # the last is "no class"
        self.groups = nn.ModuleDict(
            {name: _TokenGroup(embed, TOKENS[name], width) for name, embed in embeddings.items()}
        )

    def forward(self, r: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
        """(B,), (B,) -> (B, tokens, width)."""
        label, omega, interval = condition or Condition()
        values = {"h": t - r, "t": t}
        values["omega"] = torch.zeros_like(t) if omega is None else 1 - 1 / omega.to(t.dtype)
        values["low"] = torch.zeros_like(t) if interval is None else interval[:, 0].to(t.dtype)
        values["high"] = torch.ones_like(t) if interval is None else interval[:, 1].to(t.dtype)
        values["label"] = torch.full_like(t, self.classes, dtype=torch.long) if label is None else label
        return torch.cat([group(values[name]) for name, group in self.groups.items()], dim=1)


class MeanFlowTransformer(nn.Module):
    """u(z, r, t) or x_hat(z, r, t) by a transformer, with a second head for v that shares its first blocks.

    The path to u is `blocks` and `u_last` whatever the v-head: a network built with `v_head_blocks=0` loads the
    weights of one that has a v-head once the keys of `V_HEAD_MODULES` are dropped (see `without_v_head`).

    Args:
        latent_channels: C of the latent.
        grid: its I, J, K; multiples of `patch`.
        depth: blocks on the way to u, the shared ones and those of its head; see `SIZES`.
        width: channels of a token.
        heads: attention heads; divides `width`.
        patch: cells per axis of the block a token stands for.
        v_head_blocks: blocks of each head; the `depth` - `v_head_blocks` before them are shared. 0: no v-head.
        time_token: embed t beside h.
        classes: K; 0 is unconditional.
        guidance: embed the guidance scale and interval.

    Raises:
        UserError: `grid` does not divide into blocks.
        ValueError: `heads` or `v_head_blocks` do not fit.

    Example:
        >>> net = MeanFlowTransformer(4, (8, 8, 8), depth=3, width=48, heads=4, patch=2, v_head_blocks=1)
        >>> z, r, t = torch.randn(2, 4, 8, 8, 8), torch.zeros(2), torch.ones(2)
        >>> net(z, r, t).shape
        torch.Size([2, 4, 8, 8, 8])
    """

    ADAMW_MODULES: ClassVar[tuple[str, ...]] = ("patch_embed", "conditioning", "u_last", "v_last")
    """Modules whose weights are not Muon's: embeddings, first and last layers."""

    V_HEAD_MODULES: ClassVar[tuple[str, ...]] = ("v_blocks", "v_last")
    """Modules that sampling does without."""

    ENDS: ClassVar[tuple[str, str]] = ("patch_embed", "u_last.linear")
    """The layers by which latent channels enter and leave."""

    ADAPTED: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": ("to_qkv", "to_out"),
        "blocks": ("mlp.inner", "mlp.outer"),
    }
    """Layers that adapters may stand beside, by how their names end: of attention, and between its blocks."""

    def __init__(
        self,
        latent_channels: int,
        grid: Sequence[int],
        *,
        depth: int,
        width: int,
        heads: int,
        patch: int,
        v_head_blocks: int = 8,
        time_token: bool = False,
        classes: int = 0,
        guidance: bool = False,
    ) -> None:
        super().__init__()
        _check_sizes(depth, width, heads, v_head_blocks)
        check_token_grid(grid, patch)
        self.grid, self.patch, self.shared = tuple(grid), patch, depth - v_head_blocks
        self.head_width, features = width // heads, latent_channels * patch**3
        self.patch_embed = nn.Linear(features, width)
        self.conditioning = _Conditioning(width, time_token=time_token, classes=classes, guidance=guidance)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.u_last = _LastLayer(width, features)
        self.v_blocks = nn.ModuleList(_Block(width, heads) for _ in range(v_head_blocks))
        self.v_last = _LastLayer(width, features) if v_head_blocks else None
        self._initialise()

    def forward(self, z: Tensor, r: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """The u head at (z_t, r, t); no block of the v-head is computed.

        Args:
            z: (B, C, I, J, K), I, J, K as in `grid`.
            r, t: (B,).
            condition: a missing label is "no class", a missing omega 1, a missing interval (0, 1).

        Returns:
            (B, C, I, J, K): u or x_hat, as the objective reads it.
        """
        x, rotation = self._trunk(z, r, t, condition)
        return self._head(x, rotation, self.blocks[self.shared :], self.u_last)

    def heads(self, z: Tensor, r: Tensor, t: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        """Both heads, (u or x_hat, v), on one pass through the shared blocks; arguments as in `forward`.

        Raises:
            ValueError: the network has no v-head.
        """
        if self.v_last is None:
            raise ValueError("the network has no v-head: it was built with v_head_blocks=0")
        x, rotation = self._trunk(z, r, t, condition)
        u = self._head(x, rotation, self.blocks[self.shared :], self.u_last)
        return u, self._head(x, rotation, self.v_blocks, self.v_last)

    def without_v_head(self) -> MeanFlowTransformer:
        """A copy for sampling: the same answer bit for bit, without the v-head's weights."""
        network = copy.deepcopy(self)
        network.v_blocks, network.v_last = nn.ModuleList(), None
        return network

    def _trunk(self, z: Tensor, r: Tensor, t: Tensor, condition: Condition | None) -> tuple[Tensor, Rotation]:
        """Tokens after the shared blocks, (B, conditions + N, width), and how attention rotates them."""
        assert z.shape[2:] == self.grid, f"the network is for latents of {self.grid}, not {tuple(z.shape[2:])}"
        conditions = self.conditioning(r, t, condition)
        x = torch.cat([conditions, self.patch_embed(to_tokens(z, self.patch))], dim=1)
        rotation = self._rotation(conditions.shape[1], z)
        for block in self.blocks[: self.shared]:
            x = block(x, rotation)
        return x, rotation

    def _rotation(self, conditions: int, z: Tensor) -> Rotation:
        """In the precision of z, so that float64 checks are float64, and never in half."""
        dtype = torch.promote_types(z.dtype, torch.float32)
        blocks = [n // self.patch for n in self.grid]
        angles = rotation_angles(blocks, self.head_width, dtype=dtype, device=z.device)
        angles = F.pad(angles, (0, 0, conditions, 0))  # the conditions' tokens stand nowhere
        return angles.cos(), angles.sin()

    def _head(self, x: Tensor, rotation: Rotation, blocks: Iterable[nn.Module], last: nn.Module) -> Tensor:
        """(B, conditions + N, width) -> (B, C, I, J, K)."""
        for block in blocks:
            x = block(x, rotation)
        n = math.prod(n // self.patch for n in self.grid)
        return from_tokens(last(x[:, -n:]), self.patch, self.grid)

    def _initialise(self) -> None:
        """Xavier for matrices, 0.02 for classes (as DiT), zero for biases and the last layers."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for last in (self.u_last, self.v_last):
            if last is not None:
                nn.init.zeros_(last.linear.weight)


def _check_sizes(depth: int, width: int, heads: int, v_head_blocks: int) -> None:
    """Refuse counts that do not fit each other."""
    if width % heads:
        raise ValueError(f"width {width} is not divisible by {heads} heads")
    if width // heads < 6 or width // heads % 2:
        raise ValueError(
            f"width {width} with {heads} heads gives heads of {width // heads} channels: rotation over three axes "
            "takes an even number of at least 6"
        )
    if not 0 <= v_head_blocks <= depth:
        raise ValueError(f"v_head_blocks {v_head_blocks} is not between 0 and the depth {depth}")
