"""Training policies and verifiers on few traces, and comparing them with intervals over runs and questions."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from workbook.study import Measured
from workbook.train import cosine_rate


def fit(
    module: torch.nn.Module,
    loss: Callable[[NDArray], torch.Tensor],
    count: int,
    *,
    steps: int,
    rate: float,
    batch: int,
    seed: int,
    every: int | None = 10,
) -> torch.nn.Module:
    """Minimise loss(rows) over random rows of `count` examples by AdamW; a tenth of them is held out to stop in time.

    The rate warms up over a tenth of the steps and falls to 0 along half a cosine. Returns the module with the weights
    of the least held-out loss, looked at every `every` steps, in eval mode; those of the start compete too. None holds
    nothing out and keeps the last weights. ValueError for fewer than two examples.
    """
    if count < 2:
        raise ValueError(f"{count} examples cannot be split into training and held-out ones: 2 or more wanted.")
    rng, cut = np.random.default_rng(seed), max(1, count // 10) if every else 0
    optimiser = torch.optim.AdamW(module.parameters(), lr=rate, fused=True)
    best, kept = math.inf, copy.deepcopy(module.state_dict())
    for step in range(steps + 1):
        if every and (step % every == 0 or step == steps):
            with torch.no_grad():
                held_out = loss(np.arange(cut)).item()
            if held_out < best:
                best, kept = held_out, copy.deepcopy(module.state_dict())
        if step < steps:
            for group in optimiser.param_groups:
                group["lr"] = rate * cosine_rate(step, steps, max(1, steps // 10))
            descend(module, optimiser, loss(rng.integers(cut, count, batch)))
    if every:
        module.load_state_dict(kept)
    return module.eval()


def descend(
    module: torch.nn.Module, optimiser: torch.optim.Optimizer, loss: torch.Tensor, *, clip: float = 1.0
) -> None:
    """One step down the gradient of `loss`, its norm cut at `clip`."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def crossed(
    values: ArrayLike,
    statistic: Callable[[NDArray], float] = np.mean,
    *,
    level: float = 0.95,
    draws: int = 500,
    seed: int = 0,
    **measured,
) -> Measured:
    """A statistic of values (runs, questions, …) and its interval, runs and questions both drawn again.

    All runs answer the same questions, so that a drawn question is the same in every run. One run gives the interval
    over questions alone. measured: fields of Measured to pass on.
    """
    values, rng = np.asarray(values, dtype=float), np.random.default_rng(seed)
    runs, questions = values.shape[:2]
    found = []
    for _ in range(draws):
        chosen = values[rng.integers(runs, size=runs)]
        found.append(statistic(chosen[:, rng.integers(questions, size=questions)]))
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Measured(float(statistic(values)), float(low), float(high), n=questions, **measured)
