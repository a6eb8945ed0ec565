"""Annotators who score what they see: what they say, the exact law of what they say, and who agrees with them best."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

POINTS = 4  # scores are 1, 2, 3, 4


def scores(quality: NDArray, bias: ArrayLike, noise: float, rng: np.random.Generator) -> NDArray:
    """Scores 1 to 4 that each annotator gives to answers of quality (…, dimensions) in [0, 1]: int (annotators, …).

    A score is 1 + 3 quality + the annotator's bias + noise x a normal number, rounded, cut at 1 and 4. bias:
    (annotators,), positive where someone is mild.
    """
    bias = np.reshape(bias, (-1, *[1] * quality.ndim))
    heard = 1 + (POINTS - 1) * quality + bias + noise * rng.standard_normal((len(bias), *quality.shape))
    return np.clip(np.round(heard), 1, POINTS).astype(int)


def law(quality: NDArray, bias: ArrayLike, noise: float) -> NDArray:
    """Law of the sum of all scores, over annotators and dimensions, of answers of quality (n, dimensions).

    Shape (n, 3 m + 1) for the sums m, …, 4 m of m = annotators x dimensions scores.
    """
    middle = 1 + (POINTS - 1) * quality[..., None] + np.asarray(bias)  # (n, dimensions, annotators)
    below = stats.norm.cdf((np.arange(1, POINTS) + 0.5 - middle[..., None]) / noise)
    chances = np.diff(below, axis=-1, prepend=0.0, append=1.0).reshape(len(quality), -1, POINTS)
    found = np.ones((len(quality), 1))
    for chance in np.moveaxis(chances, 1, 0):
        wider = np.zeros((len(found), found.shape[1] + POINTS - 1))
        for more in range(POINTS):
            wider[:, more : more + found.shape[1]] += found * chance[:, more : more + 1]
        found = wider
    return found


def win_chances(one: NDArray, other: NDArray) -> NDArray:
    """Chances that the first answer gets the larger, an equal or the smaller sum: (…, 3), from two laws (…, sums)."""
    under = np.cumsum(other, -1) - other
    wins, equal = (one * under).sum(-1), (one * other).sum(-1)
    return np.stack([wins, equal, 1 - wins - equal], -1)


@dataclass(frozen=True)
class Panel:
    """Annotators of equal noise, each mild or strict by a constant of their own (spread 0.3), all set by the seed."""

    noise: float
    seed: int
    annotators: int = 3

    @property
    def bias(self) -> NDArray:
        """What each annotator adds to a score."""
        return np.random.default_rng([self.seed, 77]).normal(0, 0.3, self.annotators)

    def sums(self, quality: NDArray, number: int) -> NDArray:
        """Sums over annotators of the scores of answers of quality (…, dimensions); number: which round of work."""
        rng = np.random.default_rng([self.seed, int(1000 * self.noise), number])
        return scores(quality, self.bias, self.noise, rng).sum(0)

    def chances(self, one: NDArray, other: NDArray) -> NDArray:
        """Exact chances of win, tie and loss (…, 3) for the overall sums of answers of quality (…, dimensions)."""
        laws = (law(x.reshape(-1, x.shape[-1]), self.bias, self.noise) for x in (one, other))
        return win_chances(*laws).reshape(*one.shape[:-1], 3)
