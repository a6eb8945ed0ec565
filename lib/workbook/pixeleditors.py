"""Small editors that learn from other editors' work, and what they learn from a chosen part of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise, product

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from workbook.editors import INSTRUCTION, Tasks
from workbook.models import canvas
from workbook.preferences import crossed


class PixelEditors(nn.Module):
    """Many small editors side by side: each pixel of an edit from what is there, and from the instruction.

    A network of three layers sees the pixel, its mirror image in the half, its counterpart in the other half, whether
    it is to be edited, the word (bright, dim, or a new direction) and where it stands. It cannot swap classes.
    """

    def __init__(self, models: int, hidden: int = 32):
        super().__init__()
        sizes = (9, hidden, hidden, 1)
        shapes = [(models, a, b) for a, b in pairwise(sizes)]
        self.weights = nn.ParameterList([nn.Parameter((2 * torch.rand(s) - 1) / s[1] ** 0.5) for s in shapes])
        self.biases = nn.ParameterList([nn.Parameter(torch.zeros(models, 1, b)) for b in sizes[1:]])
        rows, columns = torch.meshgrid(torch.arange(32), torch.arange(64), indexing="ij")
        mirror = 32 * (columns // 32) + 31 - columns % 32
        self.seen = torch.stack([64 * rows + columns, 64 * rows + mirror, 64 * rows + (columns + 32) % 64]).flatten(1)
        self.place = torch.stack([columns % 32 / 16 - 1, rows / 16 - 1], -1).view(-1, 2)
        self.half = (columns // 32).flatten()

    def forward(self, x: torch.Tensor, side: torch.Tensor, words: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """Edited values of some pixels, (models, n, p). x: (models, n, 2048); side, words: (models, n); pixels: (p,).

        words: 0 bright, 1 dim, 2 another direction.
        """
        values = x[..., self.seen[:, pixels]].movedim(-2, -1)  # (models, n, p, 3)
        shape = values.shape[:-1]
        inside = (self.half[pixels] == side[..., None]).float()[..., None]
        word = functional.one_hot(words, 3)[:, :, None].expand(*shape, 3)
        y = torch.cat([values, inside, word, self.place[pixels].expand(*shape, 2)], -1).flatten(1, 2)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            y = torch.baddbmm(bias, y, weight)
            y = y if i == 2 else y.relu()
        return values[..., 0] + y.view(shape)


def word_numbers(tasks: Tasks) -> torch.Tensor:
    """0 bright, 1 dim, 2 another direction, of tasks that swap no class, (n,); ValueError if one does."""
    if (tasks.kind == 0).any():
        raise ValueError("editors that learn cannot swap classes: leave tasks of kind 0 out.")
    return torch.where(tasks.kind == 2, 2, tasks.words[:, 2] - INSTRUCTION.index("bright"))


def train_editors(
    tasks: Tasks, edited: torch.Tensor, chosen: list[NDArray], *, steps: int, batch: int = 16, seed: int = 0
) -> PixelEditors:
    """One editor for each list of numbers in `chosen`, by least squares on these edits alone, at equal steps."""
    torch.manual_seed(seed)
    words, models = word_numbers(tasks), PixelEditors(len(chosen))
    optimiser = torch.optim.Adam(models.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    source, goal = tasks.x.flatten(1), edited.flatten(1)
    numbers = [torch.from_numpy(np.array(own)) for own in chosen]
    for _ in range(steps):
        picked = torch.stack([own[torch.randint(len(own), (batch,))] for own in numbers])
        pixels = torch.randint(source.shape[1], (192,))
        found = models(source[picked], tasks.side[picked], words[picked], pixels)
        loss = (found - goal[picked[..., None], pixels]).square().mean((1, 2)).sum()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        schedule.step()
    return models.eval().requires_grad_(False)


def achieved(models: PixelEditors, tasks: Tasks) -> NDArray:
    """Quality (models, n, 2) of what trained editors make of unseen tasks, measured on the pixels.

    Following: how far the half went towards what was asked (its projection, cut to 0 … 1) x (1 - change of the other
    half); visual: 1 - what is left beside that way. Both as root mean squares, 0.5 being all.
    """
    count, everything = len(models.weights[0]), torch.arange(2048)
    parts = []
    for model in range(count):
        alone = PixelEditors(1, models.weights[0].shape[2]).requires_grad_(False)
        alone.load_state_dict({name: p[model : model + 1] for name, p in models.state_dict().items()})
        found = alone(tasks.x.flatten(1)[None], tasks.side[None], word_numbers(tasks)[None], everything)[0]
        found = found.view(tasks.x.shape).clamp(-1, 1)
        own, other = (canvas.half(found - tasks.x, side).flatten(1) for side in (tasks.side, 1 - tasks.side))
        way = (tasks.asked - canvas.half(tasks.x, tasks.side)).flatten(1)
        share = ((own * way).sum(1) / way.square().sum(1).clamp(min=1e-6)).clamp(0, 1)
        losses = [part.square().mean(1).sqrt() for part in (other, own - share[:, None] * way)]
        spill, rest = ((1 - 2 * loss).clamp(min=0) for loss in losses)
        parts.append(torch.stack([share * spill, rest], 1))
    return torch.stack(parts).double().numpy()


def from_selections(
    tasks: Tasks,
    edited: torch.Tensor,
    orders: Mapping[str, NDArray],
    kept: Sequence[float],
    unseen: Tasks,
    *,
    steps: int,
    seed: int = 0,
) -> dict[tuple[str, float], NDArray]:
    """Quality (seeds, unseen, 2) of editors that learn from the first share of each order: {(order, share): …}.

    orders: {name: (seeds, n), numbers of edits, best first}; kept: shares; all editors train side by side and for equal
    steps. A share of 1 is one and the same run for all orders.
    """
    seeds = len(next(iter(orders.values())))
    runs = [
        *product(orders, [share for share in kept if share < 1]),
        *([(next(iter(orders)), 1.0)] if 1 in kept else []),
    ]
    chosen = [orders[name][s][: max(1, round(share * len(tasks)))] for name, share in runs for s in range(seeds)]
    found = achieved(train_editors(tasks, edited, chosen, steps=steps, seed=seed), unseen)
    by_run = dict(zip(runs, found.reshape(len(runs), seeds, *found.shape[1:]), strict=True))
    return {(name, share): by_run[(name, share) if share < 1 else runs[-1]] for name, share in product(orders, kept)}


def summary(taught: Mapping[tuple[str, float], NDArray]) -> pd.DataFrame:
    """One row a run of `from_selections`: judge, kept, the sum of both qualities with its interval, and each."""
    rows = []
    for (name, share), found in taught.items():
        m, (following, visual) = crossed(found.sum(-1)), found.mean((0, 1))
        rows.append({"judge": name, "kept": share, "value": m.value, "low": m.low, "high": m.high})
        rows[-1] |= {"following": following, "visual": visual}
    return pd.DataFrame(rows)
