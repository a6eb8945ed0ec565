"""What a pool of answers is worth: estimates over all smaller pools that it allows, intervals over questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from workbook import measure
from workbook.study import Measured


@dataclass(frozen=True)
class Pool:
    """What a selection rule may look at; a rule is a function of it that returns the place of one candidate.

    All arrays share their leading axes (none for one pool); N candidates, M answers that are evidence only.
    """

    logprob: NDArray | None = None  # (..., N) log-probability of the whole answer
    tokens: NDArray | None = None  # (..., N) tokens in it
    reward: NDArray | None = None  # (..., N) what a judge says of it
    same: NDArray | None = None  # (..., N, N) whether two candidates agree
    utility: NDArray | None = None  # (..., N, N) how alike they are, 0 to 1
    cross: NDArray | None = None  # (..., N, M) how alike candidate and evidence are


def expected_best(values: ArrayLike, scores: ArrayLike, n: int) -> float:
    """Mean value of the best-scored of n answers, over all subsets of n of the pool: best-of-n without bias.

    values, scores: (pool,). The i-th best answer wins in C(pool - i, n - 1) of the C(pool, n) subsets; equal scores
    share their wins. ValueError unless 1 <= n <= pool.
    """
    values, scores = np.asarray(values, float), np.asarray(scores, float)
    if not 1 <= n <= len(values):
        raise ValueError(f"n = {n} of a pool of {len(values)}: 1 to {len(values)} allowed.")
    group = np.unique(scores, return_inverse=True)[1]  # 0 is the worst
    means = np.bincount(group, values) / np.bincount(group)
    below = np.concatenate([[0], np.bincount(group).cumsum()])
    wins = np.array([comb(int(k), n) for k in below], dtype=float) / comb(len(values), n)
    return float(np.diff(wins) @ means)


def expected_maximum(values: ArrayLike, n: int) -> float:
    """Mean of the largest of n values, over all subsets: of 0s and 1s it is the coverage (pass@n)."""
    return expected_best(values, values, n)


def expected_minimum(values: ArrayLike, n: int) -> float:
    """Mean of the smallest of n values, over all subsets of the pool."""
    return -expected_maximum(-np.asarray(values, float), n)


def expected_majority(
    groups: ArrayLike, values: ArrayLike, n: int, *, most: int = 2000, seed: int | Sequence[int] = 0
) -> float:
    """Mean value of a largest group among n answers, equally large ones sharing, over subsets of n of the pool.

    groups: (pool,), equal entries agree; values: (pool,), of each answer. All subsets if at most `most`, else `most`
    random ones, which leaves the estimate unbiased. ValueError unless 1 <= n <= pool.
    """
    groups, values = np.unique(np.asarray(groups), return_inverse=True)[1], np.asarray(values, float)
    pool, rng = len(groups), np.random.default_rng(seed)
    if not 1 <= n <= pool:
        raise ValueError(f"n = {n} of a pool of {pool}: 1 to {pool} allowed.")
    every = comb(pool, n) <= most
    picks = combinations(range(pool), n) if every else (rng.permutation(pool)[:n] for _ in range(most))
    picks = np.array(list(picks))
    size = (groups[picks][:, :, None] == groups[picks][:, None, :]).sum(-1)  # of the group of each answer
    weight = (size == size.max(1, keepdims=True)) / size  # so that each largest group weighs 1
    return float(((weight * values[picks]).sum(1) / weight.sum(1)).mean())


# -- over questions ---------------------------------------------------------------------------------------------------


def by_question(rows: pd.DataFrame, value: str = "right") -> pd.Series:
    """Mean of a column for each question (columns task, item): one question counts once, in all its languages."""
    return rows.groupby(["task", "item"])[value].mean()


def estimate(values: pd.Series, other: pd.Series | float = 0.0, **options) -> Measured:
    """Mean over questions, in percent, with its bootstrap interval: of `values`, less `other` question by question.

    values, other: results of `by_question`; questions that only one of them has are left out.
    """
    return measure.bootstrap(100 * (values - other).dropna(), **({"unit": "points", "tolerance": 0.5} | options))


def summary(
    rows: pd.DataFrame,
    by: Sequence[str],
    statistic: Callable[[pd.DataFrame], Measured] = lambda part: estimate(by_question(part)),
    *,
    also: Sequence[str] = (),
) -> pd.DataFrame:
    """One row a group of `rows`: columns `by`, value, low, high of the statistic, and means of the columns `also`."""
    found = [(key, statistic(part), part[list(also)].mean()) for key, part in rows.groupby(list(by))]
    table = [(*key, m.value, m.low, m.high, *means) for key, m, means in found]
    return pd.DataFrame(table, columns=[*by, "value", "low", "high", *also])
