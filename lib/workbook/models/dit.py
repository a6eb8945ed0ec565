"""A small diffusion transformer that returns velocities, for pictures of any size that its patches divide."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

NO_LABEL = 10  # the class of pictures whose label is not told; Fashion-MNIST has classes 0 to 9


def sinusoid(value: torch.Tensor, width: int, *, slowest: float = 1000.0) -> torch.Tensor:
    """Cosines and sines of `value` (n,), at width/2 frequencies from 1 down to 1/slowest; shape (n, width)."""
    rates = torch.exp(-math.log(slowest) * torch.arange(width // 2, device=value.device) / (width // 2 - 1))
    angles = value[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], 1)


def rotations(side: int, head_width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the 2-D rotary positions of a side × side grid, each (side², head_width / 2).

    One half of the pairs turns with the row and one with the column (RoPE, Su et al. 2021, once for each axis). Rows
    and columns are counted 0 … side - 1 at every resolution, as in training.
    """
    rates = 100.0 ** (-torch.arange(head_width // 4, device=device) / (head_width // 4))
    turns = torch.arange(side, device=device)[:, None] * rates
    angles = torch.cat([turns.repeat_interleave(side, 0), turns.repeat(side, 1)], 1)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (x_i, x_{i + width/2}) of the last dimension by the angles of `rotations`."""
    one, other = x.chunk(2, -1)
    return torch.cat([one * cos - other * sin, one * sin + other * cos], -1)


class Block(nn.Module):
    """Attention and MLP, each scaled, shifted and gated by the condition (adaLN-zero, Peebles and Xie 2023)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.condition = nn.Linear(width, 6 * width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        # SiLU in place of GELU: a third of its time on a CPU
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
        nn.init.zeros_(self.condition.weight)
        nn.init.zeros_(self.condition.bias)

    def attend(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        n, tokens, width = x.shape
        q, k, v = self.qkv(x).view(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        found = functional.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.out(found.transpose(1, 2).reshape(n, tokens, width))

    def forward(self, x: torch.Tensor, condition: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.condition(condition)[:, None].chunk(6, -1)
        x = x + gate_1 * self.attend(torch.addcmul(shift_1, _normed(x), 1 + scale_1), cos, sin)
        return x + gate_2 * self.mlp(torch.addcmul(shift_2, _normed(x), 1 + scale_2))


def _normed(x: torch.Tensor) -> torch.Tensor:
    return functional.layer_norm(x, x.shape[-1:])


class DiT(nn.Module):
    """Velocity v(x, sigma, label) of a flow-matching model (n - x_0 on x = (1 - sigma) x_0 + sigma n).

    patch: side of a token in pixels; width, layers, heads: of the transformer. Each block sees the noise level, the
    class and the number of tokens a side, through adaLN-zero; the output layer starts at zero.
    """

    def __init__(self, *, patch: int = 2, width: int = 128, layers: int = 4, heads: int = 4, channels: int = 1):
        super().__init__()
        self.patch, self.width, self.head_width = patch, width, width // heads
        self.inward, self.outward = nn.Linear(channels * patch**2, width), nn.Linear(width, channels * patch**2)
        self.level = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.side, self.label = nn.Linear(width, width), nn.Embedding(NO_LABEL + 1, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.last = nn.Linear(width, 2 * width)
        for layer in (self.last, self.outward):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor | float, labels: torch.Tensor | None = None) -> torch.Tensor:
        """x: (n, channels, h, h), h a multiple of `patch`; sigma: noise level 0 to 1, one number or (n,);
        labels: (n,), int64, 0 to 9 or NO_LABEL, which is what None means. Returns v in the shape of x."""
        height, width = x.shape[-2:]
        if height != width or height % self.patch:
            raise ValueError(
                f"pictures of {height} × {width} pixels: take square ones, a multiple of {self.patch} wide."
            )
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        labels = torch.full((len(x),), NO_LABEL, device=x.device) if labels is None else labels
        side = height // self.patch
        sides = torch.full((len(x),), float(side), device=x.device)
        condition = self.level(sinusoid(1000 * sigma, self.width)) + self.label(labels)
        condition = functional.silu(condition + self.side(sinusoid(sides, self.width)))
        cos, sin = rotations(side, self.head_width, x.device)
        tokens = self.inward(functional.pixel_unshuffle(x, self.patch).flatten(2).transpose(1, 2))
        for block in self.blocks:
            tokens = block(tokens, condition, cos, sin)
        shift, scale = self.last(condition)[:, None].chunk(2, -1)
        out = self.outward(torch.addcmul(shift, _normed(tokens), 1 + scale))
        return functional.pixel_shuffle(out.transpose(1, 2).unflatten(2, (side, side)), self.patch)
