"""Moving Fashion-MNIST: short films of one item that crosses the canvas and turns back at its edges."""

from __future__ import annotations

from functools import cache

import torch

from workbook import data

FRAMES, CANVAS, ITEM = 8, 32, 16  # frames of a film; pixels a side of the canvas and of the item
FASTEST = 3.0  # pixels a frame, in each direction


@cache
def small_items(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Fashion-MNIST at half its size: (n, 16, 16) in [-1, 1], each pixel the mean of four, and labels (n,)."""
    pictures, labels = data.fashion_mnist_tensor(split)
    return torch.nn.functional.avg_pool2d(pictures, 2)[:, 0], labels


def paths(n: int, generator: torch.Generator) -> torch.Tensor:
    """Upper left corners of n films, int64 of shape (n, FRAMES, 2): constant velocity, reflected at the edges."""
    room = CANVAS - ITEM
    start = room * torch.rand(n, 1, 2, generator=generator)
    velocity = FASTEST * (2 * torch.rand(n, 1, 2, generator=generator) - 1)
    straight = start + velocity * torch.arange(FRAMES)[:, None]
    return (room - (straight.remainder(2 * room) - room).abs()).round().long()  # a triangle wave of period 2 room


def moving_fashion(n: int, generator: torch.Generator, *, split: str = "train") -> tuple[torch.Tensor, torch.Tensor]:
    """n films of random items on random paths: (n, 1, FRAMES, CANVAS, CANVAS) in [-1, 1], and labels (n,)."""
    items, labels = small_items(split)
    chosen = torch.randint(len(items), (n,), generator=generator)
    corners, side = paths(n, generator), torch.arange(ITEM)
    rows, columns = (corners[..., axis, None] + side for axis in (0, 1))
    films = torch.full((n, FRAMES, CANVAS, CANVAS), -1.0)
    which, frame = torch.arange(n)[:, None, None, None], torch.arange(FRAMES)[None, :, None, None]
    films[which, frame, rows[..., None], columns[..., None, :]] = items[chosen][:, None]
    return films[:, None], labels[chosen]
