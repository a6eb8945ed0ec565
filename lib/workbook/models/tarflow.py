"""TarFlow (Zhai et al. 2024, arXiv 2412.06329): a normalising flow whose blocks are causal transformers over patches.

A picture becomes T patches of D numbers. A block maps patches x to z, position by position in the block's order:

    z_t = exp(-s_t) (x_t - u_t),    (s_t, u_t) = network(x_0 ... x_{t-1}),    s_0 = u_0 = 0.

One pass gives all s and u of a known x. The inverse, x_t = exp(s_t) z_t + u_t, knows x only up to t: it is solved
position by position, or by iteration (notebooks/diffusion/gs-jacobi.ipynb). Either way it is `Block.advance` that
runs the network on a segment of positions, over the keys and values of the positions before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    """Shape of a flow: pictures of `side` x `side` pixels, patches of `patch` x `patch`, `blocks` of `layers`."""

    patch: int
    blocks: int
    layers: int
    width: int
    heads: int
    side: int = 28
    channels: int = 1
    classes: int = 10

    @property
    def positions(self) -> int:
        """Patches of a picture, T."""
        return (self.side // self.patch) ** 2

    @property
    def numbers(self) -> int:
        """Numbers in a patch, D."""
        return self.channels * self.patch**2


SHAPES = {
    "tarflow_fmnist_a": Shape(patch=4, blocks=8, layers=2, width=72, heads=3),
    "tarflow_fmnist_b": Shape(patch=2, blocks=6, layers=2, width=48, heads=2),
}


class Layer(nn.Module):
    """A pre-norm transformer layer: attention over earlier positions, then an MLP four times as wide."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, h: torch.Tensor, cache=None, start: int = 0, mask: torch.Tensor | None = None) -> torch.Tensor:
        """h: (B, L, width) at positions start ... start + L - 1; mask: (L, start + L), needed where start > 0 < L - 1.

        cache: (keys, values), each (B, heads, T, width / heads): this segment's are written into it, and those of
        the positions before `start` are read from it. Without a cache the segment is all there is.
        """
        batch, length, width = h.shape
        q, k, v = self.qkv(self.norm_1(h)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if cache is not None:
            keys, values = cache
            stop = start + length
            keys[:, :, start:stop], values[:, :, start:stop] = k, v
            if start:
                k, v = keys[:, :, :stop], values[:, :, :stop]
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not start and length > 1)
        h = h + self.out(seen.transpose(1, 2).reshape(batch, length, width))
        return h + self.down(F.gelu(self.up(self.norm_2(h))))


class Block(nn.Module):
    """One step of the flow. Positions are in the block's own order throughout; `TarFlow.turn` changes the order."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.into = nn.Linear(shape.numbers, shape.width)
        self.place = nn.Parameter(0.01 * torch.randn(shape.positions, shape.width))
        self.kind = nn.Parameter(0.01 * torch.randn(shape.classes, shape.width))
        self.layers = nn.ModuleList(Layer(shape.width, shape.heads) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.onto = nn.Linear(shape.width, 2 * shape.numbers)
        nn.init.zeros_(self.onto.weight)  # a new block is the identity
        nn.init.zeros_(self.onto.bias)
        allowed = torch.ones(shape.positions, shape.positions, dtype=torch.bool).tril()
        self.register_buffer("allowed", allowed, persistent=False)

    def cache(self, batch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Room for the keys and values of all positions, one pair a layer."""
        s, like = self.shape, self.place
        size = (batch, s.heads, s.positions, s.width // s.heads)
        return [(like.new_empty(size), like.new_empty(size)) for _ in range(s.layers)]

    def condition(self, labels: torch.Tensor) -> torch.Tensor:
        """What the network is told beside the patches, their place and the pictures' classes (B,): (B, T, width)."""
        return self.place + self.kind[labels][:, None]

    def advance(self, x: torch.Tensor, condition: torch.Tensor, cache=None, start: int = 0):
        """Run the network on patches x (B, L, D) at positions start ... start + L - 1.

        condition: of `condition`. cache: of `cache`; it holds the positions before `start`, and afterwards this
        segment's as well: running a segment again replaces its keys and values.
        Returns (s, u), each (B, L, D), of positions start + 1 ... start + L: what a position says is of the next one.
        """
        stop = start + x.shape[1]
        h = self.into(x) + condition[:, start:stop]
        mask = self.allowed[start:stop, :stop] if start and stop - start > 1 else None
        for number, layer in enumerate(self.layers):
            h = layer(h, cache and cache[number], start, mask)
        return self.onto(self.norm(h)).chunk(2, dim=-1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From patches x (B, T, D) to (z, s), each (B, T, D). The log-determinant of dz/dx is -s summed over (T, D)."""
        s, u = (F.pad(part[:, :-1], (0, 0, 1, 0)) for part in self.advance(x, self.condition(labels)))
        return (x - u) * torch.exp(-s), s

    @torch.inference_mode()
    def inverse(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The patches x (B, T, D) that the block maps to z: position by position, T - 1 calls on a single patch each.

        `advance` with L = 1, but lean: matrices of (B, width), keys and values written where they stay, x in place.
        """
        s, x = self.shape, z.clone()
        patches, condition = x.unbind(1), self.condition(labels).unbind(1)
        layers = [(*layer.parameters(), *cache) for layer, cache in zip(self.layers, self.cache(len(z)), strict=True)]
        into, onto, width = tuple(self.into.parameters()), tuple(self.onto.parameters()), (s.width,)
        scale, offset = self.norm.parameters()
        for t in range(s.positions - 1):
            h = F.linear(patches[t], *into).add_(condition[t])
            for g1, b1, g2, b2, qkv, c1, out, c2, up, c3, down, c4, keys, values in layers:
                read = F.linear(F.layer_norm(h, width, g1, b1), qkv, c1).view(-1, 3, s.heads, 1, s.width // s.heads)
                q, keys[:, :, t : t + 1], values[:, :, t : t + 1] = read.unbind(1)
                seen = F.scaled_dot_product_attention(q, keys[:, :, : t + 1], values[:, :, : t + 1])
                h.add_(F.linear(seen.view(-1, s.width), out, c2))
                h.add_(F.linear(F.gelu(F.linear(F.layer_norm(h, width, g2, b2), up, c3)), down, c4))
            log_scale, shift = F.linear(F.layer_norm(h, width, scale, offset), *onto).chunk(2, dim=-1)
            patches[t + 1].mul_(log_scale.exp()).add_(shift)
        return x


class TarFlow(nn.Module):
    """Blocks with alternating order: even ones read the patches row by row, odd ones from the end."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.blocks))

    def patches(self, pictures: torch.Tensor) -> torch.Tensor:
        """(B, C, side, side) to (B, T, D), row by row."""
        return F.unfold(pictures, self.shape.patch, stride=self.shape.patch).transpose(1, 2)

    def pictures(self, patches: torch.Tensor) -> torch.Tensor:
        """The inverse of `patches`."""
        s = self.shape
        return F.fold(patches.transpose(1, 2), (s.side, s.side), s.patch, stride=s.patch)

    @staticmethod
    def turn(patches: torch.Tensor, number: int) -> torch.Tensor:
        """Patches (B, T, D) from row order to the order of block `number`, or back."""
        return patches.flip(1) if number % 2 else patches

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From patches x (B, T, D) to noise z of that shape, and the log-determinant a number, shape (B,)."""
        log_determinant = x.new_zeros(len(x))
        for number, block in enumerate(self.blocks):
            z, s = block(self.turn(x, number), labels)
            x = self.turn(z, number)
            log_determinant = log_determinant - s.mean((1, 2))
        return x, log_determinant

    def loss(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Negative log-likelihood of patches x in nats a number, shape (B,), less the constant log(2 pi) / 2."""
        z, log_determinant = self(x, labels)
        return 0.5 * z.square().mean((1, 2)) - log_determinant

    def noise(self, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Noises (count, T, D) and labels (count,), the classes in turn; the same for a seed on every device."""
        z = torch.randn(count, self.shape.positions, self.shape.numbers, generator=torch.Generator().manual_seed(seed))
        device = self.blocks[0].place.device
        return z.to(device), (torch.arange(count) % self.shape.classes).to(device)

    def inverse(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """From noise z (B, T, D) to patches x of that shape, block after block and position after position."""
        for number, block in reversed(list(enumerate(self.blocks))):
            z = self.turn(block.inverse(self.turn(z, number), labels), number)
        return z

    def denoise(self, x: torch.Tensor, labels: torch.Tensor, noise: float) -> torch.Tensor:
        """The mean of the clean patches, given patches x (B, T, D) with Gaussian noise of that size: Tweedie's formula.

        The flow has learnt the density p of noisy pictures; the mean is x + noise**2 times the gradient of log p.
        """
        with torch.inference_mode(False), torch.enable_grad():
            x, labels = x.clone().requires_grad_(), labels.clone()  # a tensor of inference mode has no gradient
            total = self.loss(x, labels).sum() * x[0].numel()
            (gradient,) = torch.autograd.grad(total, x)
        return (x - noise**2 * gradient).detach()

    def draw(self, patches: torch.Tensor) -> torch.Tensor:
        """Patches as pictures for the classifier: (B, C, 32, 32) in [-1, 1], padded with -1 like the data."""
        border = (32 - self.shape.side) // 2
        return F.pad(self.pictures(patches).clamp(-1, 1), (border,) * 4, value=-1.0)


def load(name: str, *, device: str = "cpu") -> TarFlow:
    """The flow `name` of SHAPES as it ships: eval mode, float32, no gradients. data.DataError if missing or changed."""
    from workbook import checkpoints

    return checkpoints.restore(TarFlow(SHAPES[name]), name).to(device)
