"""A U-Net of diffusers on one strip of rows: what its layers lack of the other strips, they ask an exchange for.

Rank r of n holds rows r H/n … (r + 1) H/n of every feature map. Three kinds of layers look beyond them:

- a convolution larger than 1 × 1 needs the row above and the row below: `exchange.halo(name, x)`;
- group normalisation needs the mean and the mean square over all rows: `exchange.statistics(name, moments)`;
- self-attention needs keys and values of other tokens: `exchange.keys(name, own)`.

What an exchange answers, and how fresh it is, is the scheme; a notebook's matter. Everything else is local.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Protocol

import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.nn import functional


class Exchange(Protocol):
    """Where a strip's layers get what lies outside of it. name: the layer's name in the network."""

    def halo(self, name: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows just above and just below x (b, c, h, w), each (b, c, 1, w)."""

    def statistics(self, name: str, moments: torch.Tensor) -> torch.Tensor:
        """Mean and mean square of each group over all strips, (2, b, groups), from one's own."""

    def keys(self, name: str, own: torch.Tensor) -> torch.Tensor:
        """Keys and values that this strip's queries see, (b, any, 2c), from one's own (b, tokens, 2c)."""


def rows_of(rank: int, size: int, height: int) -> slice:
    """The rows of rank's strip. ValueError if the height cannot be cut into `size` equal strips."""
    if height % size:
        raise ValueError(f"{height} rows cannot be cut into {size} equal strips.")
    return slice(rank * height // size, (rank + 1) * height // size)


def check_strips(network: UNet2DModel, size: int, height: int) -> None:
    """Refuse a picture whose strips would not be whole rows on every level of the network."""
    least = size * 2 ** (len(network.config.block_out_channels) - 1)
    if height % least:
        raise ValueError(f"{height} rows cannot be cut into {size} strips: use a multiple of {least}.")


def posted(network: UNet2DModel, x: torch.Tensor, size: int) -> list[tuple[str, int, int]]:
    """What one of `size` strips has to tell the others in a step on pictures x: (category, numbers, rows of tokens).

    From the shapes that pass through the uncut network. The last entry is how many tokens a strip has, 0 where the
    layer is no attention.
    """
    found, hooks = [], []

    def note(layer: nn.Module, arguments: tuple) -> None:
        b, c, *rest = arguments[0].shape
        if isinstance(layer, nn.GroupNorm):
            found.append(("normalisation", 2 * b * layer.num_groups, 0))
        elif isinstance(layer, Attention):
            tokens = rest[0] * rest[1] // size
            found.append(("attention", 2 * b * tokens * layer.inner_dim, tokens))
        elif layer is not network.conv_in:
            found.append(("convolution", 2 * b * c * rest[1], 0))  # the first row and the last

    for layer in network.modules():
        wide = isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1)
        if wide or isinstance(layer, nn.GroupNorm | Attention):
            hooks.append(layer.register_forward_pre_hook(note))
    try:
        with torch.inference_mode():
            out = network(x, torch.zeros(len(x))).sample
    finally:
        for hook in hooks:
            hook.remove()
    return [*found, ("output", out.numel() // size, 0)]


def on_strip(network: UNet2DModel, exchange: Exchange, rank: int, size: int) -> UNet2DModel:
    """A copy of the network that takes the whole picture (b, c, H, W) and returns the strip (b, c, H/size, W).

    The weights are shared with the original. The first convolution cuts its strip out of the whole picture, which
    every rank has: that is exact, and free. A single strip is the network itself.
    """
    if size == 1:
        return network
    strip = copy.deepcopy(network, {id(p): p for p in network.parameters()})
    for name, layer in strip.named_modules():
        if layer is strip.conv_in:
            layer.forward = partial(_first_convolution, layer, rank, size)
        elif isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1):
            if layer.kernel_size != (3, 3) or layer.padding != (1, 1):
                raise ValueError(f"{name} is a convolution of {layer.kernel_size}: only 3 × 3 with one row around it.")
            layer.forward = partial(_convolution, layer, partial(exchange.halo, name))
        elif isinstance(layer, nn.GroupNorm):
            layer.forward = partial(_group_norm, layer, partial(exchange.statistics, name))
        elif isinstance(layer, Attention):
            layer.set_processor(_Attention(partial(exchange.keys, name)))
    return strip


def _first_convolution(layer: nn.Conv2d, rank: int, size: int, whole: torch.Tensor) -> torch.Tensor:
    rows = rows_of(rank, size, whole.shape[2])
    padded = functional.pad(whole, (0, 0, 1, 1))[:, :, rows.start : rows.stop + 2]
    return functional.conv2d(padded, layer.weight, layer.bias, padding=(0, 1))


def _convolution(layer: nn.Conv2d, halo, x: torch.Tensor) -> torch.Tensor:
    above, below = (rows.contiguous(memory_format=_layout(x)) for rows in halo(x))
    return functional.conv2d(torch.cat([above, x, below], 2), layer.weight, layer.bias, layer.stride, (0, 1))


def _layout(x: torch.Tensor) -> torch.memory_format:
    """Channels last if x is laid out so, which makes convolutions faster; the usual order otherwise."""
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _group_norm(layer: nn.GroupNorm, statistics, x: torch.Tensor) -> torch.Tensor:
    """x: (b, c, …). The variance is the biased one, as in torch; it is that of one's own rows where it is negative."""
    b, c, *rest = x.shape
    inner, x = torch.Size(rest).numel(), x.contiguous(memory_format=_layout(x))
    _, mean, inverse = torch.native_group_norm(x, None, None, b, c, inner, layer.num_groups, layer.eps)
    variance = inverse.pow(-2) - layer.eps  # from torch's own kernel, ten times as fast as torch.var_mean
    mean, square = statistics(torch.stack([mean, variance + mean.square()]))
    used = square - mean.square()
    used = torch.where(used < 0, variance, used)
    scale = (used + layer.eps).rsqrt().repeat_interleave(c // layer.num_groups, 1) * layer.weight
    shift = layer.bias - mean.repeat_interleave(c // layer.num_groups, 1) * scale
    shape = (b, c, *[1] * len(rest))
    return torch.addcmul(shift.view(shape), x, scale.view(shape))


class _Attention:
    """Self-attention over the pixels of a strip: diffusers' own, but for the keys and values that are seen."""

    def __init__(self, keys):
        self.keys = keys

    def __call__(self, attn: Attention, x: torch.Tensor, temb: object = None, **_: object) -> torch.Tensor:
        b, c, h, w = x.shape  # temb: diffusers passes it along and never reads it
        tokens = attn.group_norm(x.reshape(b, c, h * w)).transpose(1, 2)
        own = torch.cat([attn.to_k(tokens), attn.to_v(tokens)], 2)
        query, key, value = (
            t.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for t in (attn.to_q(tokens), *self.keys(own).chunk(2, 2))
        )  # fmt: skip
        seen = functional.scaled_dot_product_attention(query, key, value, scale=attn.scale)
        out = attn.to_out[0](seen.transpose(1, 2).flatten(2)).transpose(1, 2).unflatten(2, (h, w))
        return (out.contiguous(memory_format=_layout(x)) + x) / attn.rescale_output_factor
