"""Reward models that learn from preferences: their heads, how good a judge they are, what best-of-n makes of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise, product

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats
from torch import nn
from torch.nn import functional

from workbook import pools
from workbook.panels import Panel
from workbook.study import Measured

# -- heads ------------------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """Reward heads: `models` independent sets of one head a dimension, width → hidden → 16 → (mu, log sigma).

    ReLU, dropout before the second layer. All weights have a leading axis of models, so that the seeds of a study train
    side by side, in one batched product a layer, and never see one another's data.
    """

    def __init__(self, models: int, width: int, *, dimensions: int = 2, hidden: int = 128, dropout: float = 0.05):
        super().__init__()
        sizes = list(pairwise((width, hidden, 16, 2)))
        shapes = [(models, dimensions, a, b) for a, b in sizes]
        self.weights = nn.ParameterList([nn.Parameter((2 * torch.rand(s) - 1) / s[2] ** 0.5) for s in shapes])
        self.biases = nn.ParameterList([nn.Parameter(torch.zeros(models, dimensions, 1, b)) for _, b in sizes])
        self.dropout = dropout

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(mu, log sigma), each (models, n, dimensions). states: (models, n, dimensions, width), or (n, …) for all."""
        x = states.transpose(-3, -2)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = x @ weight + bias
            x = x if i == 2 else functional.dropout(x.relu(), self.dropout * (i == 0), self.training)
        return x.transpose(-3, -2).unbind(-1)

    def only(self, models: slice) -> Heads:
        """A copy of some of the models, to be trained further."""
        some = copy.deepcopy(self).train()
        for group in (some.weights, some.biases):
            for layer, parameter in enumerate(group):
                group[layer] = nn.Parameter(parameter[models].detach().clone())
        return some


def pairs_of(candidates: int) -> NDArray:
    """Numbers (first, second) of all pairs of 0, …, candidates - 1: shape (2, pairs)."""
    return np.array(list(combinations(range(candidates), 2))).T


# -- how good a judge is ----------------------------------------------------------------------------------------------


def tie_threshold(delta: NDArray, label: NDArray) -> tuple[float, float]:
    """(epsilon, accuracy): the threshold that maximises the accuracy of win, tie and loss on these pairs.

    delta: differences of scores (n,); label: 1, 0 (a tie) or -1; |delta| <= epsilon is called a tie.
    """
    size = np.abs(delta)
    order = np.argsort(size)
    right = ((np.sign(delta) == label) & (label != 0))[order].astype(int)
    tied = (label == 0)[order].astype(int)
    total = right.sum() + np.concatenate([[0], np.cumsum(tied - right)])  # if the i closest are ties
    ends = 1 + np.flatnonzero(np.append(np.diff(size[order]) > 0, True))  # equal differences are called alike
    allowed = ends if size.min() == 0 else np.concatenate([[0], ends])
    best = allowed[np.argmax(total[allowed])]
    return (float(size[order][best - 1]) if best else 0.0), total[best] / len(delta)


def called(delta: NDArray, epsilon: float | NDArray) -> NDArray:
    """1, 0 or -1: which side a judge names, |delta| <= epsilon being a tie."""
    return np.sign(delta) * (np.abs(delta) > epsilon)


Chance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (delta, spread) -> P(the first wins)


def chances_of(delta: NDArray, spread: NDArray, chance: Chance) -> NDArray:
    """P(the first wins) of arrays, by a function of tensors."""
    return chance(*(torch.from_numpy(np.array(x, dtype=float)) for x in (delta, spread))).numpy()


def stretch(delta: NDArray, spread: NDArray, label: NDArray, chance: Chance) -> float:
    """The one factor on a judge's scores under which its chances fit labels best; ties are left out.

    delta, spread, label: (n,), label 1, 0 or -1; chance(delta, spread): P(first beats second), of tensors.
    """
    kept = label != 0
    delta, spread, size = (label * delta)[kept], spread[kept], np.abs(delta).mean() + 1e-12

    def loss(log_factor: float) -> float:
        factor = np.exp(log_factor) / size
        return float(-np.log(chances_of(delta * factor, spread * factor, chance) + 1e-12).mean())

    return float(np.exp(optimize.minimize_scalar(loss, bounds=(-4, 5), method="bounded").x) / size)


def crossed(top: ArrayLike, bottom: ArrayLike = 1.0, *, draws: int = 1000, **options) -> Measured:
    """Ratio of the sums of two tables (seeds, problems), with a 95 % interval that resamples seeds and problems both.

    One row or a flat list: problems alone. options: fields of Measured.
    """
    top = np.atleast_2d(np.asarray(top, float))
    bottom = np.broadcast_to(np.asarray(bottom, float), top.shape)
    rng = np.random.default_rng(0)
    rows, columns = (rng.multinomial(n, np.full(n, 1 / n), draws) for n in top.shape)
    values = ((rows @ top) * columns).sum(1) / ((rows @ bottom) * columns).sum(1)
    low, high = np.quantile(values, [0.025, 0.975])
    return Measured(float(top.sum() / bottom.sum()), float(low), float(high), n=top.shape[1], **options)


def labels_of(sums: torch.Tensor) -> NDArray:
    """1, 0 or -1 for all pairs (…, pairs): which of two answers a panel prefers. sums: (…, candidates, dimensions)."""
    first, second = pairs_of(sums.shape[-2])
    return (sums[..., first, :] - sums[..., second, :]).sum(-1).sign().numpy()


@dataclass(frozen=True)
class Truth:
    """What is known of the pairs of a test set, for judges of several models (panels).

    gaps: (problems, pairs, columns), true differences, the first column overall, 0 where equal; labels: (models,
    problems, pairs), 1, 0 or -1; chances: (models, problems, pairs, 3), exact chances of win, tie and loss.
    """

    gaps: NDArray
    labels: NDArray
    chances: NDArray

    @property
    def untied(self) -> NDArray:
        """Chance that a pair is no tie, (models, problems, pairs)."""
        return self.chances[..., 0] + self.chances[..., 2]

    @property
    def exact(self) -> NDArray:
        """Exact chance that the first wins, ties left out, (models, problems, pairs)."""
        return self.chances[..., 0] / np.maximum(self.untied, 1e-12)

    def first(self, models: int) -> Truth:
        """What is known for the first few models."""
        return Truth(self.gaps, self.labels[:models], self.chances[:models])

    def ceiling(self, models: slice = slice(None)) -> float:
        """Share of untied labels that the best possible judge calls right: it names the likelier side each time."""
        return float(self.chances[models][..., ::2].max(-1).sum() / self.untied[models].sum())


def truth_of(quality: NDArray, sums: torch.Tensor, juries: Sequence[Panel]) -> Truth:
    """What is known of all pairs of answers, columns overall and each dimension.

    quality: (problems, candidates, dimensions); sums: what each jury said, (juries, problems, candidates, dimensions).
    """
    first, second = pairs_of(quality.shape[1])
    gaps = quality[:, first] - quality[:, second]
    gaps = np.concatenate([gaps.sum(-1, keepdims=True), gaps], -1).round(9)
    chances = np.stack([jury.chances(quality[:, first], quality[:, second]) for jury in juries])
    return Truth(gaps, labels_of(sums), chances)


@dataclass(frozen=True)
class Grade:
    """How a judge does: {measure: (top, bottom)}, each (models, problems), whose sums' ratio is the measure; guess and
    spread, (models, problems, pairs): its chances that the first wins, and its spread, after `stretch`."""

    sums: dict[str, tuple[NDArray, NDArray]]
    guess: NDArray
    spread: NDArray

    def score(self, measure: str, models: slice = slice(None), *, less: Grade | None = None, **options) -> Measured:
        """A measure in points, "nats" in nats, or its difference from another judge's, over some models (`crossed`)."""
        scale, unit = (1, "nats") if measure == "nats" else (100, "points")
        top, bottom = (x[models] for x in self.sums[measure])
        top = scale * (top - (0 if less is None else less.sums[measure][0][models]))
        return crossed(top, bottom, **({"unit": unit, "tolerance": 0.3} | options))


def binned(x: NDArray, bins: int, **columns: NDArray) -> pd.DataFrame:
    """Means of the columns (and of x, as column "x") in `bins` equal ranges of x; empty ranges are left out."""
    table = pd.DataFrame({"x": x} | columns)
    return table.groupby(pd.cut(table.x, bins, labels=False)).mean()


def grade(
    delta: NDArray, spread: NDArray, truth: Truth, past: Sequence[NDArray], chance: Chance, names: Sequence[str]
) -> Grade:
    """Grade a judge on all pairs of several problems.

    delta: (models, problems, pairs, columns), its differences of scores; spread: (models, problems, pairs), of the
    first column; past: delta of the first column, spread and labels of validation problems, where the stretch and the
    threshold for ties are chosen; chance(delta, spread): P(first wins); names: of the columns.
    Measures: the names (share of true orders found), "label" (of the panel's untied labels), "nats" (exact
    cross-entropy of its chances), "all K" (share of problems in which win, tie and loss are right for all pairs of the
    first K answers, K = 2, …).
    """
    fitted = [[x[m].ravel() for x in past] for m in range(len(delta))]
    factor = np.array([stretch(*three, chance) for three in fitted])[:, None, None]
    epsilon = np.array([tie_threshold(own, label)[0] for own, _, label in fitted])[:, None, None]
    guess = chances_of(delta[..., 0] * factor, spread * factor, chance).clip(1e-6, 1 - 1e-6)
    cost, side = -truth.exact * np.log(guess) - (1 - truth.exact) * np.log(1 - guess), np.sign(delta)
    found = {"label": ((side[..., 0] == truth.labels) & (truth.labels != 0), truth.labels != 0)}
    found["nats"] = truth.untied * cost, truth.untied
    for column, name in enumerate(names):
        gap = np.sign(truth.gaps[..., column])
        found[name] = (side[..., column] == gap) & (gap != 0), gap != 0
    right = called(delta[..., 0], epsilon) == truth.labels
    several = int((2 * right.shape[-1]) ** 0.5) + 1
    last = pairs_of(several)[1]
    for k in range(2, several + 1):
        found[f"all {k}"] = right[..., last < k].all(-1, keepdims=True), np.ones((1, 1))
    sums = {name: tuple(np.broadcast_to(x.sum(-1), right.shape[:2]) for x in both) for name, both in found.items()}
    return Grade(sums, guess, spread * factor)


def uncertainty(
    grades: Mapping[str, Grade], log_sigma: Mapping[str, NDArray], truth: Truth, models: slice
) -> pd.DataFrame:
    """What judges do with their uncertainty, columns panel, judge, x, y.

    log_sigma: {judge: (steps, models)}. Panels: "training", mean log sigma at about 100 steps; "doubt", the spread
    against the exact chance that the less likely side wins; "calibration", the exact chance against the predicted one.
    A judge without log_sigma is in the last alone.
    """
    tables, exact = [], truth.exact[models].ravel()
    for name, own in grades.items():
        guess, spread = own.guess[models].ravel(), own.spread[models].ravel()
        tables.append(binned(guess, 10, y=exact).assign(panel="calibration", judge=name))
        if name in log_sigma:
            tables.append(binned(np.minimum(exact, 1 - exact), 6, y=spread).assign(panel="doubt", judge=name))
            means = np.asarray(log_sigma[name])[:, models].mean(1)
            steps = pd.DataFrame({"x": np.arange(len(means)), "y": means})[:: 1 + len(means) // 100]
            tables.append(steps.assign(panel="training", judge=name))
    return pd.concat(tables, ignore_index=True)


# -- best of n --------------------------------------------------------------------------------------------------------


def largest_normal(n: int) -> float:
    """Mean of the largest of n independent standard normal numbers."""
    x = np.linspace(-12, 12, 20001)
    return float((n * x * stats.norm.pdf(x) * stats.norm.cdf(x) ** (n - 1)).sum() * (x[1] - x[0]))


def predicted_gain(reward: NDArray, quality: NDArray, n: int) -> NDArray:
    """Gain of best-of-n over one answer if reward and quality (…, pool) are jointly normal within a pool: shape (…).

    cov(reward, quality) / sd(reward) x largest_normal(n): the judge contributes one factor, and n another.
    """
    r, q = (x - x.mean(-1, keepdims=True) for x in (reward, quality))
    below = np.sqrt((r**2).sum(-1) * (r.shape[-1] - 1))
    return np.divide((r * q).sum(-1), below, out=np.zeros(below.shape), where=below > 0) * largest_normal(n)


def best_of(rewards: Mapping[str, NDArray], quality: NDArray, sizes: Sequence[int]) -> tuple[pd.DataFrame, dict]:
    """Gain of best-of-n over one answer, over all subsets of n of a pool, by judge and n.

    rewards: {judge: (seeds, problems, pool), or flat}; quality: (problems, pool); sizes: the n. Returns a table
    (judge, n, value, low, high, predicted by `predicted_gain`), and the gains {(judge, n): (seeds, problems)}.
    """
    rows, gains = [], {}
    rewards = {name: np.reshape(reward, (-1, *quality.shape)) for name, reward in rewards.items()}
    for (name, reward), n in product(rewards.items(), sizes):
        found = [[pools.expected_best(q, r, n) for q, r in zip(quality, own, strict=True)] for own in reward]
        gains[name, n] = np.array(found) - quality.mean(1)
        m, hoped = crossed(gains[name, n]), predicted_gain(reward, quality, n).mean()
        rows.append({"judge": name, "n": n, "value": m.value, "low": m.low, "high": m.high, "predicted": hoped})
    return pd.DataFrame(rows), gains
