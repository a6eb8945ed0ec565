"""A KV cache in few bits: packed codes with their rulers, and groups of tokens of different precision in each layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Put 8 / bits codes into each byte: integers (..., c) below 2**bits to uint8 (..., c * bits / 8)."""
    shifts = torch.arange(0, 8, bits, device=codes.device)
    return (codes.unflatten(-1, (-1, 8 // bits)).int() << shifts).sum(-1).to(torch.uint8)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes that `pack` put into bytes: uint8 (..., b) to uint8 (..., b * 8 / bits)."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> shifts) & (2**bits - 1)).flatten(-2)


@dataclass(frozen=True)
class Codes:
    """A quantised matrix (tokens, channels): x = (codes * step + low) * scale; codes packed, the rest in 16 bits.

    low, step: (1, channels) or (tokens, 1); scale: (channels,), or None for ones.
    """

    packed: torch.Tensor
    bits: int
    low: torch.Tensor
    step: torch.Tensor
    scale: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of codes and parameters."""
        return sum(t.nbytes for t in (self.packed, self.low, self.step, self.scale) if t is not None)

    def read(self) -> torch.Tensor:
        """The matrix in float32."""
        x = unpack(self.packed, self.bits) * self.step.float() + self.low.float()
        return x if self.scale is None else x * self.scale.float()


class MixedCache:
    """Keys and values of one sequence: groups of tokens in few bits, and a tail in full precision, layer by layer.

    quantise: (keys or values (tokens, channels), bits, is_keys) to Codes. bits: of important and of other tokens;
    16 leaves a group in the tail, 0 evicts it.
    """

    def __init__(
        self, layers: int, quantise: Callable[[torch.Tensor, int, bool], Codes], bits: tuple[int, int] = (4, 2)
    ):
        self.quantise, self.bits = quantise, bits
        self.groups: list[list[tuple[Codes, Codes]]] = [[] for _ in range(layers)]
        self.tails: list[torch.Tensor | None] = [None] * layers

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Add keys and values, each (kv_heads, new, head_dim), to the layer's tail."""
        new, tail = torch.stack([k, v]), self.tails[layer]
        self.tails[layer] = new if tail is None else torch.cat([tail, new], dim=2)

    def compress(self, layer: int, kept: torch.Tensor) -> None:
        """Quantise the tail: its positions `kept` in bits[0], the others in bits[1]."""
        keys, values = self.tails[layer].transpose(1, 2).flatten(2)  # channels of all heads side by side
        important = torch.zeros(len(keys), dtype=torch.bool, device=keys.device)
        important[kept] = True
        untouched = torch.zeros_like(important)
        for bits, group in zip(self.bits, (important, ~important), strict=True):
            if bits == 16:
                untouched |= group
            elif bits and group.any():
                pair = self.quantise(keys[group], bits, True), self.quantise(values[group], bits, False)
                self.groups[layer].append(pair)
        self.tails[layer] = self.tails[layer][:, :, untouched]

    def read(self, layer: int) -> torch.Tensor:
        """All keys and values, (2, kv_heads, n, head_dim), groups first: softmax does not mind their order."""
        tail = self.tails[layer]
        groups = [torch.stack([k.read(), v.read()]) for k, v in self.groups[layer]]
        return torch.cat([*(g.unflatten(2, (tail.shape[1], -1)).transpose(1, 2) for g in groups), tail], dim=2)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Append new tokens and return their causal attention to all that `read` gives, shaped like q.

        q: (heads, new, head_dim); k, v: (kv_heads, new, head_dim).
        """
        self.append(layer, k, v)
        keys, values = self.read(layer).repeat_interleave(len(q) // len(k), dim=1)
        new, length = q.shape[1], keys.shape[1]
        seen = torch.ones(new, length, dtype=torch.bool, device=q.device).tril(length - new)
        return F.scaled_dot_product_attention(q[None], keys[None], values[None], attn_mask=seen)[0]

    @property
    def nbytes(self) -> int:
        """Bytes that the layers hold: codes, their parameters, and the tails at 16 bits."""
        coded = sum(codes.nbytes for groups in self.groups for pair in groups for codes in pair)
        return coded + sum(2 * tail.numel() for tail in self.tails if tail is not None)


def full_bytes(model, length: int) -> int:
    """Bytes of all keys and values of `length` tokens of a lm.Llama at 16 bits an element."""
    return 2 * 2 * length * len(model.layers) * model.kv_heads * model.head_dim
